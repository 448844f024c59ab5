"""The lines of text files as people save them: UTF-8, other bytes kept, or UTF-16."""

import io
from collections.abc import Iterator
from pathlib import Path

from pipeline.errors import UserError, printable
from pipeline.files import encoding_of, open_file
from pipeline.folders import as_url

MAX_LINE = 1 << 16
"""Characters. A path has at most 4,096 bytes; a longer line is another kind of file."""

KINDS = {
    b"PAR1": "a Parquet file", b"ARROW1": "an Arrow file", b"\x1f\x8b": "a gzip file",
    b"PK\3\4": "a zip file (or a workbook)", b"SQLite format 3": "an SQLite database",
    b"\x89HDF": "an HDF5 file", b"\x93NUMPY": "a NumPy array", b"\x80\4": "a pickle",
    b"\x89PNG": "an image", b"\xff\xd8\xff": "an image", b"%PDF": "a PDF", b"BZh": "a bzip2 file",
    b"\x28\xb5\x2f\xfd": "a Zstandard file", b"\xd0\xcf\x11\xe0": "a workbook",
}  # fmt: skip
"""Of files that are given as lists, by their first bytes."""


def text_lines(path: Path, expected: str = "expected a text file") -> Iterator[str]:
    """The lines of a text file with their line ends. The file is UTF-8, and invalid bytes are kept,
    as in the names of files; or UTF-16 with a byte order mark, as PowerShell writes by default.

    Raises UserError, also for a file that is no text; the message says what was `expected`.
    """
    name = printable(as_url(str(path)) or str(path))
    try:
        with open_file(path, pipes=True) as file:
            head = file.peek(16)[:16]
            if kind := next((KINDS[magic] for magic in KINDS if head.startswith(magic)), ""):
                raise UserError(f"{name}: {kind}; {expected}")
            encoding = encoding_of(head)
            errors = "strict" if encoding == "utf-16" else "surrogateescape"
            text = io.TextIOWrapper(file, encoding, errors, newline="")
            for number, line in enumerate(iter(lambda: text.readline(MAX_LINE + 1), ""), 1):
                if "\0" in line:
                    raise UserError(f"{name}: line {number}: a NUL byte; save it as UTF-8 text")
                if len(line) > MAX_LINE:
                    raise UserError(f"{name}: line {number}: more than {MAX_LINE:,} characters")
                yield line
    except OSError as error:
        raise UserError(f"{name}: {error.strerror or error}") from error
    except UnicodeError as error:
        raise UserError(f"{name}: damaged UTF-16 text: {error}") from error
