"""Passes 1 and 2: crop, resize as Pillow does it, and flip; then the jitter up to its contrast.

Pillow resizes lines first, rounds to bytes, then resizes columns. Its weights are integers in units
of 2^-22, from float64. Here `weigh` computes them, once for each view; `resize_across` resizes the
lines, `resize_down` the columns. All sums are exact, so the bytes are Pillow's.
"""

import triton
import triton.language as tl
from triton.language import tensor

from pipeline.augment.kernels.colour import colour_before_contrast
from pipeline.augment.kernels.words import (
    FIRST_LINE,
    FLIPPED,
    HEIGHT,
    LOW_BITS,
    WIDTH,
    WORDS,
    X0,
    Y0,
)

UNIT = tl.constexpr(1 << 22)  # the weight 1
HALF = tl.constexpr(1 << 21)


@triton.jit(do_not_specialize=["rows"])
def weigh(
    words: tensor, weights: tensor, rows: tensor, S: tl.constexpr, BLOCK: tl.constexpr
) -> None:
    """Write the filters of a view, across (0) and down (1), to weights int32 [2 B, 2, rows, S].

    Row 0: the first pixel on the crop's side that each of the S pixels reads. Row 1 + k: the weight
    of the k-th pixel from there. The filter across is mirrored for a flipped view.
    """
    row, side = tl.program_id(0) // 2, tl.program_id(0) % 2
    words += row * WORDS
    length = tl.load(words + WIDTH + side)
    flipped = (tl.load(words + FLIPPED) != 0) & (side == 0)
    column = tl.arange(0, BLOCK)
    inside = column < S
    table = weights + tl.program_id(0).to(tl.int64) * rows * S + column

    # In the order of Pillow's operations: each of them rounds.
    scale = length.to(tl.float64) / S
    stretch = tl.maximum(scale, 1.0)
    centre = (tl.where(flipped, S - 1 - column, column).to(tl.float64) + 0.5) * scale
    first = tl.maximum((centre - 2.0 * stretch + 0.5).to(tl.int32), 0)
    count = tl.minimum((centre + 2.0 * stretch + 0.5).to(tl.int32), length) - first
    tl.store(table, first, mask=inside)
    total = tl.zeros((BLOCK,), tl.float64)
    for k in range(taps(length, S)):
        total += _bicubic(first + k - centre + 0.5, k < count, 1.0 / stretch)
    for k in range(taps(length, S)):
        weight = _bicubic(first + k - centre + 0.5, k < count, 1.0 / stretch) / total * UNIT
        table += S
        tl.store(table, (weight + tl.where(weight < 0, -0.5, 0.5)).to(tl.int32), mask=inside)


@triton.jit
def taps(length: tensor, S: tl.constexpr) -> tensor:
    """How many pixels a filter reads on a side of the crop that is `length` pixels long."""
    return (4 * tl.maximum(length, S) + S - 1) // S


@triton.jit
def _bicubic(distance: tensor, used: tensor, shrink: tensor) -> tensor:
    """Keys' kernel with a = -1/2; zero where not `used`."""
    t = tl.abs(distance * shrink)
    near = (1.5 * t - 2.5) * t * t + 1.0
    far = (((t - 5.0) * t + 8.0) * t - 4.0) * -0.5
    return tl.where(used, tl.where(t < 1.0, near, tl.where(t < 2.0, far, 0.0)), 0.0)


