"""SlotCon: self-supervised learning by joint semantic grouping and contrast of slots.

Wen et al., NeurIPS 2022, arXiv 2205.15288.
B images, K prototypes, D features, H W cells, S side of a view, two views each.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from model import official
from model.alignment import align_to_overlap, has_area
from model.config import ModelConfig
from model.distributed import all_gather, all_reduce_mean, all_reduce_sum, rank, world_size
from model.encoder import build_encoder
from model.grouping import SemanticGrouping, winning_slots
from model.heads import build_predictor, build_projector
from model.losses import grouping_loss, slot_loss

DIRECTIONS = (("12", 0, 1), ("21", 1, 0))
"""Name of a loss direction, the student's view and the teacher's view."""


@dataclass(frozen=True)
class ModelOutput:
    """What one forward gives. Each number is this process's own: nothing is averaged over ranks."""

    loss: Tensor
    """Weighted sum of the terms, a scalar to call `backward` on."""
    terms: dict[str, Tensor]
    """Detached scalars before their weights: grouping_12, grouping_21, slot_12, slot_21
    (12: student view 1 against teacher view 2)."""
    stats: dict[str, Tensor]
    """Detached scalars, means per image and view: active_slots (teacher slots that win a cell),
    active_pairs (slots that win in the student's view and in the teacher's other view)."""


class Grouped(NamedTuple):
    """One view, grouped."""

    features: Tensor
    """[B, D, H, W] output of the projector."""
    slots: Tensor
    """[B, K, D]"""
    scores: Tensor
    """[B, K, H, W] cosine of cell and prototype."""


