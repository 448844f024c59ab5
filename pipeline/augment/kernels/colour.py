"""Pass 3: the colour operations, which passes 2 and 4 use too.

The contrast needs the mean of the whole view, so the operations before it are in the pass before.
"""

import triton
import triton.language as tl
from triton.language import tensor

from pipeline.augment import IMAGENET_MEAN, IMAGENET_STD
from pipeline.augment import SOLARIZE_THRESHOLD as _SOLARIZE_THRESHOLD
from pipeline.augment.kernels.words import (
    BOX,
    CONTRAST_POSITION,
    FACTORS,
    GREY,
    HUE,
    ORDER,
    SOLARIZED,
    WORDS,
)

SOLARIZE_THRESHOLD = tl.constexpr(_SOLARIZE_THRESHOLD)
RED_SCALE, GREEN_SCALE, BLUE_SCALE = (tl.constexpr(1 / (255 * std)) for std in IMAGENET_STD)
RED_SHIFT, GREEN_SHIFT, BLUE_SHIFT = (
    tl.constexpr(-mean / std) for mean, std in zip(IMAGENET_MEAN, IMAGENET_STD, strict=True)
)


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
    """With BEFORE_CONTRAST: apply the operations that precede the contrast to `pixels`. Without it:
    apply the others to the views that have contrast; `pixels` is then the scratch memory, which
    has a plane for each channel, so that a thread reads and writes four levels at once.
    """
    blocks: tl.constexpr = (S * S + BLOCK - 1) // BLOCK
    row = tl.program_id(0) // blocks
    pixel = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < S * S
    words += row * WORDS
    view = pixels + row.to(tl.int64) * (S * S * 3)
    position = tl.load(words + CONTRAST_POSITION)
    if BEFORE_CONTRAST:
        r, g, b = _load(view + pixel * 3, 1, inside)
        colour_before_contrast(r, g, b, words, row, sums, scratch, out, pixel, inside, S)
    elif position < 4:
        r, g, b = _load(view + pixel, S * S, inside)
        mean = (2 * tl.load(sums + row) + S * S) // (2 * S * S)
        r, g, b = _jitter(r, g, b, words, position, 4, mean.to(tl.int32))
        _grey_and_finish(r, g, b, words, row, scratch, out, pixel, inside, S)


