"""Crop and resize one image on the CPU, compiled and without the GIL: Pillow's bicubic resize, bit
for bit.

Pillow filters the rows, rounds to bytes, and filters the columns. Its weights are whole numbers in
units of 2^-22, and their sums fit 32 bits. Here 16 rows are filtered together, one in each lane of
a vector. They are transposed before and after, so that no pass reads or writes single bytes.

Two loops are stated in LLVM's own terms, which any processor can run: from plain Python no
compiler made vectors of them, and the resize took three times as long.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

from pipeline.compiling import njit

_LANES = 16  # bytes of a vector
_PIXEL = 3 * _LANES  # bytes of a pixel of 16 rows
_BITS = 22  # of a weight after the point

_compiled = njit(nogil=True, cache=True, error_model="numpy")  # no checks: loops use vectors


# ---- Vectors. Each function gets flat arrays and offsets into them, and checks none. ----

_byte, _word = ir.IntType(8), ir.IntType(32)
_bytes, _words = ir.VectorType(_byte, _LANES), ir.VectorType(_word, _LANES)
_vectors: Any = intrinsic  # its type takes the compiler's context for an argument of the caller
_Generate = Callable[[Any, ir.IRBuilder, Any, list[ir.Value]], ir.Value]


@_vectors
def _transpose(
    typing: Any, source: Any, at: Any, stride: Any, target: Any, to: Any, step: Any
) -> tuple[Any, _Generate]:
    """Transpose 16 lines of 16 bytes: line n is at `source[at + n stride]`, in the result at
    `target[to + n step]`.

    Interleaving line n with line n + 8, four times, transposes.
    """

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        begin = _pointer(context, builder, signature, args, 0)
        end = _pointer(context, builder, signature, args, 3)
        lines = [_load(builder, _step(builder, begin, args[2], n)) for n in range(_LANES)]
        low, high = (
            ir.Constant(
                ir.VectorType(_word, _LANES),
                [n // 2 + n % 2 * _LANES + half for n in range(_LANES)],
            )
            for half in (0, _LANES // 2)
        )
        for _ in range(4):
            pairs = zip(lines[: _LANES // 2], lines[_LANES // 2 :], strict=True)
            lines = [builder.shuffle_vector(a, b, half) for a, b in pairs for half in (low, high)]
        for n, line in enumerate(lines):
            _store(builder, line, _step(builder, end, args[5], n))
        return context.get_dummy_value()

    number = types.intp
    return types.void(source, number, number, target, number, number), generate


@_vectors
def _weigh(
    typing: Any, source: Any, at: Any, stride: Any, weights: Any, first: Any, count: Any,
    target: Any, to: Any, step: Any,
) -> tuple[Any, _Generate]:  # fmt: skip
    """Three weighted sums in each of 16 lanes, rounded to bytes:
    target[to + n step + lane] = sum of weights[first + k] source[at + k stride + 16 n + lane] over
    k < count, for n in 0, 1, 2.
    """

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        begin = _pointer(context, builder, signature, args, 0)
        factors = _pointer(context, builder, signature, args, 3)
        end = _pointer(context, builder, signature, args, 6)
        half = ir.Constant(_words, [1 << (_BITS - 1)] * _LANES)
        totals = [cgutils.alloca_once_value(builder, half) for _ in range(3)]  # in registers
        with cgutils.for_range(builder, args[5]) as loop:
            weight = _splat(builder, builder.load(builder.gep(factors, [loop.index])))
            line = builder.gep(begin, [builder.mul(loop.index, args[2])])
            for n, total in enumerate(totals):
                part = builder.gep(line, [ir.Constant(loop.index.type, n * _LANES)])
                level = builder.zext(_load(builder, part), _words)
                builder.store(builder.add(builder.load(total), builder.mul(level, weight)), total)
        for n, total in enumerate(totals):
            _store(builder, _clip(builder, builder.load(total)), _step(builder, end, args[8], n))
        return context.get_dummy_value()

    number = types.intp
    signature = types.void(source, number, number, weights, number, number, target, number, number)
    return signature, generate


def _pointer(
    context: Any, builder: ir.IRBuilder, signature: Any, args: list[ir.Value], number: int
) -> ir.Value:
    """The address of an argument's element; its offset is the next argument."""
    array = context.make_array(signature.args[number])(context, builder, args[number])
    return builder.gep(array.data, [args[number + 1]])


def _step(builder: ir.IRBuilder, begin: ir.Value, stride: ir.Value, n: int) -> ir.Value:
    return builder.gep(begin, [builder.mul(stride, ir.Constant(stride.type, n))])


def _load(builder: ir.IRBuilder, pointer: ir.Value) -> ir.Value:
    return builder.load(builder.bitcast(pointer, _bytes.as_pointer()), align=1)


def _store(builder: ir.IRBuilder, value: ir.Value, pointer: ir.Value) -> None:
    builder.store(value, builder.bitcast(pointer, _bytes.as_pointer()), align=1)


