"""Going through every record of a beton on threads: verify, extract, measure.

In memory: a record and an image for each thread, and the list of what is wrong.
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

from pipeline.beton import Beton
from pipeline.errors import UserError
from pipeline.ffcv_format import DESCRIPTOR, HEADER, IMAGE, INTEGER, RAW, VERSION, metadata_type
from pipeline.manifest import Manifest, Record
from pipeline.parallel import ordered_map
from pipeline.turbojpeg import Decoder
from tools.packing.progress import progress

CHUNK = 32  # records of one task
GAP = 1 << 23  # bytes of unused space read at once
SAMPLE = 512  # records of a rate, or fewer where they are large
SAMPLE_BYTES = 1 << 28
RATE_SECONDS = 1.0

Problem = tuple[str, str]
"""The name of an image, or of the file, and what is wrong with it."""


@dataclass
class Outcome:
    """What came of going through the records."""

    images: int = 0
    bytes: int = 0
    seconds: float = 0.0
    problems: list[Problem] = field(default_factory=list)

    @property
    def images_per_s(self) -> float:
        return self.images / self.seconds


class RecordReader:
    """Reads and decodes records one by one, each thread into buffers of its own."""

    def __init__(self, beton: Beton) -> None:
        self.beton = beton
        self._own = threading.local()
        self.read(0)  # compiles what decodes, before anything is timed

    def read(self, i: int) -> tuple[np.ndarray, np.ndarray, str]:
        """Record `i`: its stored bytes uint8 [bytes], its pixels uint8 [H, W, 3], both valid until
        the thread's next call, and what is wrong with it or "".
        """
        if not hasattr(self._own, "decoder"):
            largest = int((self.beton.height * self.beton.width).max()) * 3
            self._own.pixels = np.empty(largest, np.uint8)
            self._own.decoder = Decoder(int(self.beton.records[:, 1].max()))
        _, size, height, width, _ = self.beton.records[i]
        pixels = self._own.pixels[: height * width * 3].reshape(1, height, width, 3)
        _, reason = self.beton.try_decode(np.array([i]), pixels, self._own.decoder)
        return self._own.decoder.scratch[:size], pixels[0], reason


def verify(beton: Beton, manifest: Manifest | None, workers: int) -> Outcome:
    """Decode every record and, where there is a manifest, compare it with that, bit by bit."""
    reader = RecordReader(beton)

    def check(i: int, expected: Record) -> str:
        stored, _, reason = reader.read(i)
        return _difference(stored, expected, reason) or _wrong_label(beton, i, expected)

    outcome = for_each(beton, manifest, check, workers, "verifying")
    if manifest:
        outcome.problems += _check_tables(beton, manifest)
    return outcome


def extract(beton: Beton, manifest: Manifest | None, folder: Path, workers: int) -> Outcome:
    """Write each record under its source's name in `folder`, new or empty: JPEG files as they are
    stored, raw pixels as PNG. What is damaged is left out. The folder appears when all is there.
    """
    partial = folder.with_name(folder.name + ".partial")
    try:
        if folder.exists() and any(folder.iterdir()):
            raise UserError(f"{folder}: not empty; nothing is overwritten")
        partial.mkdir(parents=True)
    except FileExistsError:
        raise UserError(f"{partial}: left by an extraction that was killed; delete it") from None
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}") from None
    reader = RecordReader(beton)

    def write(i: int, expected: Record) -> str:
        stored, pixels, reason = reader.read(i)
        if reason := _difference(stored, expected, reason):
            return reason
        raw = beton.records[i, 4] == RAW
        path = partial / inner_path(expected.name, ".png" if raw else ".jpg")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("xb") as file:
                if raw:
                    Image.fromarray(pixels).save(file, "PNG", compress_level=1)
                else:
                    file.write(stored.data)
        except OSError as error:
            if error.errno in (28, 122):  # no space, no quota: every further file would fail
                shutil.rmtree(partial)
                raise UserError(f"{path}: {error.strerror}") from None
            return f"cannot be written as {path}: {error.strerror}"
        return ""

    outcome = for_each(beton, manifest, write, workers, "extracting")
    partial.replace(folder)
    return outcome


def decode_rate(beton: Beton, workers: int) -> Outcome:
    """Reading and decoding a sample of the records, in the page cache, for about a second."""
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
    what: str,
) -> Outcome:
    """Call `work` on each record's number and manifest line; it returns what is wrong, or ""."""
    outcome = Outcome(len(beton), int(beton.records[:, 1].sum()))
    lines = _lines(beton, manifest, outcome.problems)

    def chunk(items: list[tuple[int, Record]]) -> list[tuple[Record, str]]:
        return [(record, work(i, record)) for i, record in items]

    began = time.perf_counter()
    with progress(what, len(beton)) as bar:
        for done in ordered_map(chunk, _chunks(enumerate(lines)), workers):
            wrong = [(record.name, reason) for record, reason in done if reason]
            outcome.problems += wrong
            bar.update(len(done))
            if wrong:
                bar.set_postfix_str(f"{len(outcome.problems)} bad", refresh=False)
    outcome.seconds = time.perf_counter() - began
    return outcome


