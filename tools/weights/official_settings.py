"""Converts settings between slotstream and the authors' code, in both directions."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from model import ModelConfig
from model.architectures import timm_name
from train.config import DataConfig, RunConfig, load_config

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
SLOTMIM = (
    *(row for row in NAMES if row[0] not in ("warmup_multiplier", "momentum")),  # no effect there
    ("drop_path_rate", "model", "drop_path"),
    ("pred_ratio", "views", "mask_ratio"),
    ("pred_ratio_var", "views", "mask_ratio_spread"),
    ("min_lr", "train", "final_lr"),
    ("weight_decay_end", "train", "final_weight_decay"),
    ("clip_grad", "train", "clip_grad"),
    ("freeze_slots", "train", "freeze_prototypes_epochs"),
    ("warmup_teacher_temp", "train", "warmup_teacher_temp"),
    ("warmup_teacher_temp_epochs", "train", "warmup_teacher_temp_epochs"),
)
"""The same of SlotMIM."""
RECIPE = "slotmim/cocoplus_vitb_800ep"
"""How SlotMIM's authors train: for a file without settings, and for what their code has no setting
of."""


def recipe(name: str, model: ModelConfig) -> RunConfig:
    """A run of this model with the recipe of its authors. Raises ValueError."""
    if not model.hides_patches:
        return RunConfig(name, DataConfig("unknown"), model=model)
    told = ["--config", RECIPE, "--name", name, "--data.path", "unknown"]
    config, _ = load_config(told)
    model = replace(model, drop_path=config.model.drop_path)
    views = replace(config.views, mask_cell=model.strides[model.stages])
    return replace(config, model=model, views=views)


def official_settings(config: RunConfig) -> dict[str, Any]:
    """A run's settings by the authors' names. Their batch_size is that of one process."""
    slotmim = config.model.hides_patches
    names = SLOTMIM if slotmim else NAMES
    settings = {theirs: getattr(getattr(config, part), ours) for theirs, part, ours in names}
    settings["dataset"] = Path(config.data.path).name
    settings |= {"batch_size": config.train.batch_size, "world_size": 1}
    if not slotmim:
        return settings
    settings |= {name: 0 for name in ("clip_grad",) if settings[name] is None}
    if settings["weight_decay_end"] is None:
        settings["weight_decay_end"] = settings["weight_decay"]
    if settings["warmup_teacher_temp"] is None:
        settings["warmup_teacher_temp"] = settings["teacher_temp"]
    arch = timm_name(config.model.arch).partition(".")[0].removesuffix("_224")
    return settings | {"arch": arch, "optimizer": config.train.optimizer}


def with_official_settings(
    config: RunConfig, args: Mapping[str, Any], model: ModelConfig
) -> RunConfig:
    """`config` with the settings in `args`, the authors' command line, and the sizes of `model`,
    which were read from the weights.

    Raises ValueError for an impossible setting.
    """
    stated = {theirs: value for theirs, value in args.items() if value is not None}
    changed: dict[str, dict[str, Any]] = {part: {} for _, part, _ in NAMES}
    if model.hides_patches:
        stated = _as_ours(stated)
    for theirs, part, ours in SLOTMIM if model.hides_patches else NAMES:
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
    parts = {part: replace(getattr(config, part), **values) for part, values in changed.items()}
    return replace(config, **parts)


def _as_ours(stated: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of SlotMIM's authors, each in the form in which ours has it."""
    values = dict(stated)
    for name in ("pred_ratio", "pred_ratio_var"):  # a list of ratios, of which no recipe has two
        if isinstance(values.get(name), list) and len(values[name]) == 1:
            values[name] = values[name][0]
    if values.get("clip_grad") == 0:
        values["clip_grad"] = None
    if values.get("warmup_teacher_temp_epochs") == 0:
        values["warmup_teacher_temp"] = None
    return values
