"""How mistakes of the user are reported."""

import errno
import os
import stat
from pathlib import Path


class UserError(ValueError):
    """Bad input: a command prints it as one line and exits with 2, without a traceback."""


def require(holds: bool, name: str, value: object, meaning: str) -> None:
    """Refuse a setting with a ValueError that names it."""
    if not holds:
        raise ValueError(f"{name} must be {meaning}, not {value!r}")


def printable(name: str) -> str:
    """A file's name for a message, escaped if it would break the line or its encoding."""
    return name if name.isprintable() else ascii(name)


def check_regular(path: Path) -> None:
    """Check an input before it is opened: to open a pipe waits for its writer, perhaps for ever,
    and a device may never end.

    Raises UserError if `path` is no regular file, OSError if there is none.
    """
    mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        raise UserError(f"{path}: a pipe, socket or device, not a regular file")