def inner_path(name: str, suffix: str) -> PurePosixPath:
    """Where an image of this name is written below a folder, never outside it: of an absolute name
    the root is dropped, and `..` becomes `__`. `suffix` is added unless the name has it already.
    """
    parts = [part for part in name.replace("\0", "_").split("/") if part not in ("", ".")]
    path = PurePosixPath(*("__" if part == ".." else part for part in parts or ["_"]))
    same = {".jpg": (".jpg", ".jpeg"), ".png": (".png",)}[suffix]
    return path if path.suffix.lower() in same else path.with_name(path.name + suffix)


def beyond_the_end(path: Path, manifest: Manifest) -> list[Problem]:
    """The images that a file cut short has lost, by its first part and the manifest; [] where they
    cannot be told.
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


def _difference(stored: np.ndarray, expected: Record, reason: str) -> str:
    """What is wrong with the bytes of a record, given what decoding them says."""
    if not expected.crc32:  # not in the manifest
        return reason
    if stored.size != expected.bytes:
        return f"has {stored.size} bytes; {expected.bytes} were packed"
    if f"{crc32(stored.data):08x}" != expected.crc32:
        return "its bytes are not those that were packed" + (f": {reason}" if reason else "")
    return reason


def _wrong_label(beton: Beton, i: int, expected: Record) -> str:
    label = None if beton.label is None else int(beton.label[i])
    if not expected.crc32 or label == expected.label:
        return ""
    return f"its label is {label}; {expected.label} was packed"


def _lines(beton: Beton, manifest: Manifest | None, problems: list[Problem]) -> Iterator[Record]:
    """The manifest's line for each record; where it has none a stand-in without a checksum."""
    count = 0
    if manifest:
        try:
            for record in manifest.records():
                if count < len(beton):
                    yield record._replace(name=str(record.name))
                count += 1
        except UserError as error:
            problems.append((str(manifest.path), str(error).removeprefix(f"{manifest.path}: ")))
        if manifest.count != len(beton):
            reason = f"lists {manifest.count} records; the beton holds {len(beton)}"
            problems.append((str(manifest.path), reason))
    for i in range(count, len(beton)):
        yield Record(f"record {i}", int(beton.records[i, 1]), "", "")


def _check_tables(beton: Beton, manifest: Manifest) -> list[Problem]:
    """What lies outside the records: numbers, and bytes that belong to nothing."""
    problems, file = [], str(beton.path)
    if manifest.bytes != beton.bytes:
        problems.append((file, f"has {beton.bytes} bytes; {manifest.bytes} were packed"))
    if not np.array_equal(beton.index, np.arange(len(beton))):
        problems.append((file, "the images' numbers are damaged"))
    if (offset := _stray_byte(beton)) is not None:
        problems.append((file, f"byte {offset}, which belongs to no image, was changed"))
    return problems


def _stray_byte(beton: Beton) -> int | None:
    """The first byte that belongs to nothing and is not zero."""
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
    """Which bytes of header, descriptors and metadata mean something: bool [beton.data]."""
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
