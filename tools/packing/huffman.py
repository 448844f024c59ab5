"""The entropy-coded data of a baseline JPEG: to the symbols of its coefficients and back, compiled
and without the GIL. Huffman tables as in the standard's annexes C and K.

Symbols are an array of `dc`, the quantised DC value of each block in the order of the scan, and of
`ac`, all AC symbols: (run and size) << 16 | the bits of the value. Block b has those from
`starts[b]` to `starts[b + 1]`. They do not depend on tables and restart markers.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.compiling import njit

TABLES = 8
"""Four for DC values, then four for AC values."""
PAD = 256
"""Bytes that must follow the data: more than a block can have, 64 codes of 16 bits with values of
up to 11 bits."""
_LOOK = 10  # bits of a code that one step looks up
_LARGEST_DC, _LARGEST_AC = 11, 10  # bits of a difference and of a coefficient of 8-bit images
_RESERVED = 256  # the symbol that takes the code of only ones, which is not allowed
_LONGEST = 32  # bits of a code before it is limited to 16

_compiled = njit(nogil=True, cache=True)
_inlined = njit(nogil=True, cache=True, inline="always")


class Symbols(NamedTuple):
    """The coefficients of a scan of N blocks."""

    dc: NDArray[np.int32]
    """[N]"""
    starts: NDArray[np.int32]
    """[N + 1]"""
    ac: NDArray[np.int32]


@_compiled
def without_stuffing(
    data: NDArray[np.uint8], position: int, clean: NDArray[np.uint8], ends: NDArray[np.int64]
) -> int:
    """Copy the data from `position` on to `clean`, without stuffed zeros and restart markers. Note
    in `ends` where each part between two markers ends.

    Returns the offset of the marker after the data; -1 if there is none, or if the restart markers
    are not those of `len(ends)` parts.
    """
    size, part, last = 0, 0, len(data) - 1
    while position < last:
        value = data[position]
        if value != 0xFF:
            clean[size] = value
            size += 1
            position += 1
            continue
        after = data[position + 1]
        if after == 0:
            clean[size] = 0xFF
            size += 1
        else:
            ends[part] = size
            part += 1
            if part == len(ends):
                return position if after & 0xF8 != 0xD0 else -1
            if after != 0xD0 + (part - 1) % 8:
                return -1
        position += 2
    return -1


@_compiled
def decoder_tables(
    counts: NDArray[np.uint8], values: NDArray[np.uint8]
) -> tuple[NDArray[np.uint16], NDArray[np.int64]]:
    """For `decode`, from each table's number of codes of each length, uint8 [8, 16], and symbols,
    uint8 [8, 256]:

    - uint16 [8, 2^_LOOK]: for each beginning of a code, its length << 8 | the symbol, or 0 if the
      code is longer;
    - int64 [8, 17, 2]: the last code of each length, and what to add to a code for the place of its
      symbol.

    A table with more codes than bits becomes empty.
    """
    looks = np.zeros((len(counts), 1 << _LOOK), np.uint16)
    lasts = np.full((len(counts), 17, 2), -1, np.int64)
    for table in range(len(counts)):
        code, place = 0, 0
        for length in range(1, 17):
            lasts[table, length, 1] = place - code
            number = int(counts[table, length - 1])
            if code + number > 1 << length:
                looks[table] = 0
                lasts[table, :, 0] = -1
                break
            for _ in range(number if length <= _LOOK else 0):
                begin = code << (_LOOK - length)
                looks[table, begin : begin + (1 << (_LOOK - length))] = (
                    length << 8 | values[table, place]
                )
                code, place = code + 1, place + 1
            if length > _LOOK:
                code, place = code + number, place + number
            if number:
                lasts[table, length, 0] = code - 1
            code <<= 1
    return looks, lasts


@_compiled
def decode(
    clean: NDArray[np.uint8],
    ends: NDArray[np.int64],
    blocks: NDArray[np.int64],
    interval: int,
    looks: NDArray[np.uint16],
    lasts: NDArray[np.int64],
    values: NDArray[np.uint8],
    symbols: Symbols,
) -> bool:
    """Decode a scan with `interval` MCUs in each part into `symbols`.

    `blocks` int64 [blocks of an MCU, 3]: component, DC table, AC table. Of each table: `looks` and
    `lasts` by `decoder_tables`, `values` uint8 [8, 256]. `clean` has `PAD` bytes more than the last
    end. False if the data is not exactly that of the image.
    """
    dc = np.zeros(4, np.int64)
    at, block, part, end = 0, 0, -1, 0
    for mcu in range(len(symbols.dc) // len(blocks)):
        if mcu % interval == 0:
            if part >= 0 and (at + 7) // 8 != ends[part]:
                return False
            dc[:] = 0
            at = ends[part] * 8 if part >= 0 else 0
            part += 1
        for j in range(len(blocks)):
            component, dc_table, ac_table = blocks[j, 0], blocks[j, 1], blocks[j, 2]
            word = _peek(clean, at)
            size, length = _next_symbol(word, dc_table, looks, lasts, values)
            if length == 0 or size > _LARGEST_DC:
                return False
            at += length + size
            dc[component] += _extended(_bits(word, length, size), size)
            symbols.dc[block] = dc[component]
            at, end = _decode_ac(clean, at, ac_table, looks, lasts, values, symbols.ac, end)
            block += 1
            symbols.starts[block] = end
            if at < 0 or at > ends[part] * 8:
                return False
    return (at + 7) // 8 == ends[part]


@_inlined
def _peek(clean: NDArray[np.uint8], at: int) -> np.uint64:
    """At least 57 bits from bit `at` on, in the upper bits."""
    byte = np.uint64(at) >> np.uint64(3)
    word = np.uint64(0)
    for k in range(8):
        word = (word << np.uint64(8)) | np.uint64(clean[byte + np.uint64(k)])
    return word << (np.uint64(at) & np.uint64(7))


@_inlined
def _bits(word: np.uint64, length: int, size: int) -> int:
    """`size` bits of `word` after the first `length`; both together up to 57."""
    return int(np.int64((word << np.uint64(length)) >> np.uint64(1) >> np.uint64(63 - size)))


@_inlined
def _extended(bits: int, size: int) -> int:
    """The value that `size` bits stand for: negative if the first bit is 0."""
    return bits if size == 0 or bits >> (size - 1) else bits - (1 << size) + 1


@_inlined
def _next_symbol(
    word: np.uint64,
    table: int,
    looks: NDArray[np.uint16],
    lasts: NDArray[np.int64],
    values: NDArray[np.uint8],
) -> tuple[int, int]:
    """The symbol at the top of `word`, and the length of its code; 0 = no code."""
    entry = int(np.int64(looks[table, word >> np.uint64(64 - _LOOK)]))
    if entry:
        return entry & 255, entry >> 8
    for length in range(_LOOK + 1, 17):
        code = np.int64(word >> np.uint64(64 - length))
        if code <= lasts[table, length, 0]:
            return int(np.int64(values[table, code + lasts[table, length, 1]])), length
    return 0, 0


@_inlined
def _decode_ac(
    clean: NDArray[np.uint8],
    at: int,
    table: int,
    looks: NDArray[np.uint16],
    lasts: NDArray[np.int64],
    values: NDArray[np.uint8],
    ac: NDArray[np.int32],
    end: int,
) -> tuple[int, int]:
    """Write the AC symbols of a block to `ac` from `end` on. Returns the bit after them, -1 if they
    are impossible, and the new end.
    """
    k, size = 1, 1
    while k < 64:
        word = _peek(clean, at)
        symbol, length = _next_symbol(word, table, looks, lasts, values)
        size = symbol & 15
        ac[end] = symbol << 16 | _bits(word, length, size)
        end += 1
        at += length + size
        if symbol == 0 and length:
            return at, end
        k += (symbol >> 4) + 1
        if length == 0 or size > _LARGEST_AC or (size == 0 and symbol != 0xF0):
            return -1, end
    return (at if k == 64 and size else -1), end


@_compiled
def count(
    symbols: Symbols, blocks: NDArray[np.int64], interval: int, frequency: NDArray[np.int64]
) -> bool:
    """Add the symbols to `frequency` int64 [8, 257], for a scan with restart markers after each
    `interval` MCUs. False if a DC difference is too large.
    """
    dc = np.zeros(4, np.int64)
    for block in range(len(symbols.dc)):
        j = block % len(blocks)
        if j == 0 and block // len(blocks) % interval == 0:
            dc[:] = 0
        component, dc_table, ac_table = blocks[j]
        size = _size(symbols.dc[block] - dc[component])
        if size > _LARGEST_DC:
            return False
        dc[component] = symbols.dc[block]
        frequency[dc_table, size] += 1
        for i in range(symbols.starts[block], symbols.starts[block + 1]):
            frequency[ac_table, symbols.ac[i] >> 16] += 1
    return True


@_compiled
def encode(
    symbols: Symbols,
    blocks: NDArray[np.int64],
    interval: int,
    codes: NDArray[np.int64],
    out: NDArray[np.uint8],
) -> int:
    """Write the scan to `out`, with restart markers after each `interval` MCUs. Returns its bytes;
    -1 if a table lacks a code. `codes` int64 [8, 256]: the code << 8 | its length; 0 = none.
    """
    dc = np.zeros(4, np.int64)
    size, have, restarts = 0, 0, 0
    word = np.uint64(0)
    for block in range(len(symbols.dc)):
        j = block % len(blocks)
        if j == 0 and block and block // len(blocks) % interval == 0:
            size = _finish(word, have, out, size)
            out[size], out[size + 1] = 0xFF, 0xD0 + restarts % 8
            size, have, restarts = size + 2, 0, restarts + 1
            dc[:] = 0
        component, dc_table, ac_table = blocks[j]
        change = symbols.dc[block] - dc[component]
        dc[component] = symbols.dc[block]
        extra = _size(change)
        code = codes[dc_table, extra]
        bits = change if change >= 0 else change + (1 << extra) - 1
        for i in range(symbols.starts[block] - 1, symbols.starts[block + 1]):
            if i >= symbols.starts[block]:
                symbol = symbols.ac[i] >> 16
                code, extra, bits = codes[ac_table, symbol], symbol & 15, symbols.ac[i] & 0xFFFF
            if code == 0:
                return -1
            length = code & 255
            word = (word << np.uint64(length + extra)) | np.uint64((code >> 8) << extra | bits)
            have += length + extra
            if have >= 32:
                have -= 32
                size = _put(np.uint32(word >> np.uint64(have)), out, size)
    return _finish(word, have, out, size)


@_compiled
def _size(value: int) -> int:
    """The bits of a value's magnitude."""
    rest, bits = abs(value), 0
    while rest:
        rest >>= 1
        bits += 1
    return bits


