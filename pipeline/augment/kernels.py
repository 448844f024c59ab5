"""The Triton kernels of the "triton" backend; `pipeline.augment.triton` launches them.

They follow Pillow's C code: bytes between operations, rounded in each as Pillow does. Colours are
computed in integers, or in float32 operations rounded as IEEE demands, and come out as Pillow's
bytes; launch with enable_fp_fusion=False, for a fused multiply-add rounds once and Pillow twice. A
filter is a product with a band matrix, on the tensor cores: bytes are exact in float16, and a
weight is the sum of two float16 numbers, which is as fine as Pillow's 22 bits.

A view is one row of parameters, number v * B + b. S is its side in pixels, i and j its lines and
columns, y and x those of what it is made from. Colours are int32 levels 0..255, a tensor each.
"""

import triton
import triton.language as tl
from triton.language import tensor

from pipeline.augment import IMAGENET_MEAN, IMAGENET_STD
from pipeline.augment import SOLARIZE_THRESHOLD as _SOLARIZE_THRESHOLD

# A row of parameters, in words of 32 bits; `pipeline.augment.triton` packs it.
X0 = tl.constexpr(0)
Y0 = tl.constexpr(1)
WIDTH = tl.constexpr(2)
HEIGHT = tl.constexpr(3)
FLIPPED = tl.constexpr(4)
GREY = tl.constexpr(5)
SOLARIZED = tl.constexpr(6)
ORDER = tl.constexpr(7)  # four bits a place: the operation there, or 15
CONTRAST_PLACE = tl.constexpr(8)  # 4: no contrast
HUE = tl.constexpr(9)  # levels to add
FACTORS = tl.constexpr(10)  # float32: brightness, contrast, saturation
BOX = tl.constexpr(13)  # pixels of full weight on either side in a box of the blur; -1: no blur
BOX_NEAR = tl.constexpr(14)  # their weight, in 2^-24
BOX_FAR = tl.constexpr(15)  # that of the next pixel on either side
WORDS = tl.constexpr(16)

# A sum over a box and one over its two far pixels in one number: sum + 2^14 far, below 2^24.
FAR = tl.constexpr(1 << 14)

SOLARIZE_THRESHOLD = tl.constexpr(_SOLARIZE_THRESHOLD)
RED_SCALE, GREEN_SCALE, BLUE_SCALE = (tl.constexpr(1 / (255 * std)) for std in IMAGENET_STD)
RED_SHIFT, GREEN_SHIFT, BLUE_SHIFT = (
    tl.constexpr(-mean / std) for mean, std in zip(IMAGENET_MEAN, IMAGENET_STD, strict=True)
)


