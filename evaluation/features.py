"""What evaluation compares, as maps of features: a run's networks, those that others trained, and
none at all.

Letters: B images, S their side in pixels, D features, h w cells.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evaluation.datasets.images import ImageSource, evaluation_size
from evaluation.networks import load_network, run_config, untrained_network
from model import SlotCon
from model.encoder import Encoder
from pipeline.augment import IMAGENET_MEAN, IMAGENET_STD
from pipeline.errors import UserError
from train.config import RunConfig
from train.run.checkpoint import check_weights
from train.weights import published_weights, read_backbone, read_weights

SPECS = ("teacher", "student", "projector", "untrained", "supervised", "timm:NAME", "pixels")
FEATURES_HELP = (
    "teacher, student: a run's encoders; projector: the teacher's, up to the projector; untrained: "
    "the run's encoder before training; supervised: torchvision's weights for the same ResNet "
    "(supervised:resnet18: for another); timm:NAME: any timm model (needs the extra [timm]); "
    "pixels: mean colours of blocks of 8×8 pixels"
)
TAKE_WEIGHTS = ("supervised", "timm:")
BLOCK = 8


class Features(Protocol):
    """A network, or none, that makes a map of features of an image."""

    name: str
    """What it is called in tables."""
    dim: int
    """D."""
    cosine: bool
    """Directions are what is compared, not distances."""

    def __call__(self, images: Tensor) -> Tensor:
        """Images [B, 3, S, S], ImageNet-normalised, on the network's device → [B, D, h, w]."""


class NetworkFeatures:
    """Features made by a function of images."""

    cosine = True

    def __init__(self, name: str, dim: int, function: Callable[[Tensor], Tensor]) -> None:
        self.name, self.dim, self.function = name, dim, function

    def __call__(self, images: Tensor) -> Tensor:
        with torch.inference_mode():
            return self.function(images).float()


class PixelFeatures:
    """Mean colours of blocks of 8×8 pixels, as normalised."""

    name, dim, cosine = "pixels", 3, False

    def __call__(self, images: Tensor) -> Tensor:
        height, width = (math.ceil(side / BLOCK) for side in images.shape[2:])
        return F.adaptive_avg_pool2d(images.contiguous(), (height, width))


def open_features(
    spec: str,
    checkpoint: Path | None,
    device: torch.device,
    *,
    weights: Path | None = None,
    images: ImageSource | None = None,
    size: int | None = None,
) -> Features:
    """The features that `spec`, one of SPECS, names, on `device`.

    Args:
        spec: see FEATURES_HELP.
        checkpoint: a run's folder or checkpoint, for the run's networks and their architecture.
        device: where the network goes.
        weights: file of weights for "supervised" and "timm:NAME" (their own where None: downloaded
            once, then from their cache).
        images, size: "untrained" only: images of which its BatchNorm takes its statistics, and
            the side at which it sees them.

    Raises:
        UserError: where something is missing or does not fit.
    """
    kind, _, argument = spec.partition(":")
    if weights is not None and not spec.startswith(TAKE_WEIGHTS):
        raise UserError(f"--weights is for supervised and timm:NAME, not for {spec}")
    if spec == "pixels":
        return PixelFeatures()
    if kind == "timm" and argument:
        return timm_features(argument, weights, device)
    if kind == "supervised":
        return supervised_features(spec, argument or architecture(checkpoint), weights, device)
    if spec not in ("teacher", "student", "projector", "untrained"):
        raise UserError(f"--features {spec}: must be one of {', '.join(SPECS)}")
    if checkpoint is None:
        raise UserError(f"--features {spec} needs --checkpoint")
    network, config = load_network(checkpoint, device)
    return run_features(spec, network, config, images, size, device)


def open_all(
    specs: Sequence[str],
    checkpoint: Path | None,
    device: torch.device,
    *,
    weights: Path | None,
    images: ImageSource,
    size: int,
) -> list[Features]:
    """`open_features` of each of `specs`; `weights` are for the one that takes a file. Raises
    UserError.
    """
    if weights and sum(spec.startswith(TAKE_WEIGHTS) for spec in specs) != 1:
        raise UserError("--weights needs exactly one of supervised and timm:NAME in --features")
    return [
        open_features(
            spec,
            checkpoint,
            device,
            weights=weights if spec.startswith(TAKE_WEIGHTS) else None,
            images=images,
            size=size,
        )
        for spec in specs
    ]


