"""Learning rate and teacher momentum as pure functions of the step: there is no state to save.

Both follow SlotCon (arXiv 2205.15288, section 4.1; the momentum is BYOL's cosine). `step` counts
from 0; `total_steps` are the optimiser steps that the run makes. The authors' momentum counts
images, and so includes the partial batch that each epoch drops. If the set is not a whole number of
batches, their momentum ends a little below 1 and ours at 1. If it is, the two are equal.
"""

import math

FLOOR = 1e-6  # the learning rate at the end of the cosine


def learning_rate(
    step: int, *, peak: float, warmup_steps: int, warmup_multiplier: float, total_steps: int
) -> float:
    """Linear from peak / warmup_multiplier to `peak`, then a cosine down to 1e-6."""
    if step < warmup_steps:
        start = peak / warmup_multiplier
        return start + (peak - start) * step / warmup_steps
    return FLOOR + (peak - FLOOR) * _cosine((step - warmup_steps) / (total_steps - warmup_steps))


def teacher_momentum(step: int, *, base: float, total_steps: int, begin: int = 0) -> float:
    """The share of its weights that the teacher keeps: `base` at step `begin`, 1 at the end."""
    return 1 - (1 - base) * _cosine((step - begin) / (total_steps - begin))


def _cosine(progress: float) -> float:
    """From 1 at progress 0 to 0 at progress 1."""
    return (1 + math.cos(math.pi * progress)) / 2
