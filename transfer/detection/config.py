"""A detection run: what every transfer has, and the data and the detector."""

import math
from dataclasses import dataclass, field

from pipeline.errors import require
from transfer.config import TransferConfig


@dataclass(frozen=True)
class DataConfig:
    """Images with COCO instance annotations, and what is done to them. Sides are in pixels."""

    root: str
    """The folder that holds annotations/, train2017/ and val2017/."""
    train: str = "train2017"
    """The split to learn from."""
    val: str = "val2017"
    """The split to be scored on; it needs the categories of the other."""
    annotations: str = "annotations/instances_{split}.json"
    """A split's annotation file: a place under root, or an absolute one."""
    images: str = "{split}"
    """A split's folder of images, likewise."""
    train_sides: tuple[int, ...] = (640, 672, 704, 736, 768, 800)
    """Shorter sides for training; each image is resized to one of them, drawn anew each time."""
    val_side: int = 800
    """The shorter side in evaluation."""
    longest_side: int = 1333
    """Images whose longer side would exceed this are resized to it instead."""
    flip: float = 0.5
    """How often a training image is mirrored."""

    def __post_init__(self) -> None:
        for name in ("root", "train", "val", "annotations", "images"):
            require(bool(getattr(self, name)), name, getattr(self, name), "a name")
        sides = tuple(self.train_sides)
        object.__setattr__(self, "train_sides", sides)
        require(bool(sides) and min(sides) >= 32, "train_sides", sides, "sides of at least 32")
        for name in ("val_side", "longest_side"):
            require(getattr(self, name) >= 32, name, getattr(self, name), "at least 32")
        require(0 <= self.flip <= 1, "flip", self.flip, "in 0..1")


@dataclass(frozen=True)
class ModelConfig:
    """Mask R-CNN with a feature pyramid; defaults are the authors' setting."""

    channels: int = 256
    """Width of the pyramid and of the heads' convolutions."""
    anchor_sizes: tuple[int, int, int, int, int] = (32, 64, 128, 256, 512)
    """Side in pixels of the anchors of each of the pyramid's levels, of which the cells are 4, 8,
    16, 32 and 64 pixels wide."""
    aspect_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    """Height by width of the anchors at each place."""
    rpn_samples: int = 256
    """Anchors of an image whose proposals enter the loss."""
    candidates_train: int = 2000
    """Best proposals of each level that non-maximum suppression chooses from, in training; …"""
    candidates_test: int = 1000
    """… in evaluation."""
    proposals_train: int = 1000
    """Proposals of an image, of all levels, that it leaves, in training; …"""
    proposals_test: int = 1000
    """… in evaluation."""
    roi_samples: int = 512
    """Proposals of an image that the heads learn from, at most a quarter of them objects."""
    roi_points: int = 0
    """Points at which each bin of a region is read, in each direction; 0: as many as its size in
    cells asks for."""
    box_convs: int = 4
    """Convolutions of the box head, each with a norm, …"""
    box_features: int = 1024
    """… and the width of the one fully connected layer after them."""
    mask_convs: int = 4
    """Convolutions of the mask head, each with a norm, before it upsamples."""
    score_threshold: float = 0.05
    """Detections of a lower score are left out."""
    detections: int = 100
    """Detections of an image at most, of all classes."""

    def __post_init__(self) -> None:
        for name in (
            "channels", "rpn_samples", "candidates_train", "candidates_test", "proposals_train",
            "proposals_test", "roi_samples", "box_features", "mask_convs", "detections",
        ):  # fmt: skip
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("box_convs", "roi_points"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        for name in ("anchor_sizes", "aspect_ratios"):
            values = tuple(getattr(self, name))
            object.__setattr__(self, name, values)
            good = bool(values) and all(0 < value < math.inf for value in values)
            require(good, name, values, "positive numbers")
        threshold = self.score_threshold
        require(0 <= threshold < 1, "score_threshold", threshold, "at least 0 and less than 1")


@dataclass(frozen=True, kw_only=True)
class DetectionConfig(TransferConfig):
    """A run."""

    data: DataConfig
    """Data"""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Model"""
