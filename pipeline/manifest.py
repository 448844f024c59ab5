"""The manifest beside a beton, FILE.beton.json: the packed images, their sources, the options.

It is one JSON document with one record per line, so that 1.3 million records are written and read
as a stream:

    {"format": 3, "tool": …, "source": …, "options": …, "classes": …, "count": …, "digest": …,
     "skipped": [[name, reason], …],
     "records": [
    ["train2017/000000000009.jpg", 224297, "9f3a11c2", "original"],
    …
    ]}

A record: name, bytes stored, CRC-32 of the stored bytes as 8 hexadecimal digits, how it is stored:
"original", "scaled" or "converted: <reasons>", and, in a set with labels, its label. The digest is
the SHA-256 of the whole document with 64 zeros instead of the digest.
"""

import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple, Self

from pipeline.errors import UserError
from pipeline.ffcv_format import VERSION

FORMAT = 3
TOOL = "slotstream 0.1.0"
ORIGINAL, SCALED, CONVERTED = "original", "scaled", "converted: "

_DIGEST = b'"digest": "%b",\n'
_NO_DIGEST = "0" * 64
_RECORDS = b'"records": [\n'
_END = b"]}\n"


class Record(NamedTuple):
    """One record of the beton in the manifest."""

    name: str
    """The image's path below its source's root, with forward slashes; unique in a beton."""
    bytes: int
    crc32: str
    how: str
    label: int | None = None


@dataclass
class Manifest:
    """A manifest without its records. These stay on disk, and `records()` reads them one by one."""

    source: str
    """The name of the source: coco, imagenet, folder, …"""
    options: dict[str, Any]
    """All options that determine the content of the beton."""
    count: int
    """Records in the beton."""
    bytes: int
    """Size of the beton."""
    classes: list[str] | None = None
    """Class names in the order of the labels; None for a beton without labels."""
    stored: dict[str, int] = field(default_factory=dict)
    """Records by storage: original and jpeg are JPEG streams, raw are pixels."""
    skipped: list[tuple[str, str]] = field(default_factory=list)
    """Name and reason of each skipped image, in the order of the source."""
    shard: dict[str, Any] | None = None
    """For a part of a data set: its number, the number of parts, and the digest of the settings and
    images that all parts share."""
    digest: str = ""
    tool: str = TOOL
    beton_version: int = VERSION
    sizes: str = ""
    """A SHA-256 of all heights and widths, which no record's checksum covers; "" in a manifest of
    an earlier slotstream."""
    path: Path | None = None
    """The file from which this was read."""

    @classmethod
    def read(cls, path: Path) -> Self:
        """Everything before the records.

        Raises:
            UserError: if `path` cannot be read or is not a manifest of format 3.
        """
        try:
            with path.open("rb") as file:
                head = json.loads(b"".join(_until_records(file)) + b'"records": []}')
            if not isinstance(head, dict) or head.get("format") != FORMAT:
                raise ValueError
            known = {item.name for item in fields(cls)} - {"path"}
            manifest = cls(**{key: head[key] for key in known & head.keys()}, path=path)
            manifest._check_types()
        except OSError as error:
            raise UserError(f"{path}: {error.strerror or error}") from error
        except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise UserError(f"{path}: not a manifest of format {FORMAT}") from error
        return manifest

    @classmethod
    def beside(cls, beton: Path) -> Self:
        """The manifest of `beton`. Raises UserError."""
        return cls.read(manifest_path(beton))

    def records(self) -> Iterator[Record]:
        """The records in the beton's order.

        Raises:
            UserError: at a damaged line, or after the last record if the digest does not match.
        """
        if self.path is None:
            raise ValueError("this manifest was not read from a file")
        digest, count = hashlib.sha256(), 0
        try:
            with self.path.open("rb") as file:
                noted, blank = (_DIGEST % value.encode() for value in (self.digest, _NO_DIGEST))
                for line in _until_records(file):
                    digest.update(blank if line == noted else line)
                digest.update(_RECORDS)
                for line in file:
                    digest.update(line)
                    if line == _END:
                        break
                    yield _record(line)
                    count += 1
                digest.update(file.read(1))  # bytes after the end change the digest
        except OSError as error:
            raise UserError(f"{self.path}: {error.strerror or error}") from error
        except (ValueError, TypeError, RecursionError) as error:
            raise UserError(f"{self.path}: the line of record {count:,} is damaged") from error
        if count != self.count or digest.hexdigest() != self.digest:
            raise UserError(f"{self.path}: it does not match its digest")

    def name(self, i: int) -> str:
        """The name of record `i`, without parsing the others: 0.1 s for the last of 1.3 million.

        Raises:
            UserError: if there is no such line.
        """
        if self.path is None:
            raise ValueError("this manifest was not read from a file")
        try:
            with self.path.open("rb") as file:
                for _ in _until_records(file):
                    pass
                line = next(itertools.islice(file, i, None), b"")
                return str(json.loads(line.rstrip(b",\n"))[0])
        except OSError as error:
            raise UserError(f"{self.path}: {error.strerror or error}") from error
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise UserError(f"{self.path}: the line of record {i:,} is damaged") from error

    def write(self, path: Path, records: Iterable[Record]) -> None:
        """Write the manifest to `path`, completely or not at all, and set its digest."""
        self.digest = _NO_DIGEST
        digest, partial = hashlib.sha256(), path.with_name(path.name + ".partial")
        with partial.open("wb", buffering=1 << 20) as file:
            for part in _parts(self, records):
                digest.update(part)
                file.write(part)
            self.digest = digest.hexdigest()
            file.seek(0)
            file.write(_head(self))  # as long as before
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        self.path = path

    def _check_types(self) -> None:
        """Raises ValueError or TypeError if a value has a wrong type."""
        if not all(type(value) is int for value in (self.count, self.bytes)):
            raise ValueError
        if not (isinstance(self.options, dict) and isinstance(self.shard, dict | None)):
            raise ValueError
        if self.classes is not None and not all(isinstance(name, str) for name in self.classes):
            raise ValueError
        self.stored = {str(kind): int(count) for kind, count in dict(self.stored).items()}
        self.skipped = [(str(name), str(reason)) for name, reason in self.skipped]
        self.digest, self.tool, self.source = str(self.digest), str(self.tool), str(self.source)


