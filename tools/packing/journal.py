"""What a packing run has done so far, so that the same command can go on after it was killed.

A text file beside the partial beton: a first line that names the job, then a JSON line for each
batch of images, written after the batch's data. Lines before the last {"synced": …} describe data
that is on the disk; data of later lines may be lost with the machine's power, so their checksums
are looked at again.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

FORMAT = 1


class Row(NamedTuple):
    """An image that was packed, or one that is bad."""

    size: int
    """Bytes stored; 0 for a bad image."""
    height: int
    width: int
    mode: int
    crc: int
    how: str
    """As in the manifest; for a bad image, why it is."""


class Journal:
    """Appends to a journal. Open it with `create` or `resume`."""

    def __init__(self, path: Path, file: int) -> None:
        self.path = path
        self.file = file

    @classmethod
    def create(cls, path: Path, job: str) -> "Journal":
        """An empty journal for the job with this digest."""
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        journal = cls(path, os.open(path, flags, 0o666))
        journal._write({"journal": FORMAT, "job": job})
        return journal

    @classmethod
    def resume(cls, path: Path, length: int) -> "Journal":
        """Go on after the first `length` bytes of an older journal."""
        journal = cls(path, os.open(path, os.O_RDWR | os.O_CLOEXEC))
        os.ftruncate(journal.file, length)
        os.lseek(journal.file, length, os.SEEK_SET)
        return journal

    def append(self, rows: list[Row]) -> None:
        """Note a batch whose data has been written."""
        self._write(rows)

    def synced(self, length: int) -> None:
        """Note that the data of the first `length` bytes of the journal is on the disk."""
        self._write({"synced": length})

    def length(self) -> int:
        """Bytes so far."""
        return os.lseek(self.file, 0, os.SEEK_CUR)

    def close(self) -> None:
        """Close the file, which stays."""
        os.close(self.file)

    def _write(self, content: object) -> None:
        line = json.dumps(content, separators=(",", ":")).encode() + b"\n"
        while line:
            line = line[os.write(self.file, line) :]


class Done(NamedTuple):
    """A batch that an older journal tells of."""

    rows: list[Row]
    end: int
    """Where its line ends in the journal, in bytes."""
    synced: bool
    """Whether its data is on the disk for certain."""


def read_job(path: Path) -> str:
    """The digest of the job that a journal belongs to; empty where there is no sound journal."""
    try:
        with path.open("rb") as file:
            head = json.loads(file.readline())
        return str(head["job"]) if head["journal"] == FORMAT else ""
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def read_done(path: Path) -> Iterator[Done]:
    """The batches of an older journal, up to the first line that is incomplete."""
    synced = 0
    for _, content in _lines(path):
        if isinstance(content, dict):
            synced = content.get("synced", synced)
    for end, content in _lines(path):
        if isinstance(content, list):
            yield Done([Row(*row) for row in content], end, end <= synced)


def _lines(path: Path) -> Iterator[tuple[int, object]]:
    end = 0
    with path.open("rb") as file:
        for line in file:
            end += len(line)
            try:
                yield end, json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                return
