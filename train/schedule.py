"""Rates of a step as pure functions of its number: there is no state to save.

Learning rate and teacher momentum follow SlotCon (arXiv 2205.15288, section 4.1; the momentum is
BYOL's cosine), the others SlotMIM (arXiv 2503.06960) and DINO (arXiv 2104.14294). `step` counts
from 0; `total_steps` are the optimiser steps that the run makes. The authors' momentum counts
images, and so includes the partial batch that each epoch drops. If the set is not a whole number of
batches, their momentum ends a little below 1 and ours at 1. If it is, the two are equal.
"""

import math

FLOOR = 1e-6  # the learning rate at the end of the cosine


def learning_rate(
    step: int,
    *,
    peak: float,
    warmup_steps: int,
    warmup_multiplier: float | None,
    total_steps: int,
    reaches_peak: bool = False,
    final: float = FLOOR,
) -> float:
    """Linear from peak / warmup_multiplier (None: from 0) to `peak`, then a cosine down to `final`.
    The first step of the cosine has the peak; with `reaches_peak` the last of the warm-up too.
    """
    if step < warmup_steps:
        start = 0.0 if warmup_multiplier is None else peak / warmup_multiplier
        return start + (peak - start) * step / max(1, warmup_steps - reaches_peak)
    return final + (peak - final) * _cosine((step - warmup_steps) / (total_steps - warmup_steps))


def teacher_momentum(step: int, *, base: float, total_steps: int, begin: int = 0) -> float:
    """The share of its weights that the teacher keeps: `base` at step `begin`, 1 at the end."""
    return 1 - (1 - base) * _cosine((step - begin) / (total_steps - begin))


def weight_decay(step: int, *, first: float, last: float, total_steps: int) -> float:
    """A cosine from `first` to `last`."""
    return last + (first - last) * _cosine(step / total_steps)


def teacher_temp(epoch: int, *, first: float, last: float, warmup_epochs: int) -> float:
    """The teacher's temperature in `epoch`, from 0: linear from `first` to `last` over the
    `warmup_epochs`, both ends included, then `last`.
    """
    if epoch >= warmup_epochs:
        return last
    return first + (last - first) * epoch / max(1, warmup_epochs - 1)


def _cosine(progress: float) -> float:
    """From 1 at progress 0 to 0 at progress 1."""
    return (1 + math.cos(math.pi * progress)) / 2
