"""Label maps: PNG files that say which class each pixel shows.

Letters: H W a stored image's height and width, in pixels.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from msgspec import Meta, Struct
from PIL import Image

from evaluation.datasets.coco_classes import CLASSES as COCO_CLASSES
from pipeline.errors import UserError, printable
from pipeline.images import named, open_stored, read_file
from train.run.json_file import read_json

VOID = 255
"""Class id of a pixel that has no class: it counts neither in training nor in scores."""
UNKNOWN = -1
"""Class of an id that the data set does not define: an error in the label map."""
PANOPTIC_BYTES = 1 << 30
"""Bytes of a file of panoptic annotations; COCO's largest has a third. Reading takes up to 8 times
as much memory."""
_Number = Annotated[int, Meta(ge=0, lt=2**24)]
_Names = Annotated[list[Annotated[str, Meta(max_length=999)]], Meta(min_length=1, max_length=VOID)]


class _Category(Struct):
    id: _Number
    supercategory: str


class _Segment(Struct):
    id: _Number
    category_id: _Number


class _Map(Struct):
    file_name: str
    segments_info: list[_Segment]


class _Panoptic(Struct):
    categories: list[_Category]
    annotations: list[_Map]


@dataclass(frozen=True)
class MapKind:
    """How a label map stores its classes."""

    name: str
    modes: frozenset[str]
    """PIL modes that such a file can have."""
    pixels: str
    """The meaning of a pixel, for messages."""

    def check(self, path: Path, image: Image.Image, size: tuple[int, int]) -> None:
        """Raise UserError unless `image`, read from `path`, is of this kind and has the `size`
        (width, height) of its photograph. Reads only the header.
        """
        if image.size != size:
            raise UserError(
                f"{path}: label map of {image.width}×{image.height} pixels"
                f" for an image of {size[0]}×{size[1]}"
            )
        if image.mode not in self.modes:
            raise UserError(
                f"{path}: not a {self.name}: its pixels are {image.mode}, not {self.pixels}"
            )

    def check_header(self, path: Path, size: tuple[int, int]) -> None:
        """Raise UserError where `check` does. Decodes no pixels."""
        with named(path):
            image = open_stored(read_file(path))
        self.check(path, image, size)

    def open(self, path: Path, size: tuple[int, int]) -> Image.Image:
        """The decoded label map at `path`. Raises UserError where `check` does."""
        with named(path):
            image = open_stored(read_file(path))
            self.check(path, image, size)
            image.load()
        return image


class IdReader:
    """Reads PNGs of one channel of ids. `table` int64 [256] gives each id's class, VOID or UNKNOWN.

    `names` are the classes' names by class id; None if nothing names them.
    """

    kind = MapKind("label map", frozenset(("1", "L", "P", "I", "I;16")), "class ids")

    def __init__(self, names: Sequence[str] | None, table: np.ndarray) -> None:
        self.names, self.table = None if names is None else list(names), table
        self.num_classes = VOID if names is None else len(names)

    def read(self, path: Path, height: int, width: int) -> np.ndarray:
        """The label map at `path` as uint8 [H, W] class ids, void as 255. Raises UserError if its
        size is not the image's or an id has no class.
        """
        ids = np.asarray(self.kind.open(path, (width, height))).astype(np.int64)
        inside = (ids >= 0) & (ids < len(self.table))
        classes = np.where(inside, self.table[np.where(inside, ids, 0)], UNKNOWN)
        if (classes == UNKNOWN).any():
            first = int(ids[classes == UNKNOWN][0])
            raise UserError(
                f"{path}: class id {first} is not in the table of {self.num_classes} classes"
            )
        return classes.astype(np.uint8)


class PanopticReader:
    """Reads COCO panoptic PNGs: the number of a segment is R + 256 G + 65536 B.

    A JSON `file` gives the category of each segment and the supercategory of each category. The
    supercategory is the class here. Panoptic labels merge some of COCO-Stuff's categories across
    supercategories (rug is textile and includes carpet, which is floor in COCO-Stuff). Scores on
    the two data sets therefore differ.
    """

    kind = MapKind("panoptic PNG", frozenset(("RGB", "RGBA")), "RGB")

    def __init__(self, file: Path, paths: Sequence[Path]) -> None:
        """Raises UserError unless `file` describes all label maps in `paths`."""
        self.file, self.segments = file, read_panoptic(file)
        self.names, self.num_classes = list(COCO_CLASSES), len(COCO_CLASSES)
        missing = [path.name for path in paths if path.name not in self.segments]
        if missing:
            raise UserError(
                f"{file}: describes {len(paths) - len(missing)} of the {len(paths)} label maps"
                f" (not {missing[0]})"
            )

    def read(self, path: Path, height: int, width: int) -> np.ndarray:
        """As `IdReader.read`."""
        image = self.kind.open(path, (width, height))
        colours = np.asarray(image.convert("RGB")).astype(np.int64)
        numbers, position = np.unique(colours @ np.array([1, 256, 65536]), return_inverse=True)
        class_of = self.segments[path.name]
        unknown = [n for n in numbers.tolist() if n not in class_of]
        if unknown:
            raise UserError(f"{path}: segment {unknown[0]} is not in {self.file}")
        classes = np.array([class_of[n] for n in numbers.tolist()], np.uint8)
        return classes[position].reshape(height, width)


LabelReader = IdReader | PanopticReader


def table_of(ids: Collection[int], void: Collection[int]) -> np.ndarray:
    """int64 [256], the table of an `IdReader`: the n-th of `ids` is class n. An id that is also in
    `void` is void. All other ids are UNKNOWN.
    """
    table = np.full(256, UNKNOWN, np.int64)
    table[list(ids)] = np.arange(len(ids))
    table[[i for i in void if 0 <= i < len(table)]] = VOID
    return table


def read_panoptic(path: Path) -> dict[str, dict[int, int]]:
    """PNG name → segment number → class id (segment 0 is void). Raises UserError."""
    content = read_json(path, _Panoptic, PANOPTIC_BYTES, "COCO panoptic annotations")
    coarse = {}
    for category in content.categories:
        if category.supercategory not in COCO_CLASSES:
            group = category.supercategory[:99]
            raise UserError(f"{path}: supercategory {group!r} is none of COCO's 27")
        coarse[category.id] = COCO_CLASSES.index(category.supercategory)
    maps: dict[str, dict[int, int]] = {}
    for one in content.annotations:
        unknown = [s.category_id for s in one.segments_info if s.category_id not in coarse]
        if unknown or one.file_name in maps:
            fault = f"no category {unknown[0]}" if unknown else "its name is there twice"
            raise UserError(f"{path}: annotation of {printable(one.file_name)}: {fault}")
        maps[one.file_name] = {0: VOID} | {s.id: coarse[s.category_id] for s in one.segments_info}
    return maps


def find_classes(given: Path | None, labels: Path) -> list[str] | None:
    """Class names from the file `given`, or from classes.json in the folder `labels` or one of the
    two folders above it. None if there is no such file. Raises UserError.
    """
    if given is not None:
        return read_classes(given)
    files = [folder / "classes.json" for folder in (labels, *labels.resolve().parents[:2])]
    return next((read_classes(file) for file in files if file.is_file()), None)


def read_classes(path: Path) -> list[str]:
    """Class names by id: a JSON list. Raises UserError for anything else."""
    names = read_json(path, _Names, what=f"a list of 1 to {VOID} class names")
    if len(set(names)) != len(names):
        raise UserError(f"{path}: a class name is there twice")
    return names
