"""The weights that libraries publish, trained on ImageNet's labels; each is downloaded once."""

from collections.abc import Mapping
from typing import Any

import torchvision
from torch import Tensor

from model.architectures import is_timm, timm_name
from model.hub import fails_at_once
from model.names import resnets_in
from model.timm_encoder import create
from pipeline.errors import UserError, printable
from train.weights import fitting


def published(library: str, arch: str) -> dict[str, Tensor]:
    """The weights that "torchvision" or "timm" publishes for an encoder. Raises UserError."""
    if library == "torchvision" and is_timm(arch):
        raise UserError(f"torchvision has no weights of {arch}; use timm, or a file")
    if library == "torchvision":
        return published_weights(arch)
    return published_encoder(arch) if is_timm(arch) else timm_weights(arch)


def published_weights(arch: str) -> dict[str, Tensor]:
    """The backbone that torchvision publishes, trained on ImageNet's labels (IMAGENET1K_V1).

    Downloads it, unless torchvision's cache has it. Raises UserError.
    """
    source = torchvision.models.get_model_weights(arch)["IMAGENET1K_V1"]
    try:
        state = source.get_state_dict(progress=True, check_hash=True)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"{source.url} cannot be downloaded ({error}): get it elsewhere and give its file"
        ) from None
    return fitting(_resnet(state), arch, source.url)


def timm_weights(arch: str) -> dict[str, Tensor]:
    """The backbone that timm publishes under this name by default.

    Downloads it, unless the cache of Hugging Face's hub has it. Raises UserError.
    """
    try:
        import timm
    except ImportError:
        raise UserError("weights of timm need timm (pip install .[timm])") from None
    try:
        with fails_at_once():
            state = timm.create_model(arch, pretrained=True).state_dict()
    except Exception as error:  # timm's hub and registry raise many types
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"timm's weights of {arch} cannot be loaded ({printable(reason)}): get them elsewhere "
            "and give their file"
        ) from None
    return fitting(_resnet(state), arch, f"timm's weights of {arch}")


def published_encoder(arch: str) -> dict[str, Any]:
    """The weights that timm publishes for timm:NAME, by its names, without the classifier.
    Downloads them, unless the cache of Hugging Face's hub has them. Raises UserError.
    """
    try:
        net = create(timm_name(arch), pretrained=True)
    except ValueError as error:
        raise UserError(
            f"{arch} cannot be downloaded ({error}): get it elsewhere and give its file"
        ) from None
    state: dict[str, Any] = net.state_dict()
    return state


def _resnet(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The ResNet, without classifier, in the state dict of one."""
    return {ours: state[name] for ours, name in resnets_in(state)[""].items()}
