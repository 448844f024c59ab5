"""A source from a list of files: a path on each line, or CSV with path and label."""

import codecs
import csv
import io
import os
import re
from array import array
from collections.abc import Iterator
from pathlib import Path

from pipeline.errors import UserError
from tools.packing.files import bounded, require_root
from tools.packing.sources import Source, mark_duplicates

MAX_LINE = 1 << 16
"""Characters. A path has at most 4,096 bytes; a longer line is another kind of file."""


def listed(path: Path, root: Path | None = None) -> Source:
    """The files in a list, in its order: a path on each line, or CSV with path and label.

    Paths are relative to `root`, by default the list's folder. If all labels are whole numbers,
    they are kept. Else they are class names, and the label is the rank of the name.
    """
    rows = list(bounded(_rows(path), path))
    if not rows:
        raise UserError(f"{path}: names no files")
    if root:
        require_root(root)
    source = Source(root or path.parent)
    source.add_files(os.path.normpath(name) for name, _ in rows)
    labels = [label for _, label in rows if label is not None]
    if labels and len(labels) < len(rows):
        raise UserError(f"{path}: {len(rows) - len(labels):,} of {len(rows):,} rows have no label")
    if labels:
        source.labels, source.classes = _ranked(path, labels)
    top = str(source.root.absolute())
    join = os.path.join  # a Path takes ten times as long
    return mark_duplicates(source, lambda name: os.path.normpath(join(top, name)))


def _rows(path: Path) -> Iterator[tuple[str, str | None]]:
    """Path and label of each line; None without a label."""
    if path.suffix.lower() not in (".csv", ".tsv"):
        yield from ((line.rstrip("\r\n"), None) for line in _lines(path) if line.strip())
        return
    for number, (line, row) in enumerate(_table(path)):
        if number == 0 and row[0].strip().lower() in _HEADINGS:
            continue
        if not row[0] or len(row) > 2:
            raise UserError(f"{path}: line {line}: expected path or path,label")
        label = row[1].strip() if len(row) == 2 else None
        if label == "":
            raise UserError(f"{path}: line {line}: an empty label")
        yield row[0], label


def _table(path: Path) -> Iterator[tuple[int, list[str]]]:
    """The number and the cells of each line that is not empty. A quoted line feed ends no line."""
    length = 0

    def lines() -> Iterator[str]:
        nonlocal length
        for line in _lines(path):
            if (length := length + len(line)) > MAX_LINE:
                raise UserError(f"{path}: line {table.line_num}: more than {MAX_LINE:,} characters")
            yield line

    table = csv.reader(lines(), delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
    try:
        for row in table:
            length = 0
            if row:
                yield table.line_num, row
    except csv.Error as error:
        raise UserError(f"{path}: line {table.line_num}: {error}") from error


def _lines(path: Path) -> Iterator[str]:
    """The lines of a text file with their line ends. The file is UTF-8, and invalid bytes are kept;
    or UTF-16 with a byte order mark, as PowerShell writes by default.
    """
    try:
        # Without O_NONBLOCK a pipe that no program writes to would block for ever.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        os.set_blocking(descriptor, True)
        with os.fdopen(descriptor, "rb") as file:
            wide = file.peek(2)[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
            encoding, errors = ("utf-16", "strict") if wide else ("utf-8-sig", "surrogateescape")
            text = io.TextIOWrapper(file, encoding, errors, newline="")
            for number, line in enumerate(iter(lambda: text.readline(MAX_LINE + 1), ""), 1):
                if "\0" in line:
                    raise UserError(f"{path}: line {number}: a NUL byte; save it as UTF-8 text")
                if len(line) > MAX_LINE:
                    raise UserError(f"{path}: line {number}: more than {MAX_LINE:,} characters")
                yield line
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error
    except UnicodeError as error:
        raise UserError(f"{path}: damaged UTF-16 text: {error}") from error


_HEADINGS = ("path", "file", "filename", "file_name", "image", "name")
_NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[-+]?[0-9]+)?", re.IGNORECASE)


def _ranked(path: Path, labels: list[str]) -> tuple[array, list[str] | None]:
    """Labels and class names: whole numbers unchanged, or the rank of each name.

    Refuses numbers that cannot be stored. As names they would be renumbered, "10" before "2".
    """
    odd = next((label for label in labels if _whole(label) is None), None)
    if odd is None:
        return array("q", map(int, labels)), None
    classes = sorted(set(labels))
    if all(_NUMBER.fullmatch(name) for name in classes):
        raise UserError(f"{path}: label {odd}: numbers must be whole and fit 64 bits")
    rank = {name: label for label, name in enumerate(classes)}
    return array("q", (rank[label] for label in labels)), classes


def _whole(label: str) -> int | None:
    """The value of a label; None if it is not a whole number of 64 bits."""
    value = int(label) if re.fullmatch(r"-?[0-9]{1,30}", label) else 1 << 63
    return value if -(1 << 63) <= value < 1 << 63 else None
