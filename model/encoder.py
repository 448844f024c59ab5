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
        """The maps [B, dim of the stage, ⌈S/stride⌉, ⌈S/stride⌉] of `stages`, in growing order."""
        names, found = [name_of(stage) for stage in stages], []
        for name, part in self.named_children():
            images = part(images)
            if name in names:
                found.append(images)
        return found


def name_of(stage: int) -> str:
    """torchvision's name of a stage."""
    return f"layer{stage}"


def encoder_dim(arch: str) -> int:
    """`Encoder.dim` of an architecture, without allocating its weights."""
    with torch.device("meta"):
        return Encoder(arch).dim
