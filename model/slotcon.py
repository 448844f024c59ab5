"""SlotCon: self-supervised learning by joint semantic grouping and contrast of slots.

Wen et al., NeurIPS 2022, arXiv 2205.15288.
B images, K prototypes, D features, H W cells, S side of a view, two views each.
"""

import copy
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from model.alignment import align_to_overlap, has_area
from model.config import ModelConfig
from model.distributed import all_reduce_mean
from model.encoder import Encoder
from model.grouping import SemanticGrouping, cosine_scores, winning_slots, won_cells
from model.heads import build_predictor, build_projector
from model.image_level import image_loss
from model.losses import grouping_loss, slot_loss, slot_regression
from model.official import from_official, to_official
from model.slots import Contrast, SlotCapacity, contrast, largest_counts, read_capacity

DIRECTIONS = (("12", 0, 1), ("21", 1, 0))
"""Of each direction of the loss: its name, the student's view, the teacher's view."""


@dataclass(frozen=True)
class ModelOutput:
    """The result of one forward pass, of this rank alone: nothing is averaged over ranks."""

    loss: Tensor
    """Weighted sum of the terms, a scalar to call `backward` on."""
    terms: dict[str, Tensor]
    """Detached scalars before weighting, named as in `SlotCon.term_names`: grouping_12,
    grouping_21, slot_12, slot_21 (12: student view 1 against teacher view 2) and, if its weight is
    not 0, image (both directions)."""
    stats: dict[str, Tensor]
    """Detached scalars, means per image and view: active_slots (teacher slots that win a cell),
    active_pairs (slots that win in the student's view and in the teacher's other view),
    dropped_pairs (active pairs that did not fit into `SlotCon.capacity`)."""
    usage: Tensor
    """int64 [K], the number of cells that each of the teacher's prototypes wins in both views."""


class Grouped(NamedTuple):
    """The maps and slots of one view."""

    features: Tensor
    """[B, D, H, W] output of the projector."""
    slots: Tensor
    """[B, K, D]"""
    scores: Tensor
    """[B, K, H, W] cosine of cell and prototype."""


