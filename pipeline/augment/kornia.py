"""The augmentation by kornia, many images at once, on any device; rounded as PIL rounds.

PIL keeps uint8 between operations, and each operation rounds in a different way. Following PIL
costs little and keeps the two backends within one level of 255 on average. Single pixels, of a
saturated colour or at an edge, differ by more: 21 levels in the worst case seen.

B images, S view side. A batch of views is float32 [B, 3, S, S] in 0..1. Between operations its
values are whole levels k / 255.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from kornia.color import hsv_to_rgb, rgb_to_grayscale, rgb_to_hsv
from kornia.enhance import (
    adjust_brightness_accumulative,
    adjust_contrast_with_mean_subtraction,
    adjust_saturation_with_gray_subtraction,
    normalize,
    solarize,
)
from kornia.filters import filter2d_separable
from kornia.geometry.transform import hflip
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate

from pipeline.augment import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    JITTER_NEUTRAL,
    SOLARIZE_THRESHOLD,
    empty_views,
)
from pipeline.views import ViewParams

PART = 8
"""Images that a CPU colours at once."""


def apply(
    canvas: Tensor,
    sizes: Tensor,  # unused: a crop never reaches beyond its image
    params: ViewParams,
    size: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    """See `pipeline.augment.Apply`."""
    canvas = canvas.to(device, non_blocking=True)
    views = empty_views(len(canvas), size, device, dtype)
    for v, part in _parts(views):
        x = crop_and_flip(canvas[part], params.crops[v, part], params.flipped[v, part], size)
        views[v, part] = _finish(_photometric(x, params, v, part))
    return views


def colour(pixels: Tensor, params: ViewParams, device: torch.device, dtype: torch.dtype) -> Tensor:
    """See `pipeline.augment.Colour`."""
    pixels = pixels.to(device, non_blocking=True)
    _, batch, size, *_ = pixels.shape
    views = empty_views(batch, size, device, dtype)
    for v, part in _parts(views):
        x = pixels[v, part].permute(0, 3, 1, 2).contiguous().float().div_(255)
        views[v, part] = _finish(_photometric(x, params, v, part))
    return views


def _parts(views: Tensor) -> Iterator[tuple[int, slice]]:
    """Each view, and the images to colour at once: all, but on a CPU only as many as its cache and
    the allocator hold on to.
    """
    count = views.shape[1]
    step = PART if views.device.type == "cpu" else max(count, 1)
    for v in range(2):
        for begin in range(0, count, step):
            yield v, slice(begin, begin + step)


def _finish(x: Tensor) -> Tensor:
    return normalize(x, torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD))


def crop_and_flip(
    canvas: Tensor, crops: NDArray[np.int32], flipped: NDArray[np.bool_], size: int
) -> Tensor:
    """uint8 [B, Hmax, Wmax, 3] -> [B, 3, S, S]."""
    x = torch.empty(len(canvas), 3, size, size, device=canvas.device)
    for b, (x0, y0, x1, y1) in enumerate(crops.tolist()):
        crop = canvas[b, y0:y1, x0:x1].permute(2, 0, 1)[None]
        if canvas.device.type != "cpu":  # only CPUs resize uint8, 8 times faster than float
            crop = crop.float()
        x[b] = interpolate(crop, size=(size, size), mode="bicubic", antialias=True)[0]
    _update(x, flipped, hflip)
    return x.round_().clamp_(0, 255).div_(255)


def _photometric(x: Tensor, params: ViewParams, v: int, part: slice) -> Tensor:
    """Apply view v's colour operations to x [B, 3, S, S], the images `part` of the batch, in place,
    each where it was drawn.
    """
    for position in range(4):
        for number, operation in enumerate(_JITTER):
            amount = params.jitter[v, part, number]
            mask = params.jittered[v, part] & (params.order[v, part, position] == number)
            _update(x, mask & (amount != JITTER_NEUTRAL[number]), operation, amount)
    _update(x, params.grey[v, part], _grey)
    sigma = params.sigma[v, part]
    _update(x, sigma > 0, _blur, blur_kernels(sigma))
    _update(x, params.solarized[v, part], _solarize)
    return x


def _update(
    x: Tensor, mask: NDArray[np.bool_], operation: Callable[..., Tensor], *arguments: NDArray[Any]
) -> None:
    """x[i] = operation(x[i], arguments[i]) for all images i of the mask [B], in one batch.

    The mask is an array on the host: with a mask on the device the host would have to wait.
    """
    if not mask.any():
        return
    rows = torch.from_numpy(np.flatnonzero(mask)).to(x.device)
    x[rows] = operation(x[rows], *(torch.from_numpy(a[mask]).to(x.device) for a in arguments))


def _round(x: Tensor) -> Tensor:
    return (x * 255).round_().div_(255)


def _truncate(x: Tensor) -> Tensor:
    """Round down to a level, as PIL's blend does; 1e-3 outweighs a rounding error below a level."""
    return (x * 255 + 1e-3).floor_().div_(255)


