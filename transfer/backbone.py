"""The encoder of a task: its initial weights and its frozen stages."""

from pathlib import Path
from typing import Any

from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from model.encoder import Encoder
from train.weights import published_weights, read_backbone
from transfer.config import InitConfig

_LAST_OF_STAGE = ("bn1", "layer1", "layer2", "layer3", "layer4")


def build_backbone(init: InitConfig) -> tuple[Encoder, dict[str, Any]]:
    """The encoder [B, 3, S, S] → [B, C, ⌈S/32⌉, ⌈S/32⌉] that `init` describes, and its description
    for result.json: {"weights", "kind": "random" | "supervised" | "file", "arch", "branch",
    "frozen", "metadata"}. "weights" is a file's absolute path, so that the same file has the same
    name in all runs, wherever they were started.

    The children are torchvision's: conv1, bn1, relu, maxpool, layer1 … layer4. Random weights are
    drawn from torch's global generator. Raises UserError.
    """
    encoder = Encoder(init.arch)
    named = init.weights in ("random", "supervised")
    about: dict[str, Any] = {
        "weights": init.weights if named else str(Path(init.weights).resolve()),
        "kind": init.weights if named else "file",
        "arch": init.arch,
        "branch": init.branch,
        "frozen": init.frozen,
        "metadata": {},
    }
    if about["kind"] == "file":
        backbone = read_backbone(Path(init.weights), init.arch, init.branch)
        encoder.load_state_dict(backbone.weights)
        about["metadata"] = dict(backbone.metadata)
    elif about["kind"] == "supervised":
        weights = published_weights(init.arch)
        names = encoder.state_dict()
        encoder.load_state_dict({name: weights[name] for name in names})
    freeze(encoder, init.frozen)
    return encoder, about


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
