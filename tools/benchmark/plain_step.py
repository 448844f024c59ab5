"""SlotCon's training step in one process, written plainly: the baseline of the benchmark.

It follows the paper and the authors' published implementation: NCHW, autocast with loss scaling on
CUDA, a loop over tensors for the teacher and for LARS, a Python branch on each image's flip flag,
`nonzero` for the active slots, all teacher slots normalised whether active or not, the loss read by
the host at every step. It uses the network's modules of a `SlotCon`, but not its losses, selection
or optimiser.

B images, K prototypes, D features, H W cells, S side of a view, N queries, M keys.
"""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import record_function
from torchvision.ops import roi_align

from model import ModelConfig, SlotCon
from model.branch import Branch


class PlainStep:
    """Training steps in NCHW. Changes `model` in place.

    `dtype` is autocast's: float32 turns autocast off, float16 adds loss scaling. Raises ValueError
    for a variant of the method, which has no plain version.
    """

    def __init__(
        self,
        model: SlotCon,
        *,
        momentum: float = 0.9,
        weight_decay: float = 1e-5,
        eta: float = 0.001,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if not is_plain(model.config):
            raise ValueError("there is no plain version of the method's variants")
        self.model = model.to(memory_format=torch.contiguous_format)
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        self.optimizer = PlainLARS(weights, momentum, weight_decay, eta)
        self.device, self.dtype = model.center.device, dtype
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=dtype == torch.float16)

    def __call__(
        self,
        views: Tensor,
        overlap: Tensor,
        flipped: Tensor,
        *,
        lr: float = 1e-6,
        teacher_momentum: float = 0.99,
    ) -> float:
        """One step on a batch; returns its loss.

        views [2, B, 3, S, S], overlap [2, B, 4], flipped bool [2, B]: as for `SlotCon.forward`.
        """
        views = views.contiguous()
        with torch.backends.cudnn.flags(enabled=True, benchmark=True):  # as in the authors' run
            mixed = self.dtype != torch.float32
            with torch.autocast(self.device.type, self.dtype if mixed else None, enabled=mixed):
                loss = self.loss(views, overlap, flipped, teacher_momentum)
            self.optimizer.zero_grad()
            self.scaler.scale(loss).backward()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.scaler.unscale_(self.optimizer)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss.item()

    def loss(
        self, views: Tensor, overlap: Tensor, flipped: Tensor, teacher_momentum: float
    ) -> Tensor:
        """Forward of both networks, with the teacher's update in between. Returns a scalar."""
        model, config = self.model, self.model.config
        with record_function("slotcon.student"):
            student = [features_of(model.student, view) for view in views]
        with record_function("slotcon.teacher update"):
            update_teacher(model, teacher_momentum)
        with record_function("slotcon.teacher"), torch.no_grad():
            teacher = [features_of(model.teacher, view) for view in views]
        with record_function("slotcon.grouping"):
            slots, scores = self._grouped(model.student, student)
            with torch.no_grad():
                targets, teacher_scores = self._grouped(model.teacher, teacher)
        with record_function("slotcon.geometry"):
            predicted = [align(scores[v], overlap[v], flipped[v]) for v in (0, 1)]
            with torch.no_grad():
                expected = [align(teacher_scores[v], overlap[v], flipped[v]) for v in (0, 1)]

        weight = config.group_loss_weight
        with record_function("slotcon.losses"):
            terms = [weight * self._grouping(predicted[v], expected[1 - v]) for v in (0, 1)]
            self._update_center(torch.cat(teacher_scores))
        with record_function("slotcon.slots"):
            terms += [
                (1 - weight)
                * self._contrast(slots[v], targets[1 - v], scores[v], teacher_scores[1 - v])
                for v in (0, 1)
            ]
        return sum(terms[1:], start=terms[0])

    def _grouped(
        self, branch: Branch, views: list[Tensor]
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Slots and scores of both views' features."""
        prototypes, temperature = branch.grouping.prototypes, self.model.config.teacher_temp
        slots, scores = zip(*(group(x, prototypes, temperature) for x in views), strict=True)
        return slots, scores

    def _grouping(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Cross-entropy between aligned scores [B, K, H, W], mean over all cells."""
        config = self.model.config
        log_prediction = F.log_softmax(rows_of(student) / config.student_temp, dim=1)
        shifted = rows_of(teacher) - self.model.center
        target = F.softmax(shifted / config.teacher_temp, dim=1)
        return -(target * log_prediction).sum(dim=1).mean()

    @torch.no_grad()
    def _update_center(self, scores: Tensor) -> None:
        """From the teacher's scores [2B, K, H, W], not aligned."""
        rows = rows_of(scores)
        mean = rows.sum(dim=0, keepdim=True) / len(rows)
        kept = self.model.config.center_momentum
        self.model.center = self.model.center * kept + mean * (1 - kept)

    def _contrast(
        self, slots: Tensor, targets: Tensor, scores: Tensor, teacher_scores: Tensor
    ) -> Tensor:
        """InfoNCE of the student's slots [B, K, D] against the teacher's targets [B, K, D].

        scores and teacher_scores [B, K, H, W] say which are active. Fewer than two pairs have no
        batch statistics: then the loss is zero, where the authors' code fails.
        """
        temperature = self.model.config.contrast_temp
        queries, keys = slots.flatten(0, 1), F.normalize(targets.flatten(0, 1), dim=1)
        active = wins(teacher_scores).flatten()
        pairs = (wins(scores).flatten() & active).nonzero().squeeze(1)
        if len(pairs) < 2:
            weights = [weight.sum() for weight in self.model.predictor.parameters()]
            return 0 * torch.stack([queries.sum(), *weights]).sum()
        predicted = F.normalize(self.model.predictor(queries[pairs]), dim=1)
        logits = predicted @ keys[active.nonzero().squeeze(1)].T / temperature
        positive = active.long().cumsum(0)[pairs] - 1
        return F.cross_entropy(logits, positive) * (2 * temperature)


def is_plain(config: ModelConfig) -> bool:
    """Whether a model is SlotCon itself, not a variant."""
    standard = (
        "objective", "slot_loss", "align", "image_loss_weight", "stages", "supervise", "targets",
        "cell_loss_weight", "relation_loss_weight", "norm",
    )  # fmt: skip
    return all(getattr(config, name) == getattr(ModelConfig, name) for name in standard)


class PlainLARS(torch.optim.Optimizer):
    """LARS (You et al., arXiv 1708.03888), tensor by tensor; see `train.lars.LARS`."""

    def __init__(
        self, parameters: Iterable[Tensor], momentum: float, weight_decay: float, eta: float
    ) -> None:
        fixed = {"lr": 0.0, "momentum": momentum, "weight_decay": weight_decay, "eta": eta}
        super().__init__(parameters, fixed)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every tensor that has a gradient."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                update = weight.grad
                if weight.ndim != 1:
                    update = update.add(weight, alpha=group["weight_decay"])
                    size, length = torch.norm(weight), torch.norm(update)
                    trust = torch.where(
                        (size > 0) & (length > 0), group["eta"] * size / length, 1.0
                    )
                    update = update * trust
                state = self.state[weight]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(weight)
                state["momentum"].mul_(group["momentum"]).add_(update)
                weight.add_(state["momentum"], alpha=-group["lr"])


@torch.no_grad()
def update_teacher(model: SlotCon, momentum: float) -> None:
    """The teacher's parameters, one after the other."""
    pairs = zip(model.teacher.parameters(), model.student.parameters(), strict=True)
    for teacher, student in pairs:
        teacher.data = momentum * teacher.data + (1 - momentum) * student.data


def features_of(branch: Branch, view: Tensor) -> Tensor:
    """Projected features [B, D, H, W] of a view [B, 3, S, S]."""
    features: Tensor = branch.projector(branch.encoder(view))
    return features


def group(features: Tensor, prototypes: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Slots [B, K, D] and scores [B, K, H, W] of features [B, D, H, W] and prototypes [K, D]."""
    copies = prototypes.expand(len(features), -1, -1)
    scores = torch.einsum(
        "bkd,bdhw->bkhw", F.normalize(copies, dim=2), F.normalize(features, dim=1)
    )
    assignment = F.softmax(scores / temperature, dim=1) + 1e-6
    share = assignment / assignment.sum(dim=(2, 3), keepdim=True)
    return torch.einsum("bdhw,bkhw->bkd", features, share), scores


def align(scores: Tensor, overlap: Tensor, flipped: Tensor) -> Tensor:
    """Scores [B, K, H, W] resampled to the pixels that both views share: [B, K, H, W]."""
    height, width = scores.shape[2:]
    corners = overlap.clone()
    corners[:, 0::2] *= width
    corners[:, 1::2] *= height
    number = torch.arange(len(scores), device=overlap.device)[:, None]
    boxes = torch.cat((number, corners), dim=1)
    maps = roi_align(scores, boxes.to(scores.dtype), (height, width), aligned=True)
    pairs = zip(maps, flipped, strict=True)
    return torch.stack([one.flip(-1) if flag else one for one, flag in pairs])


def wins(scores: Tensor) -> Tensor:
    """Slots with the highest score [B, K, H, W] in at least one cell: bool [B, K]."""
    best = torch.zeros_like(scores).scatter_(1, scores.argmax(dim=1, keepdim=True), 1.0)
    return best.sum(dim=(2, 3)) > 0


def rows_of(scores: Tensor) -> Tensor:
    """[B, K, H, W] as [B·H·W, K]."""
    return scores.permute(0, 2, 3, 1).flatten(0, 2)
