"""The journal of a packing run, with which the same command resumes after a kill.

A text file beside the partial beton. Its first line names the job. Each further line is JSON and
lists a batch of images; it is written after the batch's data. A line {"synced": …} says how many
bytes of the journal describe data that is on the disk. A power cut can lose later data, so a
resumed run compares its checksums.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

FORMAT = 1


class Row(NamedTuple):
    """A packed image or a bad image."""

    size: int
    """Stored bytes; 0 for a bad image."""
    height: int
    width: int
    mode: int
    crc: int
    how: str
    """How it is stored, as in the manifest. For a bad image: why it is bad."""


class Journal:
    """An open journal, made with `create` or `resume`."""

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
        """Continue an older journal after its first `length` bytes."""
        journal = cls(path, os.open(path, os.O_RDWR | os.O_CLOEXEC))
        os.ftruncate(journal.file, length)
        os.lseek(journal.file, length, os.SEEK_SET)
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
        line = json.dumps(content, separators=(",", ":")).encode() + b"\n"
        while line:
            line = line[os.write(self.file, line) :]


class Done(NamedTuple):
    """A batch in an older journal."""

    rows: list[Row]
    end: int
    """Where its line ends in the journal, in bytes."""
    synced: bool
    """Whether its data is certainly on the disk."""


def read_job(path: Path) -> str:
    """The digest of a journal's job; empty if the journal is missing or damaged."""
    try:
        with path.open("rb") as file:
            head = json.loads(file.readline())
        return str(head["job"]) if head["journal"] == FORMAT else ""
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def read_done(path: Path) -> Iterator[Done]:
    """The batches of an older journal, up to the first incomplete line."""
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
