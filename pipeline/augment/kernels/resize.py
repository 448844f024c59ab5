"""Pass 1: crop, bicubic resize and flip, then the colour operations before the contrast."""

import triton
import triton.language as tl
from triton.language import tensor

from pipeline.augment.kernels.colour import colour_before_contrast
from pipeline.augment.kernels.words import FLIPPED, HEIGHT, WIDTH, WORDS, X0, Y0


@triton.jit
def crop_and_resize(
    canvas: tensor,
    image_stride: tensor,
    line_stride: tensor,
    batch: tensor,
    words: tensor,
    sums: tensor,
    scratch: tensor,
    out: tensor,
    S: tl.constexpr,
    TILE_I: tl.constexpr,
    TILE_J: tl.constexpr,
    LINES: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Crop, resize and flip; apply the colour operations that precede the contrast.

    A program makes TILE_I x TILE_J pixels. It walks down the lines of the crop that they need,
    LINES at a time: it resizes these horizontally, rounds them to bytes as Pillow does after its
    first pass, and adds them to the tile. No intermediate result leaves the chip.
    """
    tiles_across: tl.constexpr = (S + TILE_J - 1) // TILE_J
    tiles: tl.constexpr = (S + TILE_I - 1) // TILE_I * tiles_across
    row = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    words += row * WORDS
    width, height = tl.load(words + WIDTH), tl.load(words + HEIGHT)
    crop = canvas + (row % batch).to(tl.int64) * image_stride
    crop += tl.load(words + Y0).to(tl.int64) * line_stride + tl.load(words + X0) * 3

    first_i, first_j = (tile // tiles_across) * TILE_I, (tile % tiles_across) * TILE_J
    i = first_i + tl.arange(0, TILE_I)
    j = first_j + tl.arange(0, TILE_J)
    i_here = tl.minimum(i, S - 1)  # beyond the view: any pixel with weights; it is not stored
    j_here = tl.minimum(j, S - 1)
    y_from, y_to = _span(first_i, TILE_I, height, S)
    x_from, x_to = _span(first_j, TILE_J, width, S)
    red = tl.zeros((TILE_I, TILE_J), tl.float32)
    green = tl.zeros((TILE_I, TILE_J), tl.float32)
    blue = tl.zeros((TILE_I, TILE_J), tl.float32)
    down_sum = tl.zeros((TILE_I,), tl.float32)
    lines = crop + y_from.to(tl.int64) * line_stride
    for y_first in range(y_from, y_to, LINES):
        y = y_first + tl.arange(0, LINES)
        r, g, b = _resize_across(
            lines, line_stride, y, x_from, x_to, j_here, height, width, S, LINES, TILE_J, COLUMNS
        )
        down = _bicubic(y[None, :], i_here[:, None], height, S)
        down_sum += tl.sum(down, 1)
        red, green, blue = _filter_down(down, r, g, b, red, green, blue)
        lines += LINES * line_stride
    down_scale = (1.0 / down_sum)[:, None]
    r = _to_level(red * down_scale).to(tl.int32)
    g = _to_level(green * down_scale).to(tl.int32)
    b = _to_level(blue * down_scale).to(tl.int32)

    inside = (i < S)[:, None] & (j < S)[None, :]
    j = tl.where(tl.load(words + FLIPPED) != 0, S - 1 - j, j)
    pixel = i[:, None] * S + j[None, :]
    colour_before_contrast(r, g, b, words, row, sums, scratch, out, pixel, inside, S)


@triton.jit
def _resize_across(
    lines: tensor,
    line_stride: tensor,
    y: tensor,
    x_from: tensor,
    x_to: tensor,
    j: tensor,
    height: tensor,
    width: tensor,
    S: tl.constexpr,
    LINES: tl.constexpr,
    TILE_J: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> tensor:
    """Resize lines `y` of the crop horizontally to the view's columns `j`, COLUMNS at a time:
    levels r, g, b [LINES, TILE_J]. `lines`: the address of the first line.
    """
    r = tl.zeros((LINES, TILE_J), tl.float32)
    g = tl.zeros((LINES, TILE_J), tl.float32)
    b = tl.zeros((LINES, TILE_J), tl.float32)
    weight_sum = tl.zeros((TILE_J,), tl.float32)
    for x_first in range(x_from, x_to, COLUMNS):
        x = x_first + tl.arange(0, COLUMNS)
        weight = _bicubic(x[:, None], j[None, :], width, S)
        weight_sum += tl.sum(weight, 0)
        pixel = lines + (tl.arange(0, LINES) * line_stride)[:, None] + (x * 3)[None, :]
        inside = (y < height)[:, None] & (x < width)[None, :]
        r, g, b = _filter_across(pixel, inside, weight, r, g, b)
    scale = (1.0 / weight_sum)[None, :]
    return _to_level(r * scale), _to_level(g * scale), _to_level(b * scale)


@triton.jit
def _span(first: tensor, COUNT: tl.constexpr, length: tensor, S: tl.constexpr) -> tensor:
    """The range of pixels that the filter reads for COUNT outputs, on a side of the crop that is
    `length` pixels long.
    """
    support = 4 * tl.maximum(length, S)
    last = tl.minimum(first + COUNT, S) - 1
    start = tl.maximum((2 * first + 1) * length + S - support, 0) // (2 * S)
    end = tl.minimum(((2 * last + 1) * length + S + support) // (2 * S), length)
    return start, end


@triton.jit
def _bicubic(source: tensor, output: tensor, length: tensor, S: tl.constexpr) -> tensor:
    """Weight of pixel `source` on a crop's side for pixel `output` on the view's, not normalised.

    The distance between their centres is a quotient of integers: it is rounded once, however far
    they are from the corner, and exact where Pillow's is. The weight is zero beyond the crop.
    """
    distance = tl.abs((2 * source + 1) * S - (2 * output + 1) * length).to(tl.float32)
    t = tl.div_rn(distance, (2 * tl.maximum(length, S)).to(tl.float32))
    near = tl.fma(tl.fma(t, 1.5, -2.5), t * t, 1.0)
    far = tl.fma(tl.fma(tl.fma(t, -0.5, 2.5), t, -4.0), t, 2.0)
    weight = tl.where(t < 1, near, tl.where(t < 2, far, 0.0))
    return tl.where(source < length, weight, 0.0)


@triton.jit
def _filter_across(
    pixel: tensor, inside: tensor, weight: tensor, r: tensor, g: tensor, b: tensor
) -> tensor:
    """Add pixels [lines, columns] times weights [columns, tile] to r, g, b [lines, tile]."""
    high = weight.to(tl.float16)
    low = (weight - high.to(tl.float32)).to(tl.float16)
    red = tl.load(pixel, mask=inside, other=0).to(tl.float16)
    green = tl.load(pixel + 1, mask=inside, other=0).to(tl.float16)
    blue = tl.load(pixel + 2, mask=inside, other=0).to(tl.float16)
    r = tl.dot(red, high, tl.dot(red, low, r))
    g = tl.dot(green, high, tl.dot(green, low, g))
    b = tl.dot(blue, high, tl.dot(blue, low, b))
    return r, g, b


@triton.jit
def _filter_down(
    weight: tensor, r: tensor, g: tensor, b: tensor, red: tensor, green: tensor, blue: tensor
) -> tensor:
    """Add weights [tile, lines] times levels [lines, tile] to red, green, blue [tile, tile]."""
    high = weight.to(tl.float16)
    low = (weight - high.to(tl.float32)).to(tl.float16)
    r, g, b = r.to(tl.float16), g.to(tl.float16), b.to(tl.float16)
    red = tl.dot(high, r, tl.dot(low, r, red))
    green = tl.dot(high, g, tl.dot(low, g, green))
    blue = tl.dot(high, b, tl.dot(low, b, blue))
    return red, green, blue


@triton.jit
def _to_level(x: tensor) -> tensor:
    return tl.minimum(tl.maximum(tl.floor(x + 0.5), 0.0), 255.0)
