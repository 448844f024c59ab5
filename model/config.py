"""The settings that define a model; defaults are those of SlotCon's authors for COCO."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, get_args

from model.architectures import ARCH, STRIDES, Statistics, is_timm

Objective = Literal["slotcon", "slotmim"]
SlotLoss = Literal["contrastive", "regression"]
Align = Literal["assignments", "projections"]
Targets = Literal["centred", "balanced"]
Norm = Literal["train", "eval"]
Projector = Literal["mlp", "norm"]
PrototypeInit = Literal["random", "kmeans"]

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
_STAGE: _Bound = {"a whole number in 1..4": lambda value: type(value) is int and 1 <= value <= 4}
_STAGES: _Bound = {
    "a growing list of whole numbers in 1..4": lambda stages: (
        list(stages) == sorted(set(stages)) and set(stages) <= {1, 2, 3, 4}
    )
}
_SIZES: _Bound = {
    f"a list [stage, dim_hidden, num_prototypes, cells] of whole numbers in 1..{_WIDEST:,} for "
    "each of some stages": lambda sizes: (
        all(len(row) == 4 and all(1 <= size <= _WIDEST for size in row) for row in sizes)
        and len({row[0] for row in sizes}) == len(sizes)
    )
}


_BELOW_1: _Bound = {"at least 0 and less than 1": lambda value: 0 <= value < 1}
_STATISTICS: _Bound = {
    "null, or a mean and a positive deviation of three channels": lambda rows: (
        rows is None or (math.isfinite(sum(map(sum, rows))) and min(rows[1]) > 0)
    )
}


def _one_of(names: tuple[str, ...]) -> _Bound:
    return {f"one of {', '.join(names)}": lambda value: value in names}


@dataclass(frozen=True)
class ModelConfig:
    """Settings of the network and its loss. An impossible value raises ValueError with its name."""

    arch: str = field(default="resnet50", metadata=ARCH)
    """Encoder: a ResNet of torchvision, "resnet18", "resnet34", "resnet50" or "resnet101"; or any
    network of timm with maps of its stages, as "timm:convnext_tiny" (docs/backbones.md)."""
    dim_hidden: int = field(default=4096, metadata=_COUNT)
    """Width of the hidden layers of projector and predictor."""
    dim_out: int = field(default=256, metadata=_COUNT)
    """D, the size of a projected feature, a prototype and a slot."""
    num_prototypes: int = field(default=256, metadata=_COUNT)
    """K, the number of prototypes and so of slots in an image."""
    objective: Objective = field(default="slotcon", metadata=_one_of(get_args(Objective)))
    """What is learnt. "slotcon": the groups and slots of whole views (arXiv 2205.15288). "slotmim":
    its successor for ViTs (arXiv 2503.06960). The student sees views with hidden patches
    (views.mask_ratio) and also learns the groups of these, and heads have no BatchNorm
    (docs/slotmim.md)."""
    teacher_temp: float = field(default=0.07, metadata=_POSITIVE)
    """Temperature of the teacher's distribution in the grouping loss, and of the assignment of
    cells to slots in both student and teacher. train.warmup_teacher_temp changes it at first."""
    student_temp: float = field(default=0.1, metadata=_POSITIVE)
    """Temperature of the student's distribution in the grouping loss."""
    center_momentum: float = field(default=0.9, metadata=_SHARE)
    """Share of the running centre of the teacher's scores that one step keeps."""
    contrast_temp: float = field(default=0.2, metadata=_POSITIVE)
    """Temperature τ of the contrast between slots; its term is multiplied by 2τ."""
    group_loss_weight: float = field(default=0.5, metadata=_SHARE)
    """λ of λ·grouping + (1 − λ)·slots; with slotmim that of half of
    λ·(grouping + masked) + (1 − λ)·slots."""
    slot_loss: SlotLoss = field(default="contrastive", metadata=_one_of(get_args(SlotLoss)))
    """Loss between the slots of two views: "contrastive", InfoNCE against all active slots of the
    batch; "regression", 2 − 2·cosine with only the positive, as in BYOL (paper, table 8b)."""
    align: Align = field(default="assignments", metadata=_one_of(get_args(Align)))
    """What the inverse augmentation aligns: "assignments", the scores of the cells; "projections",
    the features, which are scored afterwards (paper, table 8c)."""
    image_loss_weight: float = field(default=0.0, metadata=_WEIGHT)
    """Weight of an additional contrast between whole images, as in MoCo v3, with a separate
    predictor (paper, table 8d). It is added to the weighted sum of the other losses. 0 = none."""
    targets: Targets = field(default="centred", metadata=_one_of(get_args(Targets)))
    """The teacher's distribution in the grouping loss. "centred": a running mean of the scores is
    taken off, as in the paper. "balanced": the prototypes' shares of the batch are pulled towards
    equal ones, as in SwAV (Caron et al., arXiv 2006.09882), with `balance`. Small prototype sets
    then stay in use: 24 of 24 after minutes on sample scenes, where centring kept 20."""
    balance: float = field(default=0.7, metadata=_SHARE)
    """Balanced targets: how far shares are pulled, the exponent of unbalanced optimal transport
    (Chizat et al., arXiv 1607.05816). 0: not at all; 1: to equal shares, SwAV's Sinkhorn."""
    balance_temp: float = field(default=0.05, metadata=_POSITIVE)
    """Balanced targets: temperature of the teacher's distribution, in place of teacher_temp."""
    cell_loss_weight: float = field(default=0.0, metadata=_WEIGHT)
    """Weight of an additional contrast between single cells of the shared pixels, as pixels in
    PixContrast (Xie et al., arXiv 2011.10043), with a separate predictor and τ contrast_temp. At
    equal cost, it raised the prototypes' mIoU on sample scenes from 14 to 21 %. 0 = none."""
    cells: int = field(default=16, metadata=_COUNT)
    """Cells of an image that this contrast, and the relations, sample in each direction, at most
    those of a view."""
    relation_loss_weight: float = field(default=0.0, metadata=_WEIGHT)
    """Weight of an additional term: to which other cells of the batch a cell is near, a softmax of
    cosines of centred features, is the same in student and teacher (KL; model/relations.py). The
    two need no common width, so a frozen teacher of any architecture will do. 0 = none."""
    relation_temp: float = field(default=0.1, metadata=_POSITIVE)
    """Temperature of this softmax, in both."""
    projector: Projector = field(default="mlp", metadata=_one_of(get_args(Projector)))
    """What is between a cell of the encoder's map and its feature. "mlp": three layers, as in the
    paper. "norm": a BatchNorm without weights, so that the map itself is grouped; dim_out must then
    be the encoder's width."""
    prototype_init: PrototypeInit = field(
        default="random", metadata=_one_of(get_args(PrototypeInit))
    )
    """Prototypes at the start. "random": from N(0, 1). "kmeans": centres of the cells of the first
    epoch's images, for networks that are trained already (model.supervise must be empty)."""
    norm: Norm = field(default="train", metadata=_one_of(get_args(Norm)))
    """The encoder's BatchNorms in training. "train": they normalise by the batch. "eval": by the
    running statistics that the encoder started with, which stay; scale and shift are trained. On
    160 photographs, measuring an ImageNet network's statistics again cost 5.9 points of dense k-NN
    by itself (docs/posttraining.md). Projector and predictor always use the batch."""
    stages: int = field(default=4, metadata=_STAGE)
    """Stages that the encoder has, 1 to 4. Those of a ResNet have cells of 4, 8, 16 and 32 pixels,
    those of timm's networks: docs/backbones.md. Stages after the last one are not built. On a few
    hundred images stage 2 alone learns fastest (docs/results.md); detection and segmentation need
    4."""
    supervise: tuple[int, ...] = field(default=(), metadata=_STAGES)
    """Stages with losses, as [2, 3, 4]; the last of them must be the encoder's last. Each has its
    own projector, prototypes, predictors and centre, and the whole loss; the losses are added. Deep
    supervision (Lee et al., arXiv 1409.5185). Empty: the last stage alone, as in the paper."""
    stage_sizes: tuple[tuple[int, int, int, int], ...] = field(default=(), metadata=_SIZES)
    """[stage, dim_hidden, num_prototypes, cells] of supervised stages before the last one. A stage
    that is not listed has the sizes of the last."""
    drop_path: float = field(default=0.0, metadata=_BELOW_1)
    """timm only: the probability with which the student leaves out the last block for an image; it
    grows linearly over the blocks (stochastic depth, Huang et al., arXiv 1603.09382)."""
    image_stats: Statistics | None = field(default=None, metadata=_STATISTICS)
    """timm only: mean and deviation by which the encoder gets its images, in 0..1. null: those of
    the network's published weights, which are then recorded here."""

    def __post_init__(self) -> None:
        for setting in fields(self):
            value = getattr(self, setting.name)
            for meaning, holds in setting.metadata.items():
                _require(holds(value), setting.name, value, meaning)
        ends = self.supervise[-1:] in ((), (self.stages,))
        last = f"a list that ends with {self.stages}, the encoder's last stage (model.stages)"
        _require(ends, "supervise", self.supervise, last)
        others = set(self.supervised[:-1])
        sized = {stage for stage, *_ in self.stage_sizes} <= others
        among = f"of stages among {sorted(others)}, those in model.supervise without the last"
        _require(sized, "stage_sizes", self.stage_sizes, among)
        if self.hides_patches:  # first: a recipe has settings that no ResNet takes
            self._check_slotmim()
        self._check_timm()

    def _check_slotmim(self) -> None:
        mlp = self.projector == "mlp"
        _require(mlp, "projector", self.projector, "mlp with model.objective slotmim")
        vit = "a ViT of timm, as timm:vit_small_patch16_224, with model.objective slotmim"
        _require(is_timm(self.arch), "arch", self.arch, vit)
        from model.timm_encoder import patch_size

        _require(patch_size(self.arch) is not None, "arch", self.arch, vit)

    def _check_timm(self) -> None:
        """Check what depends on the network, and record how its images are normalised."""
        if not is_timm(self.arch):
            other = "unless arch is a network of timm"
            _require(self.drop_path == 0, "drop_path", self.drop_path, f"0 {other}")
            _require(self.image_stats is None, "image_stats", self.image_stats, f"null {other}")
            return
        from model.timm_encoder import facts, has_drop_path

        known = facts(self.arch)
        for name, stages in (("stages", (self.stages,)), ("supervise", self.supervise)):
            there = set(stages) <= known.strides.keys()
            _require(there, name, stages, f"of {sorted(known.strides)}, the stages of {self.arch}")
        drops = self.drop_path == 0 or has_drop_path(self.arch)
        _require(drops, "drop_path", self.drop_path, f"0: {self.arch} has none")
        if self.image_stats is None:
            object.__setattr__(self, "image_stats", known.image_stats)

    @property
    def strides(self) -> Mapping[int, int]:
        """Pixels of an image along one side of a cell, by stage."""
        if not is_timm(self.arch):
            return STRIDES
        from model.timm_encoder import facts

        return facts(self.arch).strides

    def cells_of(self, side: int, stage: int | None = None) -> int:
        """Number of cells that a stage, if None the last one, makes of a view of `side` pixels."""
        return math.ceil(side / self.strides[stage or self.stages]) ** 2

    @property
    def can_checkpoint(self) -> bool:
        """Whether the encoder's activations can be computed twice instead of kept."""
        if not is_timm(self.arch):
            return True
        from model.timm_encoder import can_checkpoint

        return can_checkpoint(self.arch)

    def refused_side(self, side: int) -> str | None:
        """What the side of a view must be instead; None if the encoder takes `side` pixels."""
        if not is_timm(self.arch):
            cell = STRIDES[self.stages]
            return f"at least {cell}, a cell of stage {self.stages}" if side < cell else None
        from model.timm_encoder import refused_side

        return refused_side(self.arch, self.stages, side)

    @property
    def hides_patches(self) -> bool:
        """Whether the student sees views with hidden patches."""
        return self.objective == "slotmim"

    @property
    def samples_cells(self) -> bool:
        """Whether a term looks at a sample of the cells."""
        return bool(self.cell_loss_weight or self.relation_loss_weight)

    @property
    def assignment_floor(self) -> float:
        """Added to every assignment of a cell to a slot, by the objective's authors."""
        return 1e-12 if self.objective == "slotmim" else 1e-6

    @property
    def supervised(self) -> tuple[int, ...]:
        """The stages with losses, in growing order."""
        return self.supervise or (self.stages,)

    def at(self, stage: int) -> "ModelConfig":
        """The settings of a supervised stage: those of a model that ends there."""
        alone = replace(self, stages=stage, supervise=(), stage_sizes=())
        for of, hidden, prototypes, cells in self.stage_sizes:
            if of == stage:
                alone = replace(alone, dim_hidden=hidden, num_prototypes=prototypes, cells=cells)
        return alone


def _require(holds: bool, name: str, value: object, meaning: str) -> None:
    if not holds:
        raise ValueError(f"{name} must be {meaning}, not {value!r}")
