"""The boxes with which Pillow blurs."""

import numpy as np
from numpy.typing import NDArray


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
