"""A source from a list of files: a path on each line, or CSV with path and label."""

import csv
import os
import re
from array import array
from collections.abc import Iterator
from pathlib import Path

from pipeline.errors import UserError, printable
from pipeline.folders import as_url
from pipeline.formats import IMAGE_SUFFIXES
from pipeline.lines import MAX_LINE, text_lines
from tools.packing.files import bounded
from tools.packing.places import Place, require_root
from tools.packing.sources import Source, mark_duplicates

EXPECTED = "expected a path on each line, or .csv or .tsv of path or path,label"


def listed(path: Path, root: Place | None = None) -> Source:
    """The files in a list, in its order: a path on each line, or CSV with path and label.

    Paths are relative to `root`, by default the list's folder. If all labels are whole numbers,
    they are kept. Else they are class names, and the label is the rank of the name.
    """
    if root:
        require_root(root)
    where = root or path.parent
    source = Source(where)
    rows: list[tuple[str, str | None]] = []
    for line, name, label in bounded(_rows(path), path):
        odd = _is_odd(name, label) or not (rows or name.lower().endswith(IMAGE_SUFFIXES))
        if odd and not (isinstance(where, Path) and os.path.lexists(where / name)):
            raise UserError(f"{path}: line {line}: {_described(name, label)}")
        rows.append((name, label))
    if not rows:
        raise UserError(f"{path}: names no files")
    source.add_files(os.path.normpath(name) for name, _ in rows)
    labels = [label for _, label in rows if label is not None]
    if labels and len(labels) < len(rows):
        raise UserError(f"{path}: {len(rows) - len(labels):,} of {len(rows):,} rows have no label")
    if labels:
        source.labels, source.classes = ranked(str(path), labels)
    top = str(where.absolute()) if isinstance(where, Path) else ""
    join = os.path.join  # a Path takes ten times as long
    return mark_duplicates(source, lambda name: os.path.normpath(join(top, name)))


def _rows(path: Path) -> Iterator[tuple[int, str, str | None]]:
    """Number, path and label of each line; None without a label."""
    if path.suffix.lower() not in (".csv", ".tsv"):
        for line, text in enumerate(text_lines(path, EXPECTED), 1):
            if text.strip():
                yield line, text.rstrip("\r\n"), None
        return
    for number, (line, row) in enumerate(_table(path)):
        if number == 0 and _is_heading(path, row):
            continue
        if not row[0] or len(row) > 2:
            shown = printable(",".join(row)[:80])
            raise UserError(f"{path}: line {line}: expected path or path,label, found {shown}")
        label = row[1].strip() if len(row) == 2 else None
        if label == "":
            raise UserError(f"{path}: line {line}: an empty label")
        yield line, row[0], label


def _is_heading(path: Path, row: list[str]) -> bool:
    """Whether the first row names the columns. Raises UserError if these are other columns."""
    names = [cell.strip().lower() for cell in row]
    paths = [name in _HEADINGS for name in names]
    if paths[0] and len(row) <= 2 and not any(paths[1:]):
        return True
    if any(paths) or names[0] in _OF_URLS:
        shown = printable(",".join(row)[:80])
        raise UserError(
            f"{path}: line 1: its columns are {shown}: expected path or path,label, in this order"
        )
    return False


def _is_odd(name: str, label: str | None) -> bool:
    """Whether a row probably is no path, or no path and label."""
    if name.lower().endswith(IMAGE_SUFFIXES):  # the usual case
        return "://" in name
    return bool(
        _SECOND_COLUMN.search(name)
        or as_url(name)
        or name.lstrip()[:1] in ("{", "[")
        or (label or "").lower().endswith(IMAGE_SUFFIXES)
    )


def _described(name: str, label: str | None) -> str:
    """What an odd row is, and what was expected."""
    shown = printable(name[:80])
    if url := as_url(name):
        return f"{printable(url[:80])} is a URL: list paths below one --root, which may be a URL"
    if name.lstrip()[:1] in ("{", "["):
        return f"JSON, not a path: {EXPECTED}"
    if (label or "").lower().endswith(IMAGE_SUFFIXES):
        return f"{shown},{printable(label or '')}: a label and a path? Expected path,label"
    if _SECOND_COLUMN.search(name):
        return f"{shown}: a path and a label? {EXPECTED}"
    return f"there is no file {shown}: {EXPECTED}"


def _table(path: Path) -> Iterator[tuple[int, list[str]]]:
    """The number and the cells of each line that is not empty. A quoted line feed ends no line."""
    length = 0

    def lines() -> Iterator[str]:
        nonlocal length
        for line in text_lines(path, EXPECTED):
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


_HEADINGS = (
    *("path", "file", "filename", "file_name", "image", "name", "filepath", "file_path", "img"),
    *("image_path", "img_path", "image_name", "img_name", "imagepath", "fname", "images"),
)
_OF_URLS = ("url", "image_url", "img_url", "uri", "link")
_SECOND_COLUMN = re.compile(
    rf"({'|'.join(map(re.escape, IMAGE_SUFFIXES))})[\"']?[\s,;|]+[^\s/]+\s*$|^[^/]*[,;\t][^/]*$",
    re.IGNORECASE,
)
"""A path and something after it, or cells without a path."""
_NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[-+]?[0-9]+)?", re.IGNORECASE)


def ranked(path: str, labels: list[str]) -> tuple[array, list[str] | None]:
    """Labels and class names of `path`: whole numbers unchanged, or the rank of each name. An empty
    text, of an image that is a fault, is -1.

    Refuses numbers that cannot be stored. As names they would be renumbered, "10" before "2".
    """
    known = set(labels) - {""}
    odd = next((label for label in labels if label and _whole(label) is None), None)
    if odd is None:
        return array("q", (int(label or -1) for label in labels)), None
    classes = sorted(known)
    if all(_NUMBER.fullmatch(name) for name in classes):
        raise UserError(f"{path}: label {printable(odd)}: numbers must be whole and fit 64 bits")
    rank = {name: label for label, name in enumerate(classes)} | {"": -1}
    return array("q", (rank[label] for label in labels)), classes


def _whole(label: str) -> int | None:
    """The value of a label; None if it is not a whole number of 64 bits."""
    value = int(label) if re.fullmatch(r"-?[0-9]{1,30}", label) else 1 << 63
    return value if -(1 << 63) <= value < 1 << 63 else None
