"""What archives and tables have in common: one file that holds many images."""

import io
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from pipeline.files import open_file
from pipeline.images import Limits


class Blob(io.RawIOBase, ABC):
    """A file that several threads read at any position; also a file object of Python's.

    `pread` raises OSError, whose `strerror` says why.
    """

    size: int
    """Bytes."""

    def __init__(self) -> None:
        self._position = 0

    @abstractmethod
    def pread(self, size: int, offset: int) -> bytes:
        """`size` bytes at `offset`; fewer only at the end of the file."""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.size}[whence]
        self._position = max(0, start + offset)
        return self._position

    def readinto(self, buffer: "memoryview | bytearray") -> int:  # type: ignore[override]
        data = self.pread(len(buffer), self._position)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


class LocalBlob(Blob):
    """A regular file of this machine. Raises OSError if it cannot be opened."""

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        self._file = open_file(path).detach()
        self._number = self._file.fileno()
        self.size = os.fstat(self._number).st_size

    def pread(self, size: int, offset: int) -> bytes:
        return os.pread(self._number, size, offset)

    def close(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()
        super().close()


class Reading(Protocol):
    """A container that is open."""

    def read(self, offset: int, size: int, crc: int, limits: Limits) -> bytes:
        """The bytes of the image there, see the columns of `Source`. Raises BadImage."""

    def close(self) -> None:
        """Ends the reading."""


class Container(Protocol):
    """A file that holds many images. Its `str` is its path."""

    def open(self) -> Reading:
        """Open it for one thread. Raises OSError."""

    def expect(self, offsets: Iterable[int]) -> None:
        """No other image of it than those at `offsets` will be read."""
