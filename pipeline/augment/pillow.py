"""What Pillow and torchvision compute from the parameters of a view; other backends do the same."""

import numpy as np
from numpy.typing import NDArray

from pipeline.augment import JITTER_NEUTRAL
from pipeline.views import ViewParams

NONE = 15
"""In an order: no operation."""
_HUE = 3  # as in ViewParams.order


def order(params: ViewParams) -> NDArray[np.uint8]:
    """[2, B, 4] the operations of each jitter as in ViewParams, NONE where one is not applied: a
    neutral amount would still round.
    """
    absent = (params.jitter == np.array(JITTER_NEUTRAL, np.float32)) | ~params.jittered[..., None]
    applied = params.order.copy()
    applied[np.take_along_axis(absent, params.order.astype(np.int64), axis=-1)] = NONE
    return applied


def hue_shift(params: ViewParams) -> NDArray[np.int32]:
    """[2, B] the shift of the hue in 1/255 of a turn; the product as torchvision computes it, in
    float64.
    """
    return (params.jitter[..., _HUE].astype(np.float64) * 255).astype(np.int32)


def boxes(
    sigma: NDArray[np.float32],
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]:
    """The box that Pillow's GaussianBlur applies three times: its pixels of full weight on either
    side (-1 where sigma is 0), their weight, and the weight of the next pixel, both in 2^-24.

    Computed in Pillow's types: sums in float32, the root in float64. For the mathematics see
    `pipeline.augment.kornia.blur_kernels`.
    """
    variance = sigma * sigma / np.float32(3)
    length = np.sqrt(12 * variance.astype(np.float64) + 1).astype(np.float32)
    full = np.floor((length - 1) / 2)
    end = (2 * full + 1) * (full * (full + 1) - 3 * variance)
    radius = full + end / (6 * (variance - (full + 1) * (full + 1)))
    box = radius.astype(np.int32)
    near = (np.float32(1 << 24) / (radius * 2 + 1)).astype(np.int32)
    far = ((1 << 24) - (2 * box + 1) * near) // 2
    return np.where(sigma > 0, box, -1), near, far