@triton.jit
def colour_before_contrast(
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
    """Jitter up to the contrast and sum up the lightness for it; without contrast, all colour.

    The sum is one of integers, so it does not depend on the order of the programs.
    """
    position = tl.load(words + CONTRAST_POSITION)
    r, g, b = _jitter(r, g, b, words, 0, position, 0)
    if position < 4:
        tl.atomic_add(sums + row, tl.sum(tl.where(inside, _lightness(r, g, b), 0)).to(tl.int64))
        _keep(scratch, r, g, b, row, pixel, inside, S)
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
    """Grey, then solarize, normalise and store; a view that will be blurred goes to the scratch
    memory after the grey.
    """
    if tl.load(words + GREY) != 0:
        r = _lightness(r, g, b)
        g = r
        b = r
    if tl.load(words + BOX) >= 0:
        _keep(scratch, r, g, b, row, pixel, inside, S)
    else:
        threshold = solarize_threshold(words)
        red = normalize(r, threshold, RED_SCALE, RED_SHIFT)
        green = normalize(g, threshold, GREEN_SCALE, GREEN_SHIFT)
        blue = normalize(b, threshold, BLUE_SCALE, BLUE_SHIFT)
        target = out + row.to(tl.int64) * (S * S * 3) + pixel * 3
        _store(target, 1, red, green, blue, inside)


@triton.jit
def solarize_threshold(words: tensor) -> tensor:
    """Levels from this one on are inverted."""
    return tl.where(tl.load(words + SOLARIZED) != 0, SOLARIZE_THRESHOLD, 256)


@triton.jit
def normalize(level: tensor, threshold: tensor, SCALE: tl.constexpr, SHIFT: tl.constexpr) -> tensor:
    return tl.where(level < threshold, level, 255 - level).to(tl.float32) * SCALE + SHIFT


@triton.jit
def _keep(
    scratch: tensor,
    r: tensor,
    g: tensor,
    b: tensor,
    row: tensor,
    pixel: tensor,
    inside: tensor,
    S: tl.constexpr,
) -> None:
    target = scratch + row.to(tl.int64) * (S * S * 3) + pixel
    _store(target, S * S, r, g, b, inside)


@triton.jit
def _store(
    target: tensor, STEP: tl.constexpr, r: tensor, g: tensor, b: tensor, inside: tensor
) -> None:
    """Store channels that lie STEP apart; tl.store converts to the memory's type."""
    tl.store(target, r, mask=inside)
    tl.store(target + STEP, g, mask=inside)
    tl.store(target + 2 * STEP, b, mask=inside)


@triton.jit
def _load(source: tensor, STEP: tl.constexpr, inside: tensor) -> tensor:
    r = tl.load(source, mask=inside, other=0).to(tl.int32)
    g = tl.load(source + STEP, mask=inside, other=0).to(tl.int32)
    b = tl.load(source + 2 * STEP, mask=inside, other=0).to(tl.int32)
    return r, g, b


@triton.jit
def _jitter(
    r: tensor, g: tensor, b: tensor, words: tensor, first: tensor, last: tensor, mean: tensor
) -> tensor:
    """Apply operations first..last-1 of the drawn order. mean: the mean lightness before the
    contrast, used only if the contrast is among them.
    """
    order = tl.load(words + ORDER)
    for position in range(first, last):
        operation = (order >> (4 * position)) & 15
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
    """ground (factor 0) to level (factor 1) and beyond, truncated."""
    mixed = ground.to(tl.float32) + factor * (level - ground).to(tl.float32)
    return tl.minimum(tl.maximum(mixed, 0.0), 255.0).to(tl.int32)


@triton.jit
def _hue(r: tensor, g: tensor, b: tensor, shift: tensor) -> tensor:
    """Shift the hue in HSV, in bytes: 255 levels of hue are a turn, but hue wraps at 256."""
    high = tl.maximum(r, tl.maximum(g, b))
    low = tl.minimum(r, tl.minimum(g, b))
    chroma = high - low
    some_chroma = tl.maximum(chroma, 1).to(tl.float32)  # grey has no hue and no saturation
    saturation = _floor_of_255(tl.div_rn(some_chroma, tl.maximum(high, 1).to(tl.float32)))
    saturation = tl.where(chroma == 0, 0, saturation)

    # Of Pillow's three quotients (high - channel) / chroma one is 0 and one is 1; `third` remains.
    # In sixths of a turn, the hue differs from a primary colour by 1 - third, below or above.
    third = tl.div_rn((2 * high + low - r - g - b).to(tl.float32), some_chroma)
    above = tl.where(r == high, b == low, tl.where(g == high, r == low, g == low))
    primary = tl.where(r == high, 0.0, tl.where(g == high, 2.0, 4.0))
    sixths = tl.where(above, primary + 1.0 - third, primary - 1.0 + third)
    # Turns in float32, rounded once like Pillow's double: add the rounding errors of the sum and of
    # the division.
    turns = tl.div_rn(sixths, 6.0)
    wrapped = turns + 1.0
    missing = (turns - (wrapped - 1.0)) + ((sixths - 4.0 * turns) - 2.0 * turns) / 6.0
    turns = tl.where(sixths < 0, wrapped + missing, turns)
    hue = tl.where(chroma == 0, 0, _floor_of_255(turns))
    return _from_hsv((hue + shift) & 255, saturation, high)


@triton.jit
def _floor_of_255(x: tensor) -> tensor:
    """floor of the exact product 255 x; float32 may round this product up to an integer."""
    level = tl.floor(x * 255.0)
    level = tl.where(x * 256.0 - level < x, level - 1.0, level)
    return level.to(tl.int32)


@triton.jit
def _from_hsv(hue: tensor, saturation: tensor, value: tensor) -> tensor:
    """HSV to RGB in integers; no quotient is halfway between two levels."""
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
