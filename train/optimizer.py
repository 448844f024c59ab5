"""The optimiser of a run: LARS of the recipes from scratch, or AdamW for weights that are good
already."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from model import SlotCon
from train.config import TrainConfig
from train.lars import LARS, laid_out_like

BETA2 = 0.999
_POSITIONS = re.compile(r"pos_embed|position|rel_pos|_token|relative_")
"""In the name of a position's or a token's embedding, as timm's models name them."""


class AdamW(torch.optim.AdamW):
    """Torch's fused AdamW (Loshchilov and Hutter, arXiv 1711.05101): one operation for all tensors
    of a group.

    Under a `GradScaler` a step whose gradients are not finite changes nothing. The device decides
    this, and counts it in `skipped`, as in LARS.
    """

    skipped: Tensor
    """int64 scalar on the device: skipped steps. The caller may set it to zero."""

    def __init__(self, groups: Iterable[Mapping[str, Any]], beta1: float) -> None:
        # The rate is set at each step.
        super().__init__([dict(group) for group in groups], 0.0, (beta1, BETA2), fused=True)
        device = self.param_groups[0]["params"][0].device
        self.skipped = torch.zeros((), dtype=torch.long, device=device)

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """One update of every parameter that has a gradient, without waiting for the device."""
        for weight in self._weights():
            if weight.grad is not None:  # the fused update needs the weight's memory layout
                weight.grad = laid_out_like(weight, weight.grad)
        loss = super().step(closure)
        if (found_inf := getattr(self, "found_inf", None)) is not None:
            self.skipped += found_inf != 0
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Like any optimizer's. Moments take the memory layout of their weight."""
        super().load_state_dict(state_dict)
        for weight, state in self.state.items():
            for name, value in state.items():
                state[name] = laid_out_like(weight, value) if value.ndim else value

    def _weights(self) -> Iterable[Tensor]:
        return (weight for group in self.param_groups for weight in group["params"])


def build_optimizer(slotcon: SlotCon, train: TrainConfig) -> LARS | AdamW:
    """The optimiser of all weights that need gradients. Its rate is 0 until `set_rate`."""
    if train.optimizer == "adamw":
        return AdamW(_groups(slotcon, train, _decay_rule(train.decay_positions)), train.momentum)
    groups = _groups(slotcon, train, lambda name, weight: True)  # LARS itself spares 1-D tensors
    return LARS(
        groups,
        lr=0.0,
        momentum=train.momentum,
        weight_decay=train.weight_decay,
        eta=train.eta,
    )


def set_rate(
    optimizer: torch.optim.Optimizer, lr: float, weight_decay: float | None = None
) -> None:
    """The learning rate of the next step, of which the encoder's groups have a share. Unless it is
    None, also the decay of those weights that decay.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
        if weight_decay is not None and group["weight_decay"]:
            group["weight_decay"] = weight_decay


@torch.no_grad()
def clip_each(weights: Iterable[Tensor], limit: float) -> None:
    """Scale each tensor's gradient by itself to a norm of at most `limit`, without waiting for the
    device. As SlotMIM and DINO do; one norm of all gradients would let the largest shrink the rest.
    """
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    norms = torch.stack(torch._foreach_norm(gradients))
    torch._foreach_mul_(gradients, (limit / (norms + 1e-6)).clamp(max=1).unbind())


def _decay_rule(positions: bool) -> Callable[[str, Tensor], bool]:
    """Which weights decay: not norms, biases and scales, which have one dimension, and positions
    and tokens only if told so."""
    return lambda name, weight: weight.ndim > 1 and (positions or _POSITIONS.search(name) is None)


def _groups(
    slotcon: SlotCon, train: TrainConfig, decays: Callable[[str, Tensor], bool]
) -> list[dict[str, Any]]:
    """The weights that learn, by their decay and by the scale of their rate, in a fixed order."""
    groups: dict[tuple[float, bool], list[Tensor]] = {}
    for name, weight in slotcon.named_parameters():
        if weight.requires_grad:
            scale = train.encoder_lr_scale if name.startswith("student.encoder.") else 1.0
            groups.setdefault((scale, decays(name, weight)), []).append(weight)
    return [
        {"params": weights, "weight_decay": train.weight_decay if decayed else 0.0}
        | ({} if scale == 1 else {"lr_scale": scale})
        for (scale, decayed), weights in groups.items()
    ]
