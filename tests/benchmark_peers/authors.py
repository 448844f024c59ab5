"""SlotCon's transforms by PIL and torchvision in worker processes, from the paper's appendix (arXiv
2205.15288): two crops that overlap, recorded flips, colours one after the other.
"""

import random
from types import SimpleNamespace

import torch
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor
from torchvision import transforms as T
from torchvision.transforms import functional as TF

from tests.benchmark_peers.peers import Job, Views
from tests.benchmark_peers.workers import Files, load_views

TRIES = 10
Box = tuple[int, int, int, int]
"""top, left, height, width in pixels"""


def open_views(job: Job) -> Views:
    return load_views(job, Files(job.files, Pair(job.recipe)))


class Pair:
    """A file -> view 1, view 2, overlap [2, 4], flipped [2]."""

    def __init__(self, recipe: SimpleNamespace) -> None:
        self.recipe = recipe
        self.colours = [colour(recipe, v) for v in range(2)]

    def __call__(self, path: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        recipe = self.recipe
        with Image.open(path) as file:
            image = file.convert("RGB")
        boxes = draw_crops(image, recipe)
        flips = [random.random() < recipe.flip for _ in range(2)]
        views = []
        for box, flip, colours in zip(boxes, flips, self.colours, strict=True):
            size = [recipe.size, recipe.size]
            view = TF.resized_crop(image, *box, size, TF.InterpolationMode.BICUBIC)
            views.append(colours(TF.hflip(view) if flip else view))
        overlap = [in_view(boxes[v], boxes[1 - v], flips[v]) for v in range(2)]
        return *views, torch.tensor(overlap), torch.tensor(flips)


def draw_crops(image: Image.Image, recipe: SimpleNamespace) -> tuple[Box, Box]:
    """Crop 2 covers a share of its own area with crop 1, unless ten tries fail."""
    scale = (recipe.min_scale, recipe.max_scale)
    ratio = (recipe.min_aspect, recipe.max_aspect)
    first = T.RandomResizedCrop.get_params(image, scale, ratio)
    for _ in range(TRIES):
        second = T.RandomResizedCrop.get_params(image, scale, ratio)
        top, left, bottom, right = shared(first, second)
        area = max(0, bottom - top) * max(0, right - left)
        if area >= recipe.min_overlap * second[2] * second[3]:
            return first, second
    return first, T.RandomResizedCrop.get_params(image, scale, ratio)


def shared(first: Box, second: Box) -> Box:
    """Top, left, bottom, right of the intersection; empty if bottom <= top or right <= left."""
    return (
        max(first[0], second[0]),
        max(first[1], second[1]),
        min(first[0] + first[2], second[0] + second[2]),
        min(first[1] + first[3], second[1] + second[3]),
    )


def in_view(own: Box, other: Box, flip: bool) -> list[float]:
    """The intersection, x1 y1 x2 y2 in the (0..1) frame of the view `own` after its flip."""
    top, left, bottom, right = shared(own, other)
    x1, x2 = (left - own[1]) / own[3], (right - own[1]) / own[3]
    if flip:
        x1, x2 = 1 - x2, 1 - x1
    return [x1, (top - own[0]) / own[2], x2, (bottom - own[0]) / own[2]]


def colour(recipe: SimpleNamespace, v: int) -> T.Compose:
    """The colours of view `v`, as torchvision's transforms; PIL blurs and solarises."""
    jitter = T.ColorJitter(recipe.brightness, recipe.contrast, recipe.saturation, recipe.hue)
    return T.Compose([
        T.RandomApply([jitter], recipe.jitter),
        T.RandomGrayscale(recipe.grey),
        T.RandomApply([Blur(recipe.blur_sigma)], recipe.blur[v]),
        T.RandomApply([ImageOps.solarize], recipe.solarize[v]),
        T.ToTensor(),
        T.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ])  # fmt: skip


class Blur:
    """PIL's GaussianBlur with a sigma of this range."""

    def __init__(self, sigma: tuple[float, float]) -> None:
        self.sigma = sigma

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(random.uniform(*self.sigma)))
