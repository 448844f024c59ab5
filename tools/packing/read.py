"""Reading images from their files or archives, and converting them to their stored form."""

import os
import stat
import zlib
from contextlib import closing

from zlib_ng.zlib_ng import crc32

from tools.packing.archives import inflate
from tools.packing.images import MAX_BYTES, Packed, Storage, pack_image
from tools.packing.jpeg import BadImage
from tools.packing.sources import Source


def load(source: Source, storage: Storage, start: int, stop: int) -> list[Packed | str]:
    """Read, check and convert images `start` to `stop`. For a bad image, the reason."""
    images: list[Packed | str] = []
    with closing(_Reader(source)) as reader:
        for i in range(start, stop):
            try:
                images.append(pack_image(reader.read(i), storage))
            except BadImage as error:
                images.append(str(error))
    return images


def read_image(source: Source, i: int) -> bytes:
    """The bytes of image `i`. Raises BadImage."""
    with closing(_Reader(source)) as reader:
        return reader.read(i)


class _Reader:
    """Reads images. Keeps the last archive open, because the next image is usually in it too."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self._container, self._file = -1, -1

    def read(self, i: int) -> bytes:
        """The bytes of image `i`. Raises BadImage."""
        if i in self.source.faults:
            raise BadImage(self.source.faults[i])
        container = self.source.container[i]
        if container < 0:
            return read_file(os.path.join(self.source.root, self.source.names[i]))  # noqa: PTH118
        return self._read_member(i, container)

    def _read_member(self, i: int, container: int) -> bytes:
        size = self.source.size[i]  # negative if the member is deflated
        if abs(size) > MAX_BYTES:
            raise BadImage("larger than 1 GiB")
        try:
            if container != self._container:
                self.close()
                self._file = os.open(self.source.containers[container], os.O_RDONLY | os.O_CLOEXEC)
                self._container = container
            data = os.pread(self._file, abs(size), self.source.offset[i])
            content = data if size >= 0 else inflate(data, MAX_BYTES)
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


def read_file(path: str) -> bytes:
    """All bytes of a file.

    Raises:
        BadImage: if the file cannot be read or is not a regular file.
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