def _splat(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """`value` in every lane."""
    nothing = ir.Constant(_words, ir.Undefined)
    one = builder.insert_element(nothing, value, ir.Constant(_word, 0))
    return builder.shuffle_vector(one, nothing, ir.Constant(_words, [0] * _LANES))


def _clip(builder: ir.IRBuilder, total: ir.Value) -> ir.Value:
    """From units of 2^-22 to levels 0..255."""
    level = builder.ashr(total, ir.Constant(_words, [_BITS] * _LANES))
    for beyond, bound in (("<", 0), (">", 255)):
        limit = ir.Constant(_words, [bound] * _LANES)
        level = builder.select(builder.icmp_signed(beyond, level, limit), limit, level)
    return builder.trunc(level, _bytes)


# ---- The resize ----


@_compiled
def resize(
    image: NDArray[np.uint8], box: NDArray[np.float64], flipped: bool, out: NDArray[np.uint8]
) -> None:
    """Write the `box` (x0 y0 x1 y1) of `image` uint8 [H, W, 3] to `out` uint8 [h, w, 3], mirrored
    if `flipped`. The filter sees the pixels of the box, and all of those that its edges cut.
    """
    left, top = math.floor(box[0]), math.floor(box[1])
    right, bottom = math.ceil(box[2]), math.ceil(box[3])
    across = _filter(box[0] - left, box[2] - left, right - left, out.shape[1])
    down = _filter(box[1] - top, box[3] - top, bottom - top, out.shape[0])
    line = -(-out.shape[1] // _LANES) * _PIXEL  # bytes of a row: whole vectors
    rows = np.empty((bottom - top + _LANES) * line, np.uint8)
    _horizontal(image, (left, top, right, bottom), across, flipped, line, rows)
    _vertical(rows, line, down, out)


@_compiled
def _filter(
    low: float, high: float, limit: int, size: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int32]]:
    """For each of `size` output pixels across low..high of `limit` source pixels: the first source
    pixel, their number, and their weights int32 [size, most], in Pillow's steps.
    """
    scale = (high - low) / size
    stretch = max(scale, 1.0)  # no smoothing when enlarging
    support, narrow = 2 * stretch, 1 / stretch
    first, count = np.empty(size, np.int64), np.empty(size, np.int64)
    exact = np.empty(2 * math.ceil(support) + 1)
    whole = np.empty((size, len(exact)), np.int32)
    for i in range(size):
        centre = low + scale * (i + 0.5)
        first[i] = max(int(centre - support + 0.5), 0)
        count[i] = min(int(centre + support + 0.5), limit) - first[i]
        total = 0.0
        for k in range(count[i]):
            exact[k] = _cubic(abs((k + first[i] - centre + 0.5) * narrow))
            total += exact[k]
        for k in range(count[i]):
            weight = exact[k] / total * (1 << _BITS)
            whole[i, k] = int(weight + math.copysign(0.5, weight))
    return first, count, whole


@_compiled
def _cubic(x: float) -> float:
    """Keys' kernel, a = -1/2, at a distance of x >= 0 pixels."""
    if x < 1:
        return (1.5 * x - 2.5) * x * x + 1
    return (((x - 5) * x + 8) * x - 4) * -0.5 if x < 2 else 0.0


@_compiled
def _horizontal(
    image: NDArray[np.uint8],
    box: tuple[int, int, int, int],
    across: tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int32]],
    flipped: bool,
    line: int,
    rows: NDArray[np.uint8],
) -> None:
    """Filter the rows of the box into `rows`, `line` bytes each. The last 16 of them may be noise.

    Between the transpositions, byte j of 16 rows is at 16 j.
    """
    left, top, right, bottom = box
    first, count, weights = across
    size, most, factors = len(first), weights.shape[1], weights.reshape(-1)
    length, stride, pixels = (right - left) * 3, image.shape[1] * 3, image.reshape(-1)
    source = np.empty((length + _LANES) * _LANES, np.uint8)
    done = np.empty(line * _LANES, np.uint8)
    for y in range(top, bottom, _LANES):
        begin, rest = y * stride + left * 3, min(_LANES, bottom - y)
        if begin + (_LANES - 1) * stride + length + _LANES <= len(pixels):
            for j in range(0, length, _LANES):
                _transpose(pixels, begin + j, stride, source, j * _LANES, _LANES)
        else:
            edge = _copy(pixels, begin, stride, rest, length)
            for j in range(0, length, _LANES):
                _transpose(edge, j, length, source, j * _LANES, _LANES)
        for i in range(size):
            x = size - 1 - i if flipped else i
            at, to = first[i] * _PIXEL, x * _PIXEL
            _weigh(source, at, _PIXEL, factors, i * most, count[i], done, to, _LANES)
        for j in range(0, size * 3, _LANES):
            _transpose(done, j * _LANES, _LANES, rows, (y - top) * line + j, line)


@_compiled
def _copy(
    pixels: NDArray[np.uint8], begin: int, stride: int, rows: int, length: int
) -> NDArray[np.uint8]:
    """The first `length` bytes of up to 16 rows, where vectors may read beyond the last of them."""
    copy = np.empty(_LANES * (length + 1), np.uint8)
    for row in range(rows):
        for j in range(length):
            copy[row * length + j] = pixels[begin + row * stride + j]
    return copy


@_compiled
def _vertical(
    rows: NDArray[np.uint8],
    line: int,
    down: tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int32]],
    out: NDArray[np.uint8],
) -> None:
    """Filter the columns of `rows`, `line` bytes each, into `out` uint8 [h, w, 3]."""
    first, count, weights = down
    most, factors = weights.shape[1], weights.reshape(-1)
    done = np.empty(line, np.uint8)
    for i in range(len(out)):
        for j in range(0, line, _PIXEL):
            at = first[i] * line + j
            _weigh(rows, at, line, factors, i * most, count[i], done, j, _LANES)
        row = out[i].reshape(-1)
        for j in range(len(row)):
            row[j] = done[j]
