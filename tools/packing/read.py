"""Reading images from their files or archives, and converting them to their stored form."""

import os
import zlib
from contextlib import closing

from zlib_ng.zlib_ng import crc32

from pipeline.errors import BadImage
from pipeline.images import LIMITS, Limits, read_file
from tools.packing.archives import inflate
from tools.packing.images import Packed, Storage, pack_image
from tools.packing.sources import Source

MAX_BATCH = 16 << 20
"""Bytes. After this much is stored, `load` returns what it has."""


def load(
    source: Source, storage: Storage, start: int, stop: int, limits: Limits = LIMITS
) -> list[Packed | str]:
    """Read, check and convert the images `start` to `stop`, or the first of them: it ends early
    once they take `MAX_BATCH`. For a bad image, the reason.
    """
    images: list[Packed | str] = []
    size = 0
    with closing(_Reader(source, limits)) as reader:
        for i in range(start, stop):
            try:
                packed = pack_image(reader.read(i), storage, limits)
                images.append(packed)
                size += packed.size
            except BadImage as error:
                images.append(str(error))
            if size > MAX_BATCH:
                break
    return images


def read_image(source: Source, i: int, limits: Limits = LIMITS) -> bytes:
    """The bytes of image `i`. Raises BadImage."""
    with closing(_Reader(source, limits)) as reader:
        return reader.read(i)


class _Reader:
    """Reads images. Keeps the last archive open, because the next image is usually in it too."""

    def __init__(self, source: Source, limits: Limits) -> None:
        self.source, self.limits = source, limits
        self._container, self._file = -1, -1

    def read(self, i: int) -> bytes:
        """The bytes of image `i`. Raises BadImage."""
        if i in self.source.faults:
            raise BadImage(self.source.faults[i])
        container = self.source.container[i]
        if container < 0:
            path = os.path.join(self.source.root, self.source.names[i])  # noqa: PTH118
            return read_file(path, self.limits)
        return self._read_member(i, container)

    def _read_member(self, i: int, container: int) -> bytes:
        size = self.source.size[i]  # negative if the member is deflated
        self.limits.check_bytes(abs(size))
        try:
            if container != self._container:
                self.close()
                self._file = os.open(self.source.containers[container], os.O_RDONLY | os.O_CLOEXEC)
                self._container = container
            data = os.pread(self._file, abs(size), self.source.offset[i])
            content = data if size >= 0 else inflate(data, self.limits.max_bytes)
        except OSError as error:
            raise BadImage(error.strerror or str(error)) from error
        except zlib.error as error:
            raise BadImage(f"in the zip file: {error}") from error
        if self.source.crc[i] not in (-1, crc32(content)):
            raise BadImage("damaged in the zip file: its checksum differs")
        return content

    def close(self) -> None:
        """Close the archive that is open, if any."""
        if self._file >= 0:
            os.close(self._file)
            self._container, self._file = -1, -1
