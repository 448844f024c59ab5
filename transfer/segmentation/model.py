"""FCN on a dilated ResNet (arXiv 1411.4038), or a linear classifier of the ResNet's cells.

Letters: B images, C classes, D channels, H W an image's height and width, h w cells.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evaluation.datasets.label_maps import VOID
from evaluation.datasets.squares import normalise
from model.encoder import AnyEncoder, dilate
from transfer.segmentation.config import ModelConfig

AUXILIARY_STAGE, AUXILIARY_CHANNELS, AUXILIARY_DROPOUT = 3, 256, 0.1
"""As in mmsegmentation, with one convolution."""


class FCN(nn.Module):
    """An encoder (from `transfer.backbone`) and a head that scores each pixel."""

    def __init__(self, encoder: AnyEncoder, num_classes: int, config: ModelConfig) -> None:
        super().__init__()
        stride = config.output_stride
        self.encoder = encoder if stride is None else dilate(encoder, stride)
        self.align_corners = config.align_corners
        self.head = build_head(encoder.dim, num_classes, config)
        self.auxiliary_weight = config.auxiliary_weight
        self.auxiliary: nn.Module | None = None
        if config.auxiliary_weight:
            dim = encoder.stage_dims[AUXILIARY_STAGE]
            self.auxiliary = FCNHead(
                dim, num_classes, AUXILIARY_CHANNELS, 1, dropout=AUXILIARY_DROPOUT
            )

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """{"pixels": uint8 [B, H, W, 3], "labels": uint8 [B, H, W]} → scalar losses: "seg", and
        "auxiliary", already times its weight, if there is an auxiliary head.
        """
        images = normalise(batch["pixels"])
        last, middle = self._maps(images)
        losses = {"seg": self._loss(self.head(last), batch["labels"])}
        if self.auxiliary is not None:
            loss = self._loss(self.auxiliary(middle), batch["labels"])
            losses["auxiliary"] = self.auxiliary_weight * loss
        return losses

    def scores(self, pixels: Tensor) -> Tensor:
        """uint8 [B, H, W, 3] → logits float32 [B, C, H, W]."""
        images = normalise(pixels)
        return self._upsampled(self.head(self._maps(images)[0]), images.shape[2:])

    def _maps(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """[B, 3, H, W] → the last map [B, D, h, w], and the map for the auxiliary head."""
        middle, last = self.encoder.maps(images, [AUXILIARY_STAGE, 4])
        return last, middle

    def _upsampled(self, logits: Tensor, size: torch.Size) -> Tensor:
        """Scores of the pixels, without those that the encoder has added around the image."""
        step = self.encoder.step
        whole = [-(-side // step) * step for side in size]
        top, left = ((side - inner) // 2 for side, inner in zip(whole, size, strict=True))
        upsampled = F.interpolate(
            logits.float(), whole, mode="bilinear", align_corners=self.align_corners
        )
        return upsampled[..., top : top + size[0], left : left + size[1]]

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy over all pixels: a void pixel adds 0 to the sum, but counts."""
        upsampled = self._upsampled(logits, labels.shape[1:])
        total = F.cross_entropy(upsampled, labels.long(), ignore_index=VOID, reduction="sum")
        return total / labels.numel()


class FCNHead(nn.Module):
    """[B, D, h, w] → logits [B, C, h, w]."""

    def __init__(
        self,
        dim: int,
        num_classes: int,
        channels: int,
        convs: int,
        *,
        dilation: int = 1,
        concat: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        widths = [dim] + [channels] * convs
        self.convs = nn.Sequential(*(conv_norm_relu(a, b, dilation) for a, b in pairwise(widths)))
        self.concat = conv_norm_relu(dim + channels, channels) if concat else None
        self.classify = nn.Sequential(nn.Dropout2d(dropout), classifier(channels, num_classes))

    def forward(self, features: Tensor) -> Tensor:
        hidden = self.convs(features)
        if self.concat is not None:
            hidden = self.concat(torch.cat([features, hidden], dim=1))
        logits: Tensor = self.classify(hidden)
        return logits


def build_head(dim: int, num_classes: int, config: ModelConfig) -> nn.Module:
    """[B, D, h, w] → logits [B, C, h, w], D = `dim`."""
    if config.head == "linear":
        norm = nn.BatchNorm2d(dim, affine=False)
        return nn.Sequential(norm, nn.Dropout2d(config.dropout), classifier(dim, num_classes))
    return FCNHead(
        dim,
        num_classes,
        config.channels,
        config.convs,
        dilation=config.dilation,
        concat=config.concat,
        dropout=config.dropout,
    )


def conv_norm_relu(inputs: int, outputs: int, dilation: int = 1) -> nn.Sequential:
    """A 3×3 convolution that keeps the size, BatchNorm and ReLU. Initial weights are drawn from a
    normal distribution with standard deviation √(2/(9·outputs)).
    """
    conv = nn.Conv2d(inputs, outputs, 3, padding=dilation, dilation=dilation, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


def classifier(dim: int, num_classes: int) -> nn.Conv2d:
    """A 1×1 convolution. Initial weights are drawn from a normal distribution with standard
    deviation 0.01; biases are 0.
    """
    conv = nn.Conv2d(dim, num_classes, 1)
    nn.init.normal_(conv.weight, std=0.01)
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
    return conv
