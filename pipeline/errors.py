"""How a mistake of the user's is reported."""

import sys
from collections.abc import Callable


class UserError(ValueError):
    """Bad input: a command prints it as one line and exits with 2, without a traceback."""


def require(holds: bool, name: str, value: object, meaning: str) -> None:
    """Refuse a setting with a ValueError that names it."""
    if not holds:
        raise ValueError(f"{name} must be {meaning}, not {value!r}")


def printable(name: str) -> str:
    """A file's name for a message: as it is, or escaped where it would break the line or its
    encoding.
    """
    return name if name.isprintable() else ascii(name)


def run(main: Callable[[], None]) -> None:
    """Call a command's `main`; a `UserError` becomes one line on stderr and exit code 2."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        sys.exit(130)
