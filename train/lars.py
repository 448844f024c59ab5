"""LARS, layer-wise adaptive rates for large batches (You et al., arXiv 1708.03888), in SlotCon's
form."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class LARS(Optimizer):
    """SGD with momentum; each tensor's step is scaled by eta · |weight| / |gradient + decay|.

    1-D tensors (biases, norms) get neither decay nor scaling; a tensor or gradient of norm zero is
    not scaled. The learning rate multiplies the momentum buffer and is no part of it, so a change
    of the rate acts at once. Each operation handles all tensors of a group together. A step
    overwrites the gradients.

    Under a `GradScaler` a step whose gradients are not finite changes nothing. The device decides
    this, and counts it in `skipped`.
    """

    _step_supports_amp_scaling = True  # GradScaler sets grad_scale and found_inf for each step

    skipped: Tensor
    """int64 scalar on the device: skipped steps. The caller may set it to zero."""

    def __init__(
        self,
        parameters: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        eta: float = 0.001,
    ) -> None:
        super().__init__(
            parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "eta": eta}
        )
        device = self.param_groups[0]["params"][0].device
        self.skipped = torch.zeros((), dtype=torch.long, device=device)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient, without waiting for the device."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            if weights:
                self._update(weights, [weight.grad for weight in weights], group)
        if (found_inf := getattr(self, "found_inf", None)) is not None:
            self.skipped += found_inf != 0
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Like any optimizer's. Momentum takes the memory layout of its weight."""
        super().load_state_dict(state_dict)
        for weight, state in self.state.items():
            state["momentum"] = torch.empty_like(weight).copy_(state["momentum"])

    def _update(
        self, weights: list[Tensor], gradients: list[Tensor], group: dict[str, Any]
    ) -> None:
        """One step of tensors that share a device and a type."""
        # The fused update needs the weights' memory layout; gradients may have another one.
        updates = [
            laid_out_like(weight, gradient)
            for weight, gradient in zip(weights, gradients, strict=True)
        ]
        if (scale := getattr(self, "grad_scale", None)) is not None:
            torch._foreach_div_(updates, scale)
        adapted = [i for i, weight in enumerate(weights) if weight.ndim != 1]
        if adapted:
            _adapt([weights[i] for i in adapted], [updates[i] for i in adapted], group)
        torch._fused_sgd_(
            weights,
            updates,
            [self._momentum(weight) for weight in weights if group["momentum"]],
            weight_decay=0.0,
            momentum=group["momentum"],
            lr=group["lr"],
            dampening=0.0,
            nesterov=False,
            maximize=False,
            is_first_step=False,
            found_inf=getattr(self, "found_inf", None),
        )

    def _momentum(self, weight: Tensor) -> Tensor:
        state = self.state[weight]
        if not state:
            state["momentum"] = torch.zeros_like(weight)
        momentum: Tensor = state["momentum"]
        return momentum


def _adapt(weights: list[Tensor], updates: list[Tensor], group: dict[str, Any]) -> None:
    """In place: add the decay, then scale by eta · |weight| / |update|, by 1 if either is zero."""
    torch._foreach_add_(updates, weights, alpha=group["weight_decay"])
    norms = [torch.stack(torch._foreach_norm(tensors)) for tensors in (weights, updates)]
    usable = (norms[0] > 0) & (norms[1] > 0)
    trust = torch.where(usable, group["eta"] * norms[0] / norms[1], 1.0)
    torch._foreach_mul_(updates, trust.unbind())


def laid_out_like(weight: Tensor, value: Tensor) -> Tensor:
    """`value`, of the shape of `weight`, in its memory layout."""
    if value.stride() == weight.stride():
        return value
    return torch.empty_like(weight, dtype=value.dtype).copy_(value)
