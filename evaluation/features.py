"""Maps of features to compare: from networks of a run, from networks trained by others, and from
plain pixels.

Letters: B images, S their side in pixels, D features, h w cells.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evaluation.datasets.squares import SquareImages
from evaluation.networks import load_network, run_config, untrained_network
from model import SlotCon
from model.encoder import Encoder
from pipeline.augment import IMAGENET_MEAN, IMAGENET_STD
from pipeline.errors import UserError
from train.config import RunConfig
from train.run.checkpoint import check_weights
from train.weights import published_weights, read_backbone, read_weights

SPECS = ("teacher", "student", "projector", "untrained", "supervised", "timm:NAME", "pixels")
TAKE_WEIGHTS = ("supervised", "timm:")
BLOCK = 8


@dataclass(frozen=True)
class Features:
    """Turns images into maps of features."""

    name: str
    """Name in tables."""
    function: Callable[[Tensor], Tensor]
    cosine: bool = True
    """k-means compares directions of features; otherwise distances."""

    def __call__(self, images: Tensor) -> Tensor:
        """Images [B, 3, S, S], ImageNet-normalised, on the network's device → [B, D, h, w]. Raises
        UserError if a feature is NaN or infinite: it would be nearest to nothing, or to everything.
        """
        with torch.inference_mode():
            features = self.function(images).float()
            if not bool(features.isfinite().all()):
                raise UserError(f"{self.name}: features with NaN or infinite values")
        return features


def block_means(images: Tensor) -> Tensor:
    """Mean colours of blocks of 8×8 pixels: [B, 3, S, S] → [B, 3, ⌈S/8⌉, ⌈S/8⌉]."""
    height, width = (math.ceil(side / BLOCK) for side in images.shape[2:])
    return F.adaptive_avg_pool2d(images.contiguous(), (height, width))


def open_features(
    spec: str,
    checkpoint: Path | None,
    device: torch.device,
    *,
    weights: Path | None = None,
    images: SquareImages | None = None,
) -> Features:
    """The features that `spec` names.

    Args:
        spec: one of SPECS; FEATURES_HELP describes them.
        checkpoint: a run folder or a checkpoint, for the run's networks and their architecture.
        device: device of the network.
        weights: file of weights for "supervised" and "timm:NAME". None: the published weights,
            downloaded once, later from the cache.
        images: only for "untrained": images that calibrate its BatchNorm.

    Raises:
        UserError: if something is missing or does not fit.
    """
    kind, _, argument = spec.partition(":")
    if weights is not None and not spec.startswith(TAKE_WEIGHTS):
        raise UserError(f"--weights is for supervised and timm:NAME, not for {spec}")
    if spec == "pixels":
        return Features("pixels", block_means, cosine=False)
    if kind == "timm" and argument:
        return timm_features(argument, weights, device)
    if kind == "supervised":
        return supervised_features(spec, argument or architecture(checkpoint), weights, device)
    if spec not in ("teacher", "student", "projector", "untrained"):
        raise UserError(f"--features {spec}: must be one of {', '.join(SPECS)}")
    if checkpoint is None:
        raise UserError(f"--features {spec} needs --checkpoint")
    network, config = load_network(checkpoint, device)
    return run_features(spec, network, config, images)


def open_all(
    specs: Sequence[str], checkpoint: Path | None, weights: Path | None, images: SquareImages
) -> list[Features]:
    """`open_features` for each of `specs`; `weights` go to the spec that takes a file. Raises
    UserError.
    """
    takes = [spec.startswith(TAKE_WEIGHTS) for spec in specs]
    if weights and sum(takes) != 1:
        raise UserError("--weights needs exactly one of supervised and timm:NAME in --features")
    return [
        open_features(
            spec, checkpoint, images.device, weights=weights if take else None, images=images
        )
        for spec, take in zip(specs, takes, strict=True)
    ]


def run_features(
    spec: str, network: SlotCon, config: RunConfig, images: SquareImages | None
) -> Features:
    """Features "teacher", "student", "projector" or "untrained" of a run that is loaded."""
    if spec == "untrained":
        if images is None:
            raise ValueError("untrained features need images, for BatchNorm's statistics")
        network = untrained_network(config.model, config.train.seed, images)
    if spec == "projector":
        teacher = network.teacher
        encode = nn.Sequential(teacher.encoder, teacher.projector).eval()
        return Features(spec, encode)
    branch = network.student if spec == "student" else network.teacher
    return Features(spec, branch.encoder.eval())


def architecture(checkpoint: Path | None) -> str:
    """The architecture of a run's encoder; ResNet-50 without a run."""
    if checkpoint is None:
        return "resnet50"
    return run_config(checkpoint).model.arch


def supervised_features(
    name: str, arch: str, weights: Path | None, device: torch.device
) -> Features:
    """The last map of a torchvision ResNet trained on ImageNet's labels (IMAGENET1K_V1, the usual
    recipe, unless `weights` are given).
    """
    try:
        encoder = Encoder(arch)
    except (ValueError, TypeError, AttributeError):  # unknown to torchvision, or not a ResNet
        raise UserError(f"--features supervised:{arch}: not a ResNet of torchvision's") from None
    encoder.load_state_dict(
        read_backbone(weights, arch).weights if weights else published_weights(arch)
    )
    return Features(name, encoder.to(device).eval())


def timm_features(name: str, weights: Path | None, device: torch.device) -> Features:
    """The last map of a timm model, after the normalisation before its head. The patch tokens of a
    ViT are arranged as a map.

    Images are resized to the nearest whole number of patches and normalised as in the model's
    training.
    """
    try:
        import timm
    except ImportError:
        raise UserError(f"--features timm:{name} needs timm (pip install .[timm])") from None

    def create(**options: Any) -> Any:
        return timm.create_model(name, pretrained=weights is None, num_classes=0, **options)

    try:
        try:
            model = create(dynamic_img_size=True)
        except TypeError:  # not a transformer: accepts images of any size anyway
            model = create()
    except Exception as error:  # timm's hub, registry and models raise many types
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"--features timm:{name}: {reason}") from None
    settings: dict[str, Any] = model.pretrained_cfg
    if weights is not None:
        heads = settings.get("classifier") or "head"
        heads = (heads,) if isinstance(heads, str) else tuple(heads)
        state = read_weights(weights, model.state_dict())
        drop = tuple(f"{head}." for head in heads)
        load(model, {k: v for k, v in state.items() if not k.startswith(drop)}, weights)
    model = model.to(device).eval()
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", (1, 1))
    mean, std, timm_mean, timm_std = (
        torch.tensor(values, device=device)[:, None, None]
        for values in (IMAGENET_MEAN, IMAGENET_STD, settings["mean"], settings["std"])
    )

    def encode(images: Tensor) -> Tensor:
        sides = zip(images.shape[2:], patch, strict=True)
        whole = [max(round(side / step), 1) * step for side, step in sides]
        images = (images * std + mean - timm_mean) / timm_std
        if whole != list(images.shape[2:]):
            images = F.interpolate(images, whole, mode="bilinear", antialias=True)
        maps = model.forward_intermediates(
            images, indices=1, norm=True, output_fmt="NCHW", intermediates_only=True
        )
        return maps[-1]

    return Features(f"timm:{name}", encode)


def load(module: nn.Module, state: dict[str, Tensor], source: Path) -> None:
    """Load all of `state` into `module`. Raises UserError, in one line, unless it fits exactly."""
    try:
        check_weights(state, module.state_dict())
    except ValueError as error:
        raise UserError(f"{source}: damaged, or of another model ({error})") from None
    module.load_state_dict(state)
