"""The losses of one stage: what is asked of its maps and slots (paper, section 3).

B images, K prototypes, D features, H W cells, two views each.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from model.alignment import align_to_overlap, has_area
from model.branch import Grouped
from model.cells import cell_loss, sample_cells
from model.config import ModelConfig
from model.distributed import all_reduce_mean
from model.grouping import cosine_scores, winning_slots, won_cells
from model.heads import build_predictor
from model.image_level import image_loss
from model.losses import grouping_loss, masked_loss, slot_loss, slot_regression
from model.relations import relation_loss
from model.slots import Contrast, SlotCapacity, contrast, largest_counts, read_capacities
from model.targets import balancing_offset

DIRECTIONS = (("12", 0, 1), ("21", 1, 0))
"""Of each direction of the loss: its name, the student's view, the teacher's view."""


@dataclass(frozen=True)
class ModelOutput:
    """The result of one forward pass, of this rank alone: nothing is averaged over ranks."""

    loss: Tensor
    """Weighted sum of the terms, a scalar to call `backward` on."""
    terms: dict[str, Tensor]
    """Detached scalars before weighting, named as in `SlotCon.term_names`: grouping_12,
    grouping_21, slot_12, slot_21 (12: student view 1 against teacher view 2), with slotmim masked_1
    and masked_2 (by view) and, if their weights are not 0, image, cells and relations (both
    directions). Those of stages before the last one begin with stageN_."""
    stats: dict[str, Tensor]
    """Detached scalars, means per image and view: active_slots (teacher slots that win a cell),
    active_pairs (slots that win in the student's view and in the teacher's other view),
    dropped_pairs (active pairs that did not fit into the slots' buffers; of all supervised stages,
    the others are those of the last)."""
    usage: Tensor
    """int64 [K], the number of cells that each of the teacher's prototypes wins in both views.
    Those of earlier supervised stages come first; `SlotCon.prototype_counts` has their numbers."""


@dataclass(frozen=True)
class Geometry:
    """What is known about a batch beside its pixels."""

    overlap: Tensor
    """[2, B, 4], see `SlotCon.forward`."""
    flipped: Tensor
    """bool [2, B]"""
    micro_batches: int
    """This batch is one of so many of a step."""
    draw: tuple[int, int]
    """(seed, number of the batch in the run): what the sample of cells follows from."""
    masks: Tensor | None = None
    """bool [2, B, H, W]: the cells that the student did not see; None without slotmim."""


class Objective(nn.Module):
    """Predictors and centre of one stage; `measure` computes the stage's losses."""

    center: Tensor
    """[1, K] running mean of the teacher's scores; not used with balanced targets."""
    largest_counts: Tensor
    """int64 [2]: the largest numbers of active pairs and of active keys in one direction since the
    buffers were last fitted."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.add_parts(config)

    def add_parts(self, config: ModelConfig) -> None:
        """Build everything for a stage with these settings, in an order that never changes."""
        self.config = config
        self.teacher_temp = config.teacher_temp
        self.predictor = _predictor(config)
        self.register_buffer("center", torch.zeros(1, config.num_prototypes))
        self.register_buffer("largest_counts", torch.zeros(2, dtype=torch.long), persistent=False)
        self.capacity: SlotCapacity | None = None
        self._most_slots = 0
        # Built last: their draws do not change the other weights.
        self.image_predictor = _predictor(config) if config.image_loss_weight else None
        self.cell_predictor = _predictor(config) if config.cell_loss_weight else None

    @property
    def own_term_names(self) -> tuple[str, ...]:
        """The keys of the terms that `measure` returns, in order."""
        names = [f"grouping_{name}" for name, *_ in DIRECTIONS]
        names += ["masked_1", "masked_2"] * self.config.hides_patches
        names += [f"slot_{name}" for name, *_ in DIRECTIONS]
        names += ["image"] * bool(self.config.image_loss_weight)
        names += ["cells"] * bool(self.config.cell_loss_weight)
        return (*names, *["relations"] * bool(self.config.relation_loss_weight))

    def measure(
        self,
        student: Sequence[Grouped],
        teacher: Sequence[Grouped],
        batch: Geometry,
        has_slots: bool = True,
    ) -> ModelOutput:
        """The losses of both views of student and teacher at this stage. Unless the teacher
        `has_slots` of the student's space, the terms of slots are 0.
        """
        config = self.config
        # A pair without common pixels is excluded; the authors' code includes it as zero maps.
        overlapping = has_area(batch.overlap).all(dim=0)
        with record_function("slotcon.losses"):
            terms = self._grouping_terms(student, teacher, batch, overlapping)
            if config.targets == "centred" and self.training and torch.is_grad_enabled():
                self._update_center(teacher, batch.micro_batches)

        with record_function("slotcon.slots"):
            won = torch.stack([won_cells(view.scores) for view in teacher])
            measure = self._slot_terms if has_slots else _no_slot_terms
            slot_terms, stats = measure(student, teacher, won > 0)
        terms |= slot_terms
        weight = config.group_loss_weight
        loss = weight * (terms["grouping_12"] + terms["grouping_21"]) + (1 - weight) * (
            terms["slot_12"] + terms["slot_21"]
        )
        if batch.masks is not None:
            loss = (loss + weight * (terms["masked_1"] + terms["masked_2"])) / 2
        if self.image_predictor is not None:
            with record_function("slotcon.image level"):
                terms["image"] = self._image_term(student, teacher, self.image_predictor)
            loss = loss + config.image_loss_weight * terms["image"]
        if config.samples_cells:
            with record_function("slotcon.cells"):
                found = self._cell_terms(student, teacher, batch, overlapping)
            terms |= found
            weights = {"cells": config.cell_loss_weight, "relations": config.relation_loss_weight}
            loss = loss + sum(weights[name] * term for name, term in found.items())
        terms = {name: term.detach() for name, term in terms.items()}
        return ModelOutput(loss, terms, stats, won.sum(dim=(0, 1)))

    def fit_buffers(self, counts: SlotCapacity) -> None:
        """Size the slots' buffers a quarter above `counts`, and begin to count anew."""
        self.largest_counts.zero_()
        self.capacity = counts.with_margin(self._most_slots)

    def _grouping_terms(
        self,
        student: Sequence[Grouped],
        teacher: Sequence[Grouped],
        batch: Geometry,
        overlapping: Tensor,
    ) -> dict[str, Tensor]:
        config = self.config
        with record_function("slotcon.geometry"):
            student_aligned, teacher_aligned = (
                [
                    self._aligned(view, *at)
                    for view, *at in zip(views, batch.overlap, batch.flipped, strict=True)
                ]
                for views in (student, teacher)
            )
        offset, temperature = self.center, self.teacher_temp
        if config.targets == "balanced":
            temperature = config.balance_temp
            scores = torch.stack([view.scores for view in teacher])
            offset = balancing_offset(scores, config.balance, temperature)
        temperatures = (config.student_temp, temperature)
        terms = {
            f"grouping_{name}": grouping_loss(
                student_aligned[own], teacher_aligned[other], offset, overlapping, *temperatures
            )
            for name, own, other in DIRECTIONS
        }
        if batch.masks is not None:
            for number, pair in enumerate(zip(student, teacher, batch.masks, strict=True), start=1):
                own_view, whole, masks = pair
                terms[f"masked_{number}"] = masked_loss(
                    own_view.scores, whole.scores, offset, masks, *temperatures
                )
        return terms

    def _aligned(self, view: Grouped, overlap: Tensor, flipped: Tensor) -> Tensor:
        """Scores [B, K, H, W] of the pixels that the views share, see `ModelConfig.align`.

        The paper does not say whether `align` changes anything else. Here slots, centre and active
        slots always come from the unaligned maps.
        """
        if self.config.align == "assignments":
            return align_to_overlap(view.scores, overlap, flipped)
        features = align_to_overlap(view.features, overlap, flipped)
        with record_function("slotcon.grouping"):
            return cosine_scores(features, view.prototypes)

    @torch.no_grad()
    def _update_center(self, teacher: Sequence[Grouped], micro_batches: int) -> None:
        """Move the centre to the mean score over all cells, both views, all ranks (unaligned)."""
        mean = torch.stack([view.scores for view in teacher]).mean(dim=(0, 1, 3, 4))
        momentum = self.config.center_momentum ** (1 / micro_batches)
        self.center.mul_(momentum).add_(all_reduce_mean(mean), alpha=1 - momentum)

    def _slot_terms(
        self, student: Sequence[Grouped], teacher: Sequence[Grouped], teacher_active: Tensor
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
        capacity = (self.capacity or read_capacities([counts])[0]).within(self._most_slots)

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
        self, student: Sequence[Grouped], teacher: Sequence[Grouped], predictor: nn.Module
    ) -> Tensor:
        """Both directions of the image-level loss."""
        temperature = self.config.contrast_temp
        directions = [
            image_loss(student[own].features, teacher[other].features, predictor, temperature)
            for _, own, other in DIRECTIONS
        ]
        return torch.stack(directions).sum()

    def _cell_terms(
        self,
        student: Sequence[Grouped],
        teacher: Sequence[Grouped],
        batch: Geometry,
        overlapping: Tensor,
    ) -> dict[str, Tensor]:
        """Contrast and relations of cells, both directions, on the same sample of places."""
        config = self.config
        with record_function("slotcon.geometry"):
            student_aligned, teacher_aligned = (
                [
                    align_to_overlap(view.features, *at)
                    for view, *at in zip(views, batch.overlap, batch.flipped, strict=True)
                ]
                for views in (student, teacher)
            )
        images, _, *sides = student[0].features.shape
        chosen = sample_cells(
            batch.draw, images, math.prod(sides), config.cells, overlapping.device
        )
        terms = dict[str, list[Tensor]]()
        for _, own, other in DIRECTIONS:
            cells = (student_aligned[own], teacher_aligned[other], overlapping, chosen)
            if self.cell_predictor is not None:
                loss = cell_loss(*cells, self.cell_predictor, config.contrast_temp)
                terms.setdefault("cells", []).append(loss)
            if config.relation_loss_weight:
                loss = relation_loss(*cells, config.relation_temp)
                terms.setdefault("relations", []).append(loss)
        return {name: torch.stack(directions).sum() for name, directions in terms.items()}


def _no_slot_terms(
    student: Sequence[Grouped], teacher: Sequence[Grouped], teacher_active: Tensor
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """As `Objective._slot_terms`, where there is nothing to contrast."""
    student_active = torch.stack([winning_slots(view.scores) for view in student])
    views = 2 * len(teacher[0].scores)
    none = teacher[0].scores.new_zeros(())
    return {f"slot_{name}": none for name, *_ in DIRECTIONS}, {
        "active_slots": teacher_active.sum() / views,
        "active_pairs": (teacher_active & student_active.flip(0)).sum() / views,
        "dropped_pairs": none,
    }


def _predictor(config: ModelConfig) -> nn.Sequential:
    norms = not config.hides_patches
    return build_predictor(config.dim_out, config.dim_hidden, config.dim_out, norms)
