"""The settings that define a SlotCon model; defaults are the authors' for COCO."""

import math
from dataclasses import dataclass

ARCHITECTURES = ("resnet18", "resnet34", "resnet50", "resnet101")


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