def _parts(manifest: Manifest, records: Iterable[Record]) -> Iterator[bytes]:
    """The document, piece by piece."""
    yield _head(manifest)
    separator = b""
    for record in records:
        yield separator + _line(record)
        separator = b",\n"
    yield b"\n" + _END


def _head(manifest: Manifest) -> bytes:
    values = {"format": FORMAT} | {
        key: value for key, value in asdict(manifest).items() if key not in ("path", "skipped")
    }
    if manifest.shard is None:
        del values["shard"]
    lines = [f"{json.dumps(key)}: {json.dumps(value)},\n" for key, value in values.items()]
    skipped = ",\n".join(json.dumps(pair) for pair in manifest.skipped)
    return ("{" + "".join(lines) + f'"skipped": [{skipped}],\n').encode() + _RECORDS


def manifest_path(beton: Path) -> Path:
    """FILE.beton.json."""
    return beton.with_name(beton.name + ".json")


def _until_records(file: Iterable[bytes]) -> Iterator[bytes]:
    """The lines before the first record."""
    for line in file:
        if line == _RECORDS:
            return
        yield line
    raise ValueError("no records")


def _record(line: bytes) -> Record:
    """The record in a line. Raises ValueError, TypeError or RecursionError if it is damaged."""
    record = Record(*json.loads(line.rstrip(b",\n")))
    texts = (record.name, record.crc32, record.how)
    label = 0 if record.label is None else record.label
    if not all(isinstance(text, str) for text in texts) or len(bytes.fromhex(record.crc32)) != 4:
        raise ValueError
    if type(record.bytes) is not int or not 0 <= record.bytes < 1 << 63:
        raise ValueError
    if type(label) is not int or not -(1 << 63) <= label < 1 << 63:
        raise ValueError
    return record


def _line(record: Record) -> bytes:
    """A record's line in ASCII. Names that are not UTF-8 keep their bytes as lone surrogates."""
    return json.dumps(record[:-1] if record.label is None else record).encode()
