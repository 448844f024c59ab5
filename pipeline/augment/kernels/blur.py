"""Pass 4: the Gaussian blur, for views that have it; then solarize, normalise and store."""

import triton
import triton.language as tl
from triton.language import tensor

from pipeline.augment.kernels.colour import (
    BLUE_SCALE,
    BLUE_SHIFT,
    GREEN_SCALE,
    GREEN_SHIFT,
    RED_SCALE,
    RED_SHIFT,
    normalize,
    solarize_threshold,
)
from pipeline.augment.kernels.words import BOX, BOX_FAR, BOX_NEAR, WORDS

# The sum over a box and the sum over its two far pixels in one number: sum + 2^14 far, below 2^24.
FAR = tl.constexpr(1 << 14)


@triton.jit
def blur(
    words: tensor,
    sums: tensor,  # unused
    scratch: tensor,
    out: tensor,
    tiles: tensor,
    S: tl.constexpr,
    WINDOW: tl.constexpr,
) -> None:
    """Blur as Pillow does, by three boxes across and three down with bytes between, and finish.

    A program loads WINDOW x WINDOW pixels. Each box invalidates a margin of its reach on each side;
    the program stores the pixels that remain valid. tiles: programs per view, enough for the widest
    box of the batch.
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
        far = tl.load(words + BOX_FAR).to(tl.uint32) - near * FAR  # in 32 bits that wrap
        k = tl.arange(0, WINDOW) - margin
        i = (tile // tiles_across) * side + k
        j = (tile % tiles_across) * side + k
        # Beyond the view, Pillow repeats the pixels of its edge.
        i_here = tl.minimum(tl.maximum(i, 0), S - 1)
        j_here = tl.minimum(tl.maximum(j, 0), S - 1)
        across = _box(tl.abs(j[:, None] - j_here[None, :]), box)
        down = _box(tl.abs(i[:, None] - i_here[None, :]), box)

        wanted = (k >= 0) & (k < side)
        inside = (wanted & (i < S))[:, None] & (wanted & (j < S))[None, :]
        first = row.to(tl.int64) * (S * S * 3)
        view = scratch + first + i_here[:, None] * S + j_here[None, :]
        target = out + first + (i[:, None] * S + j[None, :]) * 3
        threshold = solarize_threshold(words)
        r = _blur_channel(view, across, down, near, far)
        tl.store(target, normalize(r, threshold, RED_SCALE, RED_SHIFT), mask=inside)
        g = _blur_channel(view + S * S, across, down, near, far)
        tl.store(target + 1, normalize(g, threshold, GREEN_SCALE, GREEN_SHIFT), mask=inside)
        b = _blur_channel(view + 2 * S * S, across, down, near, far)
        tl.store(target + 2, normalize(b, threshold, BLUE_SCALE, BLUE_SHIFT), mask=inside)


@triton.jit
def _box(distance: tensor, box: tensor) -> tensor:
    """The matrix of one box of the blur, from the distances between inputs and outputs."""
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
    """One box: exact sums, weighted and rounded in Pillow's fixed point."""
    total = tl.dot(level, matrix).to(tl.int32).to(tl.uint32)
    return ((total * near + (total // FAR) * far + (1 << 23)) >> 24).to(tl.float16)
