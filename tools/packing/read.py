"""Reading and converting the images of a source."""

import os
import stat
import zlib
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from zlib_ng.zlib_ng import crc32

from tools.packing.archives import inflate
from tools.packing.images import MAX_BYTES, Storage, make_record
from tools.packing.jpeg import BadImage
from tools.packing.sources import Source


class Packed(NamedTuple):
    """An image ready to be written, or (image None) why it cannot be: `how`."""

    image: bytes | NDArray[np.uint8] | None
    height: int
    width: int
    crc: int
    how: str


def load(source: Source, storage: Storage, start: int, stop: int) -> list[Packed]:
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
