"""The encoder: a torchvision ResNet up to its last feature map."""

import math
from collections import OrderedDict

import torchvision
from torch import nn


def build_encoder(arch: str) -> tuple[nn.Sequential, int]:
    """Return a ResNet [B, 3, S, S] -> [B, C, ⌈S/32⌉, ⌈S/32⌉] and its number of channels C.

    torchvision's own initialisation is the authors': convolutions N(0, √(2/(k²·out))), and with
    `zero_init_residual` the last BatchNorm weight of each block starts at 0, so that a block
    starts as the identity. Parameter names stay torchvision's, less the classifier.
    """
    resnet = torchvision.models.get_model(arch, weights=None, zero_init_residual=True)
    channels = resnet.fc.in_features
    stages = [
        (name, stage) for name, stage in resnet.named_children() if name not in ("avgpool", "fc")
    ]
    return nn.Sequential(OrderedDict(stages)), channels


def cells_of(side: int) -> int:
    """How many cells the encoder makes of a view of `side` pixels."""
    return math.ceil(side / 32) ** 2
