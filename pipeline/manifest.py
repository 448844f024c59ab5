"""The manifest beside a beton, FILE.beton.json: the packed images, their sources, the options.

It is one JSON document with one record per line, so that 1.3 million records are written and read
as a stream:

    {"format": 4, "tool": …, "source": …, "options": …, "classes": …, "count": …, "digest": …,
     "skipped": [[name, reason], …],
     "records": [
    ["train2017/000000000009.jpg", 224297, "9f3a11c2", "original"],
    …
    ]}

A record: name, bytes stored, CRC-32 of the stored bytes as 8 hexadecimal digits, how it is stored:
"original", "tiles", "scaled" or "converted: <reasons>"; in a set with labels, its label; of a JPEG
with tiles, [bytes, CRC-32] of its source, after null where there is no label. Format 3, of earlier
versions, has no sources, and is read too. The digest is the SHA-256 of the whole document with 64
zeros instead of the digest.
"""

import hashlib
import io
import itertools
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, BinaryIO, NamedTuple, TypeVar

import msgspec
from msgspec import Meta
from msgspec.json import Decoder

from pipeline.errors import UserError
from pipeline.ffcv_format import VERSION
from pipeline.files import open_file

FORMATS = (3, 4)
"""That are read; the last one is written."""
TOOL = "slotstream 0.1.0"
ORIGINAL, TILES, SCALED, CONVERTED = "original", "tiles", "scaled", "converted: "

MAX_LINE = 16 << 20
"""Bytes. A record has some hundred; the longest line lists all class names."""
MAX_HEAD = 128 << 20
"""Bytes before the records: more than a million skipped images. Reading them takes at most twenty
times as much memory."""

_BLOCK = 1 << 20  # bytes of records that are decoded at once
_DIGEST = b'"digest": "%b",\n'
_NO_DIGEST = "0" * 64
_RECORDS = b'"records": [\n'
_END = b"]}\n"
_FORMAT = tuple(b'{"format": %d,' % number for number in FORMATS)

T = TypeVar("T")
Count = Annotated[int, Meta(ge=0, le=2**63 - 1)]
CRC32 = Annotated[str, Meta(pattern=r"^[0-9a-f]{8}\Z")]
Option = str | int | float | bool | None


class Source(NamedTuple):
    """The JPEG of which one with tiles was made."""

    bytes: Count
    crc32: CRC32


class Record(NamedTuple):
    """One record of the beton in the manifest."""

    name: str
    """The image's path below its source's root, with forward slashes; unique in a beton."""
    bytes: Count
    crc32: CRC32
    how: str
    """ORIGINAL: the source's bytes. TILES: a JPEG from which they can be restored."""
    label: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    source: Source | None = None


@dataclass
class Shard:
    """Which part of a data set a beton is."""

    number: Annotated[int, Meta(ge=1)]
    of: Annotated[int, Meta(ge=1, lt=1 << 31)]
    listing: str
    """Digest of the settings and images that all parts share."""


