"""Packing's journal: a killed run whose journal or data are altered ends with the bytes of a run
without interruption, at once or after a refusal in one line.

A journal whose checksums fit its altered content is only read or refused: a checksum is no
signature.
"""

import contextlib
import io
import json
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
from PIL import Image
from zlib_ng.zlib_ng import crc32

from pipeline.beton import Beton
from pipeline.beton_writer import BetonWriter
from pipeline.errors import UserError
from pipeline.ffcv_format import MIN_PAGE
from pipeline.manifest import manifest_path
from tests.fuzz.damage import NUMBERS, Random, damage
from tools.packing import run as packing
from tools.packing.images import Storage
from tools.packing.job import Job, job_of, journal_path, partial_path
from tools.packing.journal import Journal, read_done
from tools.packing.sources import SOURCES

BATCHES = 4
ODD = (None, True, -1, 1.5, "", "x" * 300, [], {}, [[[[[]]]]], "\udc80", *NUMBERS, 10**40)
"""Values of each JSON type."""


class Target:
    """A source of eight images, a bad one among them, and its packing after a kill."""

    def __init__(self, folder: Path) -> None:
        (folder / "in").mkdir()
        for i in range(8):
            image = Image.fromarray(np.full((9 + i, 12, 3), 20 * i, np.uint8))
            image.save(folder / "in" / f"{i}.{'png' if i == 5 else 'jpg'}")
        (folder / "in" / "2.jpg").write_bytes(b"text")
        self.out, self.job = folder / "o.beton", self._job(folder / "in")
        self.whole = self._packed()
        self.states = [self._killed_after(batches) for batches in range(1, BATCHES + 1)]

    def _job(self, root: Path) -> Job:
        return job_of("folder", SOURCES["folder"](root), Storage(), None)

    def _packed(self) -> tuple[bytes, bytes]:
        """Pack with the command's code; the bytes of the beton and of its manifest."""
        small = partial(BetonWriter, page_size=MIN_PAGE)
        with (
            mock.patch.object(packing, "BATCH_IMAGES", 2),
            mock.patch.object(packing, "BetonWriter", small),
            mock.patch.object(os, "fsync", lambda file: None),  # slow, and no power fails here
            _quiet(),
        ):
            packing.pack(self.job, self.out, "skip")
        return self.out.read_bytes(), manifest_path(self.out).read_bytes()

    def _killed_after(self, batches: int) -> tuple[bytes, bytes]:
        """The data and the journal that a killed run leaves."""
        journal_path(self.out).unlink(missing_ok=True)
        append, count = Journal.append, 0

        def die(journal: Journal, rows: list) -> None:
            nonlocal count
            append(journal, rows)
            if (count := count + 1) == batches:
                raise _Killed

        with mock.patch.object(Journal, "append", die), contextlib.suppress(_Killed):
            self._packed()
        *_, last = read_done(journal_path(self.out))
        journal = Journal.resume(journal_path(self.out), last)
        journal.synced(journal.length())
        journal.close()
        return partial_path(self.out).read_bytes(), journal_path(self.out).read_bytes()

    def try_one(self, random: Random) -> str:
        data, journal = self.states[random.integers(BATCHES)]
        kind, forged = random.integers(4), False
        if kind == 0:
            journal = damage(journal, random)
        elif kind == 1:
            journal = _reordered(journal, random)
        elif kind == 2:
            forged = bool(random.integers(2))
            journal = _altered(journal, random, forged)
        else:
            data = _damaged(data, random)
        return self.resume(data, journal, forged)

    def resume(self, data: bytes, journal: bytes, forged: bool = False) -> str:
        """What the same command makes of this data and journal: "same" bytes, or "refused"."""
        for path in (self.out, manifest_path(self.out)):
            path.unlink(missing_ok=True)
        partial_path(self.out).write_bytes(data)
        journal_path(self.out).write_bytes(journal)
        outcome = "same"
        try:
            packed = self._packed()
        except UserError as error:
            assert "o.beton" in str(error), str(error)
            assert str(error).isprintable(), repr(str(error))
            packed, outcome = self._packed(), "refused, then same"
        if forged and packed != self.whole:
            Beton(self.out)
            return "forged"
        assert packed == self.whole, "another file"
        assert not journal_path(self.out).exists()
        return outcome


class _Killed(BaseException):
    """Simulates SIGKILL."""


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Refuse a line on stderr that is not printable."""
    with contextlib.redirect_stderr(io.StringIO()) as said:
        yield
    assert said.getvalue().replace("\n", "").isprintable(), said.getvalue()


def _reordered(journal: bytes, random: Random) -> bytes:
    """Whole lines exchanged, repeated or left out."""
    lines = journal.splitlines(keepends=True)
    match random.integers(3):
        case 0:
            random.shuffle(lines)
        case 1:
            lines.insert(int(random.integers(len(lines) + 1)), lines[random.integers(len(lines))])
        case 2:
            del lines[random.integers(len(lines))]
    return b"".join(lines)


def _altered(journal: bytes, random: Random, forged: bool) -> bytes:
    """One value of a line replaced; `forged` computes the checksums anew."""
    contents = [json.loads(line[9:]) for line in journal.splitlines()]
    i = int(random.integers(len(contents)))
    contents[i] = _with_odd_value(contents[i], random)
    lines, crc = [], 0
    for content, old in zip(contents, journal.splitlines(), strict=True):
        text = json.dumps(content, separators=(",", ":")).encode() + b"\n"
        crc = crc32(text, crc)
        lines.append((b"%08x " % crc if forged else old[:9]) + text)
    if random.integers(8) == 0:
        lines[i] = old[:9] + b"[" * int(random.choice([10, 10**5])) + b"\n"
    return b"".join(lines)


def _with_odd_value(content: object, random: Random) -> object:
    """`content` with an odd value somewhere in it."""
    if random.integers(4) == 0 or not isinstance(content, list | dict) or not content:
        return ODD[random.integers(len(ODD))]
    keys = list(content) if isinstance(content, dict) else list(range(len(content)))
    key = keys[random.integers(len(keys))]
    content[key] = _with_odd_value(content[key], random)  # type: ignore[call-overload]
    return content


def _damaged(data: bytes, random: Random) -> bytes:
    """The data altered in the records, in the unused bytes before them, or cut."""
    changed = bytearray(data)
    begin = len(data.rstrip(b"\0")) - 2000
    match random.integers(4):
        case 0:
            return data[: random.integers(begin, len(data))]
        case 1:
            return data[: random.choice([0, 1, len(data) // 2])]
        case 2:
            changed[random.integers(begin)] ^= 1 << random.integers(8)
        case 3:
            changed[random.integers(begin, len(data))] ^= 1 << random.integers(8)
    return bytes(changed)
