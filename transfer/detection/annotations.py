"""COCO's instance annotations as typed records, checked when they are read.

Letters: H W an image's stored height and width in pixels.
"""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Annotated, Any, Literal

import numpy as np
from faster_coco_eval import mask_api_new_cpp as runs
from faster_coco_eval.core import mask as rle
from msgspec import Meta, Struct

from pipeline.errors import UserError
from train.run.json_file import read_json

ANNOTATION_BYTES = 4 << 30
"""Bytes of an annotation file: COCO's has 0.45 GB, LVIS' 1.1 GB. Reading takes 6 times as much
memory for files like COCO's, up to 30 times for others."""
FARTHEST = 100_000
"""Pixels: the largest side of an image, and the largest coordinate of a box or a corner."""
PIXELS = 178_956_970
"""H · W of an image; PIL refuses to open larger ones."""
OUTLINES = 2_000_000
"""Pixels, along x and y, of all polygons of an image: drawing so many takes 0.1 s and 75 MB. In
COCO an image has less than 100,000."""
RUNS = 1_000_000
"""Length of a mask's counts, in characters or numbers: reading so many takes 120 MB. COCO's crowds
have up to 10,000."""
OBJECTS = 5_000
"""Of an image, without crowds: training takes one mask for each, of the resized image's size."""
MASK_PIXELS = 10_000_000_000
"""H · W of an image times its objects: loading decodes so many pixels, which takes minutes."""
CATEGORIES = 10_000
"""A detector has layers of this width."""
_NUMBER = re.compile("(?:[P-o]{0,6}[0-O])*")
"""COCO's text for runs: numbers of 5 bits a character, at most 7 characters each."""
_AnyInt = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
_Id = Annotated[int, Meta(ge=0, le=2**53)]  # the evaluator holds ids as float64
_Text = Annotated[str, Meta(min_length=1, max_length=4096)]  # as Linux' paths
_Side = Annotated[int, Meta(ge=1, le=FARTHEST)]
_Coordinate = Annotated[float, Meta(ge=-FARTHEST, le=FARTHEST)]
_Area = Annotated[float, Meta(ge=-(FARTHEST**2), le=FARTHEST**2)]
_Count = Annotated[int, Meta(ge=0, le=FARTHEST**2)]


class RunLengths(Struct):
    """A mask as the lengths of runs of 0 and 1 in turn, column by column."""

    size: tuple[int, int]
    """H, W."""
    counts: str | list[_Count]
    """As COCO's compressed text, which `read_annotations` returns, or as numbers."""


Segmentation = Annotated[list[list[_Coordinate]], Meta(min_length=1)] | RunLengths
"""Polygons, x y x y …; or run lengths."""


class ImageEntry(Struct):
    """An image."""

    id: _Id
    file_name: _Text
    height: _Side
    width: _Side


class Category(Struct):
    """A class of objects."""

    id: _Id
    name: _Text


class Annotation(Struct):
    """An object, or a crowd of objects."""

    image_id: _Id
    category_id: _Id
    bbox: Annotated[list[_Coordinate], Meta(min_length=4, max_length=4)]
    """x, y, width, height."""
    segmentation: Segmentation
    area: _Area | None = None
    """In pixels; `read_annotations` takes the mask's where the file has none."""
    iscrowd: Literal[0, 1] | bool | None = 0
    id: _AnyInt | float | Annotated[str, Meta(max_length=99)] | None = None
    """For messages only."""


class _File(Struct):
    images: list[ImageEntry]
    categories: list[Category]
    annotations: list[Annotation]


@dataclass(frozen=True)
class Annotations:
    """A file's content. The ids of images and of categories are unique. Each annotation is of an
    image and a category that the file lists.
    """

    images: list[ImageEntry]
    categories: list[Category]
    """In the order of their ids."""
    annotations: list[Annotation]
    derived: int
    """The number of annotations without an area in the file."""


def read_annotations(path: Path) -> Annotations:
    """The file's content. Raises UserError if it is not of the format, or exceeds a limit."""
    content = read_json(path, _File, ANNOTATION_BYTES, "COCO instance annotations")
    images = {image.id: image for image in content.images}
    categories = {category.id for category in content.categories}
    _check_ids(path, "images", [image.id for image in content.images])
    _check_ids(path, "categories", [category.id for category in content.categories])
    if len(categories) > CATEGORIES:
        raise UserError(f"{path}: {len(categories):,} categories, at most {CATEGORIES:,}")
    for image in content.images:
        _check_image(path, image)
    for number, one in enumerate(content.annotations):
        where = f"{path}: annotations[{number}]" + ("" if one.id is None else f" (id {one.id!r})")
        if one.image_id not in images:
            raise UserError(f"{where} is of image {one.image_id}, which the file does not list")
        image = images[one.image_id]
        one.segmentation = _checked(one.segmentation, image.height, image.width, where)
    unknown = [a.category_id for a in content.annotations if a.category_id not in categories]
    if unknown:
        raise UserError(
            f"{path}: {len(unknown)} of {len(content.annotations)} annotations have a category_id "
            f"that is not among the {len(categories)} categories (the first: {unknown[0]})"
        )
    _check_amounts(path, images, content.annotations)
    without_area = [one for one in content.annotations if one.area is None]
    for one in without_area:
        mask = to_rle(one.segmentation, images[one.image_id].height, images[one.image_id].width)
        one.area = float(rle.area(mask))
    content.categories.sort(key=lambda category: category.id)
    return Annotations(content.images, content.categories, content.annotations, len(without_area))


