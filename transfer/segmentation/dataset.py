"""The two sets of a run, opened as `evaluation.datasets.open` opens any."""

import hashlib
from pathlib import Path
from typing import Literal

from evaluation.datasets.labelled_images import LabelledImages
from evaluation.datasets.open import open_labelled
from pipeline.errors import UserError
from transfer.segmentation.config import DataConfig


def open_sets(config: DataConfig) -> tuple[LabelledImages, LabelledImages]:
    """The images to learn from and those to score. Raises UserError: for what is not of the layout,
    for classes without names, for images that are in both, for label maps of another size or kind,
    and where what is to be scored has class ids that the table does not hold, or none at all.
    """
    train, val = open_part(config, "train"), open_part(config, "val")
    if train.names is None:
        raise UserError(
            f"{train.source}: no class table: give data.classes, a JSON list of names, or put"
            " classes.json beside the labels"
        )
    if train.names != val.names:
        raise UserError(f"{train.source}: other classes than those of {val.source}")
    common = {path.resolve() for path in train.paths} & {path.resolve() for path in val.paths}
    if common:
        raise UserError(f"{min(common)}: to be learnt from and to be scored: give other sets")
    train.check_headers()
    val.check_labels()
    return train, val


def open_part(config: DataConfig, part: Literal["train", "val"]) -> LabelledImages:
    """One of them. Raises UserError."""
    split: str = getattr(config, f"{part}_split")
    images, labels, listed = (
        _path(getattr(config, f"{part}_{what}")) for what in ("images", "labels", "list")
    )
    return open_labelled(
        config.dataset,
        root=_path(config.root),
        split=split,
        images=images,
        labels=labels,
        classes=_path(config.classes),
        void=config.void,
        listed=listed,
        section="data.",
        part=f"{part}_",
    )


def fingerprint(data: LabelledImages) -> str:
    """SHA-256 of the images' names in their order, the class names and the label maps' sizes in
    bytes: the same wherever the set lies.
    """
    lines = [*(data.names or []), ""]
    for image, labels in zip(data.paths, data.label_paths, strict=True):
        lines.append(f"{image.name} {labels.stat().st_size}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _path(name: str | None) -> Path | None:
    return None if name is None else Path(name)
