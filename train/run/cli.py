"""What all commands share: a parser, checks of output paths, one line for each error."""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from pipeline.errors import UserError

_LONGEST_NAME = 255 - len(".partial.journal")  # Linux's limit, less our endings


def check_writable(option: str, path: Path, source: Path | None = None) -> None:
    """Check an output path before the work begins.

    Raises:
        UserError: if `path` is a folder, if its parent is no folder or not writable, or if it is
            the input file `source`.
    """
    try:
        if source and path.exists() and source.exists() and path.samefile(source):
            raise UserError(f"{option} {path}: is the file to read: give another name")
        if len(os.fsencode(path.name)) > _LONGEST_NAME:
            raise UserError(f"{option} {path}: the name is too long")
        if not path.name or path.is_dir():
            raise UserError(f"{option} {path}: is a folder")
        folder = next(folder for folder in path.absolute().parents if folder.exists())
        if not folder.is_dir():
            raise UserError(f"{option} {path}: {folder} is not a folder")
    except OSError as error:
        raise UserError(f"{option} {path}: {error.strerror}") from None
    if not os.access(folder, os.W_OK):
        raise UserError(f"{option} {path}: the folder {folder} is not writable")


_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(10), *range(11, 32), 127)}  # no line feed


class CommandParser(argparse.ArgumentParser):
    """Prints each error as one line, and keeps the line breaks of its help texts."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        print(f"error: {message} (see {self.prog} --help)", file=sys.stderr)
        sys.exit(2)


def run(main: Callable[[], None]) -> None:
    """Call a command's `main`. A `UserError`, or a file that cannot be read or written, becomes one
    line on stderr and exit code 2.
    """
    for stream in (sys.stdout, sys.stderr):  # a name that is not UTF-8 must not end the command
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        print("error: " + str(error).translate(_CONTROLS), file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # the reader of the output has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        print(f"error: {error.filename or 'system'}: {error.strerror or error}", file=sys.stderr)
        sys.exit(2)
    except MemoryError as error:
        print(f"error: not enough memory: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        sys.exit(130)
