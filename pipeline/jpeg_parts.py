"""Whether a JPEG stream has all parts of its image: the tables that its scans use, and all scans.

An abbreviated stream leaves out tables that the decoder is supposed to know, such as the frames of
a Motion JPEG. A decoder that has decoded another image before may use the tables of that one. And
decoders guess the coefficients that no scan has sent in different ways.
"""

import numpy as np
from numpy.typing import NDArray

from pipeline.compiling import njit

MAX_SCANS = 500
"""Most scans of an image, as in libjpeg-turbo. Encoders write about ten."""
QUANTISATION, HUFFMAN, SCANS, TOO_MANY = 1, 2, 4, 8
"""Bits of `missing_parts`: tables that a scan uses before the stream defines them; scans with the
rest of a component's coefficients; and more than MAX_SCANS."""

_PROGRESSIVE, _ARITHMETIC = (0xC2, 0xC6, 0xCA, 0xCE), (0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF)
_HUFFMAN_TABLES, _START_OF_SCAN, _END_OF_IMAGE, _QUANTISATION_TABLES = 0xC4, 0xDA, 0xD9, 0xDB
_ONES, _TOPS = np.uint64(0x0101010101010101), np.uint64(0x8080808080808080)


def missing_parts(data: bytes | NDArray[np.uint8]) -> int:
    """The parts that are missing, as bits; 0 = none. Looks only at the markers: a stream that is
    damaged in another way may give any.
    """
    return int(_missing(np.frombuffer(data, np.uint8)))


@njit(nogil=True, cache=True)
def next_marker(data: NDArray[np.uint8], position: int) -> int:
    """Offset of the next marker: a 0xFF that is not stuffing, a fill byte or a restart; -1 without
    one. Looks at eight bytes at a time, because few groups of eight contain a 0xFF.
    """
    last = len(data) - 1
    if position >= last:
        return -1
    words = data[position : len(data) - (len(data) - position) % 8].view(np.uint64)
    for w in range(len(words) + 1):
        if w < len(words):
            inverse = ~words[w]
            if not (inverse - _ONES) & ~inverse & _TOPS:  # no byte of `inverse` is zero
                continue
        for i in range(position + 8 * w, min(position + 8 * w + 8, last)):
            after = data[i + 1]
            if data[i] == 0xFF and after != 0 and after != 0xFF and after & 0xF8 != 0xD0:
                return i
    return -1


@njit(nogil=True, cache=True)
def _missing(data: NDArray[np.uint8]) -> int:
    kind_of_frame, tables = 0, np.zeros(3, np.int64)  # which quantisation, DC and AC tables exist
    quantisation_of = np.zeros(256, np.int64)  # the table's number, by the component's
    sent = np.full((256, 64), -1, np.int8)  # the lowest bit sent of each component's coefficients
    components = np.zeros(256, np.bool_)
    missing, scans, position = 0, 0, next_marker(data, 0)
    while position >= 0:
        kind = int(data[position + 1])
        begin = position + 4
        if kind == _END_OF_IMAGE or begin > len(data):
            break
        if kind == 0xD8 or kind == 0x01:  # markers without a segment
            position = next_marker(data, position + 2)
            continue
        end = position + 2 + 256 * int(data[position + 2]) + int(data[position + 3])
        body = data[begin : max(begin, end)]
        if kind == _QUANTISATION_TABLES:
            _note_quantisation(body, tables)
        elif kind == _HUFFMAN_TABLES:
            _note_huffman(body, tables)
        elif 0xC0 <= kind <= 0xCF and kind != 0xC8 and kind != 0xCC:
            kind_of_frame = kind
            for at in range(6, len(body) - 2, 3):
                quantisation_of[body[at]] = body[at + 2]
                components[body[at]] = True
        elif kind == _START_OF_SCAN:
            scans += 1
            if scans > MAX_SCANS:
                return TOO_MANY
            missing |= _missing_in_scan(body, kind_of_frame, tables, quantisation_of)
            _note_scan(body, kind_of_frame, sent)
            if kind_of_frame not in _PROGRESSIVE and body[:1].sum() == components.sum():
                break  # the only scan
        position = next_marker(data, max(begin, end))
    for component in np.flatnonzero(components):
        if sent[component].any():
            return missing | SCANS
    return missing


@njit(nogil=True, cache=True)
def _note_scan(body: NDArray[np.uint8], kind_of_frame: int, sent: NDArray[np.int8]) -> None:
    components = int(body[0]) if len(body) else 0
    if len(body) < 4 + 2 * components:
        return
    first, last, low = 0, 63, 0
    if kind_of_frame in _PROGRESSIVE:
        first, last = body[1 + 2 * components], body[2 + 2 * components]
        low = body[3 + 2 * components] & 15
    for at in range(1, 1 + 2 * components, 2):
        sent[body[at], first : last + 1] = low


@njit(nogil=True, cache=True)
def _note_quantisation(body: NDArray[np.uint8], tables: NDArray[np.int64]) -> None:
    at = 0
    while at < len(body):
        tables[0] |= 1 << (body[at] & 15)
        at += 129 if body[at] >> 4 else 65


@njit(nogil=True, cache=True)
def _note_huffman(body: NDArray[np.uint8], tables: NDArray[np.int64]) -> None:
    at = 0
    while at + 17 <= len(body):
        tables[2 if body[at] >> 4 else 1] |= 1 << (body[at] & 15)
        at += 17 + int(body[at + 1 : at + 17].sum())


@njit(nogil=True, cache=True)
def _missing_in_scan(
    body: NDArray[np.uint8],
    kind_of_frame: int,
    tables: NDArray[np.int64],
    quantisation_of: NDArray[np.int64],
) -> int:
    components = int(body[0]) if len(body) else 0
    if len(body) < 4 + 2 * components:
        return 0
    first, high = body[1 + 2 * components], body[3 + 2 * components] >> 4
    progressive = kind_of_frame in _PROGRESSIVE
    uses_dc = not progressive or (first == 0 and high == 0)
    uses_ac = not progressive or first > 0
    missing = 0
    for at in range(1, 1 + 2 * components, 2):
        if not tables[0] >> (quantisation_of[body[at]] & 15) & 1:
            missing |= QUANTISATION
        if kind_of_frame in _ARITHMETIC:
            continue
        dc, ac = body[at + 1] >> 4, body[at + 1] & 15
        if (uses_dc and not tables[1] >> dc & 1) or (uses_ac and not tables[2] >> ac & 1):
            missing |= HUFFMAN
    return missing
