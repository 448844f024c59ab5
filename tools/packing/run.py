"""Packing: read and convert on threads, write in order, resume after a kill.

An unfinished FILE.beton consists of two files: FILE.beton.partial holds the data, and
FILE.beton.partial.journal lists the finished images. After a kill at any moment, the same job
resumes from them and ends with the same bytes.
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
from pipeline.manifest import ORIGINAL, TILES, Manifest, Record, has_tiles, manifest_path
from pipeline.parallel import ordered_map
from tools.packing.check import stray_byte
from tools.packing.images import Packed
from tools.packing.job import Job, Sources, journal_path, partial_path
from tools.packing.journal import Done, Journal, Row, read_done, read_head
from tools.packing.progress import progress

MAX_NAMED = 20  # bad images in an error message; FILE.beton.bad.txt names all of them
SYNC_BYTES = 256 << 20  # written between two syncs; a power cut loses at most about this much
BATCH_BYTES = 2 << 20  # about; a thread reads one batch at a time
BATCHES_AHEAD = 2  # per thread in memory
BATCH_IMAGES = 32


@dataclass
class Summary:
    """The result of a packing run."""

    images: int
    """In the beton."""
    resumed: int
    """Images that an earlier run has already processed."""
    bytes: int
    seconds: float
    stored: dict[str, int]
    """Images by storage, as in the manifest."""
    skipped: int


def pack(job: Job, out: Path, on_error: str = "stop", workers: int = 1) -> Summary:
    """Write the beton `out` and its manifest, or resume an unfinished one.

    Args:
        on_error: "stop": bad images end the job after all images have been read. "skip": they are
            excluded, and the manifest lists them.
        workers: threads that read, check and convert, most of the time without Python's lock.

    Raises:
        UserError: naming the bad images, or if `out` cannot be written. Finished work is kept.
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
            run.resume()
            with closing(run.journal):
                run.pack(workers)
                _report_bad(job, run.bad, out, on_error)
                size = run.finish(on_error, workers)
        run.journal.path.unlink()
    except OSError as error:
        kept = "; finished work is kept: the same command resumes" * is_interrupted(out)
        raise UserError(f"cannot write {out}: {error.strerror or error}{kept}") from error
    return Summary(
        writer.count,
        run.resumed,
        size,
        time.perf_counter() - start,
        run.stored,
        len(run.bad) + len(job.skipped),
    )


def _say(message: str) -> None:
    print(printable(message), file=sys.stderr)


def is_interrupted(out: Path) -> bool:
    """Whether an earlier run that writes `out` did not finish."""
    return journal_path(out).is_file()


def is_complete(out: Path, job: Job) -> bool:
    """Whether a run of this job completed `out`, but was killed before it had cleaned up. If so,
    cleans up.
    """
    journal, manifest = journal_path(out), manifest_path(partial_path(out))
    if not out.exists() or partial_path(out).exists():
        return False
    head = read_head(journal)
    if not head or head.job != job.digest:
        return False
    if out.stat().st_mtime_ns < journal.stat().st_mtime_ns:  # an older file, to be replaced
        return False
    if manifest.exists():
        manifest.replace(manifest_path(out))
    journal.unlink()
    return True