def _brightness(x: Tensor, factor: Tensor) -> Tensor:
    return _truncate(adjust_brightness_accumulative(x, factor))


def _contrast(x: Tensor, factor: Tensor) -> Tensor:
    return _truncate(adjust_contrast_with_mean_subtraction(x, factor))


def _saturation(x: Tensor, factor: Tensor) -> Tensor:
    return _truncate(adjust_saturation_with_gray_subtraction(x, factor))


def _hue(x: Tensor, turns: Tensor) -> Tensor:
    """PIL's hue is a byte: it treats 255 levels as a full turn but wraps at 256, and so do we.
    kornia's hue is in radians.
    """
    level = 2 * math.pi / 255
    hue, saturation, value = rgb_to_hsv(x).unbind(1)
    hue = (hue / level + 1e-3).floor_() + (turns * 255).trunc_()[:, None, None]
    hsv = torch.stack((hue.remainder_(256) * level, _truncate(saturation), value), dim=1)
    return _round(hsv_to_rgb(hsv))


# In the order of the numbers in ViewParams.order.
_JITTER: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
    _brightness,
    _contrast,
    _saturation,
    _hue,
)


def _grey(x: Tensor) -> Tensor:
    return _round(rgb_to_grayscale(x)).expand(-1, 3, -1, -1)


def _blur(x: Tensor, kernels: Tensor) -> Tensor:
    return _round(filter2d_separable(x, kernels, kernels, border_type="replicate"))


def _solarize(x: Tensor) -> Tensor:
    # Half a level lower: after a division on the device, a level may differ from k / 255 by a bit.
    return solarize(x, (SOLARIZE_THRESHOLD - 0.5) / 255)


def blur_kernels(sigma: NDArray[np.float32]) -> NDArray[np.float32]:
    """PIL's GaussianBlur as one symmetric kernel per image: sigma float32 [B] -> float32 [B, taps].

    PIL applies a box filter three times. The outermost weights of the box are fractional, such that
    the variances add up to sigma^2 (Gwosdek et al., "Theoretical Foundations of Gaussian
    Convolution by Extended Box Filtering", SSVM 2011). For small sigma this blurs more than a
    Gaussian that is sampled at the pixels. The kernel of sigma 0 is the identity.
    """
    variance = sigma.astype(np.float64)[:, None] ** 2 / 3
    full = np.floor((np.sqrt(12 * variance + 1) - 1) / 2)  # taps of weight 1 on either side
    end = (2 * full + 1) * (full * (full + 1) - 3 * variance) / (6 * (variance - (full + 1) ** 2))
    reach = int(full.max()) + 1
    distance = np.abs(np.arange(-reach, reach + 1))
    box = np.where(distance <= full, 1.0, np.where(distance == full + 1, end, 0.0))
    box /= box.sum(axis=1, keepdims=True)
    return np.stack([np.convolve(np.convolve(b, b), b) for b in box]).astype(np.float32)
