"""Moves borders of clusters to edges of colour: mean field in a conditional random field whose
kernels end at a window (convolutional CRF, arXiv 1805.04777).

Letters: B images, K clusters, H W pixels, h w cells, O the pixels of a window without its centre.
"""

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from model.precision import full_precision
from pipeline.bounds import POSITIVE, Bounded, at_least


@dataclass(frozen=True)
class CrfConfig(Bounded):
    """Pixels i and j of one window attract each other to the same cluster. The strength is the sum
    of two kernels

        smooth_weight · exp(-|p_i - p_j|² / 2 smooth_sigma²)
        colour_weight · exp(-|p_i - p_j|² / 2 position_sigma² - |c_i - c_j|² / 2 colour_sigma²)

    with p the position in pixels and c the colour. Before its weight, each kernel is scaled so that
    its values over a pixel's window sum to 1.
    """

    radius: int = field(default=5, metadata=at_least(1))
    """Pixels from the centre of the window to each side."""
    iterations: int = field(default=5, metadata=at_least(0))
    smooth_weight: float = field(default=3.0, metadata=at_least(0))
    smooth_sigma: float = field(default=3.0, metadata=POSITIVE)
    colour_weight: float = field(default=10.0, metadata=at_least(0))
    position_sigma: float = field(default=40.0, metadata=POSITIVE)
    colour_sigma: float = field(default=13.0, metadata=POSITIVE)
    """In levels of 0 … 255."""


DEFAULT = CrfConfig()
SMALLEST = 1e-6
"""Lowest probability before the logarithm: the logarithm of 0 is not finite."""


@full_precision
@torch.no_grad()
def refine(probabilities: Tensor, images: Tensor, config: CrfConfig = DEFAULT) -> Tensor:
    """Probabilities [B, K, H, W] of each pixel's cluster, images uint8 [B, H, W, 3] → [B, K, H, W].

    Each iteration updates all pixels at once: q_i ∝ p_i · exp(Σ_j kernel_ij · q_j). j runs over the
    pixels of the window that lie in the image, without i itself. Only equal clusters attract each
    other (Potts). Needs memory for O·H·W kernel values an image and three times the probabilities.
    """
    kernel = window_kernel(images, config)
    unary = probabilities.clamp_min(SMALLEST).log()
    current = probabilities
    for _ in range(config.iterations):
        current = (unary + messages(current, kernel, config.radius)).softmax(dim=1)
    return current


def refine_clusters(logits: Tensor, clusters: Tensor, pixels: np.ndarray) -> Tensor:
    """Clusters int64 [B, R, R] refined by the CRF; `logits` [B, K, h, w], `pixels` uint8
    [B, R, R, 3].

    Only clusters that win a pixel of an image take part: with all of K = 2048 a pixel would need
    8 KB for each of the three maps.
    """
    size = clusters.shape[1]
    result = []
    for i in range(len(clusters)):
        present = clusters[i].unique()
        upsampled = F.interpolate(logits[i : i + 1, present], (size, size), mode="bilinear")
        colours = torch.from_numpy(pixels[i : i + 1]).to(logits.device)
        refined = refine(upsampled.softmax(dim=1), colours)
        result.append(present[refined[0].argmax(dim=0)])
    return torch.stack(result)


def offsets(radius: int) -> list[tuple[int, int]]:
    """The (down, right) offsets of a window's pixels, without its centre."""
    steps = range(-radius, radius + 1)
    return [(y, x) for y in steps for x in steps if (y, x) != (0, 0)]


def window_kernel(images: Tensor, config: CrfConfig) -> Tensor:
    """Images uint8 [B, H, W, 3] → [B, O, H, W]: the weight of each neighbour's cluster."""
    colours = images.permute(0, 3, 1, 2).float()
    height, width = colours.shape[2:]
    padded = F.pad(colours, [config.radius] * 4)
    mask = F.pad(torch.ones_like(colours[:1, :1]), [config.radius] * 4)
    smooth, coloured = [], []
    for down, right in offsets(config.radius):
        rows = slice(config.radius + down, config.radius + down + height)
        columns = slice(config.radius + right, config.radius + right + width)
        inside = mask[:, 0, rows, columns]  # [1, H, W], 0 outside the image
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
        # The total underflows to 0 in float32 for a pixel that is unlike all its neighbours.
        total = values.sum(dim=1, keepdim=True).clamp_min(torch.finfo(values.dtype).tiny)
        kernel = kernel + weight * values / total
    return kernel


def messages(probabilities: Tensor, kernel: Tensor, radius: int) -> Tensor:
    """Σ over a window of the kernel [B, O, H, W] times neighbours' probabilities [B, K, H, W]."""
    height, width = probabilities.shape[2:]
    padded = F.pad(probabilities, [radius] * 4)
    total = torch.zeros_like(probabilities)
    for number, (down, right) in enumerate(offsets(radius)):
        rows = slice(radius + down, radius + down + height)
        columns = slice(radius + right, radius + right + width)
        total.addcmul_(padded[:, :, rows, columns], kernel[:, number, None])
    return total
