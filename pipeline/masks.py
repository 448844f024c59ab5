"""Block masks for masked image modelling: which cells of a view its student does not see.

The rule is BEiT's (arXiv 2106.08254, section 2.3) as iBOT and SlotMIM (arXiv 2503.06960) use it:
rectangles are hidden one after another until their cells reach the asked share of the view, or
until ten tries in a row bring none that fits. So a mask never has more cells than were asked for,
and often a few less. `pipeline.views` has the layout of the random draws.
"""

import math

import numpy as np
from numpy.typing import NDArray

from pipeline.draws import Stream, below, compiled, draw_block, stream_of, uniform

_FIRST, _NEXT = 128, 2  # block of view 0, and from one try of a view to its next
_TRIES = 10  # in a row
_LOG_ASPECT = math.log(0.3)  # of the flattest rectangle; the tallest is as tall


@compiled
def sample_masks(
    seed: np.uint64,
    epoch: np.uint32,
    index: NDArray[np.uint64],
    low: float,
    high: float,
    masks: NDArray[np.bool_],
) -> None:
    """Hide cells of `masks` [2, B, rows, columns], all False before: of each mask a share that is
    uniform in low..high, about.
    """
    for b in range(len(index)):
        stream = stream_of(seed, epoch, index[b])
        for view in range(2):
            _hide(stream, _FIRST + view, low, high, masks[view, b])


@compiled
def _hide(stream: Stream, block: int, low: float, high: float, mask: NDArray[np.bool_]) -> None:
    rows, columns = mask.shape
    smallest = (min(rows, columns) // 3) ** 2
    room = uniform(draw_block(stream, block)[0], low, high) * rows * columns
    tries = 0
    while room > 0 and tries < _TRIES:
        block, tries = block + _NEXT, tries + 1
        words = draw_block(stream, block)
        area = uniform(words[0], smallest, room)  # also where the room is below the smallest
        aspect = math.exp(uniform(words[1], _LOG_ASPECT, -_LOG_ASPECT))
        height = int(np.rint(math.sqrt(area * aspect)))
        width = int(np.rint(math.sqrt(area / aspect)))
        if height >= rows or width >= columns:
            continue
        top, left = below(words[2], rows - height + 1), below(words[3], columns - width + 1)
        part = mask[top : top + height, left : left + width]
        new = part.size - part.sum()
        if 0 < new <= room:
            part[:] = True
            room -= new
            tries = 0
