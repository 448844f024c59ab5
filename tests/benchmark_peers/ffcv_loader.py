"""ffcv's own loader: it decodes and crops each view; Kornia's augmentations colour a whole batch,
for ffcv has neither hue, grey, blur nor solarisation.
"""

from types import SimpleNamespace

import kornia.augmentation as K
import numpy as np
import torch
from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
from ffcv.loader import Loader, OrderOption
from ffcv.pipeline.pipeline_spec import PipelineSpec
from ffcv.reader import Reader
from ffcv.transforms import RandomHorizontalFlip, ToDevice, ToTensor, ToTorchImage
from torch import Tensor, nn

from tests.benchmark_peers.peers import Job, Views
from tests.benchmark_peers.torchvision_v2 import TAPS

EPOCH = 64
"""Batches of the shortest epoch."""


def open_views(job: Job) -> Views:
    torch.set_num_threads(job.threads)  # importing ffcv has set one
    views = {f"view {v}": _view(job, v) for v in range(2)}
    images = int(Reader(job.beton).num_samples)
    loader = Loader(
        job.beton,
        job.batch,
        job.threads,
        os_cache=True,
        order=OrderOption.RANDOM,
        indices=np.tile(np.arange(images), -(-EPOCH * job.batch // images)),
        pipelines={"image": None, "index": None, **views},
    )
    while True:
        yield from loader


def _view(job: Job, v: int) -> PipelineSpec:
    recipe = job.recipe
    crop = RandomResizedCropRGBImageDecoder(
        (recipe.size, recipe.size),
        (recipe.min_scale, recipe.max_scale),
        (recipe.min_aspect, recipe.max_aspect),
    )
    moved = [ToDevice(torch.device(job.device))] if job.device == "cuda" else []
    steps = [
        RandomHorizontalFlip(recipe.flip),
        ToTensor(),
        *moved,
        ToTorchImage(),
        Colour(recipe, v),
    ]
    return PipelineSpec("image", decoder=crop, transforms=steps)


class Colour(nn.Module):
    """uint8 [B, 3, S, S] -> view `v` float32, each image with its own amounts."""

    def __init__(self, recipe: SimpleNamespace, v: int) -> None:
        super().__init__()
        amounts = (recipe.brightness, recipe.contrast, recipe.saturation, recipe.hue)
        mean, std = torch.tensor((0.485, 0.456, 0.406)), torch.tensor((0.229, 0.224, 0.225))
        self.steps = nn.Sequential(
            K.ColorJitter(*amounts, p=recipe.jitter),
            K.RandomGrayscale(p=recipe.grey),
            K.RandomGaussianBlur((TAPS, TAPS), recipe.blur_sigma, p=recipe.blur[v]),
            K.RandomSolarize((0.5, 0.5), (0.0, 0.0), p=recipe.solarize[v]),
            K.Normalize(mean, std),
        )

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Tensor:
        views: Tensor = self.steps(pixels.float() / 255)
        return views
