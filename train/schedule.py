"""Learning rate and teacher momentum as pure functions of the step: nothing to save, nothing to
restore.

Both follow SlotCon (arXiv 2205.15288, section 4.1; the momentum is BYOL's cosine). `step` counts
from 0 and `total_steps` are the optimiser steps that the run really makes. The authors' momentum
counts images instead, and so also the last partial batch of each epoch that is dropped: where the
set is not a whole number of batches, theirs ends a little below 1, ours at 1. Where it is, the two
are equal.
"""

import math

FLOOR = 1e-6  # the learning rate that the cosine ends at


def learning_rate(
    step: int, *, peak: float, warmup_steps: int, warmup_multiplier: float, total_steps: int
) -> float:
    """Linear from peak / warmup_multiplier to `peak`, then a cosine down to 1e-6."""
    if step < warmup_steps:
        start = peak / warmup_multiplier
        return start + (peak - start) * step / warmup_steps
    return FLOOR + (peak - FLOOR) * _cosine((step - warmup_steps) / (total_steps - warmup_steps))


def teacher_momentum(step: int, *, base: float, total_steps: int) -> float:
    """What the teacher keeps of itself at `step`: `base` at first, 1 at the end."""
    return 1 - (1 - base) * _cosine(step / total_steps)


def _cosine(progress: float) -> float:
    """From 1 at progress 0 to 0 at progress 1."""
    return (1 + math.cos(math.pi * progress)) / 2
