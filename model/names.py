"""Translates the names of a ResNet's weights between torchvision and other projects.

slotstream, timm and mmsegmentation use torchvision's names. Only names differ: layouts and shapes
are the same everywhere.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor

Branch = Literal["teacher", "student"]
"""Which of the two networks. The teacher averages the student's weights; others call it momentum
encoder or key encoder."""

_MARKS: dict[Branch, re.Pattern[str]] = {
    "teacher": re.compile(r"(?:^|(?<=[._]))(?:teacher|momentum|target|ema|key|k)(?=[._])"),
    "student": re.compile(r"(?:^|(?<=[._]))(?:student|online|query|q|base(?=_encoder\.))(?=[._])"),
}
"""Words in a prefix that tell the two networks apart: ours, the authors' and MoCo's encoder_k and
encoder_q, MoCo v3's, BYOL's, DINO's, averages of timm and torchvision."""
_NO_MARK = re.compile(
    r"module|orig|mod|model|net|network|state|dict|encoder|backbone|trunk|resnet|features?|\d*"
)
"""Words of a prefix that say nothing about which network it is."""
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
_FROM_DETECTRON2: tuple[_Rule, ...] = (
    (r"^stem\.", ""),
    (r"^res([2-5])\.", lambda match: f"layer{int(match[1]) - 1}."),
    (r"\bconv([1-3])\.norm\.", r"bn\1."),
    (r"\bshortcut\.norm\.", "downsample.1."),
    (r"\bshortcut\.", "downsample.0."),
)

_FROM_CHILDREN: tuple[_Rule, ...] = (
    (r"^0\.", "conv1."),
    (r"^1\.", "bn1."),
    (r"^([4-7])\.", lambda match: f"layer{int(match[1]) - 3}."),
)
_FROM_TRANSFORMERS: tuple[_Rule, ...] = (
    (r"^embedder\.embedder\.convolution\.", "conv1."),
    (r"^embedder\.embedder\.normalization\.", "bn1."),
    (r"^encoder\.stages\.(\d)\.layers\.", lambda match: f"layer{int(match[1]) + 1}."),
    (r"\blayer\.(\d)\.convolution\.", lambda match: f"conv{int(match[1]) + 1}."),
    (r"\blayer\.(\d)\.normalization\.", lambda match: f"bn{int(match[1]) + 1}."),
    (r"\bshortcut\.convolution\.", "downsample.0."),
    (r"\bshortcut\.normalization\.", "downsample.1."),
)
_LAYOUTS: tuple[tuple[str, str, tuple[_Rule, ...]], ...] = (
    (r"(?:conv1|bn1|layer[1-4]\.\d+)\.", "layer1.0.conv1.weight", ()),
    (r"(?:stem|res[2-5]\.\d+)\.", "res2.0.conv1.weight", _FROM_DETECTRON2),
    (r"(?:[01]\.\w+$|[4-7]\.\d+\.[a-z])", "4.0.conv1.weight", _FROM_CHILDREN),
    (
        r"(?:embedder\.embedder|encoder\.stages\.\d)\.",
        "encoder.stages.0.layers.0.layer.0.convolution.weight",
        _FROM_TRANSFORMERS,
    ),
)
"""How a ResNet names its weights: how these names begin, one that each has, and the rules to
torchvision's names. torchvision (also timm, mmsegmentation and most others), detectron2,
nn.Sequential of a ResNet's children (Lightly), Hugging Face's transformers."""


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
    return {_renamed(name, _FROM_DETECTRON2): value for name, value in weights.items()}


def resnets_in(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """The ResNets whose weights have these names, by the prefix before a ResNet's own names: for
    each the given names by torchvision's names. Classifiers and heads are left out.
    """
    names, found = list(names), dict[str, dict[str, str]]()
    for begin, anchor, rules in _LAYOUTS:
        start, below = re.compile(rf"(?:^|(?<=\.)){begin}"), dict[str, dict[str, str]]()
        for name in names:
            if match := start.search(name):
                below.setdefault(name[: match.start()], {})[name[match.start() :]] = name
        for prefix, inner in below.items():
            if anchor in inner:
                found[prefix] = {_renamed(name, rules): whole for name, whole in inner.items()}
    return found


def branch_of(prefix: str) -> Branch | None:
    """The network whose names have this prefix; None if the prefix does not say."""
    marked = [branch for branch, mark in _MARKS.items() if mark.search(prefix.lower())]
    return marked[0] if len(marked) == 1 else None


def choose(prefixes: Iterable[str], branch: Branch) -> tuple[str, Branch | None] | None:
    """Which of the networks below these prefixes `branch` is, and what it is as far as the prefix
    says; None if no rule decides.

    A single network is taken whatever it is. Of several, one is marked as the teacher, and another
    as the student; or the other one has the same prefix without a mark (`backbone.` beside
    `momentum_backbone.`), so it is the student.
    """
    sides = {prefix: branch_of(prefix) for prefix in prefixes}
    if len(sides) == 1:
        return next(iter(sides.items()))
    teachers, students = ([p for p in sides if sides[p] == side] for side in _MARKS)
    if not students:
        students = [prefix for prefix in sides if sides[prefix] is None]
        if [_bare(prefix) for prefix in students] != [_bare(prefix) for prefix in teachers]:
            return None
    if len(teachers) != 1 or len(students) != 1:
        return None
    return (teachers if branch == "teacher" else students)[0], branch


def with_counts(weights: Mapping[str, Tensor], expected: Iterable[str]) -> dict[str, Tensor]:
    """`weights`, with 0 for each count of BatchNorm that is expected and missing."""
    missing = (name for name in expected if name.endswith(COUNT) and name not in weights)
    return {**weights, **{name: torch.tensor(0) for name in missing}}


def stages_of(names: Iterable[str]) -> int:
    """The last stage of a ResNet whose weights have these torchvision names; 0 without any."""
    return max((int(name[5]) for name in names if re.match(r"layer[1-4]\.", name)), default=0)


def archs_of(names: Iterable[str]) -> list[str]:
    """The ResNets whose stages, up to some stage, have weights with these torchvision names.

    It is one of them unless the weights end early: a ResNet-50 and a ResNet-101 begin alike.
    """
    matches = [re.match(r"layer([1-4])\.(\d+)\.conv(\d)\.", name) for name in names]
    convs = [tuple(map(int, match.groups())) for match in matches if match]
    last, width = (max((row[at] for row in convs), default=0) for at in (0, 2))
    blocks = tuple(
        len({block for at, block, _ in convs if at == stage}) for stage in range(1, last + 1)
    )
    return [
        name for (all_blocks, convolutions), name in BLOCKS.items()
        if convs and all_blocks[:last] == blocks and convolutions == width
    ]  # fmt: skip


def arch_of(names: Iterable[str]) -> str | None:
    """The ResNet whose weights have these torchvision names; None if none has, or several."""
    found = archs_of(names)
    return found[0] if len(found) == 1 else None


def _bare(prefix: str) -> list[str]:
    """The words of a prefix that are neither marks nor without meaning."""
    for mark in _MARKS.values():
        prefix = mark.sub("", prefix.lower())
    return [word for word in re.split(r"[._]", prefix) if not _NO_MARK.fullmatch(word)]


def _renamed(name: str, rules: Iterable[_Rule]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name