class _Run:
    """The state of a job while it is written. The journal can restore it."""

    def __init__(self, job: Job, writer: BetonWriter) -> None:
        self.job, self.writer = job, writer
        self.how: list[str | None] = []
        """How each image is stored; None for a bad one."""
        self.crc = array("I")
        self.sources = Sources()
        self.bad: dict[int, str] = {}
        self.stored = {ORIGINAL: 0, TILES: 0, "jpeg": 0, "raw": 0}
        self.journal: Journal
        self.resumed = 0
        """Images that an earlier run has packed."""

    def resume(self) -> None:
        """Restore the state of an earlier run of this job."""
        path = journal_path(self.writer.path)
        head, last = read_head(path), None
        if head and head.job == self.job.digest:
            last = self._replay(path, head.synced)
        elif head and head.job:
            _say(f"starting over: {self.writer.partial} has another source or other options")
        if last:
            self.journal = Journal.resume(path, last)
            rest = "; the rest of its journal is damaged" if head and head.damaged else ""
            _say(f"resuming after {len(self.how):,} of {len(self.job.names):,}{rest}")
        else:
            if head and head.damaged:
                _say(f"{path}: the journal of an earlier run is damaged: starting anew")
            os.ftruncate(self.writer.file, 0)
            self.journal = Journal.create(path, self.job.digest)
        self.writer.truncate()
        self.resumed = len(self.how)

    def pack(self, workers: int) -> None:
        """Pack the remaining images. Syncs the data to the disk in the background."""
        total, synced, began = len(self.job.names), 0, self.writer.end
        with (
            ThreadPoolExecutor(1) as background,
            progress("packing", total, done=len(self.how)) as bar,
        ):
            syncing: Future[int] | None = None
            loaded = ordered_map(self._load, self._spans(), workers, BATCHES_AHEAD)
            for stop, packed in loaded:
                before = len(self.how)
                self._store(packed)
                while len(self.how) < stop:  # a large image ended the batch
                    self._store(self.job.load(len(self.how), stop))
                bar.update(stop - before)
                size = f"{(self.writer.end - began) / 1e9:.2f} GB"
                bar.set_postfix_str(f"{size}, {len(self.bad)} bad", refresh=False)
                if syncing and syncing.done():
                    self.journal.synced(syncing.result())
                    syncing = None
                if not syncing and self.writer.end - synced > SYNC_BYTES:
                    synced = self.writer.end
                    syncing = background.submit(self._sync, self.journal.length())

    def _load(self, span: tuple[int, int]) -> tuple[int, list[Packed | str]]:
        """The last number of a batch + 1, and its images, as far as they were read."""
        return span[1], self.job.load(*span)

    def finish(self, on_error: str, workers: int) -> int:
        """Complete, verify and publish the beton and its manifest; returns the beton's bytes."""
        size = self.writer.finish()
        with ThreadPoolExecutor(1) as background:
            syncing = background.submit(os.fsync, self.writer.file)
            try:
                self._verify(workers)
            except UserError as error:
                self.journal.path.unlink()  # nothing in the file is trusted
                cause = "the disk or the memory is faulty"
                raise UserError(f"{error}: {cause}; nothing is kept: start again") from error
            syncing.result()
        manifest = Manifest(
            source=self.job.kind,
            options={"on_error": on_error, **self.job.options},
            count=self.writer.count,
            bytes=size,
            classes=self.job.classes,
            stored=self.stored,
            skipped=self.job.skipped + [(self.job.names[i], self.bad[i]) for i in self.bad],
            shard=self.job.shard,
            sizes=self.writer.digest_of_sizes(),
        )
        unpublished = manifest_path(self.writer.partial)
        manifest.write(unpublished, self._records())
        self.writer.publish()
        unpublished.replace(manifest_path(self.writer.path))
        return size

    def _verify(self, workers: int) -> None:
        """Open the file as the loader does, and compare each record with its checksum. Raises
        UserError if a record differs, or a byte between those that an earlier run wrote.
        """
        beton = Beton(self.writer.partial)
        if self.resumed and (offset := stray_byte(beton)) is not None:
            raise UserError(f"{beton.path}: byte {offset}, which belongs to no image, was changed")
        kept = np.array([i for i, how in enumerate(self.how) if how is not None])
        buffers, largest = threading.local(), int(beton.records[:, 1].max())

        def first_changed(span: NDArray[np.int64]) -> int | None:
            if not hasattr(buffers, "data"):
                buffers.data = memoryview(bytearray(largest))
            rows = zip(beton.records[span, :2].tolist(), kept[span].tolist(), strict=True)
            for (pointer, size), i in rows:
                os.preadv(beton.file, [buffers.data[:size]], pointer)
                if crc32(buffers.data[:size]) != self.crc[i]:
                    return int(i)
            return None

        spans = np.array_split(np.arange(len(beton)), -(-len(beton) // BATCH_IMAGES))
        with progress("verifying", len(beton)) as bar:
            for span, i in zip(spans, ordered_map(first_changed, spans, workers), strict=True):
                bar.update(len(span))
                if i is not None:
                    name = printable(self.job.names[i])
                    raise UserError(
                        f"{name}: its bytes in {beton.path} are not those that were written"
                    )

    def _spans(self) -> Iterator[tuple[int, int]]:
        """The remaining images as batches of about BATCH_BYTES: (first, last + 1)."""
        start, total = len(self.how), len(self.job.names)
        while start < total:
            data = self.writer.end - self.writer.begin
            mean = data // self.writer.count if self.writer.count else BATCH_BYTES // 4
            stop = min(total, start + max(1, min(BATCH_IMAGES, BATCH_BYTES // max(1, mean))))
            yield start, stop
            start = stop

    def _store(self, batch: list[Packed | str]) -> None:
        """Write a batch's data, then its line in the journal."""
        samples: list[Sample] = []
        rows: list[Row] = []
        for image in batch:
            if isinstance(image, str):
                rows.append(Row(0, 0, 0, 0, 0, image))
            else:
                data, height, width, crc, how, source = image
                integers = (self.writer.count + len(samples), *self._label(len(self.how)))
                samples.append(Sample(data, height, width, integers))
                mode = JPEG if isinstance(data, bytes) else RAW
                rows.append(Row(image.size, height, width, mode, crc, how, source))
            self._note(rows[-1])
        self.writer.append(samples)
        self.journal.append(rows)

    def _label(self, i: int) -> tuple[int, ...]:
        return () if self.job.labels is None else (self.job.labels[i],)

    def _note(self, row: Row) -> None:
        """Keep the facts about the next image that the manifest needs."""
        if row.size:
            self.how.append(sys.intern(row.how))  # one string object for equal strings
            self.stored[_kind(row)] += 1
        else:
            self.bad[len(self.how)] = row.how
            self.how.append(None)
            self.writer.skip()
        self.crc.append(row.crc)
        self.sources.append(row.source)

    def _replay(self, path: Path, synced: int) -> Done | None:
        """Restore the images of a journal up to the first whose data is not in the file; returns
        their last batch. The data that the journal's first `synced` bytes list is on the disk.

        Reads bad images again, since the user may have repaired them. Stops at the first image
        that is no longer bad for the same reason.
        """
        last = None
        for batch in read_done(path):
            rows = batch.rows
            if len(self.how) + len(rows) > len(self.job.names):
                break
            if any(not self._is_as_bad(len(self.how) + k, row) for k, row in enumerate(rows)):
                break
            if not self._has_data(rows, batch.end <= synced):
                break
            for row in rows:
                if row.size:
                    integers = (self.writer.count, *self._label(len(self.how)))
                    self.writer.reserve(row.size, row.height, row.width, row.mode, integers)
                self._note(row)
            last = batch
        return last

    def _is_as_bad(self, i: int, row: Row) -> bool:
        """False if image `i` was bad, and is now good or bad for another reason."""
        return bool(row.size) or self.job.load(i, i + 1)[0] == row.how

    def _has_data(self, rows: list[Row], synced: bool) -> bool:
        """Whether the file holds the data of the next batch. Compares checksums if the data was
        not synced. Does not change the writer.
        """
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
        """Sync the data that the first `length` bytes of the journal list; returns `length`."""
        os.fdatasync(self.writer.file)
        os.fdatasync(self.journal.file)
        return length

    def _records(self) -> Iterator[Record]:
        sizes = iter(self.writer.sizes())
        for i, (name, crc, how) in enumerate(zip(self.job.names, self.crc, self.how, strict=True)):
            if how is not None:
                label = None if self.job.labels is None else self.job.labels[i]
                yield Record(name, int(next(sizes)), f"{crc:08x}", how, label, self.sources[i])


def _kind(row: Row) -> str:
    """How a good image is stored, in one word of the manifest."""
    if row.mode == RAW:
        return "raw"
    return TILES if has_tiles(row.how) else ORIGINAL if row.how == ORIGINAL else "jpeg"


def _report_bad(job: Job, bad: dict[int, str], out: Path, on_error: str) -> None:
    """Raise a UserError that names the bad images, unless they are skipped."""
    listing = out.with_name(out.name + ".bad.txt")
    listing.unlink(missing_ok=True)
    total = len(job.names)
    if not bad or (on_error == "skip" and len(bad) < total):
        return
    lines = [f"{printable(job.names[i])}: {reason}" for i, reason in bad.items()]
    hint = "no good image remains" if len(bad) == total else job.remedy
    if len(bad) == 1:
        raise UserError(f"1 of {total:,} images is bad, {out} is not written: {lines[0]} ({hint})")
    head = f"{len(bad):,} of {total:,} images are bad, {out} is not written ({hint}):"
    if len(bad) > MAX_NAMED:
        listing.write_text("\n".join(lines) + "\n", "utf-8", "backslashreplace")
        lines[MAX_NAMED:] = [f"and {len(bad) - MAX_NAMED:,} more: {listing} lists all"]
    raise UserError(head, lines)
