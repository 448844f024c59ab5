"""Maps of features: of networks, read at one stage or at several that are joined, and of pixels.

Letters: B images, S their side in pixels, D features, h w cells.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from evaluation.options import stages_of
from model.encoder import AnyEncoder, Encoder, dilate
from model.timm_encoder import first_line
from pipeline.errors import UserError

BLOCK = 8


@dataclass(frozen=True)
class Features:
    """Turns images into maps of features."""

    name: str
    """Name in tables."""
    function: Callable[[Tensor], Tensor]
    cosine: bool = True
    """k-means compares directions of features; otherwise distances."""
    stage: str | None = None
    """Where the network is read, as `--stage` has it; None for features without stages."""

    def __call__(self, images: Tensor) -> Tensor:
        """Images [B, 3, S, S], ImageNet-normalised, on the network's device → [B, D, h, w]. Raises
        UserError if a feature is NaN or infinite: it would be nearest to nothing, or to everything.
        """
        with torch.inference_mode():
            features = self.function(images).float()
            if not bool(features.isfinite().all()):
                raise UserError(f"{self.name}: features with NaN or infinite values")
        return features


@dataclass(frozen=True)
class Network:
    """A network that can be read at several stages, numbered from 1."""

    name: str
    maps: Callable[[Tensor, Sequence[int]], list[Tensor]]
    """ImageNet-normalised images [B, 3, S, S] and stages → their maps [B, D, h, w], in the same
    order."""
    strides: Mapping[int, int]
    """Pixels along one side of a cell of each stage."""

    def read(self, stage: str | None = None) -> Features:
        """The features of a stage, or of several (3+4), joined by `fuse`; of the last one if None.
        Raises UserError for a stage that the network has not. The features raise it for images
        smaller than a cell.
        """
        last = max(self.strides)
        stages = [last] if stage is None else stages_of(stage)
        if wrong := [number for number in stages if number not in self.strides]:
            first = min(self.strides)
            raise UserError(f"--stage {wrong[0]}: {self.name} has the stages {first} to {last}")
        largest = max(self.strides[number] for number in stages)

        def function(images: Tensor) -> Tensor:
            if (side := min(images.shape[2:])) < largest:
                raise UserError(
                    f"{self.name}: images of {side} pixels are smaller than a cell of {largest}"
                    " (--size)"
                )
            return fuse(self.maps(images, stages))

        name = self.name if stage is None else f"{self.name}, stage {stage}"
        return Features(name, function, stage=stage or str(last))


def fuse(maps: Sequence[Tensor]) -> Tensor:
    """Maps [B, Dᵢ, hᵢ, wᵢ] → [B, ΣDᵢ, h, w]: each cell of each map is scaled to length 1, the maps
    are brought to the finest of their grids, bilinearly, and joined. A single map stays as it is.
    """
    if len(maps) == 1:
        return maps[0]
    grid = max((tuple(each.shape[2:]) for each in maps), key=lambda side: side[0] * side[1])
    unit = [F.normalize(each.float(), dim=1) for each in maps]
    return torch.cat([F.interpolate(each, grid, mode="bilinear") for each in unit], dim=1)


def dilated_name(name: str, output_stride: int | None) -> str:
    """The name of a network in tables, so that it is not taken for the one that is not dilated."""
    return name if output_stride is None else f"{name}, output stride {output_stride}"


@contextmanager
def in_one_line(name: str, images: Tensor) -> Iterator[None]:
    """Inside the block a network of timm's gets `images`. Raises UserError for a size that it does
    not accept: each asserts and fails in its own way.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (AssertionError, RuntimeError, ValueError) as error:
        side = "×".join(map(str, images.shape[2:]))
        raise UserError(f"{name} on images of {side} pixels: {first_line(error)}") from None


def of_encoder(name: str, encoder: AnyEncoder) -> Network:
    """An encoder, in eval mode."""

    def maps(images: Tensor, stages: Sequence[int]) -> list[Tensor]:
        with in_one_line(name, images):
            return encoder.maps(images, stages)

    any_size = isinstance(encoder.eval(), Encoder)
    return Network(name, encoder.maps if any_size else maps, encoder.strides)


def dilated(encoder: AnyEncoder, output_stride: int | None) -> AnyEncoder:
    """`model.encoder.dilate`, or the encoder as it is if None. Raises UserError."""
    try:
        return encoder if output_stride is None else dilate(encoder, output_stride)
    except ValueError as error:
        raise UserError(f"--output-stride {output_stride}: {error}") from None


def block_means(images: Tensor) -> Tensor:
    """Mean colours of blocks of 8×8 pixels: [B, 3, S, S] → [B, 3, ⌈S/8⌉, ⌈S/8⌉]."""
    height, width = (math.ceil(side / BLOCK) for side in images.shape[2:])
    return F.adaptive_avg_pool2d(images.contiguous(), (height, width))
