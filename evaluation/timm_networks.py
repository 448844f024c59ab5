"""Networks of timm, read at their stages: the blocks of a ViT, the levels of a pyramid.

Letters: B images, S their side in pixels, D features, h w cells.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evaluation.features import Network, in_one_line
from model.timm_encoder import create, padded, read_maps
from pipeline.augment import IMAGENET_MEAN, IMAGENET_STD
from pipeline.errors import UserError
from train.encoders import load_weights


class TimmMaps:
    """The maps of a timm model's stages."""

    def __init__(self, name: str, model: Any) -> None:
        self.name, self.model = name, model
        info = list(model.feature_info)
        kinds = [re.sub(r"\d", "", entry["module"]) for entry in info]
        self.first = int(len(info) > 1 and kinds[0] != kinds[1])
        """1 if timm's first level is the stem, which is no stage: so a ResNet's stages are its
        layers 1 to 4."""
        reductions = (int(entry["reduction"]) for entry in info[self.first :])
        self.strides = dict(enumerate(reductions, start=1))
        settings, device = model.pretrained_cfg, next(model.parameters()).device
        mean, std, own_mean, own_std = (
            torch.tensor(values, device=device)[:, None, None]
            for values in (IMAGENET_MEAN, IMAGENET_STD, settings["mean"], settings["std"])
        )
        self.scale, self.shift = std / own_std, (mean - own_mean) / own_std

    def __call__(self, images: Tensor, stages: Sequence[int]) -> list[Tensor]:
        """As `Network.maps`. Class and register tokens are left out; the last normalisation is that
        before the model's head.
        """
        images = padded(images * self.scale + self.shift, max(self.strides.values()))
        levels = [stage - 1 + self.first for stage in stages]
        with in_one_line(self.name, images):
            return read_maps(self.model, images, levels, norm=True)


def create_timm(
    name: str, *, weights: Path | None, pretrained: bool, output_stride: int | None
) -> Any:
    """timm's model `name` in eval mode, without a classifier: with `weights` from a file, or those
    that timm downloads, or new ones from torch's generator. Raises UserError.
    """
    spec = f"timm:{name}"
    try:
        model = create(name, pretrained=pretrained, output_stride=output_stride)
    except ValueError as error:
        raise UserError(f"--features {spec}: {error}") from None
    if not hasattr(model, "forward_intermediates") or not getattr(model, "feature_info", None):
        raise UserError(f"--features {spec}: timm gives no maps of its stages")
    if weights is not None:
        load_weights(model, weights)
    return model.eval()


def timm_network(name: str, model: Any) -> Network:
    """The network that `create_timm` made. Raises UserError if it has no known stages."""
    maps = TimmMaps(name, model)
    return Network(name, maps, maps.strides)
