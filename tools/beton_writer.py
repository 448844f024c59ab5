"""A writer of standard FFCV beton files (format version 2) that stores samples as they are given.

FFCV's own `DatasetWriter` encodes each image anew, and lays out pages in the order in which its
worker processes finish. This one copies JPEG streams unchanged, keeps samples in their order, and
gives the same file for the same input:

    header · field descriptors · metadata [N] · page · page · … · allocation table [N]

No sample crosses a page boundary: FFCV's process cache reads page by page and relies on that.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from pipeline.ffcv_format import (
    ALLOCATION,
    DESCRIPTOR,
    HEADER,
    JPEG,
    RAW,
    TYPE_ID,
    VERSION,
    metadata_type,
)

MIN_PAGE_SIZE = 1 << 21
DEFAULT_PAGE_SIZE = (
    1 << 23
)  # FFCV's default: with samples of 0.1 MB about 1 % of a page stays empty
MAX_PAGE_SIZE = 1 << 31  # the largest power of two that the header's uint32 holds


class BetonWriter:
    """Writes one beton with the fields `image` and `integers`, sample after sample.

    The data goes to `<path>.partial`; the final name appears, complete and synced to disk, when
    the `with` block ends without an error. After an error nothing is left. Memory: about 60 bytes
    a sample.

        with BetonWriter(path, num_samples=2, integers=("index",)) as writer:
            writer.append(jpeg_bytes, 480, 640, 0)   # a JPEG stream, stored unchanged
            writer.append(pixels, 32, 32, 1)         # uint8 [32, 32, 3], stored raw

    Raises:
        ValueError: on a sample that the format cannot hold, or on other than `num_samples` samples.
        OSError: where the file cannot be written.
    """

    def __init__(
        self,
        path: Path,
        num_samples: int,
        integers: Sequence[str] = ("index",),
        page_size: int = DEFAULT_PAGE_SIZE,
    ) -> None:
        if num_samples < 1:
            raise ValueError("a beton holds at least one sample")
        if page_size.bit_count() != 1 or not MIN_PAGE_SIZE <= page_size <= MAX_PAGE_SIZE:
            raise ValueError(f"page_size is a power of two from 2 MiB to 2 GiB, not {page_size}")
        self.path = path
        self.partial = path.with_name(path.name + ".partial")
        self.page_size = page_size
        self._fields = ["image", *integers]
        self._metadata = np.zeros(num_samples, metadata_type(self._fields))
        self._allocations = np.zeros(num_samples, ALLOCATION)
        self._count = 0
        head = HEADER.itemsize + len(self._fields) * DESCRIPTOR.itemsize
        self._end = _round_up(head + self._metadata.nbytes, page_size)  # where free space begins

    def __enter__(self) -> Self:
        self._file = self.partial.open("wb", buffering=1 << 20)
        return self

    def append(
        self, image: bytes | NDArray[np.uint8], height: int, width: int, *integers: int
    ) -> None:
        """Store the next sample: a JPEG stream, or uint8 pixels [height, width, 3]."""
        if not (0 < height < 65536 and 0 < width < 65536):
            raise ValueError(f"sides from 1 to 65535 pixels can be stored, not {width}x{height}")
        if isinstance(image, np.ndarray):
            if image.shape != (height, width, 3) or image.dtype != np.uint8:
                raise ValueError(f"{image.dtype}{image.shape} is not uint8({height}, {width}, 3)")
            mode, data = RAW, np.ascontiguousarray(image).reshape(-1).data
        else:
            mode, data = JPEG, memoryview(image)
        pointer = self._allocate(data.nbytes)
        self._metadata[self._count] = ((mode, width, height, pointer), *integers)
        self._allocations[self._count] = (self._count, pointer, data.nbytes)
        self._file.seek(pointer)
        self._file.write(data)
        self._count += 1

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self._finish()
                self.partial.replace(self.path)
                _sync_folder(self.path.parent)
        finally:
            self._file.close()
            self.partial.unlink(missing_ok=True)

    def _allocate(self, size: int) -> int:
        """The pointer for `size` bytes that do not cross a page boundary.

        A sample larger than a page doubles the page size, for the whole file. A boundary of the
        larger pages is one of the smaller pages too, so nothing written before crosses it: that is
        why one pass over the images is enough.
        """
        if not 0 < size <= MAX_PAGE_SIZE:
            raise ValueError(f"a sample of {size} bytes does not fit a page")
        while size > self.page_size:
            self.page_size *= 2
        pointer = self._end
        if pointer % self.page_size + size > self.page_size:
            pointer = _round_up(pointer, self.page_size)
        self._end = pointer + size
        return pointer

    def _finish(self) -> None:
        if self._count != len(self._metadata):
            raise ValueError(f"{self._count} of {len(self._metadata)} samples were appended")
        table = _round_up(self._end, 8)
        self._file.seek(table)
        self._file.write(self._allocations.tobytes())
        self._file.seek(0)
        self._file.write(self._header(table).tobytes())
        self._file.write(self._descriptors().tobytes())
        self._file.write(self._metadata.tobytes())
        self._file.flush()
        os.fsync(self._file.fileno())

    def _header(self, table: int) -> NDArray[np.void]:
        header = np.zeros(1, HEADER)
        header["version"] = VERSION
        header["num_fields"] = len(self._fields)
        header["page_size"] = self.page_size
        header["num_samples"] = self._count
        header["alloc_table_ptr"] = table
        return header

    def _descriptors(self) -> NDArray[np.void]:
        descriptors = np.zeros(len(self._fields), DESCRIPTOR)
        for descriptor, name in zip(descriptors, self._fields, strict=True):
            descriptor["type_id"] = TYPE_ID[name]
            descriptor["name"][: len(name)] = np.frombuffer(name.encode("ascii"), np.uint8)
        return descriptors


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
