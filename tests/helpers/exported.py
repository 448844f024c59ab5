"""A small model that looks trained, and a way to call commands in this process."""

import sys
from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from model import ModelConfig, SlotCon
from model.encoder import Encoder

CONFIG = ModelConfig(arch="resnet18", dim_hidden=8, dim_out=6, num_prototypes=4)


@cache
def trained_model() -> SlotCon:
    """A SlotCon whose student and teacher differ, with running statistics and counts unlike those
    of a new model. All tests share it and must not change it.
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


def meta_state(arch: str) -> dict[str, Tensor]:
    """Names and shapes of a backbone's weights."""
    with torch.device("meta"):
        return dict(Encoder(arch).state_dict())


def call(main: Callable[[], None], *argv: object) -> None:
    """Call a command's `main` with these arguments."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["command", *map(str, argv)])
        main()


def images(side: int = 64) -> torch.Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))
