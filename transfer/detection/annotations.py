"""COCO's instance annotations as typed records: all that is read of a file, checked at once.

Letters: H W an image's stored height and width in pixels.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from faster_coco_eval import mask_api_new_cpp as runs
from faster_coco_eval.core import mask as rle

from pipeline.errors import UserError
from train.run.provenance import read_json

FARTHEST = 1e5
"""Pixels; an image's side, or a polygon's corner, beyond it would take gigabytes to draw."""
Segmentation = list[list[float]] | dict[str, Any]
"""Polygons, or run lengths as COCO's compressed text: {"size": [H, W], "counts": bytes}."""
Entry = TypeVar("Entry", "ImageEntry", "Category", "Annotation")


@dataclass(frozen=True, slots=True)
class ImageEntry:
    """An image."""

    id: int
    file_name: str
    height: int
    width: int


@dataclass(frozen=True, slots=True)
class Category:
    """A class of objects."""

    id: int
    name: str


@dataclass(frozen=True, slots=True)
class Annotation:
    """An object, or a crowd of them."""

    image_id: int
    category_id: int
    bbox: list[float]
    """x, y, width, height."""
    area: float
    crowd: bool
    segmentation: Segmentation


@dataclass(frozen=True)
class Annotations:
    """A file's content. Ids are unique, and those that objects name are there."""

    images: list[ImageEntry]
    categories: list[Category]
    """In the order of their ids."""
    objects: list[Annotation]


class _Fields:
    """The fields of one entry, by name and type. Raises UserError, naming `where` and the field."""

    def __init__(self, content: Any, where: str) -> None:
        self.content, self.where = content, where

    def whole(self, name: str) -> int:
        return self._of(name, lambda v: type(v) is int and 0 <= v < 2**63, "a whole number from 0")

    def text(self, name: str) -> str:
        return self._of(name, lambda v: isinstance(v, str) and v != "", "a text")

    def number(self, name: str) -> float:
        return float(self._of(name, _finite, "a number"))

    def box(self, name: str) -> list[float]:
        return self._of(
            name,
            lambda v: isinstance(v, list) and len(v) == 4 and all(map(_finite, v)),
            "[x, y, width, height]",
        )

    def flag(self, name: str) -> bool:
        """0 or 1; 0 where it is not there."""
        return name in self.content and bool(self._of(name, lambda v: v in (0, 1), "0 or 1"))

    def segmentation(self, name: str, height: int, width: int) -> Segmentation:
        """Polygons of fewer than three points enclose nothing and are left out."""
        value = self._of(name, lambda v: isinstance(v, dict) or _polygons(v), "RLE or polygons")
        if isinstance(value, dict):
            return self._run_lengths(value, height, width)
        polygons = [polygon for polygon in value if len(polygon) >= 6]
        return polygons or to_rle(
            {"size": [height, width], "counts": [height * width]}, height, width
        )

    def _run_lengths(self, value: dict[str, Any], height: int, width: int) -> dict[str, Any]:
        """As COCO's compressed text."""
        if value.get("size") != [height, width]:
            raise UserError(
                f"{self.where}: a mask of size {value.get('size')} for an image of"
                f" {[height, width]} (height, width)"
            )
        try:
            packed = to_rle(value, height, width)
            filled = sum(runs.toUncompressedRLE([packed])[0]["counts"])
        except (ValueError, TypeError, KeyError, RuntimeError):
            raise UserError(f"{self.where}: segmentation: not run lengths") from None
        if filled != height * width:
            raise UserError(
                f"{self.where}: segmentation: run lengths of {filled} pixels for an image of"
                f" {height * width}"
            )
        return packed

    def _of(self, name: str, good: Callable[[Any], bool], what: str) -> Any:
        if not isinstance(self.content, dict):
            raise UserError(f"{self.where} must be an object with fields, not {self.content!r:.60}")
        if name not in self.content:
            raise UserError(f"{self.where} has no {name}")
        value = self.content[name]
        if not good(value):
            raise UserError(f"{self.where}: {name} must be {what}, not {value!r:.60}")
        return value


def _finite(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _polygons(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_polygon, value))


def _polygon(value: Any) -> bool:
    """x y x y …"""
    points = isinstance(value, list) and len(value) % 2 == 0
    return points and all(_finite(v) and abs(v) <= FARTHEST for v in value)


def to_rle(segmentation: Segmentation, height: int, width: int) -> dict[str, Any]:
    """Polygons or run lengths as COCO's compressed text."""
    return rle.segmToRle(segmentation, width, height)


def encloses(segmentation: Segmentation) -> bool:
    """Whether run lengths have any pixel; polygons are taken to."""
    return not isinstance(segmentation, dict) or bool(rle.area(segmentation) > 0)


def read_annotations(path: Path) -> Annotations:
    """The file's content. Raises UserError where it is not of the format."""
    content = read_json(path)
    images = _entries(content, "images", path, _image)
    categories = _entries(content, "categories", path, _category)
    sizes = {image.id: (image.height, image.width) for image in images}
    names = {category.id for category in categories}
    for what, ids, count in (
        ("images", sizes, len(images)),
        ("categories", names, len(categories)),
    ):
        if not count:
            raise UserError(f"{path}: names no {what}")
        if len(ids) < count:
            raise UserError(f"{path}: {count - len(ids)} of {count} {what} have another's id")
    objects = _entries(content, "annotations", path, lambda fields: _object(fields, sizes))
    unknown = [o.category_id for o in objects if o.category_id not in names]
    if unknown:
        raise UserError(
            f"{path}: {len(unknown)} of {len(objects)} annotations have a category_id that is"
            f" none of its {len(names)} categories (the first: {unknown[0]})"
        )
    return Annotations(images, sorted(categories, key=lambda category: category.id), objects)


def _entries(content: Any, name: str, path: Path, read: Callable[[_Fields], Entry]) -> list[Entry]:
    entries = content.get(name) if isinstance(content, dict) else None
    if not isinstance(entries, list):
        raise UserError(f"{path}: not COCO instance annotations: has no list of {name}")
    return [read(_Fields(e, f"{path}: {name}[{n}]")) for n, e in enumerate(entries)]


def _image(fields: _Fields) -> ImageEntry:
    height, width = fields.whole("height"), fields.whole("width")
    if min(height, width) < 1 or max(height, width) > FARTHEST:
        raise UserError(f"{fields.where}: {width}×{height} pixels")
    return ImageEntry(fields.whole("id"), fields.text("file_name"), height, width)


def _category(fields: _Fields) -> Category:
    return Category(fields.whole("id"), fields.text("name"))


def _object(fields: _Fields, sizes: dict[int, tuple[int, int]]) -> Annotation:
    image = fields.whole("image_id")
    if image not in sizes:
        raise UserError(f"{fields.where} is of image {image}, which the file does not name")
    return Annotation(
        image_id=image,
        category_id=fields.whole("category_id"),
        bbox=fields.box("bbox"),
        area=fields.number("area"),
        crowd=fields.flag("iscrowd"),
        segmentation=fields.segmentation("segmentation", *sizes[image]),
    )
