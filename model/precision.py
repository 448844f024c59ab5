"""Keep what is small but sensitive (softmaxes, norms, losses) out of mixed precision."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., Any])


def full_precision(function: Function) -> Function:
    """Run `function` without autocast, its positional floating tensors at least float32.

    Half-precision inputs become float32, float64 stays; gradients flow back in the input's type.
    """

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        device = next(arg.device.type for arg in args if isinstance(arg, Tensor))
        with torch.autocast(device, enabled=False):
            return function(*(_promote(arg) for arg in args), **kwargs)

    return wrapper  # type: ignore[return-value]


def _promote(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.to(torch.promote_types(value.dtype, torch.float32))
    return value
