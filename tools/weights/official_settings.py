"""Converts settings between slotstream and the authors' code, in both directions."""

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
"""(the authors' name in args, our section, our name) of each setting that both codes have."""


def official_settings(config: RunConfig) -> dict[str, Any]:
    """A run's settings by the authors' names. Their batch_size is that of one process."""
    settings = {theirs: getattr(getattr(config, part), ours) for theirs, part, ours in NAMES}
    settings["dataset"] = Path(config.data.path).name
    return settings | {"batch_size": config.train.batch_size, "world_size": 1}


def with_official_settings(
    config: RunConfig, args: Mapping[str, Any], model: ModelConfig
) -> RunConfig:
    """`config` with the settings in `args`, the authors' command line, and the sizes of `model`,
    which were read from the weights.

    Raises ValueError for an impossible setting.
    """
    stated = {theirs: value for theirs, value in args.items() if value is not None}
    changed: dict[str, dict[str, Any]] = {part: {} for _, part, _ in NAMES}
    for theirs, part, ours in NAMES:
        if theirs in stated:
            changed[part][ours] = stated[theirs]
    if "batch_size" in stated:
        batch, processes = stated["batch_size"], stated.get("world_size", 1)
        if type(batch) is not int or type(processes) is not int:  # a text times a number is a text
            raise ValueError("train.batch_size must be a whole number")
        changed["train"]["batch_size"] = batch * processes
    sizes = ("arch", "dim_hidden", "dim_out", "num_prototypes", "objective", "image_stats")
    for size in sizes:
        changed["model"][size] = getattr(model, size)
    if model.hides_patches:  # SlotMIM's code reads these, and leaves others unused
        changed["train"] |= {"warmup_multiplier": None}
    parts = {part: replace(getattr(config, part), **values) for part, values in changed.items()}
    return replace(config, **parts)
