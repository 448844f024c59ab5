"""The configuration of a run: `transfer.config`'s sections, and those of segmentation."""

from dataclasses import dataclass, field
from typing import Literal

from evaluation.datasets.layouts import KINDS, VOID
from pipeline.bounds import BELOW_1, RANGE, UP_TO_1, Bounded, at_least, one_of, optional, within
from pipeline.errors import require
from transfer.config import TransferConfig

_IDS = {f"ids in 0..{VOID}": lambda ids: all(0 <= each <= VOID for each in ids)}
_SIDES = {"longer and shorter side": lambda size: size[0] >= size[1] >= 1}


@dataclass(frozen=True)
class DataConfig(Bounded):
    """Images with label maps to learn from, and others to score."""

    dataset: str = field(default="folder", metadata=one_of(KINDS))
    """Layout: "voc-aug", "voc", "cityscapes", "ade20k", "camvid", "coco-stuff", "coco-panoptic", or
    "folder", any folder of images and one of label PNGs of the same names."""
    root: str | None = None
    """The data set's folder, in which its layout says what is where."""
    train_split: str = "train"
    """Part of the data set under root to learn from."""
    val_split: str = "val"
    """Part to score."""
    train_images: str | None = None
    """Folder of images to learn from, in place of root's."""
    train_labels: str | None = None
    """Folder of their label maps."""
    train_list: str | None = None
    """File of names, one a line: learn from these images only."""
    val_images: str | None = None
    """Folder of images to score."""
    val_labels: str | None = None
    """Folder of their label maps."""
    val_list: str | None = None
    """File of names, one a line: score these images only."""
    classes: str | None = None
    """"folder" only: JSON list of class names by id; null: classes.json beside or above the
    labels."""
    void: tuple[int, ...] | None = field(default=None, metadata=optional(_IDS))
    """"folder" only: ids to ignore; null: 255."""


@dataclass(frozen=True)
class AugmentConfig(Bounded):
    """What an image goes through before the network sees it; sides and sizes in pixels."""

    crop: int = field(default=513, metadata=at_least(1))
    """Side of a training example; where the image is smaller, the rest is void."""
    size: tuple[int, int] = field(default=(2049, 513), metadata=_SIDES)
    """Longer and shorter side that an image is resized to fit into, its proportions kept: at
    evaluation as it is, in training times a factor from scale."""
    scale: tuple[float, float] = field(default=(0.5, 2.0), metadata=RANGE)
    """Range of that factor."""
    max_class_share: float = field(default=1.0, metadata=UP_TO_1)
    """Draw a crop again, up to ten times, of whose labelled pixels one class has this share or
    more; 1: never."""
    flip: float = field(default=0.5, metadata=within(0, 1))
    """Probability of a mirror image."""
    distort: bool = False
    """Change brightness, contrast, saturation and hue, each with probability 1/2."""


@dataclass(frozen=True)
class ModelConfig(Bounded):
    """What turns the encoder's map into classes; the defaults are the authors' for VOC and
    Cityscapes."""

    head: Literal["fcn", "linear"] = "fcn"
    """"fcn": 3×3 convolutions, each with BatchNorm and ReLU, and a 1×1 convolution; "linear": the
    1×1 convolution alone, after a BatchNorm without weights, which takes the scale out of the
    features."""
    output_stride: Literal[8, 16, 32] = 16
    """Pixels of a cell of the encoder's map: strides of its last stages become dilation."""
    channels: int = field(default=256, metadata=at_least(1))
    """"fcn" only: of each convolution."""
    convs: int = field(default=2, metadata=at_least(1))
    """"fcn" only: how many."""
    dilation: int = field(default=6, metadata=at_least(1))
    """"fcn" only: of these."""
    concat: bool = False
    """"fcn" only: one more convolution, which sees the encoder's map beside the last one's."""
    dropout: float = field(default=0.0, metadata=BELOW_1)
    """Probability with which a channel is left out before the 1×1 convolution."""
    auxiliary_weight: float = field(default=0.0, metadata=at_least(0))
    """Weight of the loss of a second head, on layer3, in training; 0: no such head."""
    align_corners: bool = True
    """Scores are upsampled such that the corners' centres stay in place, not their edges."""


@dataclass(frozen=True)
class InferenceConfig(Bounded):
    """How an image is scored."""

    window: int = field(default=0, metadata=at_least(0))
    """Side of a sliding window in pixels, whose scores are averaged where windows overlap; 0: the
    whole image at once."""
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
        crop, cell = self.augment.crop, self.model.output_stride
        # The norms of a batch of one image need more than one value a channel.
        require(crop > cell, "augment.crop", crop, f"more than model.output_stride ({cell})")
