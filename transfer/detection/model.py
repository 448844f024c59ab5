"""Mask R-CNN with a feature pyramid (He et al. 2017, Lin et al. 2017), of torchvision's parts, in
the shape of the authors' setting: norms in the pyramid and in both heads, four convolutions and one
fully connected layer in the box head, nothing frozen.

What can be set is set as in detectron2, which the published figures come from: numbers of anchors
and proposals, thresholds, weights of the box deltas, adaptive sampling of regions, initial weights.
What torchvision's parts do otherwise: the box losses are smooth L1 with β = 1/9 (there L1);
anchors are rounded to whole pixels; regions are read without the half-pixel shift of aligned
RoIAlign, from the maps and from the masks, which `HALF_PIXEL` makes good for the masks; the targets
of the mask loss lie between 0 and 1 (there they are 0 or 1).

Letters: B images, h w an image's height and width as the network sees it, N objects of an image,
D detections of it, C classes, M = 28 the side of a predicted mask.
"""

from collections.abc import Iterator
from typing import Any

import torch
from accelerate.utils import convert_to_fp32
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.poolers import initLevelMapper

from model.encoder import Encoder
from pipeline.augment import IMAGENET_MEAN, IMAGENET_STD
from transfer.detection.config import ModelConfig

STRIDE = 64
"""Pixels of a cell of the coarsest map. Sides are padded to whole ones: torchvision takes a level's
anchors to be as far apart as the side divided by its cells."""
BOX_SIDE, MASK_SIDE = 7, 14
"""Bins of a region in each direction, as the heads see it."""
LEVELS = ["layer1", "layer2", "layer3", "layer4"]
HALF_PIXEL = 0.5
"""How far right and down of its box, in pixels of the network's input, a predicted mask lies."""


