"""The learning rate against torch's schedulers and published formulas; the weight decay."""

import pytest
import torch
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    LinearLR,
    LRScheduler,
    MultiStepLR,
    PolynomialLR,
)

from transfer.config import OptimConfig
from transfer.optimizer import build_optimizer
from transfer.schedule import learning_rate


def by_torch(optim: OptimConfig) -> list[float]:
    optimizer = SGD([nn.Parameter(torch.zeros(1))], lr=optim.lr)
    parts: list[LRScheduler] = []
    if optim.warmup_steps:
        parts.append(LinearLR(optimizer, optim.warmup_factor, total_iters=optim.warmup_steps))
    if optim.schedule == "step":
        parts.append(MultiStepLR(optimizer, list(optim.milestones), optim.gamma))
    else:
        parts.append(PolynomialLR(optimizer, optim.steps, optim.power))
    scheduler = ChainedScheduler(parts)
    rates = []
    for _ in range(optim.steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize(
    "optim",
    [
        OptimConfig(90, 16, 0.02, schedule="step", milestones=(60, 80), warmup_steps=10),
        OptimConfig(90, 16, 0.02, schedule="step", milestones=(5, 80), gamma=0.5),
        OptimConfig(40, 16, 0.01, power=0.9),
        OptimConfig(40, 16, 0.01, power=1.0, warmup_steps=7, warmup_factor=0.1),
    ],
)
def test_rates_are_those_of_torch(optim: OptimConfig) -> None:
    """A milestone that shifts by one step, or a warm-up to another height, is another recipe."""
    ours = [learning_rate(step, optim) for step in range(optim.steps)]
    assert ours == pytest.approx(by_torch(optim))


def test_poly_ends_at_its_floor() -> None:
    """mmcv's formula: (lr - min_lr) · (1 - step / steps) ** power + min_lr."""
    optim = OptimConfig(30, 16, 0.01, min_lr=1e-4)
    for step in range(30):
        expected = (0.01 - 1e-4) * (1 - step / 30) ** 0.9 + 1e-4
        assert learning_rate(step, optim) == pytest.approx(expected)
    assert learning_rate(30, optim) == pytest.approx(1e-4)


def test_norms_have_their_weight_decay() -> None:
    """detectron2 does not decay norms, mmsegmentation does; to mix them up costs a point."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.GroupNorm(2, 4))
    model[0].bias.requires_grad_(False)  # type: ignore[union-attr]
    both = build_optimizer(model, OptimConfig(9, 1, 0.1, norm_weight_decay=0.0)).param_groups
    assert [(len(g["params"]), g["weight_decay"]) for g in both] == [(1, 1e-4), (4, 0.0)]
    same = build_optimizer(model, OptimConfig(9, 1, 0.1, weight_decay=0.3)).param_groups
    assert {group["weight_decay"] for group in same} == {0.3}
