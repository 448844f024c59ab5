"""Mask R-CNN with a feature pyramid (He et al. 2017, Lin et al. 2017), built from torchvision's
parts. The shape is the authors' setting: norms in the pyramid and in both heads; four convolutions
and one fully connected layer in the box head; nothing frozen.

The published figures come from detectron2. Its values are used for the numbers of anchors and
proposals, thresholds, weights of the box deltas, adaptive sampling of regions and initial weights.
torchvision's parts differ from detectron2 as follows:
- The box losses are smooth L1 with β = 1/9 (there L1).
- Anchors are rounded to whole pixels.
- RoIAlign reads maps and masks without the half-pixel shift of its aligned form. `HALF_PIXEL`
  corrects this for the masks.
- The targets of the mask loss lie between 0 and 1 (there they are 0 or 1).

Letters: B images, h w height and width of the network's input, N objects of an image, D detections
of an image, C classes, M = 28 the side of a predicted mask.
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
from torchvision.models.detection.roi_heads import RoIHeads, maskrcnn_loss
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.poolers import initLevelMapper

from model.encoder import Encoder
from pipeline.augment import IMAGENET_MEAN, IMAGENET_STD
from pipeline.errors import UserError
from transfer.detection.config import ModelConfig

STRIDE = 64
"""Pixels per cell of the coarsest map. Images are padded to multiples of it, because torchvision
computes the distance of a level's anchors as side / cells.
"""
BOX_SIDE, MASK_SIDE = 7, 14
"""Bins of a region in each direction, for the box head and the mask head."""
LEVELS = ["layer1", "layer2", "layer3", "layer4"]
HALF_PIXEL = 0.5
"""Pixels of the network's input by which a predicted mask lies right of and below its box."""


