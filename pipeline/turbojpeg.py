"""Calls libturbojpeg, without the GIL, and checks its return codes.

ffcv's `imdecode` wraps this library too, but it writes rows without a stride (a padded canvas needs
one), it uses the fast, less exact inverse DCT, and its callers ignore the return code. The pixels
here are those of PIL.

A TurboJPEG handle keeps state from one image to the next: the tables of the last one, with which it
decodes a stream that has lost its own, and after a damaged header a state in which it refuses good
images. So each image gets a new handle (0.5 µs, a thousandth of a decode).
"""

import ctypes
import re
import sys
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from llvmlite.binding import add_symbol
from numba import types
from numba.core.typing.ctypes_utils import make_function_type
from zlib_ng import zlib_ng

from pipeline.compiling import njit
from pipeline.ffcv_format import RAW

_int, _pointer, _ulong, _size = ctypes.c_int, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_size_t


def libraries() -> list[str]:
    """Where a libturbojpeg may be, in the order of choice: that of Python's environment (conda);
    the system's, which its distribution keeps up to date; that of the package `turbojpeg`.
    """
    own = Path(sys.prefix, "lib", "libturbojpeg.so.0")
    spec = find_spec("turbojpeg")  # which is not imported
    folder = Path(spec.origin).parent if spec and spec.origin else Path()
    packaged = sorted(folder.glob("turbojpeg.libs/libturbojpeg*.so*"))
    return [*map(str, filter(Path.exists, [own])), "libturbojpeg.so.0", *map(str, packaged)]


def load_library() -> ctypes.CDLL:
    """The first of `libraries` that can be loaded. Raises ImportError."""
    for name in libraries():
        with suppress(OSError):
            return ctypes.CDLL(name)
    raise ImportError("no libturbojpeg: pip install turbojpeg (docs/install.md)")


lib = load_library()
_init = lib.tjInitDecompress
_init.argtypes, _init.restype = [], ctypes.c_ssize_t  # an address; numba stores no pointers
_destroy = lib.tjDestroy
_destroy.argtypes, _destroy.restype = [_pointer], _int
_error = lib.tjGetErrorStr2
_error.argtypes, _error.restype = [_pointer], ctypes.c_char_p
_header = lib.tjDecompressHeader3
_header.argtypes = [_pointer, _pointer, _ulong, _pointer, _pointer, _pointer, _pointer]
_header.restype = _int
_decompress = lib.tjDecompress2
_decompress.argtypes = [_pointer, _pointer, _ulong, _pointer, _int, _int, _int, _int, _int]
_decompress.restype = _int
_pread = ctypes.CDLL(None).pread
_pread.argtypes = [_int, _pointer, _size, ctypes.c_int64]
_pread.restype = ctypes.c_ssize_t
_transform = lib.tjTransform
_transform.argtypes = [
    _pointer, _pointer, _ulong, _int, _pointer, _pointer, _pointer, _int,
]  # fmt: skip
_transform.restype = _int
_transformer = lib.tjInitTransform
_transformer.argtypes, _transformer.restype = [], _pointer
_free = lib.tjFree
_free.argtypes, _free.restype = [_pointer], None
_memcpy = ctypes.CDLL(None).memcpy
_memcpy.argtypes, _memcpy.restype = [_pointer, _pointer, _size], None
_memchr = ctypes.CDLL(None).memchr
_memchr.argtypes, _memchr.restype = [_pointer, _int, _size], ctypes.c_ssize_t
_crc32 = ctypes.CDLL(zlib_ng.__file__).zng_crc32_z
_crc32.argtypes, _crc32.restype = [ctypes.c_uint32, _pointer, _size], ctypes.c_uint32


def external(function: Any) -> Any:
    """A function of a C library, declared as for ctypes, for compiled code that can be cached.

    The code holds a name, not an address, which changes from process to process. The name is one of
    ours, set to this very function: other libraries in the process, such as Pillow's libjpeg-turbo,
    have functions of the same names.
    """
    symbol = f"slotstream_{function.__name__}"
    add_symbol(symbol, ctypes.cast(function, ctypes.c_void_p).value)
    return types.ExternalFunction(symbol, make_function_type(function).sig)


_c_init, _c_destroy, _c_header = external(_init), external(_destroy), external(_header)
c_decompress, c_pread, c_crc32 = external(_decompress), external(_pread), external(_crc32)
c_memcpy, c_memchr = external(_memcpy), external(_memchr)

RGB, CMYK = 0, 11  # TJPF_RGB, TJPF_CMYK
FLAGS = 4096 | 32768
"""TJFLAG_ACCURATEDCT: the inverse DCT that PIL uses. TJFLAG_LIMITSCANS: more than 500 scans are an
error; each can take as long as a whole image."""

OK, SHORT_READ, WRONG_BYTES, BAD_HEADER, WRONG_SIZE, BAD_PIXELS = range(6)
REASONS = {
    SHORT_READ: "the file ends before the record does",
    WRONG_BYTES: "its bytes are not those that were packed",
    BAD_HEADER: "not a JPEG that libjpeg-turbo can read",
    WRONG_SIZE: "the JPEG has another size than the file's table says",
    BAD_PIXELS: "the JPEG data are corrupt or cut short",
}

