"""The encoder of a task: its initial weights and its frozen stages."""

from pathlib import Path
from typing import Any

from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from model.architectures import is_timm
from model.encoder import AnyEncoder, Encoder
from model.timm_encoder import TimmEncoder
from pipeline.errors import UserError
from train.encoders import image_stats, read_encoder
from train.published import published_encoder, published_weights
from train.weights import Backbone
from transfer.config import InitConfig

_LAST_OF_STAGE = ("bn1", "layer1", "layer2", "layer3", "layer4")


def build_backbone(init: InitConfig) -> tuple[AnyEncoder, dict[str, Any]]:
    """The encoder [B, 3, S, S] → [B, C, ⌈S/32⌉, ⌈S/32⌉] that `init` describes, and its description
    for result.json: {"weights", "kind": "random" | "supervised" | "file", "arch", "branch",
    "frozen", "metadata"}. "weights" is a file's absolute path, so that the same file has the same
    name in all runs, wherever they were started.

    A ResNet's children are torchvision's: conv1, bn1, relu, maxpool, layer1 … layer4. Random
    weights are drawn from torch's global generator. Raises UserError.
    """
    named = init.weights in ("random", "supervised")
    about: dict[str, Any] = {
        "weights": init.weights if named else str(Path(init.weights).resolve()),
        "kind": init.weights if named else "file",
        "arch": init.arch,
        "branch": init.branch,
        "frozen": init.frozen,
        "metadata": {},
    }
    encoder, backbone = _of_timm(init) if is_timm(init.arch) else _resnet(init)
    about["metadata"] = dict(backbone.metadata) if backbone else {}
    return encoder, about


def _resnet(init: InitConfig) -> tuple[Encoder, Backbone | None]:
    encoder, backbone = Encoder(init.arch), None
    if init.weights == "supervised":
        weights = published_weights(init.arch)
        names = encoder.state_dict()
        encoder.load_state_dict({name: weights[name] for name in names})
    elif init.weights != "random":
        backbone = read_encoder(Path(init.weights), init.arch, init.branch)
        encoder.load_state_dict(backbone.weights)
    freeze(encoder, init.frozen)
    return encoder, backbone


def _of_timm(init: InitConfig) -> tuple[TimmEncoder, Backbone | None]:
    backbone, statistics = None, None
    if init.weights not in ("random", "supervised"):
        backbone = read_encoder(Path(init.weights), init.arch, init.branch)
        statistics = image_stats(backbone)
    try:
        encoder = TimmEncoder(init.arch, image_stats=statistics)
    except ValueError as error:
        raise UserError(f"init.{error}") from None
    if init.weights == "supervised":
        encoder.net.load_state_dict(published_encoder(init.arch))
    elif backbone is not None:
        encoder.net.load_state_dict(backbone.weights)
    if init.frozen and (stage := init.frozen - 1) not in encoder.strides:
        raise UserError(f"init.frozen {init.frozen}: {init.arch} has no stage {stage}")
    if init.frozen:
        encoder.freeze(init.frozen - 1)
    return encoder, backbone


def freeze(encoder: nn.Sequential, stages: int) -> None:
    """Freeze the first `stages` of an encoder, counted as in InitConfig.frozen: no gradients, and
    norms that use their running statistics without updating them, also in training mode.

    The norms become torchvision's FrozenBatchNorm2d, which the conversion to SyncBatchNorm skips.
    """
    if not stages:
        return
    names = list(dict(encoder.named_children()))
    for name in names[: names.index(_LAST_OF_STAGE[stages - 1]) + 1]:
        stage = encoder.get_submodule(name)
        encoder.set_submodule(name, _with_frozen_norms(stage).requires_grad_(False))


def _with_frozen_norms(module: nn.Module) -> nn.Module:
    if isinstance(module, nn.BatchNorm2d):
        frozen = FrozenBatchNorm2d(module.num_features, module.eps)
        frozen.load_state_dict(module.state_dict())
        return frozen
    for name, child in module.named_children():
        setattr(module, name, _with_frozen_norms(child))
    return module