@dataclass
class Manifest:
    """A manifest without its records. These stay on disk, and `records()` reads them one by one."""

    source: str
    """The name of the source: coco, imagenet, folder, …"""
    options: dict[str, Option]
    """All options that determine the content of the beton."""
    count: Count
    """Records in the beton."""
    bytes: Count
    """Size of the beton."""
    classes: list[str] | None = None
    """Class names in the order of the labels; None for a beton without labels."""
    stored: dict[str, Count] = field(default_factory=dict)
    """Records by storage: original, tiles and jpeg are JPEG streams, raw are pixels."""
    skipped: list[tuple[str, str]] = field(default_factory=list)
    """Name and reason of each skipped image, in the order of the source."""
    shard: Shard | None = None
    """None for a whole data set."""
    digest: Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")] = _NO_DIGEST
    tool: str = TOOL
    beton_version: int = VERSION
    sizes: str = ""
    """A SHA-256 of all heights and widths, which no record's checksum covers; "" in a manifest of
    an earlier slotstream."""
    path: Path | None = None
    """The file from which this was read."""

    @classmethod
    def read(cls, path: Path) -> "Manifest":
        """Everything before the records.

        Raises:
            UserError: if `path` cannot be read or is not a manifest of a known format.
        """
        try:
            with open_file(path) as file:
                head = b"".join(_until_records(file)) + b'"records": []}'
            if not head.startswith(_FORMAT):
                raise ValueError("it begins with other text")
            manifest = decoded(head, _HEAD)
        except OSError as error:
            raise UserError(f"{path}: {error.strerror or error}") from error
        except msgspec.MsgspecError as error:
            raise UserError(f"{path}: damaged: {error}") from error
        except ValueError as error:
            formats = " or ".join(map(str, FORMATS))
            raise UserError(f"{path}: not a manifest of format {formats}: {error}") from error
        manifest.path = path
        return manifest

    @classmethod
    def beside(cls, beton: Path) -> "Manifest":
        """The manifest of `beton`. Raises UserError."""
        return cls.read(manifest_path(beton))

    def records(self) -> Iterator[Record]:
        """The records in the beton's order.

        Raises:
            UserError: at a damaged line, or after the last record if the digest does not match.
        """
        if self.path is None:
            raise ValueError("this manifest was not read from a file")
        digest, count, line = hashlib.sha256(), 0, b""
        try:
            with open_file(self.path) as file:
                noted, blank = (_DIGEST % value.encode() for value in (self.digest, _NO_DIGEST))
                for line in _until_records(file):
                    digest.update(blank if line == noted else line)
                digest.update(_RECORDS)
                while (text := _block(file)) and (batch := _batch(text, self.count - count)):
                    digest.update(text)
                    yield from batch
                    count += len(batch)
                lines = itertools.chain(_lines(io.BytesIO(text)), _lines(file))
                for line in lines:
                    digest.update(line)
                    if line == _END or count == self.count:
                        break
                    yield decoded(line.rstrip(b",\n"), _RECORD)
                    count += 1
                digest.update(next(lines, b""))  # bytes after the end change the digest
        except OSError as error:
            raise UserError(f"{self.path}: {error.strerror or error}") from error
        except ValueError as error:
            reason = f"the line of record {count:,} is damaged: {error}"
            raise UserError(f"{self.path}: {reason}") from error
        if (line, count, digest.hexdigest()) != (_END, self.count, self.digest):
            raise UserError(f"{self.path}: it does not match its digest")

    def name(self, i: int) -> str:
        """The name of record `i`, without parsing the others: 0.1 s for the last of 1.3 million.

        Raises:
            UserError: if there is no such line.
        """
        if self.path is None:
            raise ValueError("this manifest was not read from a file")
        try:
            with open_file(self.path) as file:
                for _ in _until_records(file):
                    pass
                line = next(itertools.islice(_lines(file), i, None), b"")
                return decoded(line.rstrip(b",\n"), _RECORD).name
        except OSError as error:
            raise UserError(f"{self.path}: {error.strerror or error}") from error
        except ValueError as error:
            reason = f"the line of record {i:,} is damaged: {error}"
            raise UserError(f"{self.path}: {reason}") from error

    def write(self, path: Path, records: Iterable[Record]) -> None:
        """Write the manifest to `path`, completely or not at all, and set its digest."""
        self.digest = _NO_DIGEST
        if len(_head(self)) > MAX_HEAD:
            raise UserError(
                f"{path}: too many skipped images: more than {MAX_HEAD:,} bytes of names"
            )
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


def has_tiles(how: str) -> bool:
    """Whether a record that is stored like this is a JPEG with tiles. Packing has read all of its
    coefficients.
    """
    return how == TILES or how.endswith(", " + TILES)


def _parts(manifest: Manifest, records: Iterable[Record]) -> Iterator[bytes]:
    """The document, piece by piece."""
    yield _head(manifest)
    separator = b""
    for record in records:
        yield separator + _line(record)
        separator = b",\n"
    yield b"\n" + _END


def _head(manifest: Manifest) -> bytes:
    values = {"format": FORMATS[-1]} | {
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


def decoded(text: bytes, decoder: Decoder[T]) -> T:
    """JSON as the decoder's type. Raises ValueError."""
    try:
        if b"\\ud" not in text:
            return decoder.decode(text)
        # A name that is not UTF-8 has lone surrogates, which msgspec's own parser refuses.
        return msgspec.convert(json.loads(text), decoder.type)
    except RecursionError as error:
        raise ValueError("nested too deep") from error


_HEAD, _RECORD, _RECORDS_OF_A_BLOCK = Decoder(Manifest), Decoder(Record), Decoder(list[Record])


def _until_records(file: BinaryIO) -> Iterator[bytes]:
    """The lines before the first record."""
    size = 0
    for line in _lines(file):
        if line == _RECORDS:
            return
        if (size := size + len(line)) > MAX_HEAD:
            raise ValueError(f"more than {MAX_HEAD:,} bytes before the records")
        yield line
    raise ValueError("no records")


def _lines(file: BinaryIO) -> Iterator[bytes]:
    while line := file.readline(MAX_LINE):
        if len(line) == MAX_LINE:
            raise ValueError(f"a line of {MAX_LINE:,} bytes or more")
        yield line


def _block(file: BinaryIO) -> bytes:
    """The next lines, about a megabyte."""
    text = file.read(_BLOCK)
    return text if text.endswith(b"\n") else text + next(_lines(file), b"")


def _batch(text: bytes, most: int) -> list[Record]:
    """The records of these lines, decoded at once. None unless each line is a good record with one
    after it, and there are at most `most`.
    """
    count = text.count(b"\n")
    if count > most or not text.startswith(b"[") or text.count(b"],\n[") != count - 1:
        return []
    try:
        records = decoded(b"[" + text.removesuffix(b",\n") + b"]", _RECORDS_OF_A_BLOCK)
    except ValueError:
        return []
    return records if len(records) == count else []


def _line(record: Record) -> bytes:
    """A record's line in ASCII. Names that are not UTF-8 keep their bytes as lone surrogates."""
    used = 6 if record.source else 4 if record.label is None else 5
    return json.dumps(record[:used]).encode()