@_inlined
def _put(word: np.uint32, out: NDArray[np.uint8], size: int) -> int:
    """Write four bytes, with a zero after each 0xFF; returns the new size."""
    inverse = ~word
    if (inverse - np.uint32(0x01010101)) & word & np.uint32(0x80808080):  # a byte is 0xFF, perhaps
        for shift in (24, 16, 8, 0):
            out[size] = (word >> np.uint32(shift)) & np.uint32(255)
            size += 1
            if out[size - 1] == 0xFF:
                out[size] = 0
                size += 1
        return size
    for k in range(4):
        out[size + k] = (word >> np.uint32(24 - 8 * k)) & np.uint32(255)
    return size + 4


@_compiled
def _finish(word: np.uint64, have: int, out: NDArray[np.uint8], size: int) -> int:
    """Write the last `have` bits, filled up with ones; returns the new size."""
    while have > 0:
        lack = max(0, 8 - have)
        value = (word << np.uint64(lack) | np.uint64((1 << lack) - 1)) >> np.uint64(
            max(0, have - 8)
        )
        out[size] = value & np.uint64(255)
        size += 1
        if out[size - 1] == 0xFF:
            out[size] = 0
            size += 1
        have -= 8
    return size


@_compiled
def code_table(
    counts: NDArray[np.uint8], values: NDArray[np.uint8], codes: NDArray[np.int64]
) -> None:
    """The codes int64 [256] of a table's symbols, for `encode`."""
    code, place = 0, 0
    codes[:] = 0
    for length in range(1, 17):
        for _ in range(counts[length - 1]):
            codes[values[place]] = code << 8 | length
            code, place = code + 1, place + 1
        code <<= 1


