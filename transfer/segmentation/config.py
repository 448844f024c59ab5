"""The configuration of a segmentation run: `transfer.config` and further sections."""

from dataclasses import dataclass, field
from typing import Literal

from evaluation.datasets.kinds import KINDS
from evaluation.datasets.label_maps import VOID
from pipeline.bounds import (
    BELOW_1,
    LONGEST_SIDE,
    RANGE,
    UP_TO_1,
    Bound,
    Bounded,
    at_least,
    one_of,
    optional,
    within,
)
from pipeline.errors import require
from transfer.config import TransferConfig

_IDS = {f"ids in 0..{VOID}": lambda ids: all(0 <= each <= VOID for each in ids)}
_SIDES: Bound = {
    "longer and shorter side": lambda size: size[0] >= size[1] >= 1,
    f"sides of at most {LONGEST_SIDE:,}": lambda size: size[0] <= LONGEST_SIDE,
}


@dataclass(frozen=True)
class DataConfig(Bounded):
    """Images with label maps, to train on and to score."""

    dataset: str = field(default="folder", metadata=one_of(KINDS))
    """Layout: "voc-aug", "voc", "cityscapes", "ade20k", "camvid", "coco-stuff", "coco-panoptic", or
    "folder", any folder of images and one of label PNGs of the same names."""
    root: str | None = None
    """Folder of the data set, in the chosen layout."""
    train_split: str = "train"
    """Part of the data set under root to train on."""
    val_split: str = "val"
    """Part to score."""
    train_images: str | None = None
    """Folder of images to train on, instead of those under root."""
    train_labels: str | None = None
    """Folder of their label maps."""
    train_list: str | None = None
    """File of names, one a line: train only on these images."""
    val_images: str | None = None
    """Folder of images to score."""
    val_labels: str | None = None
    """Folder of their label maps."""
    val_list: str | None = None
    """File of names, one a line: score only these images."""
    classes: str | None = None
    """"folder" only: JSON list of class names by id; null: classes.json beside or above the
    labels."""
    void: tuple[int, ...] | None = field(default=None, metadata=optional(_IDS))
    """"folder" only: ids to ignore; null: 255."""


@dataclass(frozen=True)
class AugmentConfig(Bounded):
    """How an image is resized and augmented before it enters the network. Sizes are in pixels."""

    crop: int = field(default=513, metadata=at_least(1, LONGEST_SIDE))
    """Side of a training crop; beyond the border of a smaller image the crop is void."""
    size: tuple[int, int] = field(default=(2049, 513), metadata=_SIDES)
    """Longer and shorter side; an image is resized to fit into them and keeps its proportions. In
    training they are multiplied by a random factor, see scale."""
    scale: tuple[float, float] = field(default=(0.5, 2.0), metadata=RANGE)
    """Range of the random factor for size."""
    max_class_share: float = field(default=1.0, metadata=UP_TO_1)
    """Draw another crop, up to ten times, if one class has this share or more of the labelled
    pixels; 1: never."""
    flip: float = field(default=0.5, metadata=within(0, 1))
    """Probability of a mirror image."""
    distort: bool = False
    """Change brightness, contrast, saturation and hue, each with probability 1/2."""

    def __post_init__(self) -> None:
        super().__post_init__()
        longest, factor = self.size[0], self.scale[1]
        fits = longest * factor <= 2 * LONGEST_SIDE
        meaning = f"at most {2 * LONGEST_SIDE:,} pixels / size ({longest})"
        require(fits, "scale", self.scale, meaning)


@dataclass(frozen=True)
class ModelConfig(Bounded):
    """The head on the encoder's map; the defaults are the authors' for VOC and Cityscapes."""

    head: Literal["fcn", "linear"] = "fcn"
    """"fcn": 3×3 convolutions, each with BatchNorm and ReLU, and a 1×1 convolution; "linear": only
    the 1×1 convolution, after a BatchNorm without weights, which normalises the features' scale."""
    output_stride: Literal[8, 16, 32] | None = 16
    """Pixels of a cell of the encoder's map; the last stages use dilation instead of stride.
    null: as the encoder is."""
    channels: int = field(default=256, metadata=at_least(1, 8192))
    """"fcn" only: width of each convolution."""
    convs: int = field(default=2, metadata=at_least(1, 100))
    """"fcn" only: number of convolutions."""
    dilation: int = field(default=6, metadata=at_least(1, 1000))
    """"fcn" only: dilation of these convolutions."""
    concat: bool = False
    """"fcn" only: one more convolution, on the encoder's map and the last convolution's output."""
    dropout: float = field(default=0.0, metadata=BELOW_1)
    """Probability of dropping a channel before the 1×1 convolution."""
    auxiliary_weight: float = field(default=0.0, metadata=at_least(0))
    """Loss weight of a second head on layer3, in training; 0: no second head."""
    align_corners: bool = True
    """Upsampling of the scores aligns the centres of the corner pixels, not their edges."""


@dataclass(frozen=True)
class InferenceConfig(Bounded):
    """How an image is scored."""

    window: int = field(default=0, metadata=at_least(0, LONGEST_SIDE))
    """Side of a sliding window in pixels; scores are averaged where windows overlap. 0: the whole
    image at once."""
    stride: int = 0
    """Pixels from one window to the next."""

    def __post_init__(self) -> None:
        super().__post_init__()
        within = self.stride == 0 if not self.window else 1 <= self.stride <= self.window
        require(within, "stride", self.stride, f"in 1..window ({self.window}), 0 without one")


@dataclass(frozen=True, kw_only=True)
class SegmentationConfig(TransferConfig):
    """A run of semantic segmentation."""

    data: DataConfig = field(default_factory=DataConfig)
    """Data"""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """Augmentation"""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Model"""
    inference: InferenceConfig = field(default_factory=InferenceConfig)
    """Inference"""

    def __post_init__(self) -> None:
        super().__post_init__()
        crop, cell = self.augment.crop, self.model.output_stride or 32
        # In a batch of one image, BatchNorm needs more than one cell.
        require(crop > cell, "augment.crop", crop, f"more than model.output_stride ({cell})")
