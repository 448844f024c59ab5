"""The encoder: a network up to the map of one of its stages. Here are torchvision's ResNets; those
of timm are in `model.timm_encoder`.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

import torch
import torchvision
from torch import Tensor, nn

from model.architectures import STAGES, STRIDES, is_timm
from model.config import ModelConfig

if TYPE_CHECKING:
    from model.timm_encoder import TimmEncoder

AnyEncoder: TypeAlias = "Encoder | TimmEncoder"
"""Also `model.masked_vit.MaskedVit`, which is a TimmEncoder."""


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
    stage_dims: dict[int, int]
    """Channels of each stage's map."""
    strides: dict[int, int]
    """Pixels along one side of a cell of each stage."""
    step = 1
    """Images are padded to a multiple of it."""

    def __init__(self, arch: str, stages: int = 4) -> None:
        resnet = torchvision.models.get_model(arch, weights=None, zero_init_residual=True)
        left_out = ["avgpool", "fc", *(name_of(stage) for stage in STRIDES if stage > stages)]
        kept = [(name, part) for name, part in resnet.named_children() if name not in left_out]
        super().__init__(OrderedDict(kept))
        self.stages = stages
        # Each stage has twice the channels of the one before it.
        kept_stages = range(1, stages + 1)
        self.stage_dims = {stage: resnet.fc.in_features >> (4 - stage) for stage in kept_stages}
        self.strides = {stage: STRIDES[stage] for stage in kept_stages}
        self.dim = self.stage_dims[stages]

    def forward(self, images: Tensor) -> Tensor:
        """The map of the last stage."""
        return self.maps(images, (self.stages,))[0]

    def maps(self, images: Tensor, stages: Sequence[int]) -> list[Tensor]:
        """Images [B, 3, S, S] → the map [B, D, h, w] of each of `stages`, in their order. Stage n
        is layer n, 1 to 4; those after the last one asked for are not computed.
        """
        maps: dict[int, Tensor] = {}
        ends = {name_of(stage) for stage in self.stage_dims}
        for name, part in self.named_children():
            images = part(images)
            if name in ends:
                maps[len(maps) + 1] = images
            if len(maps) == max(stages):
                break
        return [maps[stage] for stage in stages]

    def weights_up_to(self, stage: int) -> frozenset[str]:
        """The names of the weights that the map of `stage`, 1 to 4, depends on."""
        parts = [name for name, _ in self.named_children()]
        early = tuple(f"{name}." for name in parts[: parts.index(name_of(stage)) + 1])
        return frozenset(name for name, _ in self.named_parameters() if name.startswith(early))


def name_of(stage: int) -> str:
    """torchvision's name of a stage."""
    return f"layer{stage}"


def build_encoder(config: ModelConfig) -> AnyEncoder:
    """A new encoder with weights from torch's generator. Raises ValueError."""
    if not is_timm(config.arch):
        return Encoder(config.arch, config.stages)
    from model.masked_vit import MaskedVit
    from model.timm_encoder import TimmEncoder

    kind = MaskedVit if config.hides_patches else TimmEncoder
    return kind(
        config.arch, config.stages, drop_path=config.drop_path, image_stats=config.image_stats
    )


def encoder_dim(arch: str) -> int:
    """`Encoder.dim` of an architecture, without allocating its weights."""
    if is_timm(arch):
        from model.timm_encoder import facts

        return facts(arch).dims[STAGES]
    with torch.device("meta"):
        return Encoder(arch).dim


def dilate(encoder: AnyEncoder, output_stride: int) -> AnyEncoder:
    """The encoder with cells of `output_stride` pixels in its last map. A ResNet is changed in
    place. Raises ValueError for a network of timm that cannot be built so.
    """
    if isinstance(encoder, Encoder):
        return _dilate_resnet(encoder, output_stride)
    return encoder.dilated(output_stride)


def _dilate_resnet(encoder: Encoder, output_stride: int) -> Encoder:
    """Cells of the map become `output_stride` (8, 16, 32) pixels wide. Where layer3
    and layer4 (if it has them) would halve the map, their strides become 1, and the 3×3
    convolutions that follow get twice the dilation.

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
    encoder.strides = {stage: min(of, output_stride) for stage, of in encoder.strides.items()}
    return encoder