def _check_ids(path: Path, entries: str, ids: list[int]) -> None:
    if not ids:
        raise UserError(f"{path}: lists no {entries}")
    (first, count), *_ = Counter(ids).most_common(1)
    if count > 1:
        repeated = len(ids) - len(set(ids))
        raise UserError(
            f"{path}: {repeated} of {len(ids)} {entries} repeat an id (the first: {first})"
        )


def _check_image(path: Path, image: ImageEntry) -> None:
    """Refuse names outside the folder of images, and images that cannot be opened."""
    where = f"{path}: image {image.id}"
    name = PurePath(image.file_name)
    if name.is_absolute() or ".." in name.parts:
        raise UserError(f"{where}: file_name {image.file_name!a} leaves the folder of images")
    if image.height * image.width > PIXELS:
        size = f"{image.width}×{image.height}"
        raise UserError(f"{where}: {size} are more than {PIXELS:,} pixels")


def _check_amounts(
    path: Path, images: dict[int, ImageEntry], annotations: Iterable[Annotation]
) -> None:
    """Refuse images with so many objects or such outlines that loading them would take hours."""
    objects: Counter[int] = Counter()
    outlines: Counter[int] = Counter()
    for one in annotations:
        objects[one.image_id] += not one.iscrowd
        if not isinstance(one.segmentation, RunLengths):
            # A bound that is faster than the length: all corners in turn with the origin.
            outlines[one.image_id] += sum(2 * int(sum(map(abs, p))) for p in one.segmentation)
    for image, count in objects.items():
        most = min(OBJECTS, MASK_PIXELS // (images[image].height * images[image].width))
        if count > most:
            raise UserError(
                f"{path}: image {image} has {count:,} objects, at most {most:,} for its size"
            )
    long = {image for image, bound in outlines.items() if bound > OUTLINES}
    outlines.clear()
    for one in annotations:
        if one.image_id in long and not isinstance(one.segmentation, RunLengths):
            outlines[one.image_id] += sum(map(_outline, one.segmentation))
            if outlines[one.image_id] > OUTLINES:
                raise UserError(
                    f"{path}: image {one.image_id}: segmentation: outlines of more than"
                    f" {OUTLINES:,} pixels (the last read: annotation {one.id!r})"
                )


def _outline(polygon: list[float]) -> int:
    """Length of the closed polygon, along x and y."""
    corners = np.array(polygon).reshape(-1, 2)
    return int(np.abs(corners - np.roll(corners, 1, axis=0)).sum())


def _checked(segmentation: Segmentation, height: int, width: int, where: str) -> Segmentation:
    """Polygons of at least three points, or run lengths of the whole image. Raises UserError."""
    if isinstance(segmentation, RunLengths):
        return _compressed(segmentation, height, width, where)
    if any(len(polygon) % 2 for polygon in segmentation):
        raise UserError(f"{where}: segmentation: a polygon with an odd number of coordinates")
    polygons = [polygon for polygon in segmentation if len(polygon) >= 6]
    return polygons or _compressed(
        RunLengths((height, width), [height * width]), height, width, where
    )


def _compressed(mask: RunLengths, height: int, width: int, where: str) -> RunLengths:
    """The run lengths as COCO's compressed text. The library believes them: other sums than H · W
    would make it write outside its memory. Raises UserError.
    """
    if mask.size != (height, width):
        raise UserError(
            f"{where}: a mask of size {list(mask.size)} for an image of {[height, width]} (height,"
            " width)"
        )
    if len(mask.counts) > RUNS:
        raise UserError(f"{where}: segmentation: counts are longer than {RUNS:,}")
    if isinstance(mask.counts, str):
        try:
            if not _NUMBER.fullmatch(mask.counts):
                raise ValueError
            lengths = runs.toUncompressedRLE([to_rle(mask, height, width)])[0]["counts"]
        except (ValueError, RuntimeError):  # the library's versions differ
            raise UserError(
                f"{where}: segmentation: counts are not COCO's compressed text for an image of"
                f" {height * width} pixels"
            ) from None
    else:
        lengths = mask.counts
    if (filled := sum(lengths)) != height * width or len(lengths) > filled + 1:
        raise UserError(
            f"{where}: segmentation: {len(lengths)} run lengths of {filled} pixels for an image of"
            f" {height * width}"
        )
    packed = runs.frUncompressedRLE([{"size": mask.size, "counts": lengths}])[0]
    return RunLengths(mask.size, packed["counts"].decode())


def to_rle(segmentation: Segmentation, height: int, width: int) -> dict[str, Any]:
    """Polygons or compressed run lengths as the library's run lengths."""
    if isinstance(segmentation, RunLengths):
        return {"size": list(segmentation.size), "counts": segmentation.counts}
    runs_of: dict[str, Any] = rle.segmToRle(segmentation, width, height)
    return runs_of


def encloses(segmentation: Segmentation) -> bool:
    """Whether run lengths hold any pixel. Polygons are assumed to."""
    if not isinstance(segmentation, RunLengths):
        return True
    return bool(rle.area(to_rle(segmentation, *segmentation.size)) > 0)
