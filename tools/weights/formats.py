"""The formats in which a pre-trained encoder is exported."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from model.architectures import is_timm, timm_name
from model.encoder import encoder_dim
from model.names import to_detectron2
from model.timm_encoder import outline
from pipeline.augment import IMAGENET_MEAN, IMAGENET_STD
from pipeline.errors import UserError
from tools.weights.model_card import method_of, model_card
from tools.weights.official_settings import official_settings
from train.encoders import image_stats
from train.pickles import pickle_arrays, torch_bytes
from train.pretrained import load_model, read_record
from train.run.checkpoint import find
from train.weights import (
    FOLDER_CONFIG,
    FOLDER_WEIGHTS,
    META,
    Backbone,
    describe,
    safetensors_bytes,
)

KEPT = ("interpolation", "crop_pct", "crop_mode", "first_conv", "classifier")
"""Settings of timm's own weights that hold for any weights of the network."""


def state_dict(backbone: Backbone, suffix: str) -> bytes:
    """Weights under the names of torchvision and timm: safetensors, or a plain state dict."""
    if suffix == ".safetensors":
        return safetensors_bytes(backbone)
    return torch_bytes(backbone.weights)


def detectron2(backbone: Backbone, suffix: str) -> bytes:
    """The dictionary that detectron2's DetectionCheckpointer reads from a .pkl file."""
    arrays = {name: value.numpy() for name, value in to_detectron2(backbone.weights).items()}
    return pickle_arrays(
        {
            "model": arrays,
            "__author__": "slotstream",
            "matching_heuristics": True,
            META: backbone.metadata,
        }
    )


def mmseg(backbone: Backbone, suffix: str) -> bytes:
    """The dictionary that mmengine's load_checkpoint reads."""
    return torch_bytes({"state_dict": backbone.weights, META: backbone.metadata})


def huggingface(backbone: Backbone) -> dict[str, bytes]:
    """The files of a model on Hugging Face's hub, as timm reads them: content by file name.

    Raises UserError.
    """
    size = backbone.metadata.get("view_size", "")
    side = int(size) if size.isdecimal() else 224
    if is_timm(backbone.arch):
        architecture, features, settings = _of_timm(backbone, side)
    else:
        architecture, features = backbone.arch, encoder_dim(backbone.arch)
        settings = {
            "input_size": [3, side, side],
            "fixed_input_size": False,
            "interpolation": "bicubic",
            "crop_pct": 0.875,
            "crop_mode": "center",
            "mean": IMAGENET_MEAN,
            "std": IMAGENET_STD,
            "pool_size": [math.ceil(side / 32)] * 2,
            "first_conv": "conv1",
            "classifier": "fc",
        }
    tag = method_of(backbone).lower()
    config = {
        "architecture": architecture,
        "num_classes": 0,
        "num_features": features,
        "pretrained_cfg": {"tag": tag, "custom_load": False, **settings, "num_classes": 0},
    }
    return {
        FOLDER_WEIGHTS: state_dict(backbone, ".safetensors"),
        FOLDER_CONFIG: (json.dumps(config, indent=2) + "\n").encode(),
        "README.md": model_card(backbone).encode(errors="backslashreplace"),
    }


def _of_timm(backbone: Backbone, side: int) -> tuple[str, int, dict[str, Any]]:
    """timm's name of a network of its own, its features, and its settings: those of its published
    weights, but for images that are normalised as in the run, of its views' size if it can.
    """
    net = outline(backbone.arch)
    own = net.pretrained_cfg
    mean, deviation = image_stats(backbone)
    fixed = bool(own.get("fixed_input_size"))  # else its positions would have another number
    settings = {
        "input_size": list(own["input_size"]) if fixed else [3, side, side],
        "fixed_input_size": fixed,
        "mean": mean,
        "std": deviation,
        **{name: own[name] for name in KEPT if own.get(name) is not None},
    }
    return timm_name(backbone.arch).partition(".")[0], net.num_features, settings


def official(checkpoint: Path, metadata: dict[str, str]) -> bytes:
    """The whole model and its settings, under the names of the authors' code.

    Raises UserError.
    """
    if checkpoint.is_file():
        raise UserError(f"{checkpoint}: a file: --to official needs a run or a checkpoint")
    record = read_record(find(checkpoint))
    model, config = load_model(checkpoint)
    if is_timm(config.model.arch) and not config.model.hides_patches:
        raise UserError(
            "--to official: for SlotMIM and the ResNets of torchvision alone, and "
            f"{checkpoint} has a {config.model.arch}"
        )
    if config.model.stages < 4:
        raise UserError(
            f"--to official: needs four stages, and {checkpoint} ends at stage "
            f"{config.model.stages}"
        )
    prefix = "" if config.model.hides_patches else "module."  # as their files have it
    return torch_bytes(
        {
            "model": {f"{prefix}{k}": v for k, v in model.official_state_dict().items()},
            "args": official_settings(config),
            META: describe(record) | metadata,
        }
    )


FILES: dict[str, Callable[[Backbone, str], bytes]] = {
    "torchvision": state_dict,
    "timm": state_dict,
    "detectron2": detectron2,
    "mmseg": mmseg,
}
"""The formats that are a single file with a backbone."""
