"""LARS, layer-wise adaptive rates for large batches (You et al., arXiv 1708.03888), as SlotCon uses
it."""

from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer


class LARS(Optimizer):
    """SGD with momentum; each tensor's step is scaled by eta · |weight| / |gradient + decay|.

    1-D tensors (biases, norms) get neither decay nor scaling; a tensor or gradient of norm zero is
    not scaled. The learning rate multiplies the momentum buffer instead of entering it, so a change
    of rate acts at once.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        eta: float = 0.001,
    ) -> None:
        super().__init__(
            parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "eta": eta}
        )

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update of every parameter that has a gradient; stays on the device throughout."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        update = parameter.grad
        assert update is not None
        if parameter.ndim != 1:
            update = update.add(parameter, alpha=group["weight_decay"])
            update = update * _trust(parameter, update, group["eta"])
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].mul_(group["momentum"]).add_(update)
        parameter.add_(state["momentum"], alpha=-group["lr"])


def _trust(weight: Tensor, update: Tensor, eta: float) -> Tensor:
    """eta · |weight| / |update| as a scalar tensor; 1 where either norm is zero."""
    weight_norm, update_norm = torch.linalg.vector_norm(weight), torch.linalg.vector_norm(update)
    usable = (weight_norm > 0) & (update_norm > 0)
    return torch.where(usable, eta * weight_norm / update_norm, 1.0)
