"""The encoder: a torchvision ResNet up to its last feature map."""

import math
from collections import OrderedDict

import torch
import torchvision
from torch import nn

STRIDE = 32
"""Pixels of a view along one side of a cell."""


class Encoder(nn.Sequential):
    """A ResNet without its classifier: [B, 3, S, S] -> [B, dim, ⌈S/32⌉, ⌈S/32⌉].

    torchvision initialises the weights as the authors do: convolutions N(0, √(2/(k²·out))). With
    `zero_init_residual` the last BatchNorm weight of each block starts at 0, so a block starts as
    the identity. Parameter names are torchvision's.
    """

    dim: int
    """Channels of the last feature map."""
    stage_dims: dict[str, int]
    """Channels of each stage's feature map: "layer1" … "layer4"."""

    def __init__(self, arch: str) -> None:
        resnet = torchvision.models.get_model(arch, weights=None, zero_init_residual=True)
        stages = [
            (name, stage)
            for name, stage in resnet.named_children()
            if name not in ("avgpool", "fc")
        ]
        super().__init__(OrderedDict(stages))
        self.dim = resnet.fc.in_features
        # Each stage has twice the channels of the one before it.
        self.stage_dims = {f"layer{stage}": self.dim >> (4 - stage) for stage in (1, 2, 3, 4)}


def encoder_dim(arch: str) -> int:
    """`Encoder.dim` of an architecture, without allocating its weights."""
    with torch.device("meta"):
        return Encoder(arch).dim


def cells_of(side: int) -> int:
    """Number of cells that the encoder makes of a view of `side` × `side` pixels."""
    return math.ceil(side / STRIDE) ** 2
