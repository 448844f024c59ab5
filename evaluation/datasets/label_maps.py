"""Label maps: PNG files that say which class each pixel shows.

Letters: H W a stored image's height and width, in pixels.
"""

import io
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from msgspec import Meta, Struct
from PIL import Image

from evaluation.datasets.coco_classes import CLASSES as COCO_CLASSES
from evaluation.datasets.coco_classes import PANOPTIC_DROPS, PANOPTIC_MOVES
from evaluation.datasets.numbering import Numbering
from evaluation.datasets.stored_ids import MODES, REMEDY, has_channels, ids_of, palette_of
from pipeline.errors import UserError, printable
from pipeline.images import named, open_stored, read_file
from pipeline.png import read_png
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

    def open(self, path: Path, size: tuple[int, int]) -> tuple[Image.Image, int]:
        """The label map at `path`, not yet decoded, and the bits of a channel.

        Raises UserError unless it is a PNG of this kind that has the `size` (width, height) of its
        photograph.
        """
        with named(path):
            data = read_file(path)
            image = open_stored(data)
        if image.size != size:
            raise UserError(
                f"{path}: label map of {image.width}×{image.height} pixels"
                f" for an image of {size[0]}×{size[1]}"
            )
        if image.format != "PNG":
            raise UserError(f"{path}: not a {self.name}: a {image.format} file, not a PNG")
        if image.mode not in self.modes:
            raise UserError(
                f"{path}: not a {self.name}: its pixels are {image.mode}, not {self.pixels}"
            )
        return image, read_png(io.BytesIO(data)).bits


class IdReader:
    """Reads PNGs of ids. `table` int64 [256] gives each id's class, VOID or UNKNOWN.

    `names` are the classes' names by class id; None if nothing names them. `colours` as in
    `stored_ids.ids_of`. `others` are numberings that such maps are often in, instead of this one.
    """

    kind = MapKind("label map", MODES, "class ids")

    def __init__(
        self,
        names: Sequence[str] | None,
        table: np.ndarray,
        *,
        colours: np.ndarray | None = None,
        others: Sequence[Numbering] = (),
    ) -> None:
        self.names, self.table = None if names is None else list(names), table
        self.num_classes = VOID if names is None else len(names)
        self.colours, self.others = colours, others
        self.seen = np.zeros(len(table), bool)
        """Ids in the label maps that were read so far."""
        self._palettes: dict[int, tuple[tuple[int, ...], Path]] = {}

    def check_header(self, path: Path, size: tuple[int, int]) -> None:
        """Raise UserError if the label map at `path` is no PNG of ids, or has not the `size`
        (width, height) of its photograph. Decodes pixels only of a file of several channels.
        """
        image, bits = self.kind.open(path, size)
        if has_channels(image):
            self._ids(path, image, bits)

    def read(self, path: Path, height: int, width: int) -> np.ndarray:
        """The label map at `path` as uint8 [H, W] class ids, void as 255. Raises UserError if its
        size is not the image's, an id has no class, or its pixels are no ids or ambiguous.
        """
        ids = self._ids(path, *self.kind.open(path, (width, height)))
        used = np.flatnonzero(np.bincount(ids.ravel()))
        inside = used[used < len(self.table)]
        unknown = [*inside[self.table[inside] == UNKNOWN], *used[len(inside) :]]
        if unknown:
            first = int(unknown[0])
            hint = next((f": {other.advice}" for other in self.others if first in other.ids), "")
            raise UserError(
                f"{path}: class id {first} is not in the table of {self.num_classes} classes{hint}"
            )
        self.seen[inside] = True
        return self.table.astype(np.uint8)[ids]

    def notes(self) -> list[str]:
        """What is odd about the ids of all label maps that were read: a line each."""
        seen = np.flatnonzero(self.seen).tolist()
        notes = [note for other in self.others if (note := other.suspected(seen))]
        classes = [c for c in np.unique(self.table[seen]).tolist() if c != VOID]
        names = self.names or [f"class {c}" for c in range(self.num_classes)]
        if len(classes) == 1 or (self.names and 0 < 2 * len(classes) <= len(names)):
            some = ", ".join(names[c] for c in classes[:5]) + ", …" * (len(classes) > 5)
            notes.append(f"the labels show only {len(classes)} of {len(names)} classes: {some}")
        return notes

    def _ids(self, path: Path, image: Image.Image, bits: int) -> np.ndarray:
        with named(path):
            ids = ids_of(image, bits, self.table != UNKNOWN, self.colours)
        if image.mode == "P" and self.colours is None:
            self._check_palette(path, image, ids)
        return ids

    def _check_palette(self, path: Path, image: Image.Image, ids: np.ndarray) -> None:
        """Raise UserError if an id has another colour than in an earlier label map: a program that
        made one of them smaller has renumbered its palette, and the ids are lost.
        """
        palette = palette_of(image)
        if (palette == palette[:, :1]).all():
            return
        for i in np.flatnonzero(np.bincount(ids.ravel(), minlength=len(palette))).tolist():
            colour = tuple(palette[i].tolist()) if i < len(palette) else ()
            first, other = self._palettes.setdefault(i, (colour, path))
            if first != colour:
                raise UserError(
                    f"{path}: palette colour {i} is {colour}, in {other.name} {first}: its colours"
                    f" were renumbered: {REMEDY}"
                )


