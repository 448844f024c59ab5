"""How mistakes of the user are reported, and texts of others shown."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

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


@contextmanager
def about(what: object) -> Iterator[None]:
    """Turns a ValueError inside, which does not know what it is about, into a UserError that begins
    with `what`. A UserError inside says that already, and stays as it is.
    """
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{what}: {error}") from None


def require(holds: bool, name: str, value: object, meaning: str) -> None:
    """Refuse a setting with a ValueError that names it, and shows how its value begins."""
    if not holds:
        shown = repr(value)
        shown = shown if len(shown) <= 100 else f"{shown[:100]}…"
        raise ValueError(f"{name} must be {meaning}, not {shown}")


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
