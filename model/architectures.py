"""Names of encoders and what is fixed about them. Imports no PyTorch."""

import re
from collections.abc import Callable

STRIDES = {1: 4, 2: 8, 3: 16, 4: 32}
"""Pixels of an image along one side of a cell of a ResNet, by stage."""
STAGES = 4
"""The last stage of every encoder."""
ARCHITECTURES = ("resnet18", "resnet34", "resnet50", "resnet101")
"""The ResNets of torchvision."""
ARCH: dict[str, Callable[[str], bool]] = {
    f"one of {', '.join(ARCHITECTURES)}, or timm:NAME": lambda name: (
        name in ARCHITECTURES or re.fullmatch(r"timm:[A-Za-z0-9_.]+", name) is not None
    )
}
"""What the name of an encoder must be, and its test."""
Statistics = tuple[tuple[float, float, float], tuple[float, float, float]]
IMAGENET: Statistics = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Mean and deviation by which views come normalised, of images in 0..1."""


def is_timm(arch: str) -> bool:
    """Whether an architecture is a network of timm: timm:NAME."""
    return arch.startswith("timm:")


def timm_name(arch: str) -> str:
    """timm's own name of an architecture timm:NAME."""
    return arch.removeprefix("timm:")
