"""What hidden patches need of the settings of views, network and training."""

from dataclasses import replace
from typing import Any

from pipeline.errors import require


def check_masks(config: Any) -> None:
    """`config`: a RunConfig. Raises ValueError."""
    views, model, teacher = config.views, config.model, config.train.teacher
    for _, side in config.train.view_sizes:
        try:
            replace(views, size=side)
        except ValueError as error:
            raise ValueError(f"train.view_sizes has views of {side} pixels: {error}") from None
    if not model.hides_patches:
        none = "0 without model.objective slotmim"
        require(views.mask_ratio == 0, "views.mask_ratio", views.mask_ratio, none)
        return
    from model.timm_encoder import patch_size

    hides = "above 0 with model.objective slotmim"
    require(views.mask_ratio > 0, "views.mask_ratio", views.mask_ratio, hides)
    patch = patch_size(model.arch)
    fits = f"{patch}, the patch of {model.arch}"
    require(views.mask_cell == patch, "views.mask_cell", views.mask_cell, fits)
    whole = "ema or frozen with model.objective slotmim: its student sees no whole view"
    require(teacher in ("ema", "frozen"), "train.teacher", teacher, whole)
