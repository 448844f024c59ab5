"""The learning rate as a pure function of the step: there is no state to save."""

from bisect import bisect_right

from transfer.config import OptimConfig


def learning_rate(step: int, optim: OptimConfig) -> float:
    """The schedule's rate at `step` (0, 1, …), times the factor of the warm-up.

    "step" and its warm-up are detectron2's WarmupMultiStepLR; "poly" is mmcv's PolyLrUpdaterHook
    with a linear warm-up. The warm-up rises to the falling curve, not to its start.
    """
    if optim.schedule == "step":
        scheduled = optim.lr * optim.gamma ** bisect_right(optim.milestones, step)
    else:
        left = (1 - step / optim.steps) ** optim.power
        scheduled = optim.min_lr + (optim.lr - optim.min_lr) * left
    if step >= optim.warmup_steps:
        return scheduled
    return scheduled * (optim.warmup_factor + (1 - optim.warmup_factor) * step / optim.warmup_steps)