@triton.jit(do_not_specialize=["image_stride", "line_stride", "batch", "rows"])
def resize_across(
    canvas: tensor,
    image_stride: tensor,
    line_stride: tensor,
    batch: tensor,
    words: tensor,
    weights: tensor,
    rows: tensor,
    lines: tensor,
    S: tl.constexpr,
    LINES: tl.constexpr,
    TILE_J: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Resize the lines of a crop to `lines` uint8 [lines of all views, 3, S].

    A program makes LINES x TILE_J pixels, by products of pixels and a band matrix of weights on the
    tensor cores, COLUMNS of the crop at a time.
    """
    tiles: tl.constexpr = (S + TILE_J - 1) // TILE_J
    row, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    words += row * WORDS
    height, width = tl.load(words + HEIGHT), tl.load(words + WIDTH)
    y = tl.program_id(1) * LINES + tl.arange(0, LINES)
    if tl.program_id(1) * LINES < height:
        j = tile * TILE_J + tl.arange(0, TILE_J)
        table = weights + row.to(tl.int64) * (2 * rows * S) + tl.minimum(j, S - 1)
        first = tl.load(table)
        count = taps(width, S)
        line = canvas + (row % batch).to(tl.int64) * image_stride + tl.load(words + X0) * 3
        line += (tl.load(words + Y0) + tl.minimum(y, height - 1)).to(tl.int64) * line_stride
        low_bits = tl.load(words + LOW_BITS)

        r, g, b = _zeros(LINES, TILE_J)
        r_low, g_low, b_low = _zeros(LINES, TILE_J)
        for x_first in range(tl.min(first, 0), tl.max(first, 0) + count, COLUMNS):
            x = x_first + tl.arange(0, COLUMNS)
            k = x[:, None] - first[None, :]
            used = (k >= 0) & (k < count)
            weight = tl.load(table[None, :] + (k + 1) * S, mask=used, other=0)
            # Two integers that float16 holds exactly. Sums below 2^24 are exact in float32.
            high = (weight + (1 << low_bits >> 1)) >> low_bits
            low = (weight - (high << low_bits)).to(tl.float16)
            high = high.to(tl.float16)
            pixel = line[:, None] + tl.minimum(x, width - 1)[None, :] * 3
            red, green, blue = _half(pixel), _half(pixel + 1), _half(pixel + 2)
            r, r_low = tl.dot(red, high, r), tl.dot(red, low, r_low)
            g, g_low = tl.dot(green, high, g), tl.dot(green, low, g_low)
            b, b_low = tl.dot(blue, high, b), tl.dot(blue, low, b_low)

        target = (
            lines + (tl.load(words + FIRST_LINE) + y).to(tl.int64)[:, None] * (3 * S) + j[None, :]
        )
        inside = (y < height)[:, None] & (j < S)[None, :]
        tl.store(target, _join(r, r_low, low_bits), mask=inside)
        tl.store(target + S, _join(g, g_low, low_bits), mask=inside)
        tl.store(target + 2 * S, _join(b, b_low, low_bits), mask=inside)


@triton.jit
def _zeros(LINES: tl.constexpr, TILE_J: tl.constexpr) -> tensor:
    zeros = tl.zeros((LINES, TILE_J), tl.float32)
    return zeros, zeros, zeros


@triton.jit
def _half(pixel: tensor) -> tensor:
    return tl.load(pixel).to(tl.float16)


@triton.jit
def _join(high: tensor, low: tensor, low_bits: tensor) -> tensor:
    return level((high.to(tl.int32) << low_bits) + low.to(tl.int32) + HALF)


@triton.jit
def level(total: tensor) -> tensor:
    """Pillow's rounding, of a sum to which HALF is already added."""
    return tl.minimum(tl.maximum(total >> 22, 0), 255)


@triton.jit(do_not_specialize=["rows"])
def resize_down(
    lines: tensor,
    weights: tensor,
    rows: tensor,
    words: tensor,
    sums: tensor,
    scratch: tensor,
    out: tensor,
    S: tl.constexpr,
    TILE_I: tl.constexpr,
    TILE_J: tl.constexpr,
) -> None:
    """Resize the columns of `lines`; apply the colour operations that precede the contrast."""
    tiles_across: tl.constexpr = (S + TILE_J - 1) // TILE_J
    tiles: tl.constexpr = (S + TILE_I - 1) // TILE_I * tiles_across
    row, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    words += row * WORDS
    i = (tile // tiles_across) * TILE_I + tl.arange(0, TILE_I)
    j = (tile % tiles_across) * TILE_J + tl.arange(0, TILE_J)
    inside = (i < S)[:, None] & (j < S)[None, :]
    weight = weights + row.to(tl.int64) * (2 * rows * S) + rows * S + tl.minimum(i, S - 1)
    line = tl.load(words + FIRST_LINE) + tl.load(weight)
    pixel = lines + line.to(tl.int64)[:, None] * (3 * S) + j[None, :]
    r = tl.full((TILE_I, TILE_J), HALF, tl.int32)
    g = r
    b = r
    for _ in range(taps(tl.load(words + HEIGHT), S)):
        weight += S
        factor = tl.load(weight)[:, None]
        r += factor * tl.load(pixel, mask=inside, other=0)
        g += factor * tl.load(pixel + S, mask=inside, other=0)
        b += factor * tl.load(pixel + 2 * S, mask=inside, other=0)
        pixel += 3 * S
    place = i[:, None] * S + j[None, :]
    colour_before_contrast(
        level(r), level(g), level(b), words, row, sums, scratch, out, place, inside, S
    )
