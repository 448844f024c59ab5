"""Which image files a data set consists of, and in which order they are stored."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


@dataclass(frozen=True)
class Source:
    """The files of a data set. A sample's index in the beton is its position in `names`."""

    root: Path
    names: list[str]
    """Paths below `root`, with forward slashes, in the stored order."""
    classes: list[str] | None = None
    """Class names, sorted; None for a set without labels."""
    labels: list[int] | None = None
    """For each name the position of its class in `classes`."""


def coco(root: Path) -> Source:
    """COCO: ROOT/train2017/*.jpg."""
    return Source(root, _images_in(root, "train2017"))


def cocoplus(root: Path) -> Source:
    """COCO+: ROOT/train2017/*.jpg, then ROOT/unlabeled2017/*.jpg."""
    return Source(root, _images_in(root, "train2017") + _images_in(root, "unlabeled2017"))


def imagenet(root: Path) -> Source:
    """ImageNet: ROOT/train/<wnid>/*.JPEG; the label is the rank of the sorted wnid."""
    folder = _require_folder(root, "train", "<wnid>/*.JPEG")
    classes = sorted(entry.name for entry in _entries(folder) if entry.is_dir())
    if not classes:
        raise UserError(f"{folder}: expected a folder per class, <wnid>/*.JPEG; {_found(folder)}")
    names: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        images = _images_in(root, f"train/{name}")
        names += images
        labels += [label] * len(images)
    return Source(root, names, classes, labels)


def folder(root: Path) -> Source:
    """Any folder: all image files below ROOT, sorted by path."""
    if not root.is_dir():
        raise UserError(f"{root}: no such folder")
    names = sorted(path.relative_to(root).as_posix() for path in _walk(root, ()))
    if not names:
        kinds = " ".join(IMAGE_SUFFIXES)
        raise UserError(f"{root}: expected image files ({kinds}); {_found(root)}")
    return Source(root, names)


SOURCES: dict[str, Callable[[Path], Source]] = {
    "coco": coco,
    "cocoplus": cocoplus,
    "imagenet": imagenet,
    "folder": folder,
}


def _images_in(root: Path, name: str) -> list[str]:
    """The image files directly in ROOT/name, sorted."""
    folder = _require_folder(root, name, "*.jpg")
    images = sorted(entry.name for entry in _entries(folder) if _is_image(entry))
    if not images:
        raise UserError(f"{folder}: expected image files; {_found(folder)}")
    return [f"{name}/{image}" for image in images]


def _require_folder(root: Path, name: str, content: str) -> Path:
    folder = root / name
    if not folder.is_dir():
        raise UserError(f"expected {folder}/{content}; {_found(root)}")
    return folder


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """What `folder` holds, less the hidden files that macOS and others leave beside images."""
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}") from error


def _is_image(entry: os.DirEntry[str]) -> bool:
    """By its suffix. A broken link counts, so that packing names it."""
    return entry.name.lower().endswith(IMAGE_SUFFIXES) and not entry.is_dir()


def _walk(folder: Path, above: tuple[tuple[int, int], ...]) -> Iterator[Path]:
    """The image files below `folder`. Links are followed; a loop of them shows up in `above`."""
    status = folder.stat()
    here = (status.st_dev, status.st_ino)
    if here in above:
        raise UserError(f"{folder}: a link to a folder that contains it")
    for entry in _entries(folder):
        if entry.is_dir():
            yield from _walk(Path(entry.path), (*above, here))
        elif _is_image(entry):
            yield Path(entry.path)


def _found(folder: Path) -> str:
    """What is there instead, for an error line."""
    if not folder.is_dir():
        return f"{folder} is {'not a folder' if folder.exists() else 'not there'}"
    names = sorted(entry.name + "/" * entry.is_dir() for entry in _entries(folder))
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"{folder} holds {', '.join(names[:5]) + more}" if names else f"{folder} is empty"
