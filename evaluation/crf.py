"""Moves borders of clusters to edges of colour: mean field in a fully connected conditional random
field (arXiv 1210.5644), computed by pydensecrf with the constants of STEGO and CAUSE.

Letters: B images, K clusters, H W pixels, h w cells.
"""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.errors import UserError

ITERATIONS = 10
NEAR_WEIGHT, NEAR_SIGMA = 3, 1
"""Pixels attract each other to the same cluster by exp(-|p_i - p_j|² / 2 sigma²), p in pixels;"""
COLOUR_WEIGHT, POSITION_SIGMA, COLOUR_SIGMA = 4, 67, 3
"""and by exp(-|p_i - p_j|² / 2 · 67² - |c_i - c_j|² / 2 · 3²), c in levels of 0 … 255."""
FLOOR = 1e-5
"""Lowest probability before the logarithm, as in pydensecrf.utils."""
ALL = 64
"""Of more clusters only those that win a pixel of the image take part: each needs memory and time
for a map of the image."""


def require_crf() -> None:
    """Raise UserError if pydensecrf is not installed."""
    try:
        import pydensecrf.densecrf  # noqa: F401
    except ImportError:
        raise UserError("--crf needs pydensecrf2 (pip install .[crf])") from None


def refine(
    probabilities: np.ndarray, image: np.ndarray, iterations: int = ITERATIONS
) -> np.ndarray:
    """Probabilities float32 [K, H, W] of each pixel's cluster and an image uint8 [H, W, 3] →
    float32 [K, H, W] after so many iterations.
    """
    from pydensecrf.densecrf import DenseCRF2D

    count, height, width = probabilities.shape
    field = DenseCRF2D(width, height, count)
    energy = -np.log(probabilities.clip(FLOOR, 1)).reshape(count, -1)
    field.setUnaryEnergy(np.ascontiguousarray(energy, np.float32))
    field.addPairwiseGaussian(sxy=NEAR_SIGMA, compat=NEAR_WEIGHT)
    field.addPairwiseBilateral(
        sxy=POSITION_SIGMA,
        srgb=COLOUR_SIGMA,
        rgbim=np.ascontiguousarray(image),
        compat=COLOUR_WEIGHT,
    )
    return np.array(field.inference(iterations), np.float32).reshape(probabilities.shape)


def refine_clusters(
    logits: Tensor, clusters: Tensor, pixels: np.ndarray, features: Tensor | None = None
) -> Tensor:
    """Clusters int64 [B, H, W] refined by the CRF; `logits` [B, K, h, w], `pixels` uint8
    [B, H, W, 3].

    With `features` [B, D, h, w] the logits are products of these. Each pixel's logits are then
    divided by the length of its upsampled features, as if those had been normalised.
    """
    size = (clusters.shape[1], clusters.shape[2])
    result = []
    for i in range(len(clusters)):
        taking = clusters[i].unique() if logits.shape[1] > ALL else slice(None)
        upsampled = upsample(logits[i, taking], size)
        if features is not None:
            squares = sum(
                upsample(part, size).square().sum(dim=0) for part in features[i].split(64)
            )
            upsampled = upsampled / torch.as_tensor(squares).sqrt().clamp_min(1e-12)
        refined = refine(upsampled.softmax(dim=0).cpu().numpy(), pixels[i, ..., ::-1]).argmax(
            axis=0
        )
        numbers = torch.arange(logits.shape[1], device=clusters.device)[taking]
        result.append(numbers[torch.from_numpy(refined).to(clusters.device)])
    return torch.stack(result)


def upsample(maps: Tensor, size: int | tuple[int, int]) -> Tensor:
    """[K, h, w] → [K, H, W], bilinearly; one side stands for both."""
    return F.interpolate(maps[None], size, mode="bilinear")[0]
