"""Networks of timm, read at their stages: the blocks of a ViT, the levels of a pyramid.

Letters: B images, S their side in pixels, D features, h w cells.
"""

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evaluation.features import Network
from pipeline.augment import IMAGENET_MEAN, IMAGENET_STD
from pipeline.errors import UserError
from train.run.checkpoint import check_weights
from train.weights import read_weights

SIZES: tuple[dict[str, Any], ...] = ({"dynamic_img_size": True}, {"strict_img_size": False}, {})
"""How a model is told to take images of any size: ViTs (positions are interpolated), Swin, others,
which need not be told."""


class TimmMaps:
    """The maps of a timm model's stages."""

    def __init__(self, name: str, model: Any) -> None:
        self.name, self.model = name, model
        info = list(model.feature_info)
        kinds = [re.sub(r"\d", "", entry["module"]) for entry in info]
        self.first = int(len(info) > 1 and kinds[0] != kinds[1])
        """1 if timm's first level is the stem, which is no stage: so a ResNet's stages are its
        layers 1 to 4."""
        self.strides = [int(entry["reduction"]) for entry in info[self.first :]]
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
        images = padded(images * self.scale + self.shift, max(self.strides))
        try:
            maps: list[Tensor] = self.model.forward_intermediates(
                images,
                indices=[stage - 1 + self.first for stage in sorted(stages)],
                norm=True,
                stop_early=True,
                output_fmt="NCHW",
                intermediates_only=True,
            )
        except torch.OutOfMemoryError:
            raise
        except (AssertionError, RuntimeError, ValueError) as error:
            side = "×".join(map(str, images.shape[2:]))
            raise UserError(
                f"{self.name} on images of {side} pixels: {first_line(error)}"
            ) from None
        return [maps[sorted(stages).index(stage)] for stage in stages]


def padded(images: Tensor, step: int) -> Tensor:
    """Images [B, 3, S, S] with both sides a multiple of `step`: zeros are added on all sides, so
    that the map stays centred on the image (as DINOv2's CenterPadding).
    """
    missing = [-side % step for side in images.shape[2:]]
    if not any(missing):
        return images
    top, left = (amount // 2 for amount in missing)
    return F.pad(images, (left, missing[1] - left, top, missing[0] - top))


def create_timm(
    name: str, *, weights: Path | None, pretrained: bool, output_stride: int | None
) -> Any:
    """timm's model `name` in eval mode, without a classifier: with `weights` from a file, or those
    that timm downloads, or new ones from torch's generator. Raises UserError.
    """
    spec = f"timm:{name}"
    try:
        import timm
    except ImportError:
        raise UserError(f"--features {spec} needs timm (pip install .[timm])") from None
    dilation: dict[str, Any] = {} if output_stride is None else {"output_stride": output_stride}
    model, refusal = None, None
    for size in SIZES:
        try:
            model = timm.create_model(name, pretrained, num_classes=0, **size, **dilation)
            break
        except TypeError as error:  # it has no such option
            refusal = first_line(error)
        except Exception as error:  # timm's hub, registry and models raise many types
            raise UserError(f"--features {spec}: {first_line(error)}") from None
    if model is None and dilation:
        raise UserError(f"--output-stride {output_stride}: {spec} cannot be dilated")
    if model is None:
        raise UserError(f"--features {spec}: {refusal}")
    if not hasattr(model, "forward_intermediates") or not getattr(model, "feature_info", None):
        raise UserError(f"--features {spec}: timm gives no maps of its stages")
    if weights is not None:
        load_weights(model, weights)
    return model.eval()


def load_weights(model: Any, path: Path) -> None:
    """Load a file of the model's weights: under timm's names, or under those of a release that
    timm's own model converts, such as DINOv2's. Its classifier is left out, its positions are
    interpolated. Raises UserError.
    """
    state = stored = read_weights(path, model.state_dict())
    module = sys.modules[type(model).__module__]
    if convert := getattr(module, "checkpoint_filter_fn", None):
        try:
            state = convert(dict(stored), model)
        except Exception as error:  # it expects its model's weights
            raise UserError(f"{path}: of another model ({first_line(error)})") from None
    for name, value in state.items():  # timm also resizes patches, which makes another model
        if name in stored and "pos_embed" not in name and value.shape != stored[name].shape:
            shape = list(stored[name].shape)
            raise UserError(f"{path}: of another model ({name} has shape {shape})")
    heads = model.pretrained_cfg.get("classifier") or "head"
    heads = (heads,) if isinstance(heads, str) else tuple(heads)
    drop = tuple(f"{head}." for head in heads)
    load(model, {name: v for name, v in state.items() if not name.startswith(drop)}, path)


def load(module: nn.Module, state: dict[str, Tensor], source: Path) -> None:
    """Load all of `state` into `module`. Raises UserError, in one line, unless it fits exactly."""
    try:
        check_weights(state, module.state_dict())
    except ValueError as error:
        raise UserError(f"{source}: damaged, or of another model ({error})") from None
    module.load_state_dict(state)


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def timm_network(name: str, model: Any) -> Network:
    """The network that `create_timm` made. Raises UserError if it has no known stages."""
    maps = TimmMaps(name, model)
    return Network(name, maps, maps.strides)
