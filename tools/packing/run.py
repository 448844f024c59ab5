"""The packing itself: read, check and convert on threads, write in order, survive being killed.

Beside FILE.beton, while it is made: FILE.beton.partial, the data; FILE.beton.partial.journal, what
is done. Killed at any moment, the same job goes on where it was, and ends with the same bytes.
"""

import os
import sys
import threading
import time
from array import array
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from zlib_ng.zlib_ng import crc32

from pipeline.beton import Beton
from pipeline.beton_writer import BetonWriter, Sample
from pipeline.errors import UserError, printable
from pipeline.ffcv_format import JPEG, RAW
from pipeline.manifest import ORIGINAL, Manifest, Record, manifest_path
from pipeline.parallel import ordered_map
from tools.packing.job import Job, journal_path, partial_path
from tools.packing.journal import Journal, Row, read_done, read_job
from tools.packing.progress import progress
from tools.packing.read import Packed

MAX_NAMED = 20  # bad files in an error message; the others are in FILE.beton.bad.txt
SYNC_BYTES = 256 << 20  # written between two calls that make it safe from a power cut
BATCH_BYTES = 2 << 20  # in one task of a thread, about; 4 tasks a thread are in memory
BATCH_IMAGES = 32


@dataclass
class Summary:
    """What a packing run did."""

    images: int
    """In the beton."""
    resumed: int
    """Images that an earlier run had looked at."""
    bytes: int
    seconds: float
    converted: int
    skipped: int


def pack(job: Job, out: Path, on_error: str = "stop", workers: int = 1) -> Summary:
    """Write the beton `out` and its manifest, or go on with it.

    Args:
        on_error: stop: bad images end the job after all have been looked at; skip: they are left
            out, and listed in the manifest.
        workers: threads that read, check and convert, most of it without Python's lock.

    Raises:
        UserError: naming the bad images, or where `out` cannot be written. What is done is kept.
    """
    start = time.perf_counter()
    integers = ("index",) if job.labels is None else ("index", "label")
    capacity = len(job.names) + len(job.skipped)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with BetonWriter(out, capacity, integers, keep=True) as writer:
            for _ in job.skipped:
                writer.skip()
            run = _Run(job, writer)
            resumed = run.resume()
            with closing(run.journal):
                run.pack(workers)
                _report_bad(job, run.bad, out, on_error)
                size = run.finish(on_error, workers)
        run.journal.path.unlink()
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(
            f"cannot write {out}: {reason}; what is done is kept, and the same command goes on"
        ) from error
    return Summary(
        writer.count,
        resumed,
        size,
        time.perf_counter() - start,
        sum(how is not None and how != ORIGINAL for how in run.how),
        len(run.bad) + len(job.skipped),
    )


def is_interrupted(out: Path) -> bool:
    """Whether a run that was to write `out` did not come to its end."""
    return journal_path(out).exists()


def is_complete(out: Path, job: Job) -> bool:
    """Whether a run of this job completed `out` and was killed before it could say so; does what it
    left to do.
    """
    journal, manifest = journal_path(out), manifest_path(partial_path(out))
    if not out.exists() or partial_path(out).exists() or read_job(journal) != job.digest:
        return False
    if out.stat().st_mtime_ns < journal.stat().st_mtime_ns:  # an older file, to be replaced
        return False
    if manifest.exists():
        manifest.replace(manifest_path(out))
    journal.unlink()
    return True


