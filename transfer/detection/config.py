"""The configuration of a detection run: `transfer.config`, the data and the detector."""

import math
from dataclasses import dataclass, field

from model.architectures import ARCHITECTURES
from pipeline.bounds import BELOW_1, LONGEST_SIDE, WIDEST, Bound, Bounded, at_least, within
from pipeline.errors import require
from transfer.config import TransferConfig

_SIDES: Bound = {
    "sides of at least 32": lambda sides: bool(sides) and min(sides) >= 32,
    f"sides of at most {LONGEST_SIDE:,}": lambda sides: max(sides) <= LONGEST_SIDE,
}
_ANCHORS: Bound = {
    "positive numbers": lambda values: bool(values) and all(0 < v < math.inf for v in values),
    f"numbers of at most {LONGEST_SIDE:,}": lambda values: max(values) <= LONGEST_SIDE,
}
_RATIOS: Bound = {
    "positive numbers": lambda values: bool(values) and all(0 < v < math.inf for v in values),
    "up to 20 numbers in 0.01..100": lambda values: (
        len(values) <= 20 and min(values) >= 0.01 and max(values) <= 100
    ),
}
_MOST_BOXES, _MOST_LAYERS = 10**6, 100


@dataclass(frozen=True)
class DataConfig(Bounded):
    """Images with COCO instance annotations, and their augmentation. Sides are in pixels."""

    root: str = field(metadata={"a name": bool})
    """The folder with annotations/, train2017/ and val2017/."""
    train: str = field(default="train2017", metadata={"a name": bool})
    """The split to train on."""
    val: str = field(default="val2017", metadata={"a name": bool})
    """The split to score; it must have the categories of the training split."""
    annotations: str = field(
        default="annotations/instances_{split}.json", metadata={"a name": bool}
    )
    """Annotation file of a split: a path relative to root, or an absolute path."""
    images: str = field(default="{split}", metadata={"a name": bool})
    """Image folder of a split: a path relative to root, or an absolute path."""
    train_sides: tuple[int, ...] = field(default=(640, 672, 704, 736, 768, 800), metadata=_SIDES)
    """Shorter sides for training; each time, an image is resized to a random one of them."""
    val_side: int = field(default=800, metadata=at_least(32, LONGEST_SIDE))
    """The shorter side in evaluation."""
    longest_side: int = field(default=1333, metadata=at_least(32, LONGEST_SIDE))
    """Upper bound of the longer side; an image that would exceed it is resized to it instead."""
    flip: float = field(default=0.5, metadata=within(0, 1))
    """Probability of a mirror image in training."""


@dataclass(frozen=True)
class ModelConfig(Bounded):
    """Mask R-CNN with a feature pyramid; defaults are the authors' setting."""

    channels: int = field(default=256, metadata=at_least(1, 8192))
    """Width of the pyramid and of the heads' convolutions."""
    anchor_sizes: tuple[int, int, int, int, int] = field(
        default=(32, 64, 128, 256, 512), metadata=_ANCHORS
    )
    """Side of the anchors in pixels, for each level of the pyramid. Cells of these levels are 4, 8,
    16, 32 and 64 pixels wide."""
    aspect_ratios: tuple[float, ...] = field(default=(0.5, 1.0, 2.0), metadata=_RATIOS)
    """Height / width of the anchors of each cell."""
    rpn_samples: int = field(default=256, metadata=at_least(1, _MOST_BOXES))
    """Anchors of an image that enter the loss of the proposals."""
    candidates_train: int = field(default=2000, metadata=at_least(1, _MOST_BOXES))
    """Best proposals of each level that enter non-maximum suppression, in training."""
    candidates_test: int = field(default=1000, metadata=at_least(1, _MOST_BOXES))
    """The same in evaluation."""
    proposals_train: int = field(default=1000, metadata=at_least(1, _MOST_BOXES))
    """Proposals of an image, over all levels, that remain after the suppression, in training."""
    proposals_test: int = field(default=1000, metadata=at_least(1, _MOST_BOXES))
    """The same in evaluation."""
    roi_samples: int = field(default=512, metadata=at_least(1, _MOST_BOXES))
    """Proposals of an image that train the heads; at most a quarter of them are objects."""
    roi_points: int = field(default=0, metadata=at_least(0, 100))
    """Sampling points of each bin of a region, in each direction; 0: adapted to the bin's size in
    cells."""
    masks: bool = True
    """Learn and score masks; false: boxes alone, for sets without masks."""
    box_convs: int = field(default=4, metadata=at_least(0, _MOST_LAYERS))
    """Convolutions of the box head, each with a norm."""
    box_features: int = field(default=1024, metadata=at_least(1, WIDEST))
    """Width of the fully connected layer after these convolutions."""
    mask_convs: int = field(default=4, metadata=at_least(1, _MOST_LAYERS))
    """Convolutions of the mask head before its upsampling, each with a norm."""
    score_threshold: float = field(default=0.05, metadata=BELOW_1)
    """Detections with a lower score are dropped."""
    detections: int = field(default=100, metadata=at_least(1, _MOST_BOXES))
    """Maximum number of detections in an image, over all classes."""


@dataclass(frozen=True, kw_only=True)
class DetectionConfig(TransferConfig):
    """A run."""

    data: DataConfig
    """Data"""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Model"""

    def __post_init__(self) -> None:
        super().__post_init__()
        known = ", ".join(ARCHITECTURES)
        resnet = self.init.arch in ARCHITECTURES
        require(resnet, "init.arch", self.init.arch, f"one of {known} for detection")
