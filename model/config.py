"""The settings that define a SlotCon model; defaults are the authors' for COCO."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

ARCHITECTURES = ("resnet18", "resnet34", "resnet50", "resnet101")
SlotLoss = Literal["contrastive", "regression"]
Align = Literal["assignments", "projections"]

# The metadata of a field are its bounds: the words after "must be", and a test of the value.
_Bound = dict[str, Callable[[Any], bool]]
_WIDEST, _LARGEST = 65_536, 10**9  # a square matrix of the first has 17 GB
_SMALL: _Bound = {f"at most {_LARGEST:,}": lambda value: value <= _LARGEST}
_COUNT: _Bound = {
    "a whole number of at least 1": lambda value: type(value) is int and value >= 1,
    f"at most {_WIDEST:,}": lambda value: value <= _WIDEST,
}
_POSITIVE: _Bound = {"a positive number": lambda value: 0 < value < math.inf} | _SMALL
_WEIGHT: _Bound = {"0 or a positive number": lambda value: 0 <= value < math.inf} | _SMALL
_SHARE: _Bound = {"in 0..1": lambda value: 0 <= value <= 1}


def _one_of(names: tuple[str, ...]) -> _Bound:
    return {f"one of {', '.join(names)}": lambda value: value in names}


@dataclass(frozen=True)
class ModelConfig:
    """Settings of the network and its loss. An impossible value raises ValueError with its name."""

    arch: str = field(default="resnet50", metadata=_one_of(ARCHITECTURES))
    """Encoder, one of `ARCHITECTURES`."""
    dim_hidden: int = field(default=4096, metadata=_COUNT)
    """Width of the hidden layers of projector and predictor."""
    dim_out: int = field(default=256, metadata=_COUNT)
    """D, the size of a projected feature, a prototype and a slot."""
    num_prototypes: int = field(default=256, metadata=_COUNT)
    """K, the number of prototypes and so of slots in an image."""
    teacher_temp: float = field(default=0.07, metadata=_POSITIVE)
    """Temperature of the teacher's distribution in the grouping loss, and of the assignment of
    cells to slots in both student and teacher."""
    student_temp: float = field(default=0.1, metadata=_POSITIVE)
    """Temperature of the student's distribution in the grouping loss."""
    center_momentum: float = field(default=0.9, metadata=_SHARE)
    """Share of the running centre of the teacher's scores that one step keeps."""
    contrast_temp: float = field(default=0.2, metadata=_POSITIVE)
    """Temperature τ of the contrast between slots; its term is multiplied by 2τ."""
    group_loss_weight: float = field(default=0.5, metadata=_SHARE)
    """λ of λ·grouping + (1 − λ)·slots."""
    slot_loss: SlotLoss = field(default="contrastive", metadata=_one_of(get_args(SlotLoss)))
    """Loss between the slots of two views: "contrastive", InfoNCE against all active slots of the
    batch; "regression", 2 − 2·cosine with only the positive, as in BYOL (paper, table 8b)."""
    align: Align = field(default="assignments", metadata=_one_of(get_args(Align)))
    """What the inverse augmentation aligns: "assignments", the scores of the cells; "projections",
    the features, which are scored afterwards (paper, table 8c)."""
    image_loss_weight: float = field(default=0.0, metadata=_WEIGHT)
    """Weight of an additional contrast between whole images, as in MoCo v3, with a separate
    predictor (paper, table 8d). It is added to the weighted sum of the other losses. 0 = none."""

    def __post_init__(self) -> None:
        for setting in fields(self):
            value = getattr(self, setting.name)
            for meaning, holds in setting.metadata.items():
                if not holds(value):
                    raise ValueError(f"{setting.name} must be {meaning}, not {value!r}")
