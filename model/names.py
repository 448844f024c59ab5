"""Translates the names of a ResNet's weights between torchvision and other projects.

slotstream, timm and mmsegmentation use torchvision's names. Only names differ: layouts and shapes
are the same everywhere.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor

from model.official import PREFIXES

Branch = Literal["teacher", "student"]
"""Which of the two networks. The teacher averages the student's weights; others call it momentum
encoder or key encoder."""

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
"""Prefixes of an encoder's names in files with two encoders: ours, the authors' (and MoCo's),
DenseCL's, MoCo v3's, and PixPro's for the student."""
WRAPPERS = ("", "backbone.")
"""Prefixes in files with one encoder. DenseCL's files contain the student a second time, as
`backbone.`"""
COUNT = "num_batches_tracked"
"""BatchNorm's number of batches. Only a norm with momentum None uses it, and many files lack it."""
BLOCKS: dict[tuple[tuple[int, ...], int], str] = {
    ((2, 2, 2, 2), 2): "resnet18",
    ((3, 4, 6, 3), 2): "resnet34",
    ((3, 4, 6, 3), 3): "resnet50",
    ((3, 4, 23, 3), 3): "resnet101",
    ((3, 8, 36, 3), 3): "resnet152",
}
"""(Blocks of each stage, convolutions of a block): the name of the ResNet."""

_Rule = tuple[str, str | Callable[[re.Match[str]], str]]

_DETECTRON2: tuple[_Rule, ...] = (
    (r"^(conv1|bn1)\.", r"stem.\1."),
    (r"^layer([1-4])\.", lambda match: f"res{int(match[1]) + 1}."),
    (r"\bbn([1-3])\.", r"conv\1.norm."),
    (r"\bdownsample\.0\.", "shortcut."),
    (r"\bdownsample\.1\.", "shortcut.norm."),
)
_TORCHVISION: tuple[_Rule, ...] = (
    (r"^stem\.", ""),
    (r"^res([2-5])\.", lambda match: f"layer{int(match[1]) - 1}."),
    (r"\bconv([1-3])\.norm\.", r"bn\1."),
    (r"\bshortcut\.norm\.", "downsample.1."),
    (r"\bshortcut\.", "downsample.0."),
)


def to_detectron2(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights under the names of detectron2's ResNet (modeling/backbone/resnet.py): BasicStem,
    stages res2 to res5, norms within their convolutions. detectron2 has no counts of BatchNorm.
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
    """The ResNet of a state dict under torchvision's names, without its classifier; empty if the
    state dict holds none.

    `branch` chooses between two encoders. A single encoder is returned whatever its prefix.
    """
    state = {name.removeprefix("module."): value for name, value in state.items()}
    if "stem.conv1.norm.weight" in state or "backbone.bottom_up.stem.conv1.norm.weight" in state:
        state = from_detectron2(_below(state, "backbone.bottom_up.") or state)
    other: Branch = "student" if branch == "teacher" else "teacher"
    for prefix in (*ENCODERS[branch], *ENCODERS[other], *WRAPPERS):
        if prefix + "conv1.weight" in state:
            encoder = _below(state, prefix)
            return {name: value for name, value in encoder.items() if not name.startswith("fc.")}
    return {}


def branches_of(names: Iterable[str]) -> list[Branch]:
    """The encoders that a state dict with these names holds, as far as the prefixes show."""
    bare = {name.removeprefix("module.") for name in names}
    return [
        branch
        for branch, prefixes in ENCODERS.items()
        if any(f"{prefix}conv1.weight" in bare for prefix in prefixes)
    ]


def with_counts(weights: Mapping[str, Tensor], expected: Iterable[str]) -> dict[str, Tensor]:
    """`weights`, with 0 for each count of BatchNorm that is expected and missing."""
    missing = (name for name in expected if name.endswith(COUNT) and name not in weights)
    return {**weights, **{name: torch.tensor(0) for name in missing}}


def arch_of(names: Iterable[str]) -> str | None:
    """The ResNet whose weights have these torchvision names; None if its blocks are unknown."""
    matches = [re.match(r"layer([1-4])\.(\d+)\.conv(\d)\.", name) for name in names]
    convs = [tuple(map(int, match.groups())) for match in matches if match]
    if not convs:
        return None
    blocks = tuple(len({block for at, block, _ in convs if at == stage}) for stage in range(1, 5))
    return BLOCKS.get((blocks, max(number for *_, number in convs)))


def _below(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries that start with `prefix`, without it."""
    return {name.removeprefix(prefix): v for name, v in state.items() if name.startswith(prefix)}


def _renamed(name: str, rules: Iterable[_Rule]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name