MAX_EXTRANEOUS = 16
"""Extra bytes that are accepted before the end-of-image marker. Some writers pad with a few bytes,
and the image is complete; a damaged stream leaves hundreds."""


def is_harmless(complaint: str) -> bool:
    """Whether libjpeg's warning is only about a few extra bytes before the end-of-image marker.

    libjpeg reports the first warning only. After this one none can follow, but bytes before any
    other marker may hide a second warning, about damage.
    """
    extraneous = re.search(r"(\d+) extraneous bytes before marker 0xd9", complaint)
    return extraneous is not None and int(extraneous[1]) <= MAX_EXTRANEOUS


class Decoder:
    """One thread's decoder: buffers for the compressed bytes of one record and for a part of it,
    and the TurboJPEG handle of the last one.
    """

    def __init__(self, max_record: int) -> None:
        self.handle = np.zeros(1, np.int64)
        self.scratch = np.empty(max_record, np.uint8)
        self.part = np.empty(max_record, np.uint8)

    def __del__(self) -> None:
        if hasattr(self, "handle") and self.handle[0]:
            _destroy(int(self.handle[0]))

    def decompress(self, jpeg: bytes | np.ndarray, pixels: np.ndarray, colours: int = RGB) -> str:
        """Decode a stream into `pixels` uint8 [height, width, channels], at the largest of
        libjpeg's scales that fits. Returns libjpeg's first error or warning, or "".
        """
        data, (height, width, _) = np.frombuffer(jpeg, np.uint8), pixels.shape
        renew(self.handle)
        code = _decompress(
            int(self.handle[0]), data.ctypes.data, data.size, pixels.ctypes.data,
            width, 0, height, colours, FLAGS,
        )  # fmt: skip
        return self.error() if code else ""

    def error(self) -> str:
        """libjpeg-turbo's message for the failure of the last image."""
        if not self.handle[0]:
            raise MemoryError("libturbojpeg could not make a decoder")
        return str(_error(int(self.handle[0])).decode(errors="replace"))


class _Transform(ctypes.Structure):
    """tjtransform. All zeros: nothing changes, all markers are copied."""

    _fields_ = (
        ("region", _int * 4), ("op", _int), ("options", _int),
        ("data", _pointer), ("filter", _pointer),
    )  # fmt: skip


def baseline(jpeg: bytes) -> bytes:
    """The JPEG with the same coefficients in one scan, Huffman-coded, and the same other segments;
    b"" if libjpeg complains about it.
    """
    made, size = _pointer(), _ulong()
    handle = _transformer()
    if not handle:
        raise MemoryError("libturbojpeg could not make a transformer")
    try:
        code = _transform(
            handle, jpeg, len(jpeg), 1, ctypes.byref(made), ctypes.byref(size),
            ctypes.byref(_Transform()), FLAGS,
        )  # fmt: skip
        return b"" if code else ctypes.string_at(made, size.value)
    finally:
        _free(made)
        _destroy(handle)


@njit(nogil=True, cache=True)
def renew(handle: np.ndarray) -> None:
    """Replace the handle in `handle` int64 [1], 0 = none, by a new one."""
    if handle[0]:
        _c_destroy(handle[0])
    handle[0] = _c_init()


@njit(nogil=True, cache=True)
def decode_records(
    file: int,
    records: np.ndarray,
    checksums: np.ndarray,
    handle: np.ndarray,
    scratch: np.ndarray,
    canvas: np.ndarray,
    scale: int,
) -> tuple[int, int]:
    """Read and decode records into the top left corners of `canvas` uint8 [B, Hmax, Wmax, 3], JPEGs
    at 1/`scale` of their sides (1, 2, 4 or 8), rounded up. Runs without the GIL.

    `records` int64 [B, 5]: pointer, bytes, height, width, mode. `checksums` int64 [B]: the CRC-32
    that the bytes must have, or -1. Returns (position, code) of the first record that fails, or
    (-1, OK). Canvas pixels outside an image do not change.
    """
    shape = np.empty(4, np.int32)  # width, height, subsampling, colour space
    for b in range(records.shape[0]):
        pointer, size, height, width, mode = records[b]
        if c_pread(file, scratch.ctypes.data, size, pointer) != size:
            return b, SHORT_READ
        if checksums[b] >= 0 and c_crc32(0, scratch.ctypes.data, size) != checksums[b]:
            return b, WRONG_BYTES
        if mode == RAW:
            pixels = scratch[:size].reshape(height, width, 3)
            canvas[b, :height, :width] = pixels
            continue
        renew(handle)
        shape[:] = 0
        at = shape.ctypes.data
        code = _c_header(handle[0], scratch.ctypes.data, size, at, at + 4, at + 8, at + 12)
        if code != 0 and shape[0] == 0:  # else only a sampling that TurboJPEG has no number for
            return b, BAD_HEADER
        if shape[0] != width or shape[1] != height:
            return b, WRONG_SIZE
        code = c_decompress(
            handle[0], scratch.ctypes.data, size, canvas[b].ctypes.data,
            -(-width // scale), canvas.shape[2] * 3, -(-height // scale), RGB, FLAGS,
        )  # fmt: skip
        if code != 0:
            return b, BAD_PIXELS
    return -1, OK
