"""A writer of standard FFCV beton files (format version 2) that stores samples unchanged.

FFCV's own `DatasetWriter` encodes each image again, and the order of its pages depends on which
worker process finishes first. This writer copies JPEG streams, keeps the order of the samples, and
writes the same file for the same input:

    header · field descriptors · metadata [N] · page · page · … · allocation table [N]

No sample crosses a page boundary: FFCV's process cache reads page by page and relies on it.
"""

import fcntl
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from pipeline.beton import digest_of_sizes
from pipeline.errors import UserError
from pipeline.ffcv_format import (
    ALLOCATION,
    DESCRIPTOR,
    HEADER,
    JPEG,
    MAX_PAGE,
    MAX_SIDE,
    MIN_PAGE,
    RAW,
    TYPE_ID,
    VERSION,
    metadata_type,
)

DEFAULT_PAGE = 1 << 23  # as in FFCV; with samples of 0.1 MB about 1 % of a page stays empty
_MAX_RUN = 512  # buffers in one write; Linux accepts 1024


class Sample(NamedTuple):
    """One record: an image and its integer fields."""

    image: bytes | NDArray[np.uint8]
    """A JPEG stream, or uint8 pixels [height, width, 3]."""
    height: int
    width: int
    integers: tuple[int, ...]
    """Values of the fields other than `image`."""


