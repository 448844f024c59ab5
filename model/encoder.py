"""The encoder: a torchvision ResNet up to its last feature map."""

import math
from collections import OrderedDict
from collections.abc import Sequence

import torch
import torchvision
from torch import Tensor, nn

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

    def maps(self, images: Tensor, stages: Sequence[int]) -> list[Tensor]:
        """Images [B, 3, S, S] → the map [B, D, h, w] of each of `stages`, in their order. Stage n
        is layer n, 1 to 4; those after the last one asked for are not computed.
        """
        maps: dict[int, Tensor] = {}
        for name, part in self.named_children():
            images = part(images)
            if name in self.stage_dims:
                maps[len(maps) + 1] = images
            if len(maps) == max(stages):
                break
        return [maps[stage] for stage in stages]


def encoder_dim(arch: str) -> int:
    """`Encoder.dim` of an architecture, without allocating its weights."""
    with torch.device("meta"):
        return Encoder(arch).dim


def cells_of(side: int) -> int:
    """Number of cells that the encoder makes of a view of `side` × `side` pixels."""
    return math.ceil(side / STRIDE) ** 2


def dilate(encoder: Encoder, output_stride: int) -> Encoder:
    """Change a ResNet in place: cells of its map become `output_stride` (8, 16, 32) pixels wide.
    Where layer3 and layer4 would halve the map, their strides become 1, and the 3×3 convolutions
    that follow get twice the dilation.

    The new map contains the old one: every second (fourth) cell keeps its value. torchvision does
    the same at construction (replace_stride_with_dilation), but not for ResNet-18 and -34.
    """
    dilation = 1
    for name, stride in (("layer3", 16), ("layer4", 32)):
        convs = [m for m in encoder.get_submodule(name).modules() if isinstance(m, nn.Conv2d)]
        first, *others = [conv for conv in convs if conv.kernel_size == (3, 3)]
        first.dilation = first.padding = (dilation, dilation)  # its input is the last stage's map
        if stride > output_stride:
            dilation *= 2
            for conv in convs:
                conv.stride = (1, 1)
        for conv in others:
            conv.dilation = conv.padding = (dilation, dilation)
    return encoder
