"""Names of a ResNet's weights: torchvision's, which are ours, timm's and mmsegmentation's, and
those that others use.

Only names differ: layouts and shapes are the same.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor

from model.official import PREFIXES

Branch = Literal["teacher", "student"]
"""The network that averages, or the one that learns; the first is what others call momentum or
key encoder."""

ENCODERS: dict[Branch, tuple[str, ...]] = {
    "teacher": (
        "teacher.encoder.",
        dict(PREFIXES)["teacher.encoder."],
        "encoder_k.0.",
        "momentum_encoder.",
    ),
    "student": (
        "student.encoder.",
        dict(PREFIXES)["student.encoder."],
        "encoder_q.0.",
        "base_encoder.",
        "encoder.",
    ),
}
"""What an encoder's names start with in files that hold two: ours, the authors' (and MoCo's),
DenseCL's, those of MoCo v3, PixPro's student."""
WRAPPERS = ("", "backbone.")
"""What they start with in files that hold one. DenseCL's have the student a second time, as
`backbone.`"""
COUNT = "num_batches_tracked"
"""BatchNorm's number of batches. It matters only to a norm whose momentum is None, and many files
leave it out."""
BLOCKS: dict[tuple[tuple[int, ...], int], str] = {
    ((2, 2, 2, 2), 2): "resnet18",
    ((3, 4, 6, 3), 2): "resnet34",
    ((3, 4, 6, 3), 3): "resnet50",
    ((3, 4, 23, 3), 3): "resnet101",
    ((3, 8, 36, 3), 3): "resnet152",
}
"""What tells ResNets apart: (blocks of each stage, convolutions of a block)."""

_Rule = tuple[str, str | Callable[[re.Match[str]], str]]

_DETECTRON2: tuple[_Rule, ...] = (
    (r"^(conv1|bn1)\.", r"stem.\1."),
    (r"^layer([1-4])\.", lambda found: f"res{int(found[1]) + 1}."),
    (r"\bbn([1-3])\.", r"conv\1.norm."),
    (r"\bdownsample\.0\.", "shortcut."),
    (r"\bdownsample\.1\.", "shortcut.norm."),
)
_TORCHVISION: tuple[_Rule, ...] = (
    (r"^stem\.", ""),
    (r"^res([2-5])\.", lambda found: f"layer{int(found[1]) - 1}."),
    (r"\bconv([1-3])\.norm\.", r"bn\1."),
    (r"\bshortcut\.norm\.", "downsample.1."),
    (r"\bshortcut\.", "downsample.0."),
)


def to_detectron2(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """torchvision's names as those of detectron2's ResNet (modeling/backbone/resnet.py): BasicStem,
    stages res2 to res5, norms within their convolutions; BatchNorm's counts have no place there.
    """
    return {
        _renamed(name, _DETECTRON2): value
        for name, value in weights.items()
        if not name.endswith(COUNT)
    }


def from_detectron2(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `to_detectron2`, without the counts."""
    return {_renamed(name, _TORCHVISION): value for name, value in weights.items()}


def backbone_of(state: Mapping[str, Tensor], branch: Branch) -> dict[str, Tensor]:
    """The ResNet in a state dict under torchvision's names, without its classifier; empty if there
    is none.

    Of two encoders `branch` says which; an only one is taken whatever it is called.
    """
    state = {name.removeprefix("module."): value for name, value in state.items()}
    if "stem.conv1.norm.weight" in state or "backbone.bottom_up.stem.conv1.norm.weight" in state:
        state = from_detectron2(_below(state, "backbone.bottom_up.") or state)
    other: Branch = "student" if branch == "teacher" else "teacher"
    for prefix in (*ENCODERS[branch], *ENCODERS[other], *WRAPPERS):
        if prefix + "conv1.weight" in state:
            found = _below(state, prefix)
            return {name: value for name, value in found.items() if not name.startswith("fc.")}
    return {}


def branches_of(names: Iterable[str]) -> list[Branch]:
    """Which of two encoders there are in a state dict of such names, as far as they tell."""
    found = {name.removeprefix("module.") for name in names}
    return [
        branch
        for branch, prefixes in ENCODERS.items()
        if any(f"{prefix}conv1.weight" in found for prefix in prefixes)
    ]


def with_counts(weights: Mapping[str, Tensor], expected: Iterable[str]) -> dict[str, Tensor]:
    """`weights` with 0 for each of BatchNorm's counts that is expected and missing."""
    missing = (name for name in expected if name.endswith(COUNT) and name not in weights)
    return {**weights, **{name: torch.tensor(0) for name in missing}}


def arch_of(names: Iterable[str]) -> str | None:
    """Which ResNet has weights of such torchvision names, as far as its blocks tell."""
    found = [re.match(r"layer([1-4])\.(\d+)\.conv(\d)\.", name) for name in names]
    places = [tuple(map(int, match.groups())) for match in found if match]
    if not places:
        return None
    blocks = tuple(len({block for at, block, _ in places if at == stage}) for stage in range(1, 5))
    return BLOCKS.get((blocks, max(convolution for *_, convolution in places)))


def _below(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries that start with `prefix`, without it."""
    return {name.removeprefix(prefix): v for name, v in state.items() if name.startswith(prefix)}


def _renamed(name: str, rules: Iterable[_Rule]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name
