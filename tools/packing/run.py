"""The packing itself: read, check and convert on threads, write in order, survive being killed.

Beside FILE.beton, while it is made: FILE.beton.partial, the data; FILE.beton.partial.journal, what
is done. Killed at any moment, the same job goes on where it was, and ends with the same bytes.
"""

import hashlib
import os
import stat
import sys
import threading
import time
import zlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from zlib_ng.zlib_ng import crc32

from pipeline.beton import Beton
from pipeline.beton_writer import BetonWriter, Sample
from pipeline.errors import UserError, printable
from pipeline.ffcv_format import JPEG, RAW
from pipeline.manifest import ORIGINAL, Manifest, Record, manifest_path
from pipeline.parallel import ordered_map
from tools.packing.archives import inflate
from tools.packing.images import MAX_BYTES, Storage, make_record
from tools.packing.journal import Journal, Row, read_done, read_job
from tools.packing.jpeg import BadImage
from tools.packing.progress import progress
from tools.packing.sources import Source

MAX_NAMED = 20  # bad files in an error message; the others are in FILE.beton.bad.txt
SYNC_BYTES = 256 << 20  # written between two calls that make it safe from a power cut
BATCH_BYTES = 2 << 20  # in one task of a thread, about; 4 tasks a thread are in memory
BATCH_IMAGES = 32


class Packed(NamedTuple):
    """An image ready to be written, or (image None) why it cannot be: `how`."""

    image: bytes | NDArray[np.uint8] | None
    height: int
    width: int
    crc: int
    how: str


@dataclass
class Job:
    """What is to be packed. The images are numbered in the order in which they are stored."""

    kind: str
    """The source's name, for the manifest."""
    options: dict[str, Any]
    """Everything that decides the beton's content but the images."""
    names: Sequence[str]
    load: Callable[[int, int], list[Packed]]
    """Reads images number `start` to `stop`; runs on threads."""
    digest: str
    """Of everything that decides the beton's content but the bytes of the images."""
    labels: Sequence[int] | None = None
    classes: list[str] | None = None
    shard: dict[str, Any] | None = None
    skipped: list[tuple[str, str]] = field(default_factory=list)
    """Images left out already, when shards are merged."""
    remedy: str = "--on-error skip leaves them out"
    """Of bad images."""


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
    return _journal_path(out).exists()


def is_complete(out: Path, job: Job) -> bool:
    """Whether a run of this job completed `out` and was killed before it could say so; does what it
    left to do.
    """
    journal, manifest = _journal_path(out), manifest_path(_partial(out))
    if not out.exists() or _partial(out).exists() or read_job(journal) != job.digest:
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
        path, done = _journal_path(self.writer.path), 0
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


def job_of(kind: str, source: Source, storage: Storage, shard: tuple[int, int] | None) -> Job:
    """The job of packing a source, or the i-th of n parts of it.

    Raises:
        UserError: where that part is empty.
    """
    options = {
        "store": storage.store,
        "max_side": storage.max_side,
        "quality": storage.quality,
        "check": storage.check,
    }
    listing = _listing(kind, source, options)
    number, parts = shard or (1, 1)
    first, last = len(source) * (number - 1) // parts, len(source) * number // parts
    if first == last:
        raise UserError(f"--shard {number}/{parts}: empty, there are {len(source)} images")
    return Job(
        kind,
        options,
        source.names[first:last] if shard else source.names,
        lambda start, stop: _load(source, storage, first + start, first + stop),
        f"{listing} {_places(source)} {number}/{parts}",
        None if source.labels is None else source.labels[first:last],
        source.classes,
        {"number": number, "of": parts, "listing": listing} if shard else None,
    )


def merge_job(paths: Sequence[Path]) -> Job:
    """The job of joining all parts of a data set.

    Raises:
        UserError: where a part is damaged, missing, given twice, or of another data set.
    """
    shards = sorted(
        ((Manifest.beside(path), Beton(path)) for path in paths), key=lambda pair: _number(*pair)
    )
    manifests, betons = [pair[0] for pair in shards], [pair[1] for pair in shards]
    first = manifests[0]
    for manifest, beton in shards:
        if _alike(manifest) != _alike(first):
            raise UserError(f"{beton.path}: of another data set or options than {betons[0].path}")
    have = [_number(*pair) for pair in shards]
    wanted = list(range(1, first.shard["of"] + 1)) if first.shard else []
    if have != wanted:
        missing = ", ".join(str(i) for i in wanted if i not in have)
        raise UserError(
            f"missing parts of {len(wanted)}: {missing}" if missing else "a part is given twice"
        )
    names: list[str] = []
    how: list[str] = []
    crcs = array("I")
    known: dict[str, str] = {}
    for manifest, beton in shards:
        before = len(names)
        for record in manifest.records():
            names.append(record.name)
            crcs.append(int(record.crc32, 16))
            how.append(known.setdefault(record.how, record.how))
        if len(names) - before != len(beton):
            raise UserError(f"{beton.path}: its manifest is of another file")
    starts = np.cumsum([0, *map(len, betons)])

    def load(start: int, stop: int) -> list[Packed]:
        packed = []
        for i in range(start, stop):
            part = int(np.searchsorted(starts, i, "right")) - 1
            beton = betons[part]
            pointer, size, height, width, mode = beton.records[i - starts[part]].tolist()
            data = os.pread(beton.file, size, pointer)
            if crc32(data) != crcs[i]:
                reason = f"its bytes in {beton.path} have changed"
                packed.append(Packed(None, 0, 0, 0, reason))
                continue
            pixels = np.frombuffer(data, np.uint8).reshape(height, width, 3) if mode else data
            packed.append(Packed(pixels, height, width, crcs[i], how[i]))
        return packed

    labels = [beton.label for beton in betons if beton.label is not None]
    skip = any(manifest.options["on_error"] == "skip" for manifest in manifests)
    return Job(
        first.source,
        first.options | {"on_error": "skip" if skip else "stop"},
        names,
        load,
        "merge " + " ".join(manifest.digest for manifest in manifests),
        array("q", np.concatenate(labels).tobytes()) if labels else None,
        first.classes,
        skipped=[pair for manifest in manifests for pair in manifest.skipped],
        remedy="pack or copy that part again",
    )


