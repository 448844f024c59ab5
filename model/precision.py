"""Exclude cheap but sensitive operations (softmaxes, norms, losses) from mixed precision."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., Any])


def full_precision(function: Function) -> Function:
    """Decorator: run `function` without autocast and in float32 at least.

    Half-precision tensors among the positional arguments become float32; float64 stays. Gradients
    have the type of the input.
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
