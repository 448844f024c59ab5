"""Which label map belongs to which image, and which of these pairs a list selects."""

import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

from evaluation.datasets.images import FolderImages
from pipeline.errors import UserError, printable
from pipeline.folders import require_root, say_found
from pipeline.formats import IMAGE_SUFFIXES
from pipeline.lines import text_lines

Pair = tuple[Path, Path]
"""An image, and the path that its label map should have."""


def pair(
    images: Path, labels: Path, image_ending: str = "", label_ending: str = ".png"
) -> list[Pair]:
    """Each image under `images`, sorted by path, with the path of its label map under `labels`.

    The label map has the name of the image with `label_ending` in place of `image_ending` and the
    suffix. Raises UserError if a folder is missing, if no image has the ending, or if two images
    would share a label map. Prints the number of images.
    """
    found = FolderImages(images)
    require_root(labels)

    def label_of(path: Path) -> Path:
        name = path.stem.removesuffix(image_ending) + label_ending
        return labels / path.relative_to(images).with_name(name)

    pairs = [(path, label_of(path)) for path in found.paths if path.stem.endswith(image_ending)]
    if not pairs:
        name = printable(found.paths[0].name)
        raise UserError(f"{images}: expected images called *{image_ending}, found {name}")
    if others := len(found.paths) - len(pairs):
        found.left[f"images not called *{image_ending}"] += others
    image_of = {label: image for image, label in pairs}
    for image, label in pairs:
        if image_of[label] != image:
            raise UserError(
                f"{labels}: {label.name} would belong to both {image.name} and"
                f" {image_of[label].name}"
            )
    say_found(len(pairs), images, found.left)
    return pairs


def select(pairs: Sequence[Pair], lists: Sequence[Path], images: Path) -> list[Pair]:
    """The pairs that the files `lists` name, in their order, one image a line.

    A line is a file name, with or without folder and suffix, or a number, with or without leading
    zeros. Or it is an image and its label map, as paths from the folder above `images`
    (/JPEGImages/a.jpg /SegmentationClassAug/a.png); then this label map is taken. Raises UserError
    for a name that fits no image or several, or that comes twice, and for a missing label map.
    """
    source = " and ".join(str(path) for path in lists)
    wanted = [line for path in lists for line in read_lines(path)]
    if not wanted:
        raise UserError(f"{source}: names no image")
    by_name: dict[str, list[Pair]] = defaultdict(list)
    for image, label in pairs:
        for name in {_unpadded(image.stem), str(image.relative_to(images).with_suffix(""))}:
            by_name[name].append((image, label))
    columns = [_columns(line) for line in wanted]
    names = [_without_suffix(name.removeprefix(f"{images.name}/")) for name, _ in columns]
    matches = [by_name.get(name) or by_name.get(_unpadded(name), []) for name in names]
    missing = [line for line, match in zip(wanted, matches, strict=True) if not match]
    if missing:
        raise UserError(
            f"{source}: {len(missing)} of {len(wanted)} images are not in {images}"
            f" (the first: {missing[0]})"
        )
    ambiguous = [line for line, match in zip(wanted, matches, strict=True) if len(match) > 1]
    if ambiguous:
        raise UserError(f"{source}: {images} has several images called {ambiguous[0]}")
    selected = [
        (match[0][0], images.parent / label if label else match[0][1])
        for match, (_, label) in zip(matches, columns, strict=True)
    ]
    taken = Counter(image for image, _ in selected)
    if twice := next((image for image, times in taken.items() if times > 1), None):
        raise UserError(f"{source}: names {twice.name} twice")
    return selected


def require_labels(pairs: Sequence[Pair], labels: Path) -> None:
    """Raise UserError if a label map is missing."""
    missing = [label for _, label in pairs if not label.is_file()]
    if missing:
        raise UserError(
            f"{labels}: no label map for {len(missing)} of {len(pairs)} images"
            f" (the first: {os.path.relpath(missing[0], labels)})"
        )


def read_lines(path: Path) -> list[str]:
    """The lines of a text file, stripped, without empty ones. Raises UserError."""
    return [line.strip() for line in text_lines(path) if line.strip()]


def _columns(line: str) -> tuple[str, str | None]:
    """The image that a line names, and its label map or None. Paths lose a leading slash."""
    words = line.split()
    if len(words) == 2 and all(Path(word).suffix.lower() in IMAGE_SUFFIXES for word in words):
        return words[0].lstrip("/"), words[1].lstrip("/")
    return line, None


def _without_suffix(name: str) -> str:
    """A file name, with its folder if it has one, without the suffix of an image."""
    path = Path(name)
    return str(path.with_suffix("") if path.suffix.lower() in IMAGE_SUFFIXES else path)


def _unpadded(name: str) -> str:
    """A number without leading zeros; any other name as it is."""
    return str(int(name)) if name.isascii() and name.isdigit() else name
