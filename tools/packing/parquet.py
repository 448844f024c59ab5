"""Images in Parquet files, as Hugging Face distributes data sets: a row holds the bytes of an
image file, and its label.

A file is read row group by row group, and a row group page by page: threads take its rows from one
`_Group`, so that each page is decompressed once, whatever a batch is.
"""

import json
import threading
from array import array
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.errors import BadImage, UserError, one_line
from pipeline.images import Limits
from tools.packing import archives
from tools.packing.lists import ranked
from tools.packing.places import Place, open_blob
from tools.packing.shards import add_shards, find_shards
from tools.packing.sources import Source

if TYPE_CHECKING:
    from pyarrow import Schema
    from pyarrow.parquet import ParquetFile

SUFFIX = ".parquet"
MAX_FOOTER = 256 << 20
"""Bytes of a string or a list in a file's description of itself."""
_BUFFER = 1 << 20  # bytes of a column that are read ahead
_ROWS = 8  # that are decoded at once
_WAITING = 64 << 20
"""Bytes of rows that were passed by and are kept for another thread, in a row group. Rows beyond
are read again."""
_GROUPS = 64  # that are open at once
_BYTES = ("image", "img", "jpg", "jpeg", "png", "webp", "bytes", "image_bytes", "content")
_ERRORS = (  # of pyarrow, on damaged files
    OSError, ValueError, KeyError, TypeError, IndexError, NotImplementedError, MemoryError,
)  # fmt: skip
_LABELS = ("label", "labels", "fine_label", "cls", "class", "target")


def parquet(root: Place, image: str | None = None, label: str | None = None) -> Source:
    """Parquet files of Hugging Face's layout: rows of image: {bytes, path} and label.

    ROOT is a file, a folder of shards, a folder datasets--ORG--NAME of Hugging Face's cache, or a
    pattern such as 'DIR/train-*.parquet'. The images have the order of the shards' names and of
    their rows. Class names are those in the file. `image` and `label` name the columns, where the
    usual names are not theirs.
    """
    base, pattern = find_shards(root, SUFFIX)
    source = Source(base)
    first: _Columns | None = None
    texts: list[str] = []

    def add(path: Place, name: str) -> None:
        nonlocal first
        try:
            table = Table(path, image, label, first)
            if first is None:
                first = table.columns
                source.classes = first.classes
                source.labels = array("q") if first.label else None
                source.left.update(first.unread)
                if source.labels is not None:  # of shards that could not be read
                    source.labels.extend([-1] * len(source))
            _add_table(source, table, name, texts)
        except BadImage as error:
            source.add_fault(name, str(error))
            if source.labels is not None:
                source.labels.append(-1)
        texts.extend([""] * (len(source) - len(texts)))  # of what has no name

    add_shards(source, pattern, SUFFIX, add)
    if any(texts):
        source.labels, source.classes = ranked(str(root), texts)
    return source


@dataclass(frozen=True)
class _Columns:
    """The columns of a table, by their paths in the schema."""

    image: str
    """Of the bytes of an image."""
    path: str | None
    """Of the name that the image's file had."""
    label: str | None
    as_text: bool
    """Whether labels are the names of classes."""
    classes: list[str] | None
    unread: tuple[str, ...]
    """Those that look like labels, if none is read: what they are."""


