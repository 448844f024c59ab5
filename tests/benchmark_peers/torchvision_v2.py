"""torchvision's transforms v2 on tensors, in worker processes.

uint8 up to the flip, then float32: of the forms that give these views it is the fastest.
"""

from types import SimpleNamespace

import torch
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2

from tests.benchmark_peers.peers import Job, Views
from tests.benchmark_peers.workers import Files, load_views

TAPS = 13
"""Of the blur: three standard deviations of 2 pixels on each side."""


def open_views(job: Job) -> Views:
    return load_views(job, Files(job.files, Pair(job.recipe)))


class Pair:
    """A file -> view 1, view 2."""

    def __init__(self, recipe: SimpleNamespace) -> None:
        self.views = [view(recipe, v) for v in range(2)]

    def __call__(self, path: str) -> tuple[Tensor, Tensor]:
        image = decode_image(path, ImageReadMode.RGB)
        return self.views[0](image), self.views[1](image)


def view(recipe: SimpleNamespace, v: int) -> v2.Compose:
    """The transforms of view `v`."""
    jitter = v2.ColorJitter(recipe.brightness, recipe.contrast, recipe.saturation, recipe.hue)
    return v2.Compose([
        v2.RandomResizedCrop(
            recipe.size,
            (recipe.min_scale, recipe.max_scale),
            (recipe.min_aspect, recipe.max_aspect),
            v2.InterpolationMode.BICUBIC,
            antialias=True,
        ),
        v2.RandomHorizontalFlip(recipe.flip),
        v2.ToDtype(torch.float32, scale=True),
        v2.RandomApply([jitter], recipe.jitter),
        v2.RandomGrayscale(recipe.grey),
        v2.RandomApply([v2.GaussianBlur(TAPS, recipe.blur_sigma)], recipe.blur[v]),
        v2.RandomSolarize(0.5, recipe.solarize[v]),
        v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ])  # fmt: skip