@_compiled
def optimal_table(
    frequency: NDArray[np.int64], counts: NDArray[np.uint8], values: NDArray[np.uint8]
) -> int:
    """The best table for these frequencies int64 [257], which it changes: the number of codes of
    each length, and the symbols in their order. Returns the number of symbols. The standard's
    procedures K.1 to K.4, with ties as in libjpeg.
    """
    sizes, others = np.zeros(257, np.int64), np.full(257, -1, np.int64)
    frequency[_RESERVED] = 1
    while True:
        one = _rarest(frequency, -1)
        other = _rarest(frequency, one)
        if other < 0:
            break
        frequency[one] += frequency[other]
        frequency[other] = 0
        last = _lengthen(one, sizes, others)
        others[last] = other
        _lengthen(other, sizes, others)
    lengths = np.zeros(257, np.int64)
    for symbol in range(257):
        lengths[sizes[symbol]] += 1
    _limit(lengths)
    counts[:] = lengths[1:17]
    place = 0
    for length in range(1, 257):
        for symbol in range(256):
            if sizes[symbol] == length:
                values[place] = symbol
                place += 1
    return place


@_compiled
def _rarest(frequency: NDArray[np.int64], but: int) -> int:
    """The symbol with the lowest frequency, the last of equals; -1 without any."""
    best = -1
    for symbol in range(257):
        count = frequency[symbol]
        if count and symbol != but and (best < 0 or count <= frequency[best]):
            best = symbol
    return best


@_compiled
def _lengthen(symbol: int, sizes: NDArray[np.int64], others: NDArray[np.int64]) -> int:
    """Add a bit to the codes of a chain of symbols; returns its last symbol."""
    sizes[symbol] += 1
    while others[symbol] >= 0:
        symbol = others[symbol]
        sizes[symbol] += 1
    return symbol


@_compiled
def _limit(lengths: NDArray[np.int64]) -> None:
    """Limit the codes to 16 bits, and take away the reserved one."""
    for length in range(256, 16, -1):
        while lengths[length]:
            shorter = length - 2
            while lengths[shorter] == 0:
                shorter -= 1
            lengths[length] -= 2
            lengths[length - 1] += 1
            lengths[shorter + 1] += 2
            lengths[shorter] -= 1
    longest = 16
    while lengths[longest] == 0:
        longest -= 1
    lengths[longest] -= 1