class Table:
    """A Parquet file as a container; an image's offset is the number of its row.

    `image` and `label` name columns; None: they are found. Raises BadImage if it cannot be read, or
    if its columns are not those of the `first` table; UserError if they are not found.
    """

    def __init__(
        self,
        path: Place,
        image: str | None,
        label: str | None,
        first: _Columns | None,
    ) -> None:
        self._path = path
        with self._file() as file:
            self._metadata = file.metadata
            schema = file.schema_arrow
        try:
            self.columns = _columns(str(path), schema, image, label)
        except UserError as error:
            if first is None:
                raise
            raise BadImage(str(error).removeprefix(f"{path}: ")) from None
        if first not in (None, self.columns):
            raise BadImage("has other columns or class names than the first shard")
        groups = range(self._metadata.num_row_groups)
        self._starts = [0]
        for group in groups:
            self._starts.append(self._starts[-1] + self._metadata.row_group(group).num_rows)
        if self._starts[-1] > archives.MAX_FILES:
            raise UserError(f"{path}: more than {archives.MAX_FILES:,} rows")
        self._expected: list[int] | None = None
        self._groups: OrderedDict[int, _Group] = OrderedDict()
        self._lock = threading.Lock()

    def __str__(self) -> str:
        return str(self._path)

    def __len__(self) -> int:
        return self._starts[-1]

    def open(self) -> "Table":
        """All threads read the same table."""
        return self

    def close(self) -> None:
        """The row groups close when they have been read."""

    def expect(self, offsets: Iterable[int]) -> None:
        """Other rows are not kept for later, and those after the last are not read."""
        self._expected = sorted(offsets)

    def facts(self) -> Iterator[tuple[str | None, Any]]:
        """Of each row: the path, and the label; None where it has none. Raises BadImage."""
        columns = [self.columns.path, self.columns.label]
        wanted = [column for column in columns if column]
        with self._file() as file:
            for batch in (
                file.iter_batches(1024, columns=wanted, use_threads=False) if wanted else ()
            ):
                path, label = (_leaf(batch, column) for column in columns)
                none = [None] * len(batch)
                yield from zip(path or none, label or none, strict=True)
        if not wanted:
            yield from ((None, None) for _ in range(len(self)))

    def read(self, offset: int, size: int, crc: int, limits: Limits) -> bytes:
        """The image in row `offset`. Raises BadImage."""
        with self._lock:
            number = bisect_right(self._starts, offset) - 1
            group = self._groups.pop(number, None) or self._group(number)
            self._groups[number] = group
            if len(self._groups) > _GROUPS:
                self._groups.popitem(last=False)
        data = group.take(offset)
        if group.done:
            with self._lock:
                self._groups.pop(number, None)
        if data is None:
            raise BadImage("no image: the row is null, or holds only a path")
        limits.check_bytes(len(data))
        return data

    def _group(self, number: int) -> "_Group":
        def values() -> Iterator[Any]:
            with self._file(self._metadata) as file:
                column = self.columns.image
                for batch in file.iter_batches(_ROWS, [number], [column], use_threads=False):
                    yield from _leaf(batch, column, as_buffers=True) or ()

        rows = range(self._starts[number], self._starts[number + 1])
        expected: Sequence[int] = rows
        if self._expected is not None:
            first, last = (bisect_left(self._expected, row) for row in (rows.start, rows.stop))
            expected = self._expected[first:last] or rows
        return _Group(rows.start, expected, values)

    @contextmanager
    def _file(self, metadata: Any = None) -> "Iterator[ParquetFile]":
        try:
            from pyarrow.parquet import ParquetFile
        except ImportError:
            raise UserError("parquet needs pyarrow: pip install slotstream[parquet]") from None
        with _readable(), open_blob(self._path) as blob:
            yield ParquetFile(
                blob,
                metadata=metadata,
                buffer_size=_BUFFER,
                pre_buffer=False,
                page_checksum_verification=True,
                thrift_string_size_limit=MAX_FOOTER,
                thrift_container_size_limit=MAX_FOOTER,
            )


class _Group:
    """The rows of a row group, which several threads read about in order."""

    def __init__(
        self,
        start: int,
        expected: Sequence[int],
        values: Callable[[], Iterator[Any]],
    ) -> None:
        self._start, self._stop, self._values = start, expected[-1] + 1, values
        self._expected = expected if isinstance(expected, range) else frozenset(expected)
        self._lock = threading.Lock()
        self._next, self._seen = start, start
        self._iterator = values()
        self._waiting: dict[int, Any] = {}
        self._bytes = 0

    @property
    def done(self) -> bool:
        """Whether all rows that are expected have been taken."""
        return self._next >= self._stop and not self._waiting

    def take(self, row: int) -> bytes | None:
        """The value of `row`. Raises BadImage."""
        with self._lock:
            if row in self._waiting:
                value = self._waiting.pop(row)
                self._bytes -= len(value or b"")
                return value
            if row < self._next:
                self._next, self._iterator = self._start, self._values()
            while self._next <= row:
                value = self._advance(row)
            return None if value is None else bytes(value)

    def _advance(self, row: int) -> Any:
        """The next value. It is kept if it was not seen before `row`."""
        try:
            value = next(self._iterator)
        except StopIteration:
            raise BadImage("the file holds fewer rows than it says") from None
        number, self._next = self._next, self._next + 1
        if number >= self._seen:
            self._seen = self._next
            if number != row and number in self._expected:
                self._waiting[number] = None if value is None else bytes(value)
                self._bytes += len(value or b"")
                while self._bytes > _WAITING:
                    oldest = next(iter(self._waiting))
                    self._bytes -= len(self._waiting.pop(oldest) or b"")
        return value


@contextmanager
def _readable() -> Iterator[None]:
    """Turns an error of pyarrow into a BadImage."""
    try:
        yield
    except (UserError, BadImage):
        raise
    except _ERRORS as error:
        reason = getattr(error, "strerror", None) or one_line(str(error))[:200]
        raise BadImage(f"cannot be read as Parquet: {reason}") from error


