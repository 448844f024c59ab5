"""The journal of a packing run, with which the same command resumes after a kill.

A text file beside the partial beton. A line is eight hexadecimal digits, a space, and JSON. The
first line names the job. Each further line lists a batch of images; it is written after the batch's
data. A line {"synced": …} says how many bytes of the journal describe data that is on the disk. A
power cut can lose later data, so a resumed run compares its checksums.

The digits are the CRC-32 of the JSON, continued from the line before. A line that was changed,
repeated, exchanged or left out does not fit, and ends the journal.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, NamedTuple, Self

from msgspec import Meta, Struct
from msgspec.json import Decoder
from zlib_ng.zlib_ng import crc32

from pipeline.ffcv_format import MAX_PAGE, MAX_SIDE
from pipeline.manifest import Source, decoded

FORMAT = 3
MAX_LINE = 1 << 20
"""Bytes. A batch is a few kilobytes; a longer line is damage, and must not fill the memory."""

_DIGITS = len("0123abcd ")
_Side = Annotated[int, Meta(ge=0, le=MAX_SIDE)]


class Row(NamedTuple):
    """A packed image or a bad image."""

    size: Annotated[int, Meta(ge=0, le=MAX_PAGE)]
    """Stored bytes; 0 for a bad image."""
    height: _Side
    width: _Side
    mode: Annotated[int, Meta(ge=0, le=1)]
    crc: Annotated[int, Meta(ge=0, lt=1 << 32)]
    how: str
    """How it is stored, as in the manifest. For a bad image: why it is bad."""
    source: Source | None = None
    """As in the manifest."""


class Head(NamedTuple):
    """What an older journal says of itself."""

    job: str
    """The digest of its job; empty if its first line is damaged or of another format."""
    synced: int
    """How many of its bytes describe data that is certainly on the disk."""
    damaged: bool
    """Whether lines follow that do not fit. A last line without an end is no damage: the run was
    killed while it wrote it."""


class Done(NamedTuple):
    """A batch in an older journal."""

    rows: list[Row]
    end: int
    """Where its line ends in the journal, in bytes."""
    crc: int
    """The checksum of its line."""


class Journal:
    """An open journal, made with `create` or `resume`."""

    def __init__(self, path: Path, file: int, crc: int = 0) -> None:
        self.path = path
        self.file = file
        self._crc = crc

    @classmethod
    def create(cls, path: Path, job: str) -> Self:
        """An empty journal for the job with this digest."""
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        journal = cls(path, os.open(path, flags, 0o666))
        journal._write({"journal": FORMAT, "job": job})
        return journal

    @classmethod
    def resume(cls, path: Path, last: Done) -> Self:
        """Continue an older journal after its batch `last`."""
        journal = cls(path, os.open(path, os.O_RDWR | os.O_CLOEXEC), last.crc)
        os.ftruncate(journal.file, last.end)
        os.lseek(journal.file, last.end, os.SEEK_SET)
        return journal

    def append(self, rows: list[Row]) -> None:
        """Add a batch whose data has been written."""
        self._write(rows)

    def synced(self, length: int) -> None:
        """Record that the data listed in the first `length` bytes of the journal is on the disk."""
        self._write({"synced": length})

    def length(self) -> int:
        """Length in bytes."""
        return os.lseek(self.file, 0, os.SEEK_CUR)

    def close(self) -> None:
        """Close the file without deleting it."""
        os.close(self.file)

    def _write(self, content: object) -> None:
        text = json.dumps(content, separators=(",", ":")).encode() + b"\n"
        self._crc = crc32(text, self._crc)
        line = b"%08x " % self._crc + text
        while line:
            line = line[os.write(self.file, line) :]


def read_head(path: Path) -> Head | None:
    """What the journal at `path` says of itself; None if there is none."""
    if not path.is_file():  # a pipe would block
        return None
    job, synced, fits = "", 0, 0
    for end, _, content in _lines(path):
        fits = end
        if isinstance(content, _Note):
            job = content.job if content.journal == FORMAT else job
            synced = content.synced or synced
    with path.open("rb") as file:
        file.seek(fits)
        rest = file.read(MAX_LINE)
    return Head(job, synced, b"\n" in rest or len(rest) == MAX_LINE)


def read_done(path: Path) -> Iterator[Done]:
    """The batches of an older journal, up to the first line that does not fit."""
    for end, crc, content in _lines(path):
        if not isinstance(content, _Note):
            yield Done(content, end, crc)


class _Note(Struct, forbid_unknown_fields=True):
    """A line that lists no images."""

    journal: int = 0
    job: str = ""
    synced: int = 0


_DECODER: Decoder[_Note | list[Row]] = Decoder(_Note | list[Row])


def _lines(path: Path) -> Iterator[tuple[int, int, _Note | list[Row]]]:
    """Of each line that fits: its end in bytes, its checksum, its content."""
    end = crc = 0
    with path.open("rb") as file:
        while (line := file.readline(MAX_LINE)).endswith(b"\n"):
            text = line[_DIGITS:]
            crc = crc32(text, crc)
            if line[:_DIGITS] != b"%08x " % crc:
                return
            try:
                content = decoded(text, _DECODER)
            except ValueError:
                return
            if isinstance(content, list) and any(_is_impossible(row) for row in content):
                return
            end += len(line)
            yield end, crc, content


def _is_impossible(row: Row) -> bool:
    """Whether a good image has no pixels."""
    return row.size > 0 and not row.height * row.width
