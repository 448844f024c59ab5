"""COCO's instance annotations as typed records, checked when they are read.

Letters: H W an image's stored height and width in pixels.
"""

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from faster_coco_eval import mask_api_new_cpp as runs
from faster_coco_eval.core import mask as rle
from msgspec import Meta, Struct

from pipeline.errors import UserError
from train.run.provenance import read_json

FARTHEST = 100_000
"""Pixels. Drawing a larger image, or a polygon with a corner farther out, would take gigabytes."""
_Id = Annotated[int, Meta(ge=0, le=2**63 - 1)]
_Text = Annotated[str, Meta(min_length=1)]
_Side = Annotated[int, Meta(ge=1, le=FARTHEST)]
_Finite = Annotated[float, Meta(ge=-sys.float_info.max, le=sys.float_info.max)]
_Corner = Annotated[float, Meta(ge=-FARTHEST, le=FARTHEST)]
Segmentation = Annotated[list[list[_Corner]], Meta(min_length=1)] | dict[str, Any]
"""Polygons, x y x y …; or run lengths, {"size": [H, W], "counts": …}. `read_annotations` returns
run lengths as COCO's compressed text.
"""


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
    bbox: Annotated[list[_Finite], Meta(min_length=4, max_length=4)]
    """x, y, width, height."""
    area: _Finite
    segmentation: Segmentation
    iscrowd: Literal[0, 1] | bool = 0


class Annotations(Struct):
    """A file's content. Ids are unique. Each annotation is of an image and a category that the
    file lists.
    """

    images: list[ImageEntry]
    categories: list[Category]
    """In the order of their ids."""
    annotations: list[Annotation]


def read_annotations(path: Path) -> Annotations:
    """The file's content. Raises UserError if it is not of the format."""
    content = _decoded(path)
    images = {image.id: image for image in content.images}
    categories = {category.id for category in content.categories}
    _check_unique(path, "images", len(images), len(content.images))
    _check_unique(path, "categories", len(categories), len(content.categories))
    for number, one in enumerate(content.annotations):
        where = f"{path}: annotations[{number}]"
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
    content.categories.sort(key=lambda category: category.id)
    return content


def _decoded(path: Path) -> Annotations:
    try:
        return msgspec.json.decode(path.read_text(), type=Annotations)
    except (OSError, UnicodeDecodeError, msgspec.DecodeError):
        content = read_json(path)  # slower, but names the entry that is NaN, which is no JSON
    try:
        return msgspec.convert(content, Annotations)
    except msgspec.ValidationError as error:
        raise UserError(f"{path}: not COCO instance annotations: {error}") from None


def _check_unique(path: Path, entries: str, ids: int, count: int) -> None:
    if not count:
        raise UserError(f"{path}: lists no {entries}")
    if ids < count:
        raise UserError(f"{path}: {count - ids} of {count} {entries} repeat an id")


def _checked(segmentation: Segmentation, height: int, width: int, where: str) -> Segmentation:
    """Polygons of at least three points, or run lengths of the whole image. Raises UserError."""
    if isinstance(segmentation, dict):
        return _compressed(segmentation, height, width, where)
    if any(len(polygon) % 2 for polygon in segmentation):
        raise UserError(f"{where}: segmentation: a polygon with an odd number of coordinates")
    polygons = [polygon for polygon in segmentation if len(polygon) >= 6]
    empty = {"size": [height, width], "counts": [height * width]}
    return polygons or to_rle(empty, height, width)


def _compressed(run_lengths: dict[str, Any], height: int, width: int, where: str) -> dict[str, Any]:
    """The run lengths as COCO's compressed text. Raises UserError."""
    size = run_lengths.get("size")
    if size != [height, width]:
        raise UserError(
            f"{where}: a mask of size {size} for an image of {[height, width]} (height, width)"
        )
    try:
        packed = to_rle(run_lengths, height, width)
        filled = sum(runs.toUncompressedRLE([packed])[0]["counts"])
    except (ValueError, TypeError, KeyError, RuntimeError):
        raise UserError(f"{where}: segmentation: not run lengths") from None
    if filled != height * width:
        raise UserError(
            f"{where}: segmentation: run lengths of {filled} pixels for an image of"
            f" {height * width}"
        )
    return packed


def to_rle(segmentation: Segmentation, height: int, width: int) -> dict[str, Any]:
    """Polygons or run lengths as COCO's compressed text."""
    return rle.segmToRle(segmentation, width, height)


def encloses(segmentation: Segmentation) -> bool:
    """Whether run lengths hold any pixel. Polygons are assumed to."""
    return not isinstance(segmentation, dict) or bool(rle.area(segmentation) > 0)