def _add_table(source: Source, table: Table, name: str, texts: list[str]) -> None:
    """Add the rows of a table, and to `texts` the labels that are names. Raises BadImage, and adds
    none, if one cannot be read.
    """
    names: list[str] = []
    labels: list[Any] = []
    for row, (path, label) in enumerate(table.facts()):
        last = (path or "").replace("\\", "/").rsplit("/", 1)[-1][-150:]
        names.append(f"{name}/{row}-{last}" if last else f"{name}/{row}.jpg")
        labels.append(label)
    if len(names) != len(table):
        raise BadImage("the file holds fewer rows than it says")
    if table.columns.as_text:
        if "" in (missing := [label or "" for label in labels]):
            raise BadImage(f"row {missing.index('')}: no label")
        texts.extend(map(str, labels))
        labels = [-1] * len(labels)  # until all names are known
    if source.labels is not None:
        source.labels.extend(list(_checked(labels, table.columns.classes)))
    source.add_rows(table, names)


def _checked(labels: list[int | None], classes: list[str] | None) -> Iterator[int]:
    """Raises BadImage if a row has no label, or one that cannot be. Hugging Face writes -1 for an
    image of a class that is not told, as in test splits.
    """
    low, high = (-1, len(classes) - 1) if classes else (-(1 << 63), (1 << 63) - 1)
    for row, label in enumerate(labels):
        if label is None:
            raise BadImage(f"row {row}: no label")
        if not low <= label <= high:
            raise BadImage(f"row {row}: label {label}; expected {low} to {high}")
        yield label


def _columns(path: str, schema: "Schema", image: str | None, label: str | None) -> _Columns:
    """The columns of images and labels. Raises UserError."""
    import pyarrow.types as kinds

    def is_bytes(kind: Any) -> Any:
        return kind and (kinds.is_binary(kind) or kinds.is_large_binary(kind))

    def is_text(kind: Any) -> Any:
        if kind and kinds.is_dictionary(kind):  # a categorical column of a data frame
            kind = kind.value_type
        return kind and (kinds.is_string(kind) or kinds.is_large_string(kind))

    leaves: dict[str, tuple[str, str | None]] = {}
    for field in schema:
        if is_bytes(field.type):
            leaves[field.name] = field.name, None
        elif kinds.is_struct(field.type):
            inner = {child.name: child.type for child in field.type}
            if is_bytes(inner.get("bytes")):
                leaves[field.name] = (
                    f"{field.name}.bytes",
                    f"{field.name}.path" if is_text(inner.get("path")) else None,
                )
    features = _features(schema)
    marked = [name for name in leaves if features.get(name, {}).get("_type") == "Image"]
    usual = [name for name in _BYTES if name in leaves][:1]
    structs = [name for name, (leaf, _) in leaves.items() if leaf != name]
    found = [image] if image else marked or structs or usual
    shown = ", ".join(f"{field.name}: {one_line(str(field.type))[:60]}" for field in schema)
    if len(found) != 1 or found[0] not in leaves:
        what = f"no column {image} of images" if image else "no column of images"
        if len(found) > 1:
            what = f"several columns of images: choose one with --image, {' or '.join(found)}"
        raise UserError(f"{path}: {what}; expected image: {{bytes, path}}; its columns are {shown}")
    numbers = [field.name for field in schema if kinds.is_integer(field.type)]
    named = [field.name for field in schema if is_text(field.type)]
    if label and label not in (*numbers, *named):
        raise UserError(
            f"{path}: no column {label} of whole numbers or names; its columns are {shown}"
        )
    classes = [name for name in numbers if features.get(name, {}).get("_type") == "ClassLabel"]
    usual = [name for name in _LABELS if name in numbers]
    usual = usual or [name for name in _LABELS if name in named]
    chosen = label or next(iter(classes if len(classes) == 1 else usual), None)
    names = features.get(chosen or "", {}).get("names")
    known = isinstance(names, list) and all(isinstance(one, str) for one in names)
    unread = () if chosen else _unread(schema, classes)
    as_text = chosen in named
    return _Columns(*leaves[found[0]], chosen, as_text, names if known else None, unread)


def _unread(schema: "Schema", classes: list[str]) -> tuple[str, ...]:
    """The columns that look like labels: several of `classes`, or one of another type."""
    if classes:
        return (f"choice of labels ({' or '.join(classes)}: see --label)",)
    others = [field for field in schema if field.name in _LABELS]
    return tuple(
        f"column {one.name} ({one_line(str(one.type))[:60]}: labels are whole numbers or names)"
        for one in others
    )


def _features(schema: "Schema") -> dict[str, Any]:
    """Hugging Face's description of the columns; empty if there is none."""
    try:
        described = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = described["info"]["features"]
        return {name: one for name, one in features.items() if isinstance(one, dict)}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def _leaf(batch: Any, column: str | None, as_buffers: bool = False) -> list[Any] | None:
    """The values of a column, or of the field of a struct; None without a column."""
    if not column:
        return None
    name, _, inner = column.rpartition(".")
    found = batch.column(name or inner)
    if name:
        found = found.flatten()[[child.name for child in found.type].index(inner)]
    return [value.as_buffer() for value in found] if as_buffers else found.to_pylist()
