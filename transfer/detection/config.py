"""A detection run: what every transfer has, and the data and the detector."""

import math
from dataclasses import dataclass, field

from pipeline.bounds import BELOW_1, Bound, Bounded, at_least, within
from transfer.config import TransferConfig

_SIDES: Bound = {"sides of at least 32": lambda sides: bool(sides) and min(sides) >= 32}
_POSITIVE_NUMBERS: Bound = {
    "positive numbers": lambda values: bool(values) and all(0 < v < math.inf for v in values)
}


@dataclass(frozen=True)
class DataConfig(Bounded):
    """Images with COCO instance annotations, and what is done to them. Sides are in pixels."""

    root: str = field(metadata={"a name": bool})
    """The folder that holds annotations/, train2017/ and val2017/."""
    train: str = field(default="train2017", metadata={"a name": bool})
    """The split to learn from."""
    val: str = field(default="val2017", metadata={"a name": bool})
    """The split to be scored on; it needs the categories of the other."""
    annotations: str = field(
        default="annotations/instances_{split}.json", metadata={"a name": bool}
    )
    """A split's annotation file: a place under root, or an absolute one."""
    images: str = field(default="{split}", metadata={"a name": bool})
    """A split's folder of images, likewise."""
    train_sides: tuple[int, ...] = field(default=(640, 672, 704, 736, 768, 800), metadata=_SIDES)
    """Shorter sides for training; each image is resized to one of them, drawn anew each time."""
    val_side: int = field(default=800, metadata=at_least(32))
    """The shorter side in evaluation."""
    longest_side: int = field(default=1333, metadata=at_least(32))
    """Images whose longer side would exceed this are resized to it instead."""
    flip: float = field(default=0.5, metadata=within(0, 1))
    """How often a training image is mirrored."""


@dataclass(frozen=True)
class ModelConfig(Bounded):
    """Mask R-CNN with a feature pyramid; defaults are the authors' setting."""

    channels: int = field(default=256, metadata=at_least(1))
    """Width of the pyramid and of the heads' convolutions."""
    anchor_sizes: tuple[int, int, int, int, int] = field(
        default=(32, 64, 128, 256, 512), metadata=_POSITIVE_NUMBERS
    )
    """Side in pixels of the anchors of each of the pyramid's levels, of which the cells are 4, 8,
    16, 32 and 64 pixels wide."""
    aspect_ratios: tuple[float, ...] = field(default=(0.5, 1.0, 2.0), metadata=_POSITIVE_NUMBERS)
    """Height by width of the anchors at each place."""
    rpn_samples: int = field(default=256, metadata=at_least(1))
    """Anchors of an image whose proposals enter the loss."""
    candidates_train: int = field(default=2000, metadata=at_least(1))
    """Best proposals of each level that non-maximum suppression chooses from, in training; …"""
    candidates_test: int = field(default=1000, metadata=at_least(1))
    """… in evaluation."""
    proposals_train: int = field(default=1000, metadata=at_least(1))
    """Proposals of an image, of all levels, that it leaves, in training; …"""
    proposals_test: int = field(default=1000, metadata=at_least(1))
    """… in evaluation."""
    roi_samples: int = field(default=512, metadata=at_least(1))
    """Proposals of an image that the heads learn from, at most a quarter of them objects."""
    roi_points: int = field(default=0, metadata=at_least(0))
    """Points at which each bin of a region is read, in each direction; 0: as many as its size in
    cells asks for."""
    box_convs: int = field(default=4, metadata=at_least(0))
    """Convolutions of the box head, each with a norm, …"""
    box_features: int = field(default=1024, metadata=at_least(1))
    """… and the width of the one fully connected layer after them."""
    mask_convs: int = field(default=4, metadata=at_least(1))
    """Convolutions of the mask head, each with a norm, before it upsamples."""
    score_threshold: float = field(default=0.05, metadata=BELOW_1)
    """Detections of a lower score are left out."""
    detections: int = field(default=100, metadata=at_least(1))
    """Detections of an image at most, of all classes."""


@dataclass(frozen=True, kw_only=True)
class DetectionConfig(TransferConfig):
    """A run."""

    data: DataConfig
    """Data"""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Model"""
