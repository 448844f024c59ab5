"""The recipe as published, one image at a time through PIL and torchvision on the CPU.

It is slow, and the other backends are measured against it. PIL works on uint8, so each operation
rounds.
"""

import torch
import torchvision.transforms.functional as TF
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor

from pipeline.augment import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    JITTER_NEUTRAL,
    SOLARIZE_THRESHOLD,
    empty_views,
)
from pipeline.views import ViewParams

# In the order of the numbers in ViewParams.order.
_JITTER = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)


def apply(
    canvas: Tensor,
    sizes: Tensor,
    params: ViewParams,
    size: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    """See `pipeline.augment.Apply`."""
    views = empty_views(len(canvas), size, device, dtype)
    for b, (height, width) in enumerate(sizes.tolist()):
        image = Image.fromarray(canvas[b, :height, :width].cpu().numpy())
        for v in range(2):
            view = _geometric(image, params, v, b, size)
            views[v, b] = _finish(_photometric(view, params, v, b)).to(dtype)
    return views


def colour(pixels: Tensor, params: ViewParams, device: torch.device, dtype: torch.dtype) -> Tensor:
    """See `pipeline.augment.Colour`."""
    _, batch, size, *_ = pixels.shape
    views = empty_views(batch, size, device, dtype)
    for v in range(2):
        for b, image in enumerate(pixels[v].cpu().numpy()):
            view = _photometric(Image.fromarray(image), params, v, b)
            views[v, b] = _finish(view).to(dtype)
    return views


def _geometric(image: Image.Image, params: ViewParams, v: int, b: int, size: int) -> Image.Image:
    """Crop first: the filter of the resize must not see pixels outside the crop.

    Resize widths first, as Pillow did when the recipe was published. Since version 13 it begins
    with the heights if that is less work, and then the bytes between the two passes differ.
    """
    crop = image.crop(params.crops[v, b].tolist())
    lines = crop.resize((size, crop.height), Image.Resampling.BICUBIC)
    view = lines.resize((size, size), Image.Resampling.BICUBIC)
    return TF.hflip(view) if params.flipped[v, b] else view


def _photometric(view: Image.Image, params: ViewParams, v: int, b: int) -> Image.Image:
    if params.jittered[v, b]:
        amounts = params.jitter[v, b].tolist()
        for operation in params.order[v, b].tolist():
            # Skip neutral amounts: hue would still round twice.
            if amounts[operation] != JITTER_NEUTRAL[operation]:
                view = _JITTER[operation](view, amounts[operation])
    if params.grey[v, b]:
        view = TF.rgb_to_grayscale(view, num_output_channels=3)
    if params.sigma[v, b] > 0:
        view = view.filter(ImageFilter.GaussianBlur(radius=float(params.sigma[v, b])))
    if params.solarized[v, b]:
        view = ImageOps.solarize(view, SOLARIZE_THRESHOLD)
    return view


def _finish(view: Image.Image) -> Tensor:
    return TF.normalize(TF.to_tensor(view), IMAGENET_MEAN, IMAGENET_STD)
