"""Opening files that others made, and the encoding of texts."""

import codecs
import errno
import os
import stat
from contextlib import ExitStack
from io import BufferedReader
from pathlib import Path

_WIDE = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def open_file(path: str | Path, pipes: bool = False) -> BufferedReader:
    """A file, open to be read, without waiting: to open a pipe waits for its writer, perhaps for
    ever, and a device may never end.

    Args:
        pipes: also opens pipes and devices. A pipe without a writer is then empty.

    Raises:
        OSError: whose `strerror` says why, if the file cannot be opened or is not a regular one.
    """
    with ExitStack() as stack:
        file = stack.enter_context(open(path, "rb", opener=_open_at_once))
        if not (pipes or stat.S_ISREG(os.fstat(file.fileno()).st_mode)):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        os.set_blocking(file.fileno(), True)
        stack.pop_all()
    return file


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


def encoding_of(head: bytes) -> str:
    """The encoding of a text with these first bytes: UTF-8 with or without a byte order mark, or
    UTF-16 with one, as PowerShell writes by default.
    """
    return "utf-16" if head.startswith(_WIDE) else "utf-8-sig"
