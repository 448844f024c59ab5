"""The settings of the authors' code that slotstream has as well, both ways."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from model import ModelConfig
from train.config import RunConfig

NAMES = (
    ("dataset", "data", "path"),
    ("image_size", "views", "size"),
    ("min_scale", "views", "min_scale"),
    ("arch", "model", "arch"),
    ("dim_hidden", "model", "dim_hidden"),
    ("dim_out", "model", "dim_out"),
    ("num_prototypes", "model", "num_prototypes"),
    ("teacher_temp", "model", "teacher_temp"),
    ("student_temp", "model", "student_temp"),
    ("center_momentum", "model", "center_momentum"),
    ("group_loss_weight", "model", "group_loss_weight"),
    ("teacher_momentum", "train", "teacher_momentum"),
    ("base_lr", "train", "base_lr"),
    ("warmup_epoch", "train", "warmup_epochs"),
    ("warmup_multiplier", "train", "warmup_multiplier"),
    ("weight_decay", "train", "weight_decay"),
    ("momentum", "train", "momentum"),
    ("epochs", "train", "epochs"),
    ("seed", "train", "seed"),
)
"""(the authors' name in args, our section, our name)"""


def official_settings(config: RunConfig) -> dict[str, Any]:
    """A run's settings by the authors' names; their batch_size is that of one of world_size
    processes.
    """
    settings = {theirs: getattr(getattr(config, part), ours) for theirs, part, ours in NAMES}
    settings["dataset"] = Path(config.data.path).name
    return settings | {"batch_size": config.train.batch_size, "world_size": 1}


def with_official_settings(
    config: RunConfig, args: Mapping[str, Any], model: ModelConfig
) -> RunConfig:
    """`config` with what `args` of the authors' code say, and the sizes of `model`, which was found
    in the weights.

    Raises ValueError for an impossible setting.
    """
    stated = {theirs: value for theirs, value in args.items() if value is not None}
    found: dict[str, dict[str, Any]] = {part: {} for _, part, _ in NAMES}
    for theirs, part, ours in NAMES:
        if theirs in stated:
            found[part][ours] = stated[theirs]
    if "batch_size" in stated:
        found["train"]["batch_size"] = stated["batch_size"] * stated.get("world_size", 1)
    for size in ("arch", "dim_hidden", "dim_out", "num_prototypes"):
        found["model"][size] = getattr(model, size)
    parts = {part: replace(getattr(config, part), **values) for part, values in found.items()}
    return replace(config, **parts)
