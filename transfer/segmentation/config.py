"""The configuration of a run: `transfer.config`'s sections, and those of segmentation."""

import math
from dataclasses import dataclass, field
from typing import Literal

from evaluation.datasets.label_maps import VOID
from evaluation.datasets.layouts import KINDS
from pipeline.errors import require
from transfer.config import TransferConfig


@dataclass(frozen=True)
class DataConfig:
    """Images with label maps to learn from, and others to score."""

    dataset: str = "folder"
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
    void: tuple[int, ...] | None = None
    """"folder" only: ids to ignore; null: 255."""

    def __post_init__(self) -> None:
        require(self.dataset in KINDS, "dataset", self.dataset, f"one of {', '.join(KINDS)}")
        if self.void is not None:
            object.__setattr__(self, "void", tuple(self.void))
            ids = all(0 <= each <= VOID for each in self.void)
            require(ids, "void", self.void, f"ids in 0..{VOID}")


@dataclass(frozen=True)
class AugmentConfig:
    """What an image goes through before the network sees it; sides and sizes in pixels."""

    crop: int = 513
    """Side of a training example; where the image is smaller, the rest is void."""
    size: tuple[int, int] = (2049, 513)
    """Longer and shorter side that an image is resized to fit into, its proportions kept: at
    evaluation as it is, in training times a factor from scale."""
    scale: tuple[float, float] = (0.5, 2.0)
    """Range of that factor."""
    max_class_share: float = 1.0
    """Draw a crop again, up to ten times, of whose labelled pixels one class has this share or
    more; 1: never."""
    flip: float = 0.5
    """Probability of a mirror image."""
    distort: bool = False
    """Change brightness, contrast, saturation and hue, each with probability 1/2."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", tuple(self.size))
        object.__setattr__(self, "scale", tuple(self.scale))
        require(self.crop >= 1, "crop", self.crop, "at least 1")
        require(self.size[0] >= self.size[1] >= 1, "size", self.size, "longer and shorter side")
        low, high = self.scale
        require(0 < low <= high < math.inf, "scale", self.scale, "two growing positive numbers")
        share = self.max_class_share
        require(0 < share <= 1, "max_class_share", share, "above 0 and up to 1")
        require(0 <= self.flip <= 1, "flip", self.flip, "in 0..1")


@dataclass(frozen=True)
class ModelConfig:
    """What turns the encoder's map into classes; the defaults are the authors' for VOC and
    Cityscapes."""

    head: Literal["fcn", "linear"] = "fcn"
    """"fcn": 3×3 convolutions, each with BatchNorm and ReLU, and a 1×1 convolution; "linear": the
    1×1 convolution alone, after a BatchNorm without weights, which takes the scale out of the
    features."""
    output_stride: Literal[8, 16, 32] = 16
    """Pixels of a cell of the encoder's map: strides of its last stages become dilation."""
    channels: int = 256
    """"fcn" only: of each convolution."""
    convs: int = 2
    """"fcn" only: how many."""
    dilation: int = 6
    """"fcn" only: of these."""
    concat: bool = False
    """"fcn" only: one more convolution, which sees the encoder's map beside the last one's."""
    dropout: float = 0.0
    """Probability with which a channel is left out before the 1×1 convolution."""
    auxiliary_weight: float = 0.0
    """Weight of the loss of a second head, on layer3, in training; 0: no such head."""
    align_corners: bool = True
    """Scores are upsampled such that the corners' centres stay in place, not their edges."""

    def __post_init__(self) -> None:
        for name in ("channels", "convs", "dilation"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        require(0 <= self.dropout < 1, "dropout", self.dropout, "at least 0 and less than 1")
        weight = self.auxiliary_weight
        require(0 <= weight < math.inf, "auxiliary_weight", weight, "0 or positive")


@dataclass(frozen=True)
class InferenceConfig:
    """How an image is scored."""

    window: int = 0
    """Side of a sliding window in pixels, whose scores are averaged where windows overlap; 0: the
    whole image at once."""
    stride: int = 0
    """Pixels from one window to the next."""

    def __post_init__(self) -> None:
        require(self.window >= 0, "window", self.window, "0 or more")
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
