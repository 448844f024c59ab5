"""Borders moved to where colours change: mean field in a conditional random field whose kernels are
cut off at a window (convolutional CRF, arXiv 1805.04777).

Letters: B images, K clusters, H W pixels, O the places of a window less its centre.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from model.precision import full_precision
from pipeline.errors import require


@dataclass(frozen=True)
class CrfConfig:
    """Pixels i and j of one window pull towards one cluster, by the sum of two kernels

        smooth_weight · exp(-|p_i - p_j|² / 2 smooth_sigma²)
        colour_weight · exp(-|p_i - p_j|² / 2 position_sigma² - |c_i - c_j|² / 2 colour_sigma²)

    with p the place in pixels and c the colour, each kernel scaled so that its values over a
    pixel's window sum to 1 before its weight.
    """

    radius: int = 5
    """The window reaches so many pixels to each side."""
    iterations: int = 5
    smooth_weight: float = 3.0
    smooth_sigma: float = 3.0
    colour_weight: float = 10.0
    position_sigma: float = 40.0
    colour_sigma: float = 13.0
    """In steps of 0 … 255."""

    def __post_init__(self) -> None:
        require(self.radius >= 1, "radius", self.radius, "at least 1")
        require(self.iterations >= 0, "iterations", self.iterations, "at least 0")
        for name in ("smooth_sigma", "position_sigma", "colour_sigma"):
            require(getattr(self, name) > 0, name, getattr(self, name), "positive")
        for name in ("smooth_weight", "colour_weight"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")


DEFAULT = CrfConfig()
SMALLEST = 1e-6
"""A cluster that is impossible by itself stays impossible; nearly so is enough."""


@full_precision
@torch.no_grad()
def refine(probabilities: Tensor, images: Tensor, config: CrfConfig = DEFAULT) -> Tensor:
    """Probabilities [B, K, H, W] of each pixel's cluster, images uint8 [B, H, W, 3] → [B, K, H, W].

    Each iteration sets every pixel at once: q_i ∝ p_i · exp(Σ_j kernel_ij · q_j), j over the window
    without i itself and without what lies outside the image (Potts: only equal clusters attract).
    Holds O·H·W kernel values an image, and three times the probabilities.
    """
    kernel = window_kernel(images, config)
    unary = probabilities.clamp_min(SMALLEST).log()
    current = probabilities
    for _ in range(config.iterations):
        current = (unary + messages(current, kernel, config.radius)).softmax(dim=1)
    return current


def offsets(radius: int) -> list[tuple[int, int]]:
    """The (down, right) steps to a window's places, all but its centre."""
    steps = range(-radius, radius + 1)
    return [(y, x) for y in steps for x in steps if (y, x) != (0, 0)]


def window_kernel(images: Tensor, config: CrfConfig) -> Tensor:
    """Images uint8 [B, H, W, 3] → [B, O, H, W]: how much each neighbour's cluster counts."""
    colours = images.permute(0, 3, 1, 2).float()
    height, width = colours.shape[2:]
    padded = F.pad(colours, [config.radius] * 4)
    there = F.pad(torch.ones_like(colours[:1, :1]), [config.radius] * 4)
    smooth, coloured = [], []
    for down, right in offsets(config.radius):
        rows = slice(config.radius + down, config.radius + down + height)
        columns = slice(config.radius + right, config.radius + right + width)
        inside = there[:, 0, rows, columns]  # [1, H, W], 0 outside the image
        distance = float(down * down + right * right)
        difference = (padded[:, :, rows, columns] - colours).square().sum(dim=1)
        smooth.append(math.exp(-distance / (2 * config.smooth_sigma**2)) * inside)
        exponent = difference / (2 * config.colour_sigma**2)
        exponent = exponent + distance / (2 * config.position_sigma**2)
        coloured.append((-exponent).exp() * inside)
    kernel = torch.zeros((), device=images.device)
    for weight, values in (
        (config.smooth_weight, torch.stack(smooth, dim=1)),
        (config.colour_weight, torch.stack(coloured, dim=1)),
    ):
        # Not 0: of a pixel so unlike all others that float32 has no value for its kernel.
        total = values.sum(dim=1, keepdim=True).clamp_min(torch.finfo(values.dtype).tiny)
        kernel = kernel + weight * values / total
    return kernel


def messages(probabilities: Tensor, kernel: Tensor, radius: int) -> Tensor:
    """Σ over a window of the kernel [B, O, H, W] times the neighbours' probabilities
    [B, K, H, W].
    """
    height, width = probabilities.shape[2:]
    padded = F.pad(probabilities, [radius] * 4)
    total = torch.zeros_like(probabilities)
    for place, (down, right) in enumerate(offsets(radius)):
        rows = slice(radius + down, radius + down + height)
        columns = slice(radius + right, radius + right + width)
        total.addcmul_(padded[:, :, rows, columns], kernel[:, place, None])
    return total
