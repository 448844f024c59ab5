"""Backends make the model's views from decoded images and given view parameters.

They draw nothing: with the same parameters, two backends differ only by rounding.
"""

from importlib import import_module
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from pipeline.choices import BACKENDS
from pipeline.errors import UserError
from pipeline.views import ViewParams

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
JITTER_NEUTRAL = (1, 1, 1, 0)  # the amounts in ViewParams.jitter that do not change an image
SOLARIZE_THRESHOLD = 128  # levels of 0..255; from here on a value is inverted


class Apply(Protocol):
    def __call__(
        self,
        canvas: Tensor,
        sizes: Tensor,
        params: ViewParams,
        size: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> Tensor:
        """Crop, resize, flip, colour and normalise both views of B images.

        canvas: uint8 [B, Hmax, Wmax, 3], image b in the top left corner; the rest is undefined.
        sizes: int64 [B, 2], height and width of each image in pixels.
        params: the parameters of the same B images.
        size: side S of the views in pixels.
        Returns `dtype` [2, B, 3, S, S] on `device`, ImageNet-normalised, each view channels_last.
        """
        ...


class Colour(Protocol):
    def __call__(
        self, pixels: Tensor, params: ViewParams, device: torch.device, dtype: torch.dtype
    ) -> Tensor:
        """Colour and normalise views that are already cropped, resized and flipped.

        pixels: uint8 [2, B, S, S, 3], view axis first; not modified.
        params: the parameters of the same B images; crops and flips are not used.
        Returns the same as `Apply`.
        """
        ...


class Backend(NamedTuple):
    """The two functions of a backend; `apply` is crop, resize and flip followed by `colour`."""

    apply: Apply
    colour: Colour


def get_backend(name: str) -> Backend:
    """The backend of that name, imported only here: kornia takes seconds. Raises UserError."""
    if name not in BACKENDS:
        raise UserError(f"unknown augmentation backend {name!r}; choose from {', '.join(BACKENDS)}")
    try:
        module = import_module(f"{__name__}.{name}")
    except ModuleNotFoundError as error:
        raise UserError(f"the {name} backend needs {error.name}, which is not installed") from error
    return Backend(module.apply, module.colour)


def empty_views(batch: int, size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Uninitialised [2, B, 3, S, S], each view channels_last."""
    memory = torch.empty(2, batch, size, size, 3, device=device, dtype=dtype)
    return memory.permute(0, 1, 4, 2, 3)