class Detector(nn.Module):
    """A detector of C classes on an encoder, all of whose stages feed the pyramid."""

    def __init__(self, encoder: Encoder, num_classes: int, config: ModelConfig) -> None:
        super().__init__()
        self.backbone = _pyramid(encoder, config.channels)
        self.rpn = _proposals(config)
        self.roi_heads = _heads(num_classes + 1, config)  # class 0 is the background
        for part in _before_boxes(self):
            part.register_forward_hook(_in_float32)

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Losses by name in training mode, detections of each image in evaluation mode.

        Args:
            batch: "images", a list of B uint8 [3, h, w] RGB, and for training "targets", a list of
                B dicts of boxes float32 [N, 4], x1 y1 x2 y2 in pixels, labels int64 [N], 1 … C, and
                masks uint8 [N, h, w], N ≥ 1.

        Returns:
            Scalars, of which the loss is the sum; or B dicts of boxes [D, 4], labels [D], scores
            [D], the best first, and masks [D, 1, M, M], how likely each cell of the box is the
            object's.
        """
        images = _normalised(batch["images"])
        features = self.backbone(images.tensors)
        targets = batch["targets"] if self.training else None
        proposals, proposal_losses = self.rpn(images, features, targets)
        detections, losses = self.roi_heads(features, proposals, images.image_sizes, targets)
        return {**proposal_losses, **losses} if self.training else detections


def _normalised(images: list[Tensor]) -> ImageList:
    """With ImageNet's mean and deviation, then padded with zeros to one size of whole strides."""
    device = images[0].device
    mean, std = (
        torch.tensor(v, device=device)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD)
    )
    sizes = [(image.shape[1], image.shape[2]) for image in images]
    height, width = (-(-max(side) // STRIDE) * STRIDE for side in zip(*sizes, strict=True))
    canvas = torch.zeros(len(images), 3, height, width, device=device)
    for place, image, (h, w) in zip(canvas, images, sizes, strict=True):
        place[:, :h, :w] = (image / 255 - mean) / std
    return ImageList(canvas, sizes)


def _pyramid(encoder: Encoder, channels: int) -> BackboneWithFPN:
    """[B, 3, h, w] → dict of five maps [B, channels, …] of 1/4, 1/8, … 1/64 of the size."""
    dims = [encoder.stage_dims[name] for name in LEVELS]
    return BackboneWithFPN(
        encoder, {name: name for name in LEVELS}, dims, channels, norm_layer=nn.BatchNorm2d
    )


def _proposals(config: ModelConfig) -> RegionProposalNetwork:
    sizes = tuple((size,) for size in config.anchor_sizes)
    anchors = AnchorGenerator(sizes, (config.aspect_ratios,) * len(sizes))
    return RegionProposalNetwork(
        anchors,
        RPNHead(config.channels, len(config.aspect_ratios)),
        fg_iou_thresh=0.7,
        bg_iou_thresh=0.3,
        batch_size_per_image=config.rpn_samples,
        positive_fraction=0.5,
        pre_nms_top_n={"training": config.candidates_train, "testing": config.candidates_test},
        post_nms_top_n={"training": config.proposals_train, "testing": config.proposals_test},
        nms_thresh=0.7,
    )


def _heads(classes: int, config: ModelConfig) -> RoIHeads:
    channels, points = config.channels, config.roi_points
    box_head = FastRCNNConvFCHead(
        (channels, BOX_SIDE, BOX_SIDE),
        [channels] * config.box_convs,
        [config.box_features],
        norm_layer=nn.BatchNorm2d,
    )
    heads = RoIHeads(
        _regions(BOX_SIDE, points),
        box_head,
        FastRCNNPredictor(config.box_features, classes),
        fg_iou_thresh=0.5,
        bg_iou_thresh=0.5,
        batch_size_per_image=config.roi_samples,
        positive_fraction=0.25,
        bbox_reg_weights=(10.0, 10.0, 5.0, 5.0),
        score_thresh=config.score_threshold,
        nms_thresh=0.5,
        detections_per_img=config.detections,
        mask_roi_pool=_regions(MASK_SIDE, points),
        mask_head=MaskRCNNHeads(channels, [channels] * config.mask_convs, 1, nn.BatchNorm2d),
        mask_predictor=MaskRCNNPredictor(channels, channels, classes),
    )
    _initialise(heads)
    return heads


def _regions(side: int, points: int) -> MultiScaleRoIAlign:
    """Regions of the pyramid's maps, of side × side bins.

    torchvision would guess the maps' scales from the first images that it sees, for good, and
    double them where padding makes an image more than √2 times as large.
    """
    pool = MultiScaleRoIAlign(LEVELS, side, points)
    pool.scales = [1 / 4, 1 / 8, 1 / 16, 1 / 32]
    pool.map_levels = initLevelMapper(2, 5, pool.canonical_scale, pool.canonical_level)
    return pool


def _initialise(heads: RoIHeads) -> None:
    """Where torchvision draws other first weights than detectron2."""
    for layer in heads.box_head:
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_uniform_(layer.weight, a=1)
            nn.init.zeros_(layer.bias)
    last = (
        (heads.box_predictor.cls_score, 0.01),
        (heads.box_predictor.bbox_pred, 0.001),
        (heads.mask_predictor.mask_fcn_logits, 0.001),
    )
    for layer, deviation in last:
        nn.init.normal_(layer.weight, std=deviation)
        nn.init.zeros_(layer.bias)
    nn.init.zeros_(heads.mask_predictor.conv5_mask.bias)


def _before_boxes(detector: Detector) -> Iterator[nn.Module]:
    """The parts whose outputs are computed with as coordinates, scores or losses. bfloat16 knows
    pixels beyond 256 to two or more only, and torchvision gives anchors the type of the maps.
    """
    yield detector.backbone
    yield detector.rpn.head
    yield detector.roi_heads.box_predictor
    yield detector.roi_heads.mask_predictor


def _in_float32(module: nn.Module, inputs: Any, output: Any) -> Any:
    """A forward hook."""
    return convert_to_fp32(output)
