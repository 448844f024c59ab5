"""What all commands share: a parser, checks of output paths, one line for each error."""

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NoReturn

from pipeline.commands import as_called
from pipeline.errors import UserError, one_line, safe_lines
from pipeline.folders import refuse_url
from train.run.environment import check_before_import

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
        if path.exists() and not path.is_file():
            raise UserError(f"{option} {path}: is a pipe, socket or device")
        folder = next(folder for folder in path.absolute().parents if folder.exists())
        if not folder.is_dir():
            raise UserError(f"{option} {path}: {folder} is not a folder")
    except OSError as error:
        raise UserError(f"{option} {path}: {error.strerror}") from None
    if not os.access(folder, os.W_OK):
        raise UserError(f"{option} {path}: the folder {folder} is not writable")


def escape_output() -> None:
    """Make stdout and stderr escape what a terminal would obey: names and texts of files reach it
    through messages, tables, warnings and logs alike. Only a progress bar may return to the start
    of its line: on stderr, as the first character of what it writes.
    """
    for stream, bars in ((sys.stdout, False), (sys.stderr, True)):
        if "write" in vars(stream):  # twice in one process
            continue
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # not UTF-8
        stream.write = _escaping(stream.write, bars)  # type: ignore[method-assign]


def _escaping(write: Callable[[str], int], bars: bool) -> Callable[[str], int]:
    def escaped(text: str) -> int:
        start = "\r" if bars and text.startswith("\r") else ""
        write(start + safe_lines(text.removeprefix(start)))
        return len(text)

    return escaped


def print_error(message: str | UserError) -> None:
    """One line on stderr, and one for each of the details."""
    lines = message.lines if isinstance(message, UserError) else [message]
    print("error: " + as_called("\n  ".join(map(one_line, lines))), file=sys.stderr)


class CommandParser(argparse.ArgumentParser):
    """Prints each error as one line, keeps the line breaks of its help texts, and names itself as
    it was called. The beginning of an option's name is no option: it may be another one mistyped.
    """

    def __init__(self, **options: Any) -> None:
        kept = argparse.RawDescriptionHelpFormatter
        super().__init__(formatter_class=kept, allow_abbrev=False, **options)
        self.prog = as_called(self.prog)

    def format_help(self) -> str:
        return as_called(super().format_help())

    def parse_args(  # type: ignore[override]
        self, *arguments: Any, **options: Any
    ) -> argparse.Namespace:
        """As argparse's. A URL in place of any path ends the command."""
        parsed: argparse.Namespace = super().parse_args(*arguments, **options)
        for value in vars(parsed).values():
            for path in value if isinstance(value, list) else [value]:
                if isinstance(path, Path):
                    refuse_url(path)
        return parsed

    def error(self, message: str) -> NoReturn:
        if _from_python.get():
            raise UserError(message)
        print_error(f"{message} (see {self.prog} --help)")
        sys.exit(2)


_from_python: ContextVar[bool] = ContextVar("from_python", default=False)


@contextmanager
def as_function() -> Iterator[None]:
    """Inside its `with`, Python calls a command: a refused option is a UserError like any other
    bad input, and does not end the process.
    """
    token = _from_python.set(True)
    try:
        yield
    finally:
        _from_python.reset(token)


def run(main: Callable[[], None]) -> None:
    """Call a command's `main`. A `UserError`, or a file that cannot be read or written, becomes one
    line on stderr and exit code 2.
    """
    escape_output()
    try:
        check_before_import()
        main()
        sys.stdout.flush()
    except UserError as error:
        print_error(error)
        sys.exit(2)
    except BrokenPipeError:  # the reader of the output has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        print_error(f"{error.filename or 'system'}: {error.strerror or error}")
        sys.exit(2)
    except MemoryError as error:
        print_error(f"not enough memory: {error}")
        sys.exit(2)
    except KeyboardInterrupt:
        print_error("interrupted")
        sys.exit(130)
