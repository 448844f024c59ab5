"""How mistakes of the user are reported, and texts of others shown."""

import re
from collections.abc import Sequence

_CONTROLS = {
    code: f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
    for code in (
        *range(32), *range(127, 160),  # a terminal obeys them
        *range(0x2028, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F, 0x061C,  # lines, directions
    )
} | {ord("\n"): "\\n", ord("\r"): "\\r", ord("\t"): "\\t"}  # fmt: skip
_KEEP_LINES = {code: text for code, text in _CONTROLS.items() if chr(code) not in "\n\t"}


class UserError(ValueError):
    """Bad input: a command prints it as one line and exits with 2, without a traceback.

    `details` are lines of their own, for an error with several places.
    """

    def __init__(self, message: str, details: Sequence[str] = ()) -> None:
        super().__init__("\n  ".join([message, *details]))
        self.lines = [message, *details]


def require(holds: bool, name: str, value: object, meaning: str) -> None:
    """Refuse a setting with a ValueError that names it."""
    if not holds:
        raise ValueError(f"{name} must be {meaning}, not {value!r}")


def printable(name: str) -> str:
    """A file's name for a message, escaped if it would break the line or its encoding."""
    return name if name.isprintable() else ascii(name)


class BadImage(ValueError):
    """A file that is no picture, or a damaged one. The message says why, without its name."""


def one_line(text: str) -> str:
    """`text` with all control characters escaped, line breaks too."""
    return text.translate(_CONTROLS)


def in_markdown(text: str) -> str:
    """`text` for one line of Markdown. What is HTML or markup in it stays what it is to read, and
    does nothing on the page.
    """
    return _MARKUP.sub(lambda found: f"&#{ord(found[0])};", one_line(text))


_MARKUP = re.compile(r"[\\`*\[\]<>|!~&$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")
"""What Markdown or HTML gives a meaning; an underscore has none inside a word."""


def safe_lines(text: str) -> str:
    """`text` with all control characters escaped but line breaks and tabs: none of it moves the
    cursor of a terminal, changes its colours, or reverses the order of what it shows.
    """
    return text.translate(_KEEP_LINES)