def shard_path(out: Path, number: int, parts: int) -> Path:
    """FILE.shard-i-of-n.beton."""
    return out.with_name(f"{out.name.removesuffix('.beton')}.shard-{number}-of-{parts}.beton")


def _number(manifest: Manifest, beton: Beton) -> int:
    if not manifest.shard:
        raise UserError(f"{beton.path}: not a part of a data set: it was packed without --shard")
    return int(manifest.shard["number"])


def _alike(manifest: Manifest) -> tuple[object, ...]:
    """What all parts of a data set have in common."""
    shard = manifest.shard or {}
    return (
        manifest.source,
        {key: value for key, value in manifest.options.items() if key != "on_error"},
        manifest.classes,
        shard.get("of"),
        shard.get("listing"),
    )


def _listing(kind: str, source: Source, options: dict[str, Any]) -> str:
    """Digest of the list of images and of how they are stored, wherever they are."""
    digest = hashlib.sha256(repr((kind, options, source.classes)).encode())
    for start in range(0, len(source), 1 << 14):
        names = "\0".join(source.names[start : start + (1 << 14)])
        digest.update(names.encode("utf-8", "surrogateescape") + b"\0")
    digest.update(memoryview(source.labels or array("q")).cast("B"))
    return digest.hexdigest()


def _places(source: Source) -> str:
    """Digest of where the images are."""
    containers = [str(path) for path in source.containers]
    digest = hashlib.sha256(repr((str(source.root), containers, source.faults)).encode())
    for column in (source.container, source.offset, source.size, source.crc):
        digest.update(memoryview(column).cast("B"))
    return digest.hexdigest()


def _load(source: Source, storage: Storage, start: int, stop: int) -> list[Packed]:
    """Read, check and convert images number `start` to `stop`."""
    packed = []
    with _Containers(source) as containers:
        for i in range(start, stop):
            try:
                record = make_record(containers.read(i), storage)
                crc = crc32(record.buffer)
                packed.append(Packed(record.data, record.height, record.width, crc, record.how))
            except BadImage as error:
                packed.append(Packed(None, 0, 0, 0, str(error)))
    return packed


def read_image(source: Source, i: int) -> bytes:
    """The bytes of image `i`. Raises BadImage."""
    with _Containers(source) as containers:
        return containers.read(i)


class _Containers:
    """Reads images; keeps the last archive open, since the next image is likely in it."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.number, self.file = -1, -1

    def __enter__(self) -> "_Containers":
        return self

    def __exit__(self, *_: object) -> None:
        if self.file >= 0:
            os.close(self.file)
            self.file = -1

    def read(self, i: int) -> bytes:
        """The bytes of image `i`. Raises BadImage."""
        if i in self.source.faults:
            raise BadImage(self.source.faults[i])
        size, number = self.source.size[i], self.source.container[i]
        if number < 0:
            return read_file(os.path.join(self.source.root, self.source.names[i]))  # noqa: PTH118
        if abs(size) > MAX_BYTES:
            raise BadImage("larger than 1 GiB")
        try:
            if number != self.number:
                self.__exit__()
                self.file = os.open(self.source.containers[number], os.O_RDONLY | os.O_CLOEXEC)
                self.number = number
            data = os.pread(self.file, abs(size), self.source.offset[i])
            content = data if size >= 0 else inflate(data, MAX_BYTES)
        except OSError as error:
            raise BadImage(error.strerror or str(error)) from error
        except zlib.error as error:
            raise BadImage(f"in the zip file: {error}") from error
        if self.source.crc[i] not in (-1, crc32(content)):
            raise BadImage("damaged in the zip file: its checksum differs")
        return content


def read_file(path: str) -> bytes:
    """All bytes of a file.

    Raises:
        BadImage: where it cannot be read or is no ordinary file.
    """
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe must not block
    except OSError as error:
        broken = isinstance(error, FileNotFoundError) and os.path.islink(path)  # noqa: PTH114
        raise BadImage("broken symbolic link" if broken else error.strerror or "?") from error
    try:
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode):
            raise BadImage("not a regular file")
        if status.st_size > MAX_BYTES:
            raise BadImage("larger than 1 GiB")
        data = os.read(file, status.st_size)
        while len(data) < status.st_size and (more := os.read(file, status.st_size - len(data))):
            data += more
    except OSError as error:
        raise BadImage(error.strerror or str(error)) from error
    finally:
        os.close(file)
    return data


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


def _partial(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


def _journal_path(out: Path) -> Path:
    return out.with_name(out.name + ".partial.journal")
