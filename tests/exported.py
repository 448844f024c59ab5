"""A small trained-looking model, and commands called in this process."""

import sys
from collections.abc import Callable

import pytest
import torch
from torch import nn

from model import ModelConfig, SlotCon

CONFIG = ModelConfig(arch="resnet18", dim_hidden=8, dim_out=6, num_prototypes=4)


def trained_model() -> SlotCon:
    """A SlotCon whose student and teacher differ, with statistics and counts that are not those of
    a new one.
    """
    torch.manual_seed(0)
    model = SlotCon(CONFIG)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.uniform_(norm.running_mean, -0.1, 0.1)
            nn.init.uniform_(norm.running_var, 0.5, 1.5)
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            norm.num_batches_tracked += 7
    nn.init.normal_(model.student.encoder.conv1.weight)
    nn.init.normal_(model.center)
    return model.eval()


def call(main: Callable[[], None], *argv: object) -> None:
    """Call a command's `main` with these arguments."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["command", *map(str, argv)])
        main()


def images(side: int = 64) -> torch.Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))
