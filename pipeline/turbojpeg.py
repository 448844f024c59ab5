"""Calls the libturbojpeg that ffcv links, without the GIL, and checks its return codes.

ffcv's `imdecode` wraps the same library, but it writes rows without a stride (a padded canvas needs
one), it uses the fast, less exact inverse DCT, and its callers ignore the return code. The pixels
here are those of PIL.
"""

import ctypes
import re

import numba
import numpy as np

from pipeline.ffcv_format import RAW, library

_int, _pointer, _ulong = ctypes.c_int, ctypes.c_void_p, ctypes.c_ulong

lib = ctypes.CDLL(library())
_init = lib.tjInitDecompress
_init.argtypes, _init.restype = [], _pointer
_destroy = lib.tjDestroy
_destroy.argtypes, _destroy.restype = [_pointer], _int
_error = lib.tjGetErrorStr2
_error.argtypes, _error.restype = [_pointer], ctypes.c_char_p
_header = lib.tjDecompressHeader3
_header.argtypes = [_pointer, _pointer, _ulong, _pointer, _pointer, _pointer, _pointer]
_header.restype = _int
decompress = lib.tjDecompress2
decompress.argtypes = [_pointer, _pointer, _ulong, _pointer, _int, _int, _int, _int, _int]
decompress.restype = _int
_pread = ctypes.CDLL(None).pread
_pread.argtypes = [_int, _pointer, ctypes.c_size_t, ctypes.c_int64]
_pread.restype = ctypes.c_ssize_t

RGB, CMYK = 0, 11  # TJPF_RGB, TJPF_CMYK
ACCURATE_DCT = 4096  # TJFLAG_ACCURATEDCT, the one PIL uses

OK, SHORT_READ, BAD_HEADER, WRONG_SIZE, BAD_PIXELS = range(5)
REASONS = {
    SHORT_READ: "the file ends before the record does",
    BAD_HEADER: "not a JPEG that libjpeg-turbo can read",
    WRONG_SIZE: "the JPEG has another size than the file's table says",
    BAD_PIXELS: "the JPEG data are corrupt or cut short",
}


MAX_EXTRANEOUS = 16
"""Extra bytes that are accepted before a marker. Some writers pad with a few bytes, and the image
is complete; a damaged stream leaves hundreds."""


def is_harmless(complaint: str) -> bool:
    """Whether libjpeg's warning is only about a few extra bytes before a marker."""
    extraneous = re.search(r"(\d+) extraneous bytes", complaint)
    return extraneous is not None and int(extraneous[1]) <= MAX_EXTRANEOUS


class Decoder:
    """One thread's decoder: a TurboJPEG handle and a buffer for the compressed bytes of one
    record.
    """

    def __init__(self, max_record: int) -> None:
        self.handle = _init()
        if not self.handle:
            raise MemoryError("libturbojpeg could not make a decoder")
        self.scratch = np.empty(max_record, np.uint8)

    def __del__(self) -> None:
        if getattr(self, "handle", None):
            _destroy(self.handle)

    def error(self) -> str:
        """libjpeg-turbo's message for the last failure of this handle."""
        return str(_error(self.handle).decode(errors="replace"))


@numba.njit(nogil=True)
def decode_records(
    file: int, records: np.ndarray, handle: int, scratch: np.ndarray, canvas: np.ndarray, scale: int
) -> tuple[int, int]:
    """Read and decode records into the top left corners of `canvas` uint8 [B, Hmax, Wmax, 3], JPEGs
    at 1/`scale` of their sides (1, 2, 4 or 8), rounded up. Runs without the GIL.

    `records` int64 [B, 5]: pointer, bytes, height, width, mode. Returns (position, code) of the
    first record that fails, or (-1, OK). Canvas pixels outside an image do not change.
    """
    shape = np.empty(4, np.int32)  # width, height, subsampling, colour space
    for b in range(records.shape[0]):
        pointer, size, height, width, mode = records[b]
        if _pread(file, scratch.ctypes.data, size, pointer) != size:
            return b, SHORT_READ
        if mode == RAW:
            pixels = scratch[:size].reshape(height, width, 3)
            canvas[b, :height, :width] = pixels
            continue
        at = shape.ctypes.data
        if _header(handle, scratch.ctypes.data, size, at, at + 4, at + 8, at + 12) != 0:
            return b, BAD_HEADER
        if shape[0] != width or shape[1] != height:
            return b, WRONG_SIZE
        code = decompress(
            handle, scratch.ctypes.data, size, canvas[b].ctypes.data,
            -(-width // scale), canvas.shape[2] * 3, -(-height // scale), RGB, ACCURATE_DCT,
        )  # fmt: skip
        if code != 0:
            return b, BAD_PIXELS
    return -1, OK