class Detector(nn.Module):
    """A detector of C classes on an encoder. All stages of the encoder feed the pyramid."""

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
                B dicts of boxes float32 [N, 4], x1 y1 x2 y2 in pixels, labels int64 [N], 1 … C, N ≥
                1; and if it learns masks, masks uint8 [N, h, w] and masked bool [N], whether an
                object has one.

        Returns:
            Scalars, whose sum is the loss; or B dicts of boxes [D, 4], labels [D], scores [D],
            the best first, and if it learns masks, masks [D, 1, M, M], the probability that a cell
            of the box belongs to the object.

        Raises:
            UserError: in evaluation mode, if a map is not finite. torchvision would find nothing.
        """
        images = _normalised(batch["images"])
        features = self.backbone(images.tensors)
        if not self.training and not all(bool(m.isfinite().all()) for m in features.values()):
            raise UserError("the detector's maps have NaN or infinite values")
        targets = batch["targets"] if self.training else None
        proposals, proposal_losses = self.rpn(images, features, targets)
        detections, losses = self.roi_heads(features, proposals, images.image_sizes, targets)
        return {**proposal_losses, **losses} if self.training else detections


class Heads(RoIHeads):
    """torchvision's heads. Objects without a mask train the box head; the mask loss leaves them
    out.
    """

    def has_mask(self) -> bool:
        """False in training, so that torchvision computes no mask loss."""
        return not self.training and self.mask_head is not None

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """See torchvision."""
        found, losses = super().forward(features, proposals, image_shapes, targets)
        if targets is not None and self.mask_head is not None:
            losses["loss_mask"] = self._mask_loss(features, image_shapes, targets)
        return found, losses

    def select_training_samples(
        self, proposals: list[Tensor], targets: list[dict[str, Tensor]] | None
    ) -> tuple[list[Tensor], ...]:
        """See torchvision. Keeps the regions, the object of each and its label for the masks."""
        samples: tuple[list[Tensor], ...] = super().select_training_samples(proposals, targets)
        self._samples = samples[:3]
        return samples

    def _mask_loss(
        self,
        features: dict[str, Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]],
    ) -> Tensor:
        regions, objects, labels = self._samples
        masked = [t["masked"][o] for t, o in zip(targets, objects, strict=True)]
        rows = [torch.where((n > 0) & m)[0] for n, m in zip(labels, masked, strict=True)]
        none = not sum(map(len, rows))
        if none:  # the head still runs, because other processes wait for its norms and gradients
            rows = [torch.where(n > 0)[0] for n in labels]
        regions = [each[row] for each, row in zip(regions, rows, strict=True)]
        objects = [each[row] for each, row in zip(objects, rows, strict=True)]
        pooled = self.mask_roi_pool(features, regions, image_shapes)
        logits: Tensor = self.mask_predictor(self.mask_head(pooled))
        if none:
            return logits.sum() * 0
        masks, labels = ([t[name] for t in targets] for name in ("masks", "labels"))
        loss: Tensor = maskrcnn_loss(logits, regions, masks, labels, objects)
        return loss


def _normalised(images: list[Tensor]) -> ImageList:
    """Normalise by ImageNet's mean and deviation, then pad with zeros to one size, a multiple of
    STRIDE.
    """
    device = images[0].device
    mean, std = (
        torch.tensor(v, device=device)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD)
    )
    sizes = [(image.shape[1], image.shape[2]) for image in images]
    height, width = (-(-max(side) // STRIDE) * STRIDE for side in zip(*sizes, strict=True))
    canvas = torch.zeros(len(images), 3, height, width, device=device)
    for padded, image, (h, w) in zip(canvas, images, sizes, strict=True):
        padded[:, :h, :w] = (image / 255 - mean) / std
    return ImageList(canvas, sizes)


def _pyramid(encoder: Encoder, channels: int) -> BackboneWithFPN:
    """[B, 3, h, w] → dict of five maps [B, channels, …] at 1/4, 1/8, … 1/64 of the size."""
    dims = list(encoder.stage_dims.values())
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


def _heads(classes: int, config: ModelConfig) -> Heads:
    channels, points = config.channels, config.roi_points
    box_head = FastRCNNConvFCHead(
        (channels, BOX_SIDE, BOX_SIDE),
        [channels] * config.box_convs,
        [config.box_features],
        norm_layer=nn.BatchNorm2d,
    )
    predictor = FastRCNNPredictor(config.box_features, classes)
    masks: dict[str, nn.Module] = {}
    if config.masks:
        masks["mask_roi_pool"] = _regions(MASK_SIDE, points)
        masks["mask_head"] = MaskRCNNHeads(
            channels, [channels] * config.mask_convs, 1, nn.BatchNorm2d
        )
        masks["mask_predictor"] = MaskRCNNPredictor(channels, channels, classes)
    heads = Heads(
        _regions(BOX_SIDE, points),
        box_head,
        predictor,
        fg_iou_thresh=0.5,
        bg_iou_thresh=0.5,
        batch_size_per_image=config.roi_samples,
        positive_fraction=0.25,
        bbox_reg_weights=(10.0, 10.0, 5.0, 5.0),
        score_thresh=config.score_threshold,
        nms_thresh=0.5,
        detections_per_img=config.detections,
        **masks,
    )
    _initialise(heads)
    return heads


def _regions(side: int, points: int) -> MultiScaleRoIAlign:
    """Reads regions of the pyramid's maps in side × side bins.

    The maps' scales are set here. torchvision would guess them once from the first batch, and would
    double them if padding makes an image more than √2 times as large.
    """
    pool = MultiScaleRoIAlign(LEVELS, side, points)
    pool.scales = [1 / 4, 1 / 8, 1 / 16, 1 / 32]
    pool.map_levels = initLevelMapper(2, 5, pool.canonical_scale, pool.canonical_level)
    return pool


def _initialise(heads: Heads) -> None:
    """Draw detectron2's initial weights where torchvision's differ."""
    for layer in heads.box_head:
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_uniform_(layer.weight, a=1)
            nn.init.zeros_(layer.bias)
    last = [(heads.box_predictor.cls_score, 0.01), (heads.box_predictor.bbox_pred, 0.001)]
    if heads.mask_predictor is not None:
        last.append((heads.mask_predictor.mask_fcn_logits, 0.001))
        nn.init.zeros_(heads.mask_predictor.conv5_mask.bias)
    for layer, deviation in last:
        nn.init.normal_(layer.weight, std=deviation)
        nn.init.zeros_(layer.bias)


def _before_boxes(detector: Detector) -> Iterator[nn.Module]:
    """The parts whose outputs become coordinates, scores or losses. These need float32: bfloat16
    rounds coordinates above 256 to steps of two pixels or more, and torchvision gives anchors the
    type of the maps.
    """
    yield detector.backbone
    yield detector.rpn.head
    yield detector.roi_heads.box_predictor
    if detector.roi_heads.mask_predictor is not None:
        yield detector.roi_heads.mask_predictor


def _in_float32(module: nn.Module, inputs: Any, output: Any) -> Any:
    """A forward hook."""
    return convert_to_fp32(output)