def run_features(
    spec: str,
    network: SlotCon,
    config: RunConfig,
    images: ImageSource | None,
    size: int | None,
    device: torch.device,
) -> Features:
    """Features "teacher", "student", "projector" or "untrained" of a run that is loaded."""
    if spec == "untrained":
        if images is None:
            raise ValueError("untrained features need images, for BatchNorm's statistics")
        size = size or evaluation_size(config.views.size)
        network = untrained_network(config.model, config.train.seed, images, size, device)
    if spec == "projector":
        teacher = network.teacher
        encode = nn.Sequential(teacher.encoder, teacher.projector).eval()
        return NetworkFeatures(spec, config.model.dim_out, encode)
    branch = network.student if spec == "student" else network.teacher
    return NetworkFeatures(spec, branch.encoder.dim, branch.encoder.eval())


def architecture(checkpoint: Path | None) -> str:
    """A run's encoder; ResNet-50 without a run."""
    if checkpoint is None:
        return "resnet50"
    return run_config(checkpoint).model.arch


def supervised_features(
    name: str, arch: str, weights: Path | None, device: torch.device
) -> Features:
    """A torchvision ResNet trained on ImageNet's labels (IMAGENET1K_V1, the usual recipe, unless
    `weights` are given), up to its last map.
    """
    try:
        encoder = Encoder(arch)
    except (ValueError, TypeError, AttributeError):  # unknown to torchvision, or not a ResNet
        raise UserError(f"--features supervised:{arch}: not a ResNet of torchvision's") from None
    encoder.load_state_dict(
        read_backbone(weights, arch).weights if weights else published_weights(arch)
    )
    return NetworkFeatures(name, encoder.dim, encoder.to(device).eval())


def timm_features(name: str, weights: Path | None, device: torch.device) -> Features:
    """The last map of a timm model, normed as before its head; a ViT's patch tokens laid out again.

    Images are resized to the nearest whole number of patches, and normalised as the model's own
    were.
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
        except TypeError:  # not a transformer: takes images of any size as it is
            model = create()
    except Exception as error:  # whatever its hub, its registry and its models raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"--features timm:{name}: {reason}") from None
    settings: dict[str, Any] = model.pretrained_cfg
    if weights is not None:
        heads = settings.get("classifier") or "head"
        heads = (heads,) if isinstance(heads, str) else tuple(heads)
        state = read_weights(weights)
        drop = tuple(f"{head}." for head in heads)
        load(model, {k: v for k, v in state.items() if not k.startswith(drop)}, weights)
    model = model.to(device).eval()
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", (1, 1))
    mean, std, own_mean, own_std = (
        torch.tensor(values, device=device)[:, None, None]
        for values in (IMAGENET_MEAN, IMAGENET_STD, settings["mean"], settings["std"])
    )

    def encode(images: Tensor) -> Tensor:
        sides = zip(images.shape[2:], patch, strict=True)
        whole = [max(round(side / step), 1) * step for side, step in sides]
        images = (images * std + mean - own_mean) / own_std
        if whole != list(images.shape[2:]):
            images = F.interpolate(images, whole, mode="bilinear", antialias=True)
        maps = model.forward_intermediates(
            images, indices=1, norm=True, output_fmt="NCHW", intermediates_only=True
        )
        return maps[-1]

    features = NetworkFeatures(f"timm:{name}", 0, encode)
    side = settings["input_size"][-1]
    features.dim = features(torch.zeros(1, 3, side, side, device=device)).shape[1]
    return features


def load(module: nn.Module, state: dict[str, Tensor], source: Path) -> None:
    """Load `state` into `module`, all of it. Raises UserError, in one line, unless it fits."""
    try:
        check_weights(state, module.state_dict())
    except ValueError as error:
        raise UserError(f"{source}: damaged, or of another model ({error})") from None
    module.load_state_dict(state)