class Branch(nn.Module):
    """Encoder, projector and prototypes: what student and teacher each have."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.encoder, channels = build_encoder(config.arch)
        self.projector = build_projector(channels, config.dim_hidden, config.dim_out)
        # The assignment of cells to slots uses the teacher's temperature in both branches.
        self.grouping = SemanticGrouping(config.num_prototypes, config.dim_out, config.teacher_temp)

    def forward(self, images: Tensor) -> Grouped:
        """Group one view [B, 3, S, S]; the batch is one BatchNorm batch."""
        features = self.projector(self.encoder(images))
        slots, scores = self.grouping(features)
        return Grouped(features, slots, scores)


class SlotCon(nn.Module):
    """Student, teacher, predictor and centre; `forward` computes the loss of one batch.

    The trainer calls `update_teacher` once before a step's first forward. BatchNorm is plain;
    `nn.SyncBatchNorm.convert_sync_batchnorm` makes it span processes.
    """

    center: Tensor
    """[1, K] running mean of the teacher's scores."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.student = Branch(config)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.predictor = build_predictor(config.dim_out, config.dim_hidden, config.dim_out)
        self.register_buffer("center", torch.zeros(1, config.num_prototypes))

    def forward(
        self, views: Tensor, overlap: Tensor, flipped: Tensor, micro_batches: int = 1
    ) -> ModelOutput:
        """Loss of a batch of pairs.

        views [2, B, 3, S, S]; overlap [2, B, 4], x1 y1 x2 y2 of the shared pixels in (0..1) of each
        view after its flip; flipped bool [2, B]. All ranks bring the same B. With `micro_batches`
        n, this batch is one of n that make up a step: the centre moves by 1/n of a step.
        In training (train mode, gradients on) the centre is updated, after its use.
        """
        _check_batch(views, overlap, flipped, micro_batches)
        student = [self.student(view) for view in views]
        with torch.no_grad():
            teacher = [self.teacher(view) for view in views]

        terms = self._grouping_terms(student, teacher, overlap, flipped)
        if self.training and torch.is_grad_enabled():
            self._update_center(teacher, micro_batches)

        student_active = [winning_slots(view.scores) for view in student]
        teacher_active = [winning_slots(view.scores) for view in teacher]
        pairs = [student_active[own] & teacher_active[other] for _, own, other in DIRECTIONS]
        for (name, own, other), pair in zip(DIRECTIONS, pairs, strict=True):
            terms[f"slot_{name}"] = self._slot_term(
                student[own].slots, teacher[other].slots, pair, teacher_active[other]
            )

        weight = self.config.group_loss_weight
        loss = weight * (terms["grouping_12"] + terms["grouping_21"]) + (1 - weight) * (
            terms["slot_12"] + terms["slot_21"]
        )
        stats = {
            "active_slots": torch.stack(teacher_active).sum(dim=2).float().mean(),
            "active_pairs": torch.stack(pairs).sum(dim=2).float().mean(),
        }
        return ModelOutput(loss, {name: term.detach() for name, term in terms.items()}, stats)

    @torch.no_grad()
    def update_teacher(self, momentum: float) -> None:
        """Teacher = momentum·teacher + (1 − momentum)·student, parameters only.

        BatchNorm buffers stay apart: the teacher keeps running statistics of its own.
        """
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum must lie between 0 and 1, not {momentum!r}")
        teacher: list[Tensor] = list(self.teacher.parameters())
        student: list[Tensor] = list(self.student.parameters())
        torch._foreach_mul_(teacher, momentum)
        torch._foreach_add_(teacher, student, alpha=1 - momentum)

    @torch.no_grad()
    def segment(
        self, images: Tensor, network: Literal["teacher", "student"] = "teacher"
    ) -> tuple[Tensor, Tensor]:
        """Group whole images [B, 3, S, S] with the running BatchNorm statistics.

        Returns (scores [B, K, H, W], features [B, D, H, W]); mode and buffers stay as they were.
        """
        if network not in ("teacher", "student"):
            raise ValueError(f'network must be "teacher" or "student", not {network!r}')
        branch = self.teacher if network == "teacher" else self.student
        with _eval_mode(branch):
            grouped = branch(images)
        return grouped.scores, grouped.features

    def official_state_dict(self) -> dict[str, Tensor]:
        """The state dict under the names of the authors' code, without `module.`."""
        return official.to_official(self.state_dict())

    def load_official_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load the authors' state dict, with or without `module.` (their file's "model" entry).

        Raises `ValueError` and leaves the model as it is where entries are missing, unknown or of
        another shape.
        """
        self.load_state_dict(official.from_official(state, self.state_dict()))

    def _grouping_terms(
        self, student: list[Grouped], teacher: list[Grouped], overlap: Tensor, flipped: Tensor
    ) -> dict[str, Tensor]:
        student_aligned, teacher_aligned = (
            [align_to_overlap(branch[v].scores, overlap[v], flipped[v]) for v in (0, 1)]
            for branch in (student, teacher)
        )
        # The authors let a pair that shares no pixels in as all-zero maps; here it is left out.
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

    @torch.no_grad()
    def _update_center(self, teacher: list[Grouped], micro_batches: int) -> None:
        """Move the centre to the mean score over all cells, both views, all ranks (unaligned)."""
        mean = torch.stack([view.scores for view in teacher]).mean(dim=(0, 1, 3, 4))
        momentum = self.config.center_momentum ** (1 / micro_batches)
        self.center.mul_(momentum).add_(all_reduce_mean(mean), alpha=1 - momentum)

    def _slot_term(
        self, student_slots: Tensor, teacher_slots: Tensor, pairs: Tensor, keys_active: Tensor
    ) -> Tensor:
        """One direction of the slot loss.

        student_slots, teacher_slots [B, K, D]; pairs bool [B, K]: active in both, the queries;
        keys_active bool [B, K]: active in the teacher's view. Keys come from all ranks.
        """
        # Every rank takes part in the collectives before any may find it has nothing to contrast.
        keys_active = all_gather(keys_active).flatten()
        keys = all_gather(teacher_slots).flatten(0, 1)[keys_active]

        rows = pairs.flatten().nonzero().squeeze(1)
        if self._rows_normalised_together(rows) < 2:
            return self._zero_term(student_slots)
        queries = self.predictor(student_slots.flatten(0, 1)[rows])
        positive = keys_active.cumsum(0)[rows + rank() * pairs.numel()] - 1
        return slot_loss(queries, keys, positive, self.config.contrast_temp)

    def _rows_normalised_together(self, rows: Tensor) -> int:
        """How many query rows share one BatchNorm batch: all ranks' under SyncBatchNorm.

        Decided alike on all the ranks that must then meet inside SyncBatchNorm; a rank without rows
        of its own takes part there with an empty batch.
        """
        synced = any(isinstance(layer, nn.SyncBatchNorm) for layer in self.predictor)
        if self.training and synced and world_size() > 1:
            return int(all_reduce_sum(torch.tensor(len(rows), device=rows.device)))
        return len(rows)

    def _zero_term(self, student_slots: Tensor) -> Tensor:
        """Exactly zero whatever the values, but with a (zero) gradient for all that it skips.

        DistributedDataParallel waits for a gradient of every parameter.
        """
        skipped = [student_slots, *self.predictor.parameters()]
        return torch.stack([tensor.flatten()[:0].sum() for tensor in skipped]).sum()


@contextmanager
def _eval_mode(module: nn.Module) -> Iterator[None]:
    """Eval mode inside the block; each submodule's own mode comes back after it."""
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
