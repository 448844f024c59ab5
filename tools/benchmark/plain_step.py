"""SlotCon's training step written down plainly: the baseline of the benchmark, and of parity.

It is the recipe as the paper and the authors' published implementation have it: NCHW, autocast with
loss scaling on CUDA, a loop over tensors for the teacher and for LARS, a Python branch on each
image's flip flag, `nonzero` for the active slots, the loss read by the host at every step, all
teacher slots gathered whether active or not. The network's modules are those of a `SlotCon`; of its
losses, selection and optimiser nothing is used here.

B images, K prototypes, D features, H W cells, S side of a view, N queries, M keys.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import record_function
from torchvision.ops import roi_align

from model import ModelConfig, SlotCon
from model.slotcon import Branch


class PlainStep:
    """One training step after another on a model that stays in NCHW; `model` is changed in place.

    `dtype` is that of autocast; float32 is without, float16 with loss scaling. `ValueError` where
    the model's settings make it a variant, of which there is no plain version.
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
        """The loss of a batch, and one step down: views [2, B, 3, S, S], overlap [2, B, 4],
        flipped bool [2, B], as `SlotCon.forward` takes them.
        """
        views = views.contiguous()
        with torch.backends.cudnn.flags(enabled=True, benchmark=True):  # as the authors' run has it
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
        """Forward of both networks, with the teacher's update in between; a scalar."""
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
                targets, marks = self._grouped(model.teacher, teacher)
        with record_function("slotcon.geometry"):
            scores_aligned = [align(scores[v], overlap[v], flipped[v]) for v in (0, 1)]
            with torch.no_grad():
                marks_aligned = [align(marks[v], overlap[v], flipped[v]) for v in (0, 1)]

        weight = config.group_loss_weight
        with record_function("slotcon.losses"):
            loss = weight * self._grouping(scores_aligned[0], marks_aligned[1])
            loss = loss + weight * self._grouping(scores_aligned[1], marks_aligned[0])
            self._update_center(torch.cat(marks))
        with record_function("slotcon.slots"):
            loss = loss + (1 - weight) * self._contrast(slots[0], targets[1], scores[0], marks[1])
            return loss + (1 - weight) * self._contrast(slots[1], targets[0], scores[1], marks[0])

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
        """scores [2B, K, H, W] of the teacher, before they were aligned."""
        rows = rows_of(scores)
        total = rows.sum(dim=0, keepdim=True)
        if _processes() > 1:
            dist.all_reduce(total)
        mean = total / (len(rows) * _processes())
        kept = self.model.config.center_momentum
        self.model.center = self.model.center * kept + mean * (1 - kept)

    def _contrast(self, slots: Tensor, targets: Tensor, scores: Tensor, marks: Tensor) -> Tensor:
        """InfoNCE of the student's slots [B, K, D] against the teacher's [B, K, D] of all
        processes; scores and marks [B, K, H, W] say which are active. Fewer than two pairs have no
        batch statistics: then zero, where the authors' code fails.
        """
        temperature = self.model.config.contrast_temp
        queries, keys = slots.flatten(0, 1), F.normalize(targets.flatten(0, 1), dim=1)
        held = wins(marks).flatten()
        pairs = (wins(scores).flatten() & held).nonzero().squeeze(1)
        keys, held = _gather(keys), _gather(held)
        if len(pairs) < 2:
            weights = [weight.sum() for weight in self.model.predictor.parameters()]
            return 0 * torch.stack([queries.sum(), *weights]).sum()
        predicted = F.normalize(self.model.predictor(queries[pairs]), dim=1)
        logits = predicted @ keys[held.nonzero().squeeze(1)].T / temperature
        offset = _rank() * len(queries)
        positive = held.long().cumsum(0)[pairs + offset] - 1
        return F.cross_entropy(logits, positive) * (2 * temperature)


def is_plain(config: ModelConfig) -> bool:
    """Whether a model is SlotCon itself, none of its variants."""
    standard = ("slot_loss", "align", "image_loss_weight")
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
    """What a network makes of a view [B, 3, S, S]: [B, D, H, W]."""
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
    """Scores [B, K, H, W] on the pixels that both views share, [B, K, H, W]."""
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
    """Which slots [B, K] have the highest of the scores [B, K, H, W] in one cell or more."""
    best = torch.zeros_like(scores).scatter_(1, scores.argmax(dim=1, keepdim=True), 1.0)
    return best.sum(dim=(2, 3)) > 0


def rows_of(scores: Tensor) -> Tensor:
    """[B, K, H, W] as [B·H·W, K]."""
    return scores.permute(0, 2, 3, 1).flatten(0, 2)


def _processes() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


@torch.no_grad()
def _gather(tensor: Tensor) -> Tensor:
    """Those of all processes, one after the other."""
    if _processes() == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(_processes())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)
