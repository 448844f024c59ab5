"""Reading images from their files or archives, and converting them to their stored form."""

from contextlib import closing

from pipeline.errors import BadImage
from pipeline.images import LIMITS, Limits
from tools.packing.containers import Reading
from tools.packing.images import Packed, Storage, pack_image
from tools.packing.places import read
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
    """Reads images. Keeps the last container open, because the next image is usually in it too."""

    def __init__(self, source: Source, limits: Limits) -> None:
        self.source, self.limits = source, limits
        self._container = -1
        self._open: Reading | None = None

    def read(self, i: int) -> bytes:
        """The bytes of image `i`. Raises BadImage."""
        source = self.source
        if i in source.faults:
            raise BadImage(source.faults[i])
        if source.container[i] < 0:
            return read(source.root / source.names[i], self.limits)
        container = self._opened(source.container[i])
        return container.read(source.offset[i], source.size[i], source.crc[i], self.limits)

    def _opened(self, number: int) -> Reading:
        if number != self._container or not self._open:
            self.close()
            try:
                self._open = self.source.containers[number].open()
            except OSError as error:
                raise BadImage(error.strerror or str(error)) from error
            self._container = number
        return self._open

    def close(self) -> None:
        """Close the container that is open, if any."""
        if self._open:
            self._open.close()
        self._open = None
