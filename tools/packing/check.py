"""Verifying, extracting and timing the records of a beton, on threads.

Memory: a record and an image per thread, and the list of problems.
"""

import itertools
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image
from zlib_ng.zlib_ng import crc32

from pipeline.beton import SIZES_CHANGED, Beton
from pipeline.errors import UserError
from pipeline.ffcv_format import DESCRIPTOR, HEADER, IMAGE, INTEGER, RAW, VERSION, metadata_type
from pipeline.manifest import TILES, Manifest, Record
from pipeline.parallel import ordered_map
from pipeline.turbojpeg import Decoder
from tools.packing.progress import progress
from tools.packing.tiles import restored

CHUNK = 32  # records of one task
GAP = 1 << 23  # bytes of unused space read at once
SAMPLE = 512  # records for the decoding rate; fewer if they are large
SAMPLE_BYTES = 1 << 28
RATE_SECONDS = 1.0

Problem = tuple[str, str]
"""The name of an image or a file, and the problem."""


@dataclass
class Outcome:
    """The result for all records."""

    images: int = 0
    bytes: int = 0
    seconds: float = 0.0
    problems: list[Problem] = field(default_factory=list)

    @property
    def images_per_s(self) -> float:
        return self.images / self.seconds

    @property
    def mb_per_s(self) -> float:
        return self.bytes / self.seconds / 1e6


class RecordReader:
    """Reads and decodes single records. Each thread has its own buffers."""

    def __init__(self, beton: Beton) -> None:
        self.beton = beton
        self._buffers = threading.local()
        self.read(0)  # compiles the decoder, before anything is timed

    def read(self, i: int) -> tuple[np.ndarray, np.ndarray, str]:
        """Record `i`: its stored bytes uint8 [bytes], its pixels uint8 [H, W, 3], and its problem
        or "". The arrays are valid until the thread's next call.
        """
        if not hasattr(self._buffers, "decoder"):
            largest = int((self.beton.height * self.beton.width).max()) * 3
            self._buffers.pixels = np.empty(largest, np.uint8)
            self._buffers.decoder = Decoder(int(self.beton.records[:, 1].max()))
        _, size, height, width, _ = self.beton.records[i]
        pixels = self._buffers.pixels[: height * width * 3].reshape(1, height, width, 3)
        _, reason = self.beton.try_decode(np.array([i]), pixels, self._buffers.decoder)
        return self._buffers.decoder.scratch[:size], pixels[0], reason


def verify(beton: Beton, manifest: Manifest | None, workers: int) -> Outcome:
    """Decode every record, and compare it with the manifest if there is one. Of one with tiles the
    source is restored and compared too.
    """
    reader = RecordReader(beton)

    def check(i: int, expected: Record) -> str:
        stored, _, reason = reader.read(i)
        reason = _difference(stored, expected, reason) or _wrong_label(beton, i, expected)
        return reason or _source_of(stored, expected)[1]

    outcome = for_each(beton, manifest, check, workers, "verifying")
    if manifest:
        outcome.problems += _check_tables(beton, manifest)
    return outcome


def extract(beton: Beton, manifest: Manifest | None, folder: Path, workers: int) -> Outcome:
    """Write each record under its source's name to `folder`, which must be new or empty.

    JPEG files stay unchanged, those with tiles get their source's bytes back where that is
    possible, raw pixels become PNG. Damaged records are skipped. The folder appears when it is
    complete.
    """
    partial = folder.with_name(folder.name + ".partial")
    try:
        if folder.exists() and any(folder.iterdir()):
            raise UserError(f"{folder}: not empty; nothing is overwritten")
        partial.mkdir(parents=True)
    except FileExistsError:
        raise UserError(f"{partial}: a killed extraction left it; delete it") from None
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}") from None
    reader = RecordReader(beton)

    def write(i: int, expected: Record) -> str:
        stored, pixels, reason = reader.read(i)
        source, lost = _source_of(stored, expected)
        if reason := _difference(stored, expected, reason) or lost:
            return reason
        raw = beton.records[i, 4] == RAW
        path = partial / inner_path(expected.name, ".png" if raw else ".jpg")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("xb") as file:
                if raw:
                    Image.fromarray(pixels).save(file, "PNG", compress_level=1)
                else:
                    file.write(source)
        except OSError as error:
            if error.errno in (28, 122):  # no space or no quota: every further file would fail
                shutil.rmtree(partial)
                raise UserError(f"{path}: {error.strerror}") from None
            return f"cannot be written as {path}: {error.strerror}"
        return ""

    outcome = for_each(beton, manifest, write, workers, "extracting")
    partial.replace(folder)
    return outcome