# ---- The three passes ----


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
    """Crop, resize, flip, and colour as far as that needs no mean of the whole view.

    A program makes TILE_I x TILE_J pixels. It walks down the lines of the crop that they need,
    LINES at a time: resizes them horizontally, in steps of COLUMNS, rounds to bytes as Pillow does
    after its first pass, and adds them to the tile. Nothing in between leaves the chip.
    """
    tiles_across: tl.constexpr = (S + TILE_J - 1) // TILE_J
    tiles: tl.constexpr = (S + TILE_I - 1) // TILE_I * tiles_across
    row = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    words += row * WORDS
    width = tl.load(words + WIDTH)
    height = tl.load(words + HEIGHT)
    crop = canvas + (row % batch).to(tl.int64) * image_stride
    crop += tl.load(words + Y0).to(tl.int64) * line_stride + tl.load(words + X0) * 3

    first_i = (tile // tiles_across) * TILE_I
    first_j = (tile % tiles_across) * TILE_J
    i = first_i + tl.arange(0, TILE_I)
    j = first_j + tl.arange(0, TILE_J)
    i_here = tl.minimum(i, S - 1)  # beyond the view: a pixel that has weights, and is not stored
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
        r = tl.zeros((LINES, TILE_J), tl.float32)
        g = tl.zeros((LINES, TILE_J), tl.float32)
        b = tl.zeros((LINES, TILE_J), tl.float32)
        across_sum = tl.zeros((TILE_J,), tl.float32)
        for x_first in range(x_from, x_to, COLUMNS):
            x = x_first + tl.arange(0, COLUMNS)
            across = _bicubic(x[:, None], j_here[None, :], width, S)
            across_sum += tl.sum(across, 0)
            pixel = lines + (tl.arange(0, LINES) * line_stride)[:, None] + (x * 3)[None, :]
            inside = (y < height)[:, None] & (x < width)[None, :]
            r, g, b = _filter_across(pixel, inside, across, r, g, b)
        across_scale = (1.0 / across_sum)[None, :]
        down = _bicubic(y[None, :], i_here[:, None], height, S)
        down_sum += tl.sum(down, 1)
        r, g, b = (
            _to_level(r * across_scale),
            _to_level(g * across_scale),
            _to_level(b * across_scale),
        )
        red, green, blue = _filter_down(down, r, g, b, red, green, blue)
        lines += LINES * line_stride
    down_scale = (1.0 / down_sum)[:, None]
    r = _to_level(red * down_scale).to(tl.int32)
    g = _to_level(green * down_scale).to(tl.int32)
    b = _to_level(blue * down_scale).to(tl.int32)

    inside = (i < S)[:, None] & (j < S)[None, :]
    j = tl.where(tl.load(words + FLIPPED) != 0, S - 1 - j, j)
    pixel = i[:, None] * S + j[None, :]
    _colour_before_contrast(r, g, b, words, row, sums, scratch, out, pixel, inside, S)


@triton.jit
def colour(
    pixels: tensor,
    words: tensor,
    sums: tensor,
    scratch: tensor,
    out: tensor,
    S: tl.constexpr,
    BLOCK: tl.constexpr,
    BEFORE_CONTRAST: tl.constexpr,
) -> None:
    """BEFORE_CONTRAST: colour `pixels` as far as that needs no mean of the whole view. Otherwise
    the rest, for views that have contrast: read from `pixels`, which are the scratch memory.
    """
    blocks: tl.constexpr = (S * S + BLOCK - 1) // BLOCK
    row = tl.program_id(0) // blocks
    pixel = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < S * S
    words += row * WORDS
    source = pixels + row.to(tl.int64) * (S * S * 3) + pixel * 3
    place = tl.load(words + CONTRAST_PLACE)
    if BEFORE_CONTRAST:
        r, g, b = _load(source, inside)
        _colour_before_contrast(r, g, b, words, row, sums, scratch, out, pixel, inside, S)
    elif place < 4:
        r, g, b = _load(source, inside)
        mean = (2 * tl.load(sums + row) + S * S) // (2 * S * S)
        r, g, b = _jitter(r, g, b, words, place, 4, mean.to(tl.int32))
        _grey_and_finish(r, g, b, words, row, scratch, out, pixel, inside, S)


@triton.jit
def blur(
    words: tensor,
    sums: tensor,  # not needed here
    scratch: tensor,
    out: tensor,
    tiles: tensor,
    S: tl.constexpr,
    WINDOW: tl.constexpr,
) -> None:
    """Blur as Pillow does, by three boxes across and three down with bytes between, and finish.

    A program loads WINDOW x WINDOW pixels, each box makes its own reach at either side worthless,
    and the rest is stored. tiles: programs a view, enough for the widest box of the batch.
    """
    row = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    words += row * WORDS
    box = tl.load(words + BOX)
    margin = 3 * (box + 1)
    side = WINDOW - 2 * margin
    tiles_across = (S + side - 1) // side
    if (box >= 0) & (tile < tiles_across * tiles_across):
        near = tl.load(words + BOX_NEAR).to(tl.uint32)
        far = tl.load(words + BOX_FAR).to(tl.uint32)
        k = tl.arange(0, WINDOW) - margin
        i = (tile // tiles_across) * side + k
        j = (tile % tiles_across) * side + k
        # Beyond the view each box sees its edge go on: there, its output is that of the edge.
        i_here = tl.minimum(tl.maximum(i, 0), S - 1)
        j_here = tl.minimum(tl.maximum(j, 0), S - 1)
        across = _box(tl.abs(j[:, None] - j_here[None, :]), box)
        down = _box(tl.abs(i[:, None] - i_here[None, :]), box)

        wanted = (k >= 0) & (k < side)
        inside = (wanted & (i < S))[:, None] & (wanted & (j < S))[None, :]
        first = row.to(tl.int64) * (S * S * 3)
        view = scratch + first + (i_here[:, None] * S + j_here[None, :]) * 3
        target = out + first + (i[:, None] * S + j[None, :]) * 3
        threshold = _solarize_threshold(words)
        r = _blur_channel(view, across, down, near, far)
        tl.store(target, _normalize(r, threshold, RED_SCALE, RED_SHIFT), mask=inside)
        g = _blur_channel(view + 1, across, down, near, far)
        tl.store(target + 1, _normalize(g, threshold, GREEN_SCALE, GREEN_SHIFT), mask=inside)
        b = _blur_channel(view + 2, across, down, near, far)
        tl.store(target + 2, _normalize(b, threshold, BLUE_SCALE, BLUE_SHIFT), mask=inside)


# ---- Filters ----


@triton.jit
def _span(first: tensor, COUNT: tl.constexpr, length: tensor, S: tl.constexpr) -> tensor:
    """Which pixels of a side of the crop, `length` long, the filter of COUNT outputs looks at."""
    support = 4 * tl.maximum(length, S)
    last = tl.minimum(first + COUNT, S) - 1
    start = tl.maximum((2 * first + 1) * length + S - support, 0) // (2 * S)
    end = tl.minimum(((2 * last + 1) * length + S + support) // (2 * S), length)
    return start, end


@triton.jit
def _bicubic(source: tensor, output: tensor, length: tensor, S: tl.constexpr) -> tensor:
    """Weight of pixel `source` of a crop's side in pixel `output` of the view's, not normalised.

    The distance of their centres is a quotient of integers: rounded once, however far they are from
    the corner, and exact where Pillow's is. Zero beyond the crop: there the filter sees nothing.
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
    weight: tensor,
    r: tensor,
    g: tensor,
    b: tensor,
    red: tensor,
    green: tensor,
    blue: tensor,
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
def _box(distance: tensor, box: tensor) -> tensor:
    """The matrix of one box of the blur, from the distances of its inputs and outputs."""
    return tl.where(distance <= box, 1, tl.where(distance == box + 1, FAR, 0)).to(tl.float16)


@triton.jit
def _blur_channel(pixel: tensor, across: tensor, down: tensor, near: tensor, far: tensor) -> tensor:
    level = tl.load(pixel).to(tl.float16)
    for _ in range(3):
        level = _blur_lines(level, across, near, far)
    level = tl.trans(level)
    for _ in range(3):
        level = _blur_lines(level, down, near, far)
    return tl.trans(level).to(tl.int32)


@triton.jit
def _blur_lines(level: tensor, matrix: tensor, near: tensor, far: tensor) -> tensor:
    """One box: the sums are exact, and weighted and rounded in Pillow's fixed point."""
    total = tl.dot(level, matrix).to(tl.int32).to(tl.uint32)
    return (((total % FAR) * near + (total // FAR) * far + (1 << 23)) >> 24).to(tl.float16)


@triton.jit
def _to_level(x: tensor) -> tensor:
    return tl.minimum(tl.maximum(tl.floor(x + 0.5), 0.0), 255.0)


# ---- Colour ----


@triton.jit
def _colour_before_contrast(
    r: tensor,
    g: tensor,
    b: tensor,
    words: tensor,
    row: tensor,
    sums: tensor,
    scratch: tensor,
    out: tensor,
    pixel: tensor,
    inside: tensor,
    S: tl.constexpr,
) -> None:
    """Jitter up to the contrast and add up the lightness for it; without contrast, all colour.

    An integer sum is the same in whatever order the programs get to it.
    """
    place = tl.load(words + CONTRAST_PLACE)
    r, g, b = _jitter(r, g, b, words, 0, place, 0)
    if place < 4:
        tl.atomic_add(sums + row, tl.sum(tl.where(inside, _lightness(r, g, b), 0)).to(tl.int64))
        _store_levels(scratch, r, g, b, row, pixel, inside, S)
    else:
        _grey_and_finish(r, g, b, words, row, scratch, out, pixel, inside, S)


@triton.jit
def _grey_and_finish(
    r: tensor,
    g: tensor,
    b: tensor,
    words: tensor,
    row: tensor,
    scratch: tensor,
    out: tensor,
    pixel: tensor,
    inside: tensor,
    S: tl.constexpr,
) -> None:
    """What follows the jitter; a view to be blurred goes to the scratch memory."""
    if tl.load(words + GREY) != 0:
        r = _lightness(r, g, b)
        g = r
        b = r
    if tl.load(words + BOX) >= 0:
        _store_levels(scratch, r, g, b, row, pixel, inside, S)
    else:
        _finish(r, g, b, words, row, out, pixel, inside, S)


@triton.jit
def _finish(
    r: tensor,
    g: tensor,
    b: tensor,
    words: tensor,
    row: tensor,
    out: tensor,
    pixel: tensor,
    inside: tensor,
    S: tl.constexpr,
) -> None:
    """Solarize, normalise, and store as the type of the output."""
    threshold = _solarize_threshold(words)
    r = _normalize(r, threshold, RED_SCALE, RED_SHIFT)
    g = _normalize(g, threshold, GREEN_SCALE, GREEN_SHIFT)
    b = _normalize(b, threshold, BLUE_SCALE, BLUE_SHIFT)
    _store(out, r, g, b, row, pixel, inside, S)


@triton.jit
def _solarize_threshold(words: tensor) -> tensor:
    """From here on a level is inverted."""
    return tl.where(tl.load(words + SOLARIZED) != 0, SOLARIZE_THRESHOLD, 256)


@triton.jit
def _normalize(
    level: tensor, threshold: tensor, SCALE: tl.constexpr, SHIFT: tl.constexpr
) -> tensor:
    return tl.where(level < threshold, level, 255 - level).to(tl.float32) * SCALE + SHIFT


@triton.jit
def _store_levels(
    scratch: tensor,
    r: tensor,
    g: tensor,
    b: tensor,
    row: tensor,
    pixel: tensor,
    inside: tensor,
    S: tl.constexpr,
) -> None:
    _store(scratch, r.to(tl.uint8), g.to(tl.uint8), b.to(tl.uint8), row, pixel, inside, S)


@triton.jit
def _store(
    memory: tensor,
    r: tensor,
    g: tensor,
    b: tensor,
    row: tensor,
    pixel: tensor,
    inside: tensor,
    S: tl.constexpr,
) -> None:
    """Into [rows, S, S, 3], as its type."""
    target = memory + row.to(tl.int64) * (S * S * 3) + pixel * 3
    tl.store(target, r, mask=inside)
    tl.store(target + 1, g, mask=inside)
    tl.store(target + 2, b, mask=inside)


@triton.jit
def _load(source: tensor, inside: tensor) -> tensor:
    r = tl.load(source, mask=inside, other=0).to(tl.int32)
    g = tl.load(source + 1, mask=inside, other=0).to(tl.int32)
    b = tl.load(source + 2, mask=inside, other=0).to(tl.int32)
    return r, g, b


@triton.jit
def _jitter(
    r: tensor,
    g: tensor,
    b: tensor,
    words: tensor,
    first: tensor,
    last: tensor,
    mean: tensor,
) -> tensor:
    """The operations at places first..last-1 of the drawn order; mean: of the lightness before the
    contrast, wanted only where that is among them.
    """
    order = tl.load(words + ORDER)
    for place in range(first, last):
        operation = (order >> (4 * place)) & 15
        if operation == 3:
            r, g, b = _hue(r, g, b, tl.load(words + HUE))
        elif operation < 3:
            factor = tl.load(words + FACTORS + operation).to(tl.float32, bitcast=True)
            ground = tl.where(
                operation == 2, _lightness(r, g, b), tl.where(operation == 1, mean, 0)
            )
            r = _blend(ground, r, factor)
            g = _blend(ground, g, factor)
            b = _blend(ground, b, factor)
    return r, g, b


@triton.jit
def _lightness(r: tensor, g: tensor, b: tensor) -> tensor:
    return (r * 19595 + g * 38470 + b * 7471 + 32768) >> 16


@triton.jit
def _blend(ground: tensor, level: tensor, factor: tensor) -> tensor:
    """From ground (factor 0) to level (1) and beyond, truncated."""
    mixed = ground.to(tl.float32) + factor * (level - ground).to(tl.float32)
    return tl.minimum(tl.maximum(mixed, 0.0), 255.0).to(tl.int32)


@triton.jit
def _hue(r: tensor, g: tensor, b: tensor, shift: tensor) -> tensor:
    """To HSV and back, in bytes: 255 levels of hue make a turn, but it wraps at 256."""
    high = tl.maximum(r, tl.maximum(g, b))
    low = tl.minimum(r, tl.minimum(g, b))
    chroma = high - low
    some_chroma = tl.maximum(chroma, 1).to(tl.float32)  # of a grey pixel neither hue nor saturation
    saturation = _floor_of_255(tl.div_rn(some_chroma, tl.maximum(high, 1).to(tl.float32)))
    saturation = tl.where(chroma == 0, 0, saturation)

    # Of Pillow's three quotients (high - channel) / chroma one is 0 and one 1. In sixths of a turn
    # the hue lies at or below a primary colour by 1 - the third, or above by as much.
    third = tl.div_rn((2 * high + low - r - g - b).to(tl.float32), some_chroma)
    above = tl.where(r == high, b == low, tl.where(g == high, r == low, g == low))
    primary = tl.where(r == high, 0.0, tl.where(g == high, 2.0, 4.0))
    sixths = tl.where(above, primary + 1.0 - third, primary - 1.0 + third)
    # Turns, rounded to float32 once as from Pillow's double: first the error of the division, then
    # that of the sum, and both are added again.
    turns = tl.div_rn(sixths, 6.0)
    wrapped = turns + 1.0
    missing = (turns - (wrapped - 1.0)) + ((sixths - 4.0 * turns) - 2.0 * turns) / 6.0
    turns = tl.where(sixths < 0, wrapped + missing, turns)
    hue = tl.where(chroma == 0, 0, _floor_of_255(turns))
    return _from_hsv((hue + shift) & 255, saturation, high)


@triton.jit
def _floor_of_255(x: tensor) -> tensor:
    """floor(255 x) of the exact product, which in float32 may be rounded up to the integer."""
    level = tl.floor(x * 255.0)
    level = tl.where(x * 256.0 - level < x, level - 1.0, level)
    return level.to(tl.int32)


@triton.jit
def _from_hsv(hue: tensor, saturation: tensor, value: tensor) -> tensor:
    """In integers; no quotient is halfway between two levels."""
    sector = 6 * hue // 255
    part = 6 * hue - 255 * sector
    p = (2 * value * (255 - saturation) + 255) // 510
    q = (2 * value * (65025 - saturation * part) + 65025) // 130050
    t = (2 * value * (65025 - saturation * (255 - part)) + 65025) // 130050
    sector = tl.where(sector == 6, 0, sector)
    r = tl.where((sector == 0) | (sector == 5), value, p)
    r = tl.where(sector == 1, q, tl.where(sector == 4, t, r))
    g = tl.where((sector == 1) | (sector == 2), value, p)
    g = tl.where(sector == 3, q, tl.where(sector == 0, t, g))
    b = tl.where((sector == 3) | (sector == 4), value, p)
    b = tl.where(sector == 5, q, tl.where(sector == 2, t, b))
    return r, g, b
