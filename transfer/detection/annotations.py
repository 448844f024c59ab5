"""COCO's instance annotations as typed records, checked when they are read.

Letters: H W an image's stored height and width in pixels.
"""

import math
import re
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Annotated, Any, Literal

import numpy as np
from faster_coco_eval import mask_api_new_cpp as runs
from faster_coco_eval.core import mask as rle
from msgspec import Meta, Struct

from pipeline.errors import UserError, printable
from pipeline.formats import MAX_PIXELS
from train.run.json_file import read_json

ANNOTATION_BYTES = 4 << 30
"""Bytes of an annotation file: COCO's has 0.45 GB, LVIS' 1.1 GB. Reading takes 6 times as much
memory for files like COCO's, up to 30 times for others."""
FARTHEST = 100_000
"""Pixels: the largest side of an image, and the largest coordinate of a box or a corner."""
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
_Side = Annotated[int, Meta(ge=1, le=FARTHEST)] | Annotated[float, Meta(ge=1, le=FARTHEST)]
_Coordinate = Annotated[float, Meta(ge=-FARTHEST, le=FARTHEST)]
_Area = Annotated[float, Meta(ge=-(FARTHEST**2), le=FARTHEST**2)]
_Count = Annotated[int, Meta(ge=0, le=FARTHEST**2)]


class RunLengths(Struct):
    """A mask as the lengths of runs of 0 and 1 in turn, column by column."""

    size: tuple[int, int]
    """H, W."""
    counts: str | list[_Count]
    """As COCO's compressed text, which `read_annotations` returns, or as numbers."""


Segmentation = list[list[_Coordinate]] | RunLengths
"""Polygons, x y x y …; or run lengths."""
Box = Annotated[list[_Coordinate], Meta(min_length=4, max_length=4)]
"""x, y, width, height."""


class _ImageInFile(Struct):
    id: _Id
    file_name: _Text
    height: _Side
    width: _Side


class _AnnotationInFile(Struct):
    image_id: _Id
    category_id: _Id
    bbox: Box | None = None
    segmentation: list[list[_Coordinate] | _Coordinate] | RunLengths | None = None
    area: _Area | None = None
    iscrowd: Literal[0, 1] | bool | None = 0
    id: _AnyInt | float | Annotated[str, Meta(max_length=99)] | None = None


class ImageEntry(Struct):
    """An image."""

    id: int
    file_name: str
    height: int
    width: int


class Category(Struct):
    """A class of objects."""

    id: _Id
    name: _Text


class Annotation(Struct):
    """An object, or a crowd of objects."""

    image_id: int
    category_id: int
    bbox: list[float]
    segmentation: Segmentation | None
    """None: the object has no mask."""
    area: float
    """In pixels."""
    iscrowd: bool
    id: int | float | str | None
    """For messages only."""


class _File(Struct):
    images: list[_ImageInFile]
    categories: list[Category]
    annotations: list[_AnnotationInFile]


@dataclass(frozen=True)
class Annotations:
    """A file's content. The ids of images and of categories are unique. Each annotation is of an
    image and a category that the file lists.
    """

    images: list[ImageEntry]
    categories: list[Category]
    """In the order of their ids."""
    annotations: list[Annotation]
    areas: int
    """Annotations without an area in the file: it is the mask's or, without a mask, the box's."""
    boxes: int
    """Annotations without a box in the file: it is the mask's."""


def read_annotations(path: Path) -> Annotations:
    """The file's content. Raises UserError if it is not of the format, or exceeds a limit."""
    content = read_json(path, _File, ANNOTATION_BYTES, "COCO instance annotations")
    _check_unique(path, "images", "an id", [image.id for image in content.images])
    names = [PurePath(image.file_name) for image in content.images]
    _check_unique(path, "images", "a file_name", names)
    _check_unique(path, "categories", "an id", [category.id for category in content.categories])
    images = {image.id: _image(path, image) for image in content.images}
    categories = {category.id for category in content.categories}
    if len(categories) > CATEGORIES:
        raise UserError(f"{path}: {len(categories):,} categories, at most {CATEGORIES:,}")
    annotations: list[Annotation] = []
    for number, one in enumerate(content.annotations):
        where = f"{path}: annotations[{number}]" + ("" if one.id is None else f" (id {one.id!r})")
        if one.image_id not in images:
            raise UserError(f"{where} is of image {one.image_id}, which the file does not list")
        annotations.append(_annotation(one, images[one.image_id], where))
    unknown = [a.category_id for a in annotations if a.category_id not in categories]
    if unknown:
        raise UserError(
            f"{path}: {len(unknown)} of {len(annotations)} annotations have a category_id "
            f"that is not among the {len(categories)} categories (the first: {unknown[0]})"
        )
    _check_amounts(path, images, annotations)
    _check_pixels(path, images, annotations)
    without_box = [one for one in annotations if not one.bbox]
    without_area = [one for one in annotations if math.isnan(one.area)]
    for incomplete in (*without_box, *without_area):
        _derive(incomplete, images[incomplete.image_id])
    content.categories.sort(key=lambda category: category.id)
    return Annotations(
        [*images.values()], content.categories, annotations, len(without_area), len(without_box)
    )