def decode_rate(beton: Beton, workers: int) -> Outcome:
    """Read and decode a sample of the records from the page cache for about a second."""
    largest = int((beton.height * beton.width).max()) * 3
    count = min(len(beton), SAMPLE, max(workers, SAMPLE_BYTES // largest))
    sample = np.linspace(0, len(beton) - 1, count).astype(np.int64)
    parts = np.array_split(sample, min(count, 4 * workers))
    reader = RecordReader(beton)

    def decode(part: np.ndarray) -> int:
        return sum(reader.read(i)[0].size for i in part.tolist())

    list(ordered_map(decode, parts, workers))  # fills the page cache
    outcome, began = Outcome(), time.perf_counter()
    while outcome.seconds < RATE_SECONDS:
        outcome.bytes += sum(ordered_map(decode, parts, workers))
        outcome.images += count
        outcome.seconds = time.perf_counter() - began
    return outcome


def for_each(
    beton: Beton,
    manifest: Manifest | None,
    work: Callable[[int, Record], str],
    workers: int,
    title: str,
) -> Outcome:
    """Call `work` with the number and the manifest line of each record. It returns the problem, or
    "". `title` stands before the progress bar.
    """
    outcome = Outcome(len(beton), int(beton.records[:, 1].sum()))
    lines = _lines(beton, manifest, outcome.problems)

    def chunk(items: list[tuple[int, Record]]) -> list[tuple[Record, str]]:
        return [(record, work(i, record)) for i, record in items]

    began = time.perf_counter()
    with progress(title, len(beton)) as bar:
        for done in ordered_map(chunk, _chunks(enumerate(lines)), workers):
            wrong = [(record.name, reason) for record, reason in done if reason]
            outcome.problems += wrong
            bar.update(len(done))
            if wrong:
                bar.set_postfix_str(f"{len(outcome.problems)} bad", refresh=False)
    outcome.seconds = time.perf_counter() - began
    return outcome


def inner_path(name: str, suffix: str) -> PurePosixPath:
    """The path of an image of this name inside a folder. It never leads out of the folder: the root
    of an absolute name is dropped, and `..` becomes `__`. Adds `suffix` unless the name has it.
    """
    parts = [part for part in name.replace("\0", "_").split("/") if part not in ("", ".")]
    path = PurePosixPath(*("__" if part == ".." else part for part in parts or ["_"]))
    same = {".jpg": (".jpg", ".jpeg"), ".png": (".png",)}[suffix]
    return path if path.suffix.lower() in same else path.with_name(path.name + suffix)


def beyond_the_end(path: Path, manifest: Manifest) -> list[Problem]:
    """The images that a truncated file has lost, from its beginning and the manifest; [] if the
    beginning is damaged too.
    """
    with path.open("rb") as file:
        size = path.stat().st_size
        header = np.frombuffer(file.read(HEADER.itemsize).ljust(HEADER.itemsize, b"\0"), HEADER)[0]
        first = next(manifest.records(), None)
        fields = ["image", "index"] + ["label"] * (first is not None and first.label is not None)
        dtype = metadata_type(fields)
        start = HEADER.itemsize + len(fields) * DESCRIPTOR.itemsize
        if size >= manifest.bytes:
            return []
        if size < start + manifest.count * dtype.itemsize:
            return [(record.name, "lost: the file ends before it") for record in manifest.records()]
        expected = (VERSION, len(fields), manifest.count)
        if (header["version"], header["num_fields"], header["num_samples"]) != expected:
            return []
        file.seek(start)
        metadata = np.frombuffer(file.read(manifest.count * dtype.itemsize), dtype)
    ends = zip(metadata["f0"]["data_ptr"].tolist(), manifest.records(), strict=True)
    return [
        (record.name, "lost: the file ends before it")
        for pointer, record in ends
        if pointer + record.bytes > size
    ]


def problem(path: Path | None, error: UserError) -> Problem:
    """The problem of a file, from an error whose message begins with the path."""
    return str(path), str(error).removeprefix(f"{path}: ")


def _difference(stored: np.ndarray, expected: Record, reason: str) -> str:
    """The problem of a record's bytes, or "". `reason` is the decoder's."""
    if not expected.crc32:  # not in the manifest
        return reason
    if stored.size != expected.bytes:
        return f"has {stored.size} bytes; {expected.bytes} were packed"
    if f"{crc32(stored.data):08x}" != expected.crc32:
        return "its bytes are not those that were packed" + (f": {reason}" if reason else "")
    return reason


def _source_of(stored: np.ndarray, expected: Record) -> tuple[bytes | memoryview, str]:
    """The file of which a record was made, as far as the record holds it, and the problem or ""."""
    if expected.how != TILES or not expected.source:
        return stored.data, ""
    source = restored(stored.tobytes())
    if (len(source), f"{crc32(source):08x}") != expected.source:
        return source, "its coefficients are not those of its source"
    return source, ""


def _wrong_label(beton: Beton, i: int, expected: Record) -> str:
    label = None if beton.label is None else int(beton.label[i])
    if not expected.crc32 or label == expected.label:
        return ""
    return f"its label is {label}; {expected.label} was packed"


def _lines(beton: Beton, manifest: Manifest | None, problems: list[Problem]) -> Iterator[Record]:
    """The manifest's line of each record; a line without a checksum if the manifest has none."""
    count = 0
    if manifest:
        try:
            for record in manifest.records():
                if count < len(beton):
                    yield record._replace(name=str(record.name))
                count += 1
        except UserError as error:
            problems.append(problem(manifest.path, error))
        if manifest.count != len(beton):
            reason = f"lists {manifest.count} records; the beton holds {len(beton)}"
            problems.append((str(manifest.path), reason))
    for i in range(count, len(beton)):
        yield Record(f"record {i}", int(beton.records[i, 1]), "", "")


def _check_tables(beton: Beton, manifest: Manifest) -> list[Problem]:
    """Problems outside the records: the file's size, the images' numbers, the unused bytes."""
    problems, file = [], str(beton.path)
    if manifest.bytes != beton.bytes:
        problems.append((file, f"has {beton.bytes} bytes; {manifest.bytes} were packed"))
    if beton.sizes_changed(manifest):
        problems.append((file, SIZES_CHANGED))
    if not np.array_equal(beton.index, np.arange(len(beton))):
        problems.append((file, "the images' numbers are damaged"))
    if (offset := stray_byte(beton)) is not None:
        problems.append((file, f"byte {offset}, which belongs to no image, was changed"))
    return problems


def stray_byte(beton: Beton) -> int | None:
    """Offset of the first unused byte that is not zero."""
    head = np.frombuffer(os.pread(beton.file, beton.data, 0), np.uint8)
    if (stray := np.flatnonzero(head[~_used(beton)])).size:
        return int(np.flatnonzero(~_used(beton))[stray[0]])
    order = np.argsort(beton.records[:, 0])
    starts = beton.records[order, 0]
    ends = starts + beton.records[order, 1]
    begins, stops = np.append(beton.data, ends), np.append(starts, beton.table)
    for begin, stop in zip(begins[begins < stops], stops[begins < stops], strict=True):
        for offset in range(begin, stop, GAP):
            unused = np.frombuffer(os.pread(beton.file, min(GAP, stop - offset), offset), np.uint8)
            if unused.any():
                return offset + int(np.flatnonzero(unused)[0])
    return None


def _used(beton: Beton) -> np.ndarray:
    """Which bytes of header, descriptors and metadata are used: bool [beton.data]."""
    used = np.zeros(beton.data, bool)
    used[: HEADER.itemsize] = True
    fields = 3 if beton.label is not None else 2
    metadata = HEADER.itemsize + fields * DESCRIPTOR.itemsize
    names = used[HEADER.itemsize : metadata].reshape(fields, -1)
    names[:, : 1 + len("image")] = True  # type and name; each name has five letters
    samples = used[metadata:].reshape(len(beton), -1)
    samples[:, : IMAGE.itemsize] = True
    samples[:, -(fields - 1) * INTEGER.itemsize :] = True
    return used


def _chunks(items: Iterable[tuple[int, Record]]) -> Iterator[list[tuple[int, Record]]]:
    iterator = iter(items)
    while chunk := list(itertools.islice(iterator, CHUNK)):
        yield chunk