class PanopticReader:
    """Reads COCO panoptic PNGs: the number of a segment is R + 256 G + 65536 B.

    A JSON `file` gives the category of each segment and the supercategory of each category. The
    supercategory is the class here; those that are not in `names` are void. Panoptic labels merge
    some of COCO-Stuff's categories across supercategories (`PANOPTIC_MOVES`: rug is textile and
    includes carpet, which is floor in COCO-Stuff) and drop others. Scores on the two data sets
    therefore differ.
    """

    kind = MapKind("panoptic PNG", frozenset(("RGB", "RGBA", "P", "L", "1")), "RGB")

    def __init__(
        self, file: Path, paths: Sequence[Path], names: Sequence[str] = COCO_CLASSES
    ) -> None:
        """Raises UserError unless `file` describes all label maps in `paths`."""
        self.file, self.segments = file, read_panoptic(file, names)
        self.names, self.num_classes = list(names), len(names)
        missing = [path.name for path in paths if path.name not in self.segments]
        if missing:
            raise UserError(
                f"{file}: describes {len(paths) - len(missing)} of the {len(paths)} label maps"
                f" (not {missing[0]})"
            )

    def check_header(self, path: Path, size: tuple[int, int]) -> None:
        """As `IdReader.check_header`, without decoding pixels."""
        self.kind.open(path, size)

    def read(self, path: Path, height: int, width: int) -> np.ndarray:
        """As `IdReader.read`. The colours count, also those of a palette or of greys."""
        image, _ = self.kind.open(path, (width, height))
        with named(path):
            colours = np.asarray(image.convert("RGB")).astype(np.int64)
        numbers, position = np.unique(colours @ np.array([1, 256, 65536]), return_inverse=True)
        class_of = self.segments[path.name]
        unknown = [n for n in numbers.tolist() if n not in class_of]
        if unknown and image.mode in ("1", "L"):
            raise UserError(f"{path}: not a panoptic PNG: its pixels are {image.mode}, not RGB")
        if unknown:
            raise UserError(f"{path}: segment {unknown[0]} is not in {self.file}")
        classes = np.array([class_of[n] for n in numbers.tolist()], np.uint8)
        return classes[position].reshape(height, width)

    def notes(self) -> list[str]:
        """How the 27 classes differ from COCO-Stuff's."""
        if self.names != COCO_CLASSES:
            return []
        moved = ", ".join(f"{name} to {group}" for name, group in PANOPTIC_MOVES.items())
        dropped = ", ".join(PANOPTIC_DROPS)
        return [
            f"panoptic labels move {len(PANOPTIC_MOVES)} categories of COCO-Stuff ({moved}) and"
            f" make {len(PANOPTIC_DROPS)} void ({dropped}): scores differ from coco-stuff's"
        ]


LabelReader = IdReader | PanopticReader


def table_of(ids: Collection[int], void: Collection[int]) -> np.ndarray:
    """int64 [256], the table of an `IdReader`: the n-th of `ids` is class n. An id that is also in
    `void` is void. All other ids are UNKNOWN.
    """
    table = np.full(256, UNKNOWN, np.int64)
    table[list(ids)] = np.arange(len(ids))
    table[[i for i in void if 0 <= i < len(table)]] = VOID
    return table


def read_panoptic(path: Path, names: Sequence[str] = COCO_CLASSES) -> dict[str, dict[int, int]]:
    """PNG name → segment number → class id among `names` (segment 0, and supercategories of COCO's
    that are not there, are void). Raises UserError.
    """
    content = read_json(path, _Panoptic, PANOPTIC_BYTES, "COCO panoptic annotations")
    coarse = {}
    for category in content.categories:
        if category.supercategory not in COCO_CLASSES:
            group = category.supercategory[:99]
            raise UserError(f"{path}: supercategory {group!r} is none of COCO's 27")
        group = category.supercategory
        coarse[category.id] = names.index(group) if group in names else VOID
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
