"""The settings that define a SlotCon model; defaults are the authors' for COCO."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

ARCHITECTURES = ("resnet18", "resnet34", "resnet50", "resnet101")
SlotLoss = Literal["contrastive", "regression"]
Align = Literal["assignments", "projections"]


@dataclass(frozen=True)
class ModelConfig:
    """Everything that shapes the network and its loss; `ValueError` names an impossible field."""

    arch: str = "resnet50"
    """Encoder, one of `ARCHITECTURES`."""
    dim_hidden: int = 4096
    """Width of the hidden layers of projector and predictor."""
    dim_out: int = 256
    """D, the size of a projected feature, a prototype and a slot."""
    num_prototypes: int = 256
    """K, the number of prototypes and so of slots in an image."""
    teacher_temp: float = 0.07
    """Temperature of the teacher's distribution in the grouping loss, and of the assignment of
    cells to slots in student and teacher alike."""
    student_temp: float = 0.1
    """Temperature of the student's distribution in the grouping loss."""
    center_momentum: float = 0.9
    """What one step keeps of the running centre of the teacher's scores."""
    contrast_temp: float = 0.2
    """Temperature τ of the contrast between slots; its term is multiplied by 2τ."""
    group_loss_weight: float = 0.5
    """λ of λ·grouping + (1 − λ)·slots."""
    slot_loss: SlotLoss = "contrastive"
    """What ties the slots of two views: "contrastive", InfoNCE against all active slots of the
    batch; "regression", 2 − 2·cosine with the positive alone, as in BYOL (paper, table 8b)."""
    align: Align = "assignments"
    """What the inverse augmentation brings to the shared pixels: "assignments", the scores of the
    cells, or "projections", the features, which are then scored (paper, table 8c)."""
    image_loss_weight: float = 0.0
    """Weight of a further contrast between whole images, as in MoCo v3, with a predictor of its
    own (paper, table 8d); it is added to the weighted sum of the others. 0 = none."""

    def __post_init__(self) -> None:
        if self.arch not in ARCHITECTURES:
            raise ValueError(f"arch must be one of {', '.join(ARCHITECTURES)}, not {self.arch!r}")
        for name in ("dim_hidden", "dim_out", "num_prototypes"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}")
        for name in ("teacher_temp", "student_temp", "contrast_temp"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be a positive number, not {value!r}")
        for name in ("center_momentum", "group_loss_weight"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must lie between 0 and 1, not {value!r}")
        for name, kind in (("slot_loss", SlotLoss), ("align", Align)):
            value = getattr(self, name)
            if value not in get_args(kind):
                known = " or ".join(map(repr, get_args(kind)))
                raise ValueError(f"{name} must be {known}, not {value!r}")
        if not 0 <= self.image_loss_weight < math.inf:
            raise ValueError(
                f"image_loss_weight must be 0 or a positive number, not {self.image_loss_weight!r}"
            )