class Branch(nn.Module):
    """Encoder, projector and prototypes; student and teacher each are one."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.encoder = Encoder(config.arch)
        self.projector = build_projector(self.encoder.dim, config.dim_hidden, config.dim_out)
        # Both branches assign cells to slots with the teacher's temperature.
        self.grouping = SemanticGrouping(config.num_prototypes, config.dim_out, config.teacher_temp)

    def forward(self, images: Tensor) -> Grouped:
        """Group one view [B, 3, S, S]; BatchNorm normalises the B images together."""
        features = self.projector(self.encoder(images))
        with record_function("slotcon.grouping"):
            slots, scores = self.grouping(features)
        return Grouped(features, slots, scores)


class SlotCon(nn.Module):
    """Student, teacher, predictor and centre; `forward` computes the loss of one batch.

    The trainer calls `update_teacher` once before the first forward of a step. BatchNorms see one
    rank's images; `nn.SyncBatchNorm.convert_sync_batchnorm` synchronises them over ranks.
    `record_function` names the parts of a step for profilers; `tools.benchmark` sums the time of
    each.
    """

    center: Tensor
    """[1, K] running mean of the teacher's scores."""
    largest_counts: Tensor
    """int64 [2]: the largest numbers of active pairs and of active keys in one direction since the
    last `adapt_capacity`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.student = Branch(config)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.predictor = build_predictor(config.dim_out, config.dim_hidden, config.dim_out)
        self.register_buffer("center", torch.zeros(1, config.num_prototypes))
        self.register_buffer("largest_counts", torch.zeros(2, dtype=torch.long), persistent=False)
        self.capacity: SlotCapacity | None = None
        self._most_slots = 0
        self.image_predictor: nn.Sequential | None = None
        if config.image_loss_weight:  # built last: its draws do not change the other weights
            self.image_predictor = build_predictor(
                config.dim_out, config.dim_hidden, config.dim_out
            )

    def forward(
        self, views: Tensor, overlap: Tensor, flipped: Tensor, micro_batches: int = 1
    ) -> ModelOutput:
        """Loss of a batch of pairs.

        views [2, B, 3, S, S]; overlap [2, B, 4], x1 y1 x2 y2 of the shared pixels in (0..1) of each
        view after its flip; flipped bool [2, B]. B is equal on all ranks. With `micro_batches` n,
        this batch is one of the n of a step: the centre moves by 1/n of a step.
        In training (train mode, gradients on) the centre is used first and updated afterwards.
        """
        _check_batch(views, overlap, flipped, micro_batches)
        with record_function("slotcon.student"):
            student = [self.student(view) for view in views]
        with record_function("slotcon.teacher"), torch.no_grad():
            teacher = [self.teacher(view) for view in views]

        with record_function("slotcon.losses"):
            terms = self._grouping_terms(student, teacher, overlap, flipped)
            if self.training and torch.is_grad_enabled():
                self._update_center(teacher, micro_batches)

        with record_function("slotcon.slots"):
            won = torch.stack([won_cells(view.scores) for view in teacher])
            slot_terms, stats = self._slot_terms(student, teacher, won > 0)
        terms |= slot_terms
        weight = self.config.group_loss_weight
        loss = weight * (terms["grouping_12"] + terms["grouping_21"]) + (1 - weight) * (
            terms["slot_12"] + terms["slot_21"]
        )
        if self.image_predictor is not None:
            with record_function("slotcon.image level"):
                terms["image"] = self._image_term(student, teacher, self.image_predictor)
            loss = loss + self.config.image_loss_weight * terms["image"]
        terms = {name: term.detach() for name, term in terms.items()}
        return ModelOutput(loss, terms, stats, won.sum(dim=(0, 1)))

    @property
    def term_names(self) -> tuple[str, ...]:
        """The keys of `ModelOutput.terms`, in order."""
        names = tuple(f"{kind}_{name}" for kind in ("grouping", "slot") for name, *_ in DIRECTIONS)
        return names if self.image_predictor is None else (*names, "image")

    @record_function("slotcon.teacher update")
    @torch.no_grad()
    def update_teacher(self, momentum: float) -> None:
        """Teacher = momentum·teacher + (1 − momentum)·student, parameters only.

        Buffers are excluded: the teacher's BatchNorms keep separate running statistics.
        """
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum must lie between 0 and 1, not {momentum!r}")
        teacher: list[Tensor] = list(self.teacher.parameters())
        student: list[Tensor] = list(self.student.parameters())
        torch._foreach_lerp_(teacher, student, 1 - momentum)

    def adapt_capacity(self) -> None:
        """Set the size of the slots' buffers: a quarter more than the largest count so far.

        All ranks call it together, after at least one forward. The host waits for the device here,
        so call it seldom, for example at log lines. Afterwards no forward waits; before, each one
        has to read the number of active slots. Pairs beyond `capacity` are dropped and counted in
        `dropped_pairs`.
        """
        counts = read_capacity(self.largest_counts)
        self.largest_counts.zero_()
        self.capacity = counts.with_margin(self._most_slots)

    @torch.no_grad()
    def segment(
        self, images: Tensor, network: Literal["teacher", "student"] = "teacher"
    ) -> tuple[Tensor, Tensor]:
        """Group whole images [B, 3, S, S] with the running BatchNorm statistics.

        Returns (scores [B, K, H, W], features [B, D, H, W]). Mode and buffers do not change.
        """
        if network not in ("teacher", "student"):
            raise ValueError(f'network must be "teacher" or "student", not {network!r}')
        branch = self.teacher if network == "teacher" else self.student
        with _eval_mode(branch):
            grouped = branch(images)
        return grouped.scores, grouped.features

    def official_state_dict(self) -> dict[str, Tensor]:
        """The state dict under the names of the authors' code, without `module.`."""
        return to_official(self.state_dict())

    def load_official_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load the authors' state dict, with or without `module.` (their file's "model" entry).

        Raises ValueError, without a change to the model, if entries are missing, unknown or of
        another shape.
        """
        self.load_state_dict(from_official(state, self.state_dict()))

    def _grouping_terms(
        self, student: list[Grouped], teacher: list[Grouped], overlap: Tensor, flipped: Tensor
    ) -> dict[str, Tensor]:
        with record_function("slotcon.geometry"):
            student_aligned, teacher_aligned = (
                [self._aligned(branch, views[v], overlap[v], flipped[v]) for v in (0, 1)]
                for branch, views in ((self.student, student), (self.teacher, teacher))
            )
        # A pair without common pixels is excluded; the authors' code includes it as zero maps.
        overlapping = has_area(overlap).all(dim=0)
        return {
            f"grouping_{name}": grouping_loss(
                student_aligned[own],
                teacher_aligned[other],
                self.center,
                overlapping,
                self.config.student_temp,
                self.config.teacher_temp,
            )
            for name, own, other in DIRECTIONS
        }

    def _aligned(self, branch: Branch, view: Grouped, overlap: Tensor, flipped: Tensor) -> Tensor:
        """Scores [B, K, H, W] of the pixels that the views share, see `ModelConfig.align`.

        The paper does not say whether `align` changes anything else. Here slots, centre and active
        slots always come from the unaligned maps.
        """
        if self.config.align == "assignments":
            return align_to_overlap(view.scores, overlap, flipped)
        features = align_to_overlap(view.features, overlap, flipped)
        with record_function("slotcon.grouping"):
            return cosine_scores(features, branch.grouping.prototypes)

    @torch.no_grad()
    def _update_center(self, teacher: list[Grouped], micro_batches: int) -> None:
        """Move the centre to the mean score over all cells, both views, all ranks (unaligned)."""
        mean = torch.stack([view.scores for view in teacher]).mean(dim=(0, 1, 3, 4))
        momentum = self.config.center_momentum ** (1 / micro_batches)
        self.center.mul_(momentum).add_(all_reduce_mean(mean), alpha=1 - momentum)

    def _slot_terms(
        self, student: list[Grouped], teacher: list[Grouped], teacher_active: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Slot losses by name, and the counts for `ModelOutput.stats`; teacher_active bool
        [2, B, K]: whether each of the teacher's slots is active."""
        student_active = [winning_slots(view.scores) for view in student]
        keys = torch.stack([teacher_active[other] for _, _, other in DIRECTIONS])
        pairs = keys & torch.stack([student_active[own] for _, own, _ in DIRECTIONS])

        counts = largest_counts(pairs, keys)
        torch.maximum(self.largest_counts, counts, out=self.largest_counts)
        batch, prototypes, *cells = teacher[0].scores.shape
        self._most_slots = batch * min(prototypes, math.prod(cells))
        # The capacity may come from a larger batch, with more slots than this one has.
        capacity = (self.capacity or read_capacity(counts)).within(self._most_slots)

        terms, kept = {}, []
        for at, (name, own, other) in enumerate(DIRECTIONS):
            packed = contrast(
                self.predictor,
                student[own].slots,
                teacher[other].slots,
                pairs[at],
                keys[at],
                capacity,
            )
            terms[f"slot_{name}"] = torch.where(packed.enough, self._slot_loss(packed), 0.0)
            kept.append(packed.valid_queries.sum())
        active = pairs.sum() / (2 * batch)
        return terms, {
            "active_slots": keys.sum() / (2 * batch),
            "active_pairs": active,
            "dropped_pairs": active - torch.stack(kept).sum() / (2 * batch),
        }

    def _slot_loss(self, packed: Contrast) -> Tensor:
        """The loss of one direction, see `ModelConfig.slot_loss`."""
        if self.config.slot_loss == "regression":
            targets = packed.keys[packed.positive]
            return slot_regression(packed.queries, targets, packed.valid_queries)
        return slot_loss(*packed[:5], self.config.contrast_temp)

    def _image_term(
        self, student: list[Grouped], teacher: list[Grouped], predictor: nn.Module
    ) -> Tensor:
        """Both directions of the image-level loss."""
        temperature = self.config.contrast_temp
        directions = [
            image_loss(student[own].features, teacher[other].features, predictor, temperature)
            for _, own, other in DIRECTIONS
        ]
        return torch.stack(directions).sum()


@contextmanager
def _eval_mode(module: nn.Module) -> Iterator[None]:
    """Eval mode inside the block; afterwards each submodule has its previous mode again."""
    modes = {child: child.training for child in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for child, training in modes.items():
            child.training = training


def _check_batch(views: Tensor, overlap: Tensor, flipped: Tensor, micro_batches: int) -> None:
    if views.ndim != 5 or views.shape[0] != 2 or views.shape[2] != 3:
        raise ValueError(f"views must have shape [2, B, 3, S, S], not {list(views.shape)}")
    batch = views.shape[1]
    if overlap.shape != (2, batch, 4):
        raise ValueError(f"overlap must have shape [2, {batch}, 4], not {list(overlap.shape)}")
    if flipped.shape != (2, batch) or flipped.dtype != torch.bool:
        raise ValueError(
            f"flipped must be bool [2, {batch}], not {flipped.dtype} {list(flipped.shape)}"
        )
    if micro_batches < 1:
        raise ValueError(f"micro_batches must be at least 1, not {micro_batches}")
