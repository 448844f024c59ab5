"""The encoder: a torchvision ResNet up to the feature map of one of its stages."""

from collections import OrderedDict
from collections.abc import Sequence

import torch
import torchvision
from torch import Tensor, nn

from model.config import STRIDES


class Encoder(nn.Sequential):
    """A ResNet without its classifier: [B, 3, S, S] -> [B, dim, ⌈S/32⌉, ⌈S/32⌉].

    With fewer than four `stages` it ends earlier, with a finer map (see `STRIDES`). torchvision
    initialises the weights as the authors do: convolutions N(0, √(2/(k²·out))). With
    `zero_init_residual` the last BatchNorm weight of each block starts at 0, so a block starts as
    the identity. Parameter names are torchvision's. With one seed, a stage starts with the same
    weights whether later ones follow or not.
    """

    stages: int
    """The last stage, 1 to 4."""
    dim: int
    """Channels of the last feature map."""
    stage_dims: dict[str, int]
    """Channels of each stage's feature map: "layer1" … "layer4"."""

    def __init__(self, arch: str, stages: int = 4) -> None:
        resnet = torchvision.models.get_model(arch, weights=None, zero_init_residual=True)
        left_out = ["avgpool", "fc", *(name_of(stage) for stage in STRIDES if stage > stages)]
        kept = [(name, part) for name, part in resnet.named_children() if name not in left_out]
        super().__init__(OrderedDict(kept))
        self.stages = stages
        # Each stage has twice the channels of the one before it.
        dims = {stage: resnet.fc.in_features >> (4 - stage) for stage in range(1, stages + 1)}
        self.stage_dims = {name_of(stage): dim for stage, dim in dims.items()}
        self.dim = dims[stages]

    def forward(self, images: Tensor) -> Tensor:
        """The map of the last stage."""
        return self.maps(images, (self.stages,))[0]

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


def name_of(stage: int) -> str:
    """torchvision's name of a stage."""
    return f"layer{stage}"


def encoder_dim(arch: str) -> int:
    """`Encoder.dim` of an architecture, without allocating its weights."""
    with torch.device("meta"):
        return Encoder(arch).dim


def dilate(encoder: Encoder, output_stride: int) -> Encoder:
    """Change a ResNet in place: cells of its map become `output_stride` (8, 16, 32) pixels wide.
    Where layer3 and layer4 (if it has them) would halve the map, their strides become 1, and the
    3×3 convolutions that follow get twice the dilation.

    The new map contains the old one: every second (fourth) cell keeps its value. torchvision does
    the same at construction (replace_stride_with_dilation), but not for ResNet-18 and -34.
    """
    dilation = 1
    for stage in range(3, encoder.stages + 1):
        name, stride = name_of(stage), STRIDES[stage]
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