def _annotation(one: _AnnotationInFile, image: ImageEntry, where: str) -> Annotation:
    """The annotation with its mask checked. Without a box in the file the box is empty; without an
    area, the area is NaN. Raises UserError.
    """
    mask = _checked(one.segmentation, image.height, image.width, where)
    if mask is None and one.bbox is None:
        raise UserError(f"{where} has neither bbox nor segmentation")
    area = math.nan if one.area is None else one.area
    crowd = bool(one.iscrowd)
    return Annotation(one.image_id, one.category_id, one.bbox or [], mask, area, crowd, one.id)


def _derive(one: Annotation, image: ImageEntry) -> None:
    """Set the box and the area that the file lacks."""
    if one.segmentation is None:
        one.area = one.bbox[2] * one.bbox[3]
        return
    mask = to_rle(one.segmentation, image.height, image.width)
    if not one.bbox:
        one.bbox = rle.toBbox(mask).tolist()
    if math.isnan(one.area):
        one.area = float(rle.area(mask))


def _check_unique(path: Path, entries: str, field: str, values: Sequence[Hashable]) -> None:
    if not values:
        raise UserError(f"{path}: lists no {entries}")
    (first, count), *_ = Counter(values).most_common(1)
    if count > 1:
        repeated = len(values) - len(set(values))
        raise UserError(
            f"{path}: {repeated} of {len(values)} {entries} repeat {field}"
            f" (the first: {printable(str(first))})"
        )


def _image(path: Path, image: _ImageInFile) -> ImageEntry:
    """Refuse names outside the folder of images, and images that cannot be opened."""
    where = f"{path}: image {image.id}"
    name = PurePath(image.file_name)
    if name.is_absolute() or ".." in name.parts:
        raise UserError(f"{where}: file_name {image.file_name!a} leaves the folder of images")
    height, width = int(image.height), int(image.width)
    if (height, width) != (image.height, image.width):
        raise UserError(f"{where}: height or width is no whole number of pixels")
    if height * width > MAX_PIXELS:
        raise UserError(f"{where}: {width}×{height} are more than {MAX_PIXELS:,} pixels")
    return ImageEntry(image.id, image.file_name, height, width)


def _check_pixels(
    path: Path, images: dict[int, ImageEntry], annotations: Iterable[Annotation]
) -> None:
    """Refuse boxes that are relative to the image: all of them would lie in its first pixel. An
    image of one pixel says nothing.
    """
    large = {image.id for image in images.values() if image.height * image.width > 1}
    boxes = [one.bbox for one in annotations if one.bbox and one.image_id in large]
    if boxes and all(min(b) >= 0 and b[0] + b[2] <= 1 and b[1] + b[3] <= 1 for b in boxes):
        raise UserError(
            f"{path}: all boxes lie within 0..1: expected x, y, width, height in pixels"
        )


def _check_amounts(
    path: Path, images: dict[int, ImageEntry], annotations: Iterable[Annotation]
) -> None:
    """Refuse images with so many objects or such outlines that loading them would take hours."""
    objects: Counter[int] = Counter()
    outlines: Counter[int] = Counter()
    for one in annotations:
        objects[one.image_id] += not one.iscrowd
        if isinstance(one.segmentation, list):
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
        if one.image_id in long and isinstance(one.segmentation, list):
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


def _checked(
    segmentation: list[list[float] | float] | RunLengths | None,
    height: int,
    width: int,
    where: str,
) -> Segmentation | None:
    """Polygons of at least three points, or run lengths of the whole image. None: no mask. A list
    of numbers is one polygon. Raises UserError.
    """
    if isinstance(segmentation, RunLengths):
        return _compressed(segmentation, height, width, where)
    polygons = [part for part in segmentation or [] if isinstance(part, list)]
    numbers = [part for part in segmentation or [] if not isinstance(part, list)]
    if numbers and (polygons or len(numbers) < 6):
        raise UserError(f"{where}: segmentation: numbers that are no polygon")
    polygons = [numbers] if numbers else polygons
    if not any(polygons):
        return None
    if any(len(polygon) % 2 for polygon in polygons):
        raise UserError(f"{where}: segmentation: a polygon with an odd number of coordinates")
    drawn = [polygon for polygon in polygons if len(polygon) >= 6]
    return drawn or _compressed(RunLengths((height, width), [height * width]), height, width, where)


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


def bounds(segmentation: Segmentation) -> tuple[float, float, float, float]:
    """x1 y1 x2 y2 of a mask, in pixels. Those of polygons may lie outside the image. Zeros if run
    lengths hold no pixel.
    """
    if isinstance(segmentation, RunLengths):
        x, y, width, height = rle.toBbox(to_rle(segmentation, *segmentation.size)).tolist()
        return x, y, x + width, y + height
    xs, ys = ([part[first::2] for part in segmentation] for first in (0, 1))
    return min(map(min, xs)), min(map(min, ys)), max(map(max, xs)), max(map(max, ys))
