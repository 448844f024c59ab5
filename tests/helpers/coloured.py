"""A network that groups by colour, and pictures with a known grouping."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from pipeline.augment import IMAGENET_MEAN, IMAGENET_STD

CELL = 32
COLOURS = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0]], np.uint8)
"""COLOURS[c] is the colour of class c."""


class ColourNetwork:
    """Prototype k is colour `order[k]`. The feature of a cell is its mean colour minus grey."""

    def __init__(self, order: list[int]) -> None:
        self.prototypes = torch.from_numpy(COLOURS[order]) / 255 - 0.5
        self.largest_batch = 0

    def segment(self, images: Tensor) -> tuple[Tensor, Tensor]:
        self.largest_batch = max(self.largest_batch, len(images))
        mean, std = (torch.tensor(v)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
        features = F.avg_pool2d(images * std + mean, CELL) - 0.5
        scores = torch.einsum("kd,bdhw->bkhw", F.normalize(self.prototypes), F.normalize(features))
        return scores, features


def write_scenes(root: Path, maps: list[np.ndarray]) -> tuple[Path, Path]:
    """Write class maps int [H, W] as pictures and label PNGs; returns the two folders."""
    images, labels = root / "images", root / "labels"
    images.mkdir(parents=True)
    labels.mkdir()
    for number, classes in enumerate(maps):
        blocks = np.kron(classes, np.ones((CELL, CELL), np.int64)).astype(np.uint8)
        Image.fromarray(blocks).save(labels / f"{number:03}.png")
        Image.fromarray(COLOURS[blocks % len(COLOURS)]).save(images / f"{number:03}.png")
    return images, labels
