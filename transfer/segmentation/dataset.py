"""The training set and the validation set of a run."""

import hashlib
from pathlib import Path
from typing import Literal

from evaluation.datasets.labelled_images import LabelledImages
from evaluation.datasets.open import open_labelled
from pipeline.errors import UserError
from transfer.segmentation.config import DataConfig
from transfer.shared import check_apart


def open_sets(config: DataConfig) -> tuple[LabelledImages, LabelledImages]:
    """The training set and the validation set.

    Raises UserError: if a set does not have its layout, if classes have no names or differ between
    the sets, if an image is in both, if a label map has another size than its image or is no label
    map, or if the validation set has class ids that are not in the table or no label at all.
    """
    train, val = open_part(config, "train"), open_part(config, "val")
    if train.names is None:
        raise UserError(
            f"{train.source}: no class table: give data.classes, a JSON list of names, or put"
            " classes.json beside the labels"
        )
    if train.names != val.names:
        raise UserError(f"{train.source}: has other classes than {val.source}")
    learned, scored = ([path.resolve() for path in part.paths] for part in (train, val))
    check_apart(learned, scored, val.source)
    train.check_headers()
    val.check_labels()
    return train, val


def open_part(config: DataConfig, part: Literal["train", "val"]) -> LabelledImages:
    """The training set or the validation set. Raises UserError."""
    split: str = getattr(config, f"{part}_split")
    images, labels, listed = (
        _path(getattr(config, f"{part}_{name}")) for name in ("images", "labels", "list")
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
    """SHA-256 of the class names, the images' names in their order and the label maps' sizes in
    bytes. It does not depend on the folder.
    """
    lines = [*(data.names or []), ""]
    for image, labels in zip(data.paths, data.label_paths, strict=True):
        lines.append(f"{image.name} {labels.stat().st_size}")
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


def _path(name: str | None) -> Path | None:
    return None if name is None else Path(name)