class _Run:
    """A job being written: the state that the journal keeps."""

    def __init__(self, job: Job, writer: BetonWriter) -> None:
        self.job, self.writer = job, writer
        self.how: list[str | None] = []
        """How each image is stored; None for a bad one."""
        self.crc = array("I")
        self.bad: dict[int, str] = {}
        self.stored = {ORIGINAL: 0, "jpeg": 0, "raw": 0}
        self.journal: Journal
        self._known: dict[str, str] = {}  # one string object for equal ones

    def resume(self) -> int:
        """Take over what an earlier run of this job has done; returns how many images that is."""
        path, done = journal_path(self.writer.path), 0
        older = read_job(path)
        if older and older != self.job.digest:
            print(
                f"starting anew: {self.writer.partial} is of another source or other options",
                file=sys.stderr,
            )
        if older == self.job.digest:
            done = self._replay(path)
        if done:
            self.journal = Journal.resume(path, done)
            print(f"going on after {len(self.how):,} of {len(self.job.names):,}", file=sys.stderr)
        else:
            os.ftruncate(self.writer.file, 0)
            self.journal = Journal.create(path, self.job.digest)
        self.writer.truncate()
        return len(self.how)

    def pack(self, workers: int) -> None:
        """Pack the images that are left."""
        total, written, began = len(self.job.names), 0, self.writer.end
        with (
            ThreadPoolExecutor(1) as background,
            progress("packing", total, done=len(self.how)) as bar,
        ):
            syncing: Future[int] | None = None
            for packed in ordered_map(lambda span: self.job.load(*span), self._spans(), workers):
                self._store(packed)
                bar.update(len(packed))
                size = f"{(self.writer.end - began) / 1e9:.2f} GB"
                bar.set_postfix_str(f"{size}, {len(self.bad)} bad", refresh=False)
                if syncing and syncing.done():
                    self.journal.synced(syncing.result())
                    syncing = None
                if not syncing and self.writer.end - written > SYNC_BYTES:
                    written = self.writer.end
                    syncing = background.submit(self._sync, self.journal.length())

    def finish(self, on_error: str, workers: int) -> int:
        """Complete the file, verify it, and publish it and its manifest; returns its size."""
        size = self.writer.finish()
        with ThreadPoolExecutor(1) as background:
            syncing = background.submit(os.fsync, self.writer.file)
            self._verify(workers)
            syncing.result()
        manifest = Manifest(
            source=self.job.kind,
            options={"on_error": on_error} | self.job.options,
            count=self.writer.count,
            bytes=size,
            classes=self.job.classes,
            stored=self.stored,
            skipped=self.job.skipped + [(self.job.names[i], self.bad[i]) for i in self.bad],
            shard=self.job.shard,
        )
        pending = manifest_path(self.writer.partial)
        manifest.write(pending, self._records())
        self.writer.publish()
        pending.replace(manifest_path(self.writer.path))
        return size

    def _verify(self, workers: int) -> None:
        """Open the file as its readers do, and compare what they will read with the checksums.

        Raises:
            UserError: where a record differs; then nothing of what is done is to be trusted.
        """
        beton = Beton(self.writer.partial)
        kept = np.array([i for i, how in enumerate(self.how) if how is not None])

        own, largest = threading.local(), int(beton.records[:, 1].max())

        def changed(span: NDArray[np.int64]) -> int | None:
            if not hasattr(own, "data"):
                own.data = memoryview(bytearray(largest))
            rows = zip(beton.records[span, :2].tolist(), kept[span].tolist(), strict=True)
            for (pointer, size), i in rows:
                os.preadv(beton.file, [own.data[:size]], pointer)
                if crc32(own.data[:size]) != self.crc[i]:
                    return int(i)
            return None

        spans = np.array_split(np.arange(len(beton)), -(-len(beton) // BATCH_IMAGES))
        with progress("verifying", len(beton)) as bar:
            for span, i in zip(spans, ordered_map(changed, spans, workers), strict=True):
                bar.update(len(span))
                if i is not None:
                    self.journal.path.unlink()
                    raise UserError(
                        f"{printable(self.job.names[i])}: what was written of it to"
                        f" {self.writer.partial} reads back differently: the disk or the memory is"
                        " not sound; nothing is kept"
                    )

    def _spans(self) -> Iterator[tuple[int, int]]:
        """Images for one task each: as many as come to about BATCH_BYTES."""
        position, total = len(self.how), len(self.job.names)
        while position < total:
            data = self.writer.end - self.writer.begin
            mean = data // self.writer.count if self.writer.count else BATCH_BYTES // 4
            stop = min(total, position + max(1, min(BATCH_IMAGES, BATCH_BYTES // max(1, mean))))
            yield position, stop
            position = stop

    def _store(self, packed: list[Packed]) -> None:
        samples: list[Sample] = []
        rows: list[Row] = []
        for image, height, width, crc, how in packed:
            if image is None:
                rows.append(Row(0, 0, 0, 0, 0, how))
                self._note(rows[-1])
                continue
            position = len(self.how)
            integers = (self.writer.count + len(samples), *self._label(position))
            samples.append(Sample(image, height, width, integers))
            pixels = isinstance(image, np.ndarray)
            size = image.nbytes if isinstance(image, np.ndarray) else len(image)
            rows.append(Row(size, height, width, RAW if pixels else JPEG, crc, how))
            self._note(rows[-1])
        self.writer.append(samples)
        self.journal.append(rows)

    def _label(self, position: int) -> tuple[int, ...]:
        return () if self.job.labels is None else (self.job.labels[position],)

    def _note(self, row: Row) -> None:
        """Enter what the manifest will say of the next image."""
        if row.size:
            how = self._known.setdefault(row.how, row.how)
            self.how.append(how)
            kind = "raw" if row.mode == RAW else ORIGINAL if how == ORIGINAL else "jpeg"
            self.stored[kind] += 1
        else:
            self.bad[len(self.how)] = row.how
            self.how.append(None)
            self.writer.skip()
        self.crc.append(row.crc)

    def _replay(self, path: Path) -> int:
        """Enter what the journal tells, as far as the data is there; returns its length so far.

        An image that was bad may have been mended: from there on all is done again.
        """
        length = 0
        for rows, end, synced in read_done(path):
            if len(self.how) + len(rows) > len(self.job.names):
                break
            if any(not self._is_as_bad(len(self.how) + k, row) for k, row in enumerate(rows)):
                break
            if not self._is_there(rows, synced):
                break
            for row in rows:
                if row.size:
                    integers = (self.writer.count, *self._label(len(self.how)))
                    self.writer.place(row.size, row.height, row.width, row.mode, integers)
                self._note(row)
            length = end
        return length

    def _is_as_bad(self, i: int, row: Row) -> bool:
        """Whether image `i`, if it was bad, still is, for the same reason."""
        return bool(row.size) or self.job.load(i, i + 1)[0].how == row.how

    def _is_there(self, rows: list[Row], synced: bool) -> bool:
        """Whether the data of the next batch is in the file; places nothing."""
        sizes = [row.size for row in rows if row.size]
        pointers = self.writer.pointers(sizes)
        if not sizes:
            return True
        if synced:
            return pointers[-1] + sizes[-1] <= os.fstat(self.writer.file).st_size
        crcs = [row.crc for row in rows if row.size]
        return all(
            crc32(os.pread(self.writer.file, size, pointer)) == crc
            for pointer, size, crc in zip(pointers, sizes, crcs, strict=True)
        )

    def _sync(self, length: int) -> int:
        """Bring what the first `length` bytes of the journal tell of to the disk."""
        os.fdatasync(self.writer.file)
        os.fdatasync(self.journal.file)
        return length

    def _records(self) -> Iterator[Record]:
        sizes = iter(self.writer.sizes())
        for i, (name, crc, how) in enumerate(zip(self.job.names, self.crc, self.how, strict=True)):
            if how is not None:
                yield Record(name, int(next(sizes)), f"{crc:08x}", how, *self._label(i))


def _report_bad(job: Job, bad: dict[int, str], out: Path, on_error: str) -> None:
    """Raise UserError, naming the bad images, unless they are to be left out."""
    listing = out.with_name(out.name + ".bad.txt")
    listing.unlink(missing_ok=True)
    total = len(job.names)
    if not bad or (on_error == "skip" and len(bad) < total):
        return
    lines = [f"{printable(job.names[i])}: {reason}" for i, reason in bad.items()]
    hint = "no image is left" if len(bad) == total else job.remedy
    if len(bad) == 1:
        raise UserError(f"1 of {total:,} images is bad, {out} is not written: {lines[0]} ({hint})")
    head = f"{len(bad):,} of {total:,} images are bad, {out} is not written ({hint}):"
    if len(bad) > MAX_NAMED:
        listing.write_text("\n".join(lines) + "\n", encoding="utf-8")
        lines[MAX_NAMED:] = [f"and {len(bad) - MAX_NAMED:,} more: all are in {listing}"]
    raise UserError("\n  ".join([head, *lines]))