class BetonWriter:
    """Writes one beton with the fields `image` and `integers`, sample after sample.

    The data goes to `<path>.partial`. The file gets its final name when it is complete and synced:
    after `finish` and `publish`, or when a `with` block ends without an error. After an error the
    partial file is deleted. With `keep` it stays, and a later writer can resume it with `reserve`.
    Memory: about 70 bytes per sample.

        with BetonWriter(path, capacity=2, integers=("index",)) as writer:
            writer.append([Sample(jpeg_bytes, 480, 640, (0,))])   # a JPEG stream, unchanged
            writer.append([Sample(pixels, 32, 32, (1,))])         # uint8 [32, 32, 3], stored raw

    `skip` skips a sample, but leaves space for its table entry. `capacity` is the number of
    samples that are appended or skipped.

    Raises:
        ValueError: if the format cannot hold a sample, or the number of samples is not `capacity`.
        UserError: if another process is writing the same file.
        OSError: if the file cannot be written.
    """

    def __init__(
        self,
        path: Path,
        capacity: int,
        integers: Sequence[str] = ("index",),
        page_size: int = DEFAULT_PAGE,
        keep: bool = False,
    ) -> None:
        if capacity < 1:
            raise ValueError("a beton holds at least one sample")
        if page_size.bit_count() != 1 or not MIN_PAGE <= page_size <= MAX_PAGE:
            raise ValueError(
                f"page_size must be a power of two from 2 MiB to 2 GiB, not {page_size}"
            )
        self.path = path
        self.partial = path.with_name(path.name + ".partial")
        self.page_size = page_size
        self.keep = keep
        self.count = 0
        """Samples appended or reserved."""
        self._skipped = 0
        self._published = False
        self._fields = ["image", *integers]
        self._metadata = np.zeros(capacity, metadata_type(self._fields))
        self._allocations = np.zeros(capacity, ALLOCATION)
        head = HEADER.itemsize + len(self._fields) * DESCRIPTOR.itemsize
        self.begin = _round_up(head + self._metadata.nbytes, page_size)
        """Where the samples' data begins in the file."""
        self.end = self.begin
        """Where free space begins in the file."""

    def __enter__(self) -> Self:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        self.file = os.open(self.partial, flags, 0o666)
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self.file)
            raise UserError(f"another process is writing {self.path}") from error
        except OSError:
            pass  # some file systems of clusters have no locks
        if not self._is_ours():  # the process that held the lock has published the file meanwhile
            os.close(self.file)
            raise UserError(f"another process has just written {self.path}")
        if not self.keep:
            os.ftruncate(self.file, 0)
        return self

    def append(self, samples: Sequence[Sample]) -> None:
        """Store the next samples. Neighbours in the file are written with one call."""
        start = self.end
        run: list[memoryview] = []
        for image, height, width, integers in samples:
            if isinstance(image, np.ndarray):
                if image.shape != (height, width, 3) or image.dtype != np.uint8:
                    raise ValueError(
                        f"{image.dtype}{image.shape} is not uint8({height}, {width}, 3)"
                    )
                mode, data = RAW, np.ascontiguousarray(image).reshape(-1).data
            else:
                mode, data = JPEG, memoryview(image)
            end = self.end
            pointer = self.reserve(data.nbytes, height, width, mode, integers)
            if pointer != end or len(run) == _MAX_RUN:
                self._write(start, run)
                start, run = pointer, []
            run.append(data)
        self._write(start, run)

    def reserve(
        self, size: int, height: int, width: int, mode: int, integers: tuple[int, ...]
    ) -> int:
        """Add a sample of `size` bytes to the tables without writing it; returns its pointer."""
        if not (0 < height <= MAX_SIDE and 0 < width <= MAX_SIDE):
            raise ValueError(f"sides must be 1 to {MAX_SIDE} pixels, not {width}x{height}")
        pointer, self.page_size = _allocate(self.end, size, self.page_size)
        self.end = pointer + size
        self._metadata[self.count] = ((mode, width, height, pointer), *integers)
        self._allocations[self.count] = (self.count, pointer, size)
        self.count += 1
        return pointer

    def pointers(self, sizes: Sequence[int]) -> list[int]:
        """The pointers that the next samples would get, from their sizes in bytes."""
        end, page_size, pointers = self.end, self.page_size, []
        for size in sizes:
            pointer, page_size = _allocate(end, size, page_size)
            pointers.append(pointer)
            end = pointer + size
        return pointers

    def sizes(self) -> NDArray[np.uint64]:
        """Bytes of each sample: uint64 [count]."""
        return self._allocations["size"][: self.count]

    def digest_of_sizes(self) -> str:
        """The SHA-256 of the samples' heights and widths that the manifest notes."""
        image = self._metadata["f0"][: self.count]
        return digest_of_sizes(image["height"], image["width"])

    def skip(self) -> None:
        """Skip the next sample."""
        self._skipped += 1

    def truncate(self) -> None:
        """Cut off the data that an earlier run wrote after the last reserved sample."""
        os.ftruncate(self.file, min(self.end, os.fstat(self.file).st_size))

    def finish(self) -> int:
        """Write the tables; returns the file's bytes."""
        if self.count + self._skipped != len(self._metadata):
            raise ValueError(f"{self.count} of {len(self._metadata)} samples were appended")
        table = _round_up(self.end, 8)
        allocations = self._allocations[: self.count].tobytes()
        self._write(table, [memoryview(allocations)])
        parts = (self._header(table), self._descriptors(), self._metadata)
        self._write(0, [memoryview(part.tobytes()) for part in parts])
        return table + len(allocations)

    def publish(self) -> None:
        """Sync the finished file and give it its final name."""
        os.fsync(self.file)
        self.partial.replace(self.path)
        self._published = True
        sync_folder(self.path.parent)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None and not self._published:
                self.finish()
                self.publish()
        finally:
            if not (self.keep or self._published):
                self.partial.unlink(missing_ok=True)
            os.close(self.file)

    def _is_ours(self) -> bool:
        try:
            return self.partial.stat().st_ino == os.fstat(self.file).st_ino
        except FileNotFoundError:
            return False

    def _write(self, position: int, run: list[memoryview]) -> None:
        total = sum(data.nbytes for data in run)
        written = os.pwritev(self.file, run, position) if run else 0
        if written < total:  # after a signal, above 2 GiB, or on a nearly full disk
            rest = memoryview(b"".join(run))
            while written < total:
                written += os.pwrite(self.file, rest[written:], position + written)

    def _header(self, table: int) -> NDArray[np.void]:
        header = np.zeros(1, HEADER)
        header["version"] = VERSION
        header["num_fields"] = len(self._fields)
        header["page_size"] = self.page_size
        header["num_samples"] = self.count
        header["alloc_table_ptr"] = table
        return header

    def _descriptors(self) -> NDArray[np.void]:
        descriptors = np.zeros(len(self._fields), DESCRIPTOR)
        for descriptor, name in zip(descriptors, self._fields, strict=True):
            descriptor["type_id"] = TYPE_ID[name]
            descriptor["name"][: len(name)] = np.frombuffer(name.encode("ascii"), np.uint8)
        return descriptors


def _allocate(end: int, size: int, page_size: int) -> tuple[int, int]:
    """The first pointer from `end` on at which `size` bytes cross no page boundary, and the page
    size.

    A sample larger than a page doubles the page size of the whole file. Each boundary of the larger
    pages is also a boundary of the smaller pages, so the earlier samples do not cross it. That is
    why one pass over the images is enough.
    """
    if not 0 < size <= MAX_PAGE:
        raise ValueError(f"a sample of {size} bytes does not fit a page")
    while size > page_size:
        page_size *= 2
    if end % page_size + size > page_size:
        end = _round_up(end, page_size)
    return end, page_size


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
