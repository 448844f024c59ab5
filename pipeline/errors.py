"""How mistakes of the user are reported."""


class UserError(ValueError):
    """Bad input: a command prints it as one line and exits with 2, without a traceback."""


def require(holds: bool, name: str, value: object, meaning: str) -> None:
    """Refuse a setting with a ValueError that names it."""
    if not holds:
        raise ValueError(f"{name} must be {meaning}, not {value!r}")


def printable(name: str) -> str:
    """A file's name for a message, escaped if it would break the line or its encoding."""
    return name if name.isprintable() else ascii(name)


class BadImage(ValueError):
    """A file that is no picture, or a damaged one. The message says why, without its name."""
