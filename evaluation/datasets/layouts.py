"""Images with label maps, in the layouts in which the usual data sets come.

Letters: N images, B those of a batch, H W a stored image's height and width, R the side of an
evaluated image, in pixels, C classes.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from evaluation.datasets.coco_classes import CLASSES as COCO_CLASSES
from evaluation.datasets.coco_classes import stuff_map_table
from evaluation.datasets.images import FolderImages, centre_square, open_image, readable
from evaluation.segment import DECODE_THREADS, Squares
from pipeline.errors import UserError
from pipeline.formats import IMAGE_SUFFIXES
from pipeline.parallel import ordered_map
from train.run.cli import CommandParser
from train.run.provenance import read_json

VOID = 255
UNKNOWN = -1

CAMVID = [
    "sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian",
    "bicyclist",
]  # fmt: skip
VOC = [
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair",
    "cow", "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa",
    "train", "tvmonitor",
]  # fmt: skip
CITYSCAPES = {
    7: "road", 8: "sidewalk", 11: "building", 12: "wall", 13: "fence", 17: "pole",
    19: "traffic light", 20: "traffic sign", 21: "vegetation", 22: "terrain", 23: "sky",
    24: "person", 25: "rider", 26: "car", 27: "truck", 28: "bus", 31: "train", 32: "motorcycle",
    33: "bicycle",
}  # fmt: skip
"""The 19 classes of the benchmark by the id in *_labelIds.png; others up to 33 are void."""
ADE20K_CLASSES = 150


@dataclass(frozen=True)
class MapKind:
    """How a label map says what is where."""

    name: str
    modes: frozenset[str]
    """PIL's, of its pixels, …"""
    pixels: str
    """… which are these."""


IDS = MapKind("label map", frozenset(("1", "L", "P", "I", "I;16")), "class ids")
SEGMENTS = MapKind("panoptic PNG", frozenset(("RGB", "RGBA")), "RGB")


class LabelMaps(Protocol):
    """The label maps of N images."""

    kind: MapKind
    paths: Sequence[Path]
    names: list[str] | None
    num_classes: int

    def load(self, i: int, height: int, width: int) -> np.ndarray:
        """Label map `i` as uint8 [H, W], void as 255. Raises UserError unless it fits the image
        and the class table.
        """


class IdMaps:
    """PNGs of one channel that hold ids; `table` int64 [256] gives each id's class, VOID or
    UNKNOWN.

    `names` is None where no table says what the ids mean: any id is a class then.
    """

    kind = IDS

    def __init__(self, paths: Sequence[Path], names: list[str] | None, table: np.ndarray) -> None:
        self.paths, self.names, self.table = paths, names, table
        self.num_classes = VOID if names is None else len(names)

    def load(self, i: int, height: int, width: int) -> np.ndarray:
        path = self.paths[i]
        image = open_label_map(path, (width, height), self.kind)
        ids = np.asarray(image).astype(np.int64)
        inside = (ids >= 0) & (ids < len(self.table))
        classes = np.where(inside, self.table[np.where(inside, ids, 0)], UNKNOWN)
        if (classes == UNKNOWN).any():
            first = int(ids[classes == UNKNOWN][0])
            raise UserError(
                f"{path}: class id {first} is not in the table of {self.num_classes} classes"
            )
        return classes.astype(np.uint8)


class PanopticMaps:
    """COCO panoptic PNGs: a segment's number is R + 256 G + 65536 B, and the JSON file says which
    category each segment has, and each category's supercategory, which is its class here.

    Panoptic labels merge some of COCO-Stuff's categories across supercategories (its rugs are
    textile and take in carpets, which are floor in COCO-Stuff), so scores on the two differ.
    """

    kind = SEGMENTS

    def __init__(self, paths: Sequence[Path], file: Path) -> None:
        self.paths, self.file = paths, file
        self.names: list[str] | None = list(COCO_CLASSES)
        self.num_classes = len(COCO_CLASSES)
        self.segments = read_panoptic(file)
        missing = [path.name for path in paths if path.name not in self.segments]
        if missing:
            raise UserError(
                f"{file}: describes {len(paths) - len(missing)} of the {len(paths)} label maps"
                f" (not {missing[0]})"
            )

    def load(self, i: int, height: int, width: int) -> np.ndarray:
        path = self.paths[i]
        image = open_label_map(path, (width, height), self.kind)
        colours = np.asarray(image.convert("RGB")).astype(np.int64)
        numbers, place = np.unique(colours @ np.array([1, 256, 65536]), return_inverse=True)
        known = self.segments[path.name]
        unknown = [n for n in numbers.tolist() if n not in known]
        if unknown:
            raise UserError(f"{path}: segment {unknown[0]} is not in {self.file}")
        classes = np.array([known[n] for n in numbers.tolist()], np.uint8)
        return classes[place].reshape(height, width)


class LabelledImages:
    """N images, each with a label map; an `ImageSource`."""

    def __init__(self, paths: list[Path], maps: LabelMaps, source: Path) -> None:
        self.paths, self.maps = paths, maps
        self.source = source
        """Where the label maps are, for messages."""
        self.label_paths = maps.paths
        self.names, self.num_classes = maps.names, maps.num_classes

    def __len__(self) -> int:
        return len(self.paths)

    def load(self, i: int) -> np.ndarray:
        """Image `i` as uint8 [H, W, 3] RGB. Raises UserError."""
        return np.asarray(open_image(self.paths[i]).convert("RGB"))

    def labels(self, i: int, height: int, width: int) -> np.ndarray:
        """Label map `i` as uint8 [H, W], void as 255. Raises UserError unless it fits the image."""
        return self.maps.load(i, height, width)

    def check_headers(self) -> None:
        """Raise UserError for the first label map that is of another kind, or of another size than
        its image, by their headers: what would else be found when it is read.
        """
        for image, labels in zip(self.paths, self.label_paths, strict=True):
            with readable(image), Image.open(image) as opened:
                size = opened.size
            with readable(labels), Image.open(labels) as opened:
                check_label_map(labels, opened, size, self.maps.kind)

    def check_labels(self) -> None:
        """Raise UserError for the first label map that cannot be used, class ids included, and
        where all of them are void: all are read.
        """

        def says_something(i: int) -> bool:
            with readable(self.paths[i]), Image.open(self.paths[i]) as image:
                width, height = image.size
            return bool((self.labels(i, height, width) != VOID).any())

        if not any([*ordered_map(says_something, range(len(self)), DECODE_THREADS)]):
            raise UserError(
                f"{self.source}: no labelled pixel to score: the label maps are all void"
            )


def square_labels(data: LabelledImages, squares: Squares, size: int) -> np.ndarray:
    """The label maps of a batch, cut as its images are, nearest: uint8 [B, R, R], R = `size`."""
    return np.stack(
        [
            centre_square(data.labels(int(i), *shape), size, Image.Resampling.NEAREST)
            for i, shape in zip(squares.index, squares.shape, strict=True)
        ]
    )


@dataclass(frozen=True)
class Layout:
    """Where a data set keeps what. `{split}` stands for train, val, …"""

    images: tuple[str, ...]
    """Folders under the root, the first that is there; empty: they have to be given."""
    labels: tuple[str, ...]
    image_ending: str = ""
    """What the name of an image without its suffix ends in, and …"""
    label_ending: str = ".png"
    """… what the label map's name has in its place."""
    listed: tuple[str, ...] = ()
    """The file under the root that lists a split."""
    labelled_only: bool = False
    """Most images that no list names have no label map, and that is no mistake."""
    names: tuple[str, ...] | None = None
    names_file: str = ""
    """A file under the root that has the names instead, where it is there: ADE20K's table."""
    ids: Callable[[], np.ndarray] | None = None
    """The table of `IdMaps`."""
    folders: Mapping[str, str] = field(default_factory=dict)
    """What `{split}` stands for where it is not the split's own name."""
    more_labels: str = ""
    """A folder beside `labels` that has the label maps which are not in it."""
    wider_lists: tuple[str, ...] = ()
    """Files beside the one that lists the split "train" which are taken in its place, or …"""
    more_listed: str = ""
    """… one which lists more of it."""


def table_of(ids: Collection[int], void: Collection[int], unknown: int = UNKNOWN) -> np.ndarray:
    """int64 [256]: the n-th of `ids` is class n; void wins."""
    table = np.full(256, unknown, np.int64)
    table[list(ids)] = np.arange(len(ids))
    table[[i for i in void if 0 <= i < len(table)]] = VOID
    return table


VOC_FOLDERS = ("", "VOC2012/", "VOCdevkit/VOC2012/")
VOC_LAYOUT = Layout(
    images=tuple(f"{folder}JPEGImages" for folder in VOC_FOLDERS),
    labels=tuple(f"{folder}SegmentationClass" for folder in VOC_FOLDERS),
    listed=tuple(f"{folder}ImageSets/Segmentation/{{split}}.txt" for folder in VOC_FOLDERS),
    labelled_only=True,
    names=tuple(VOC),
    ids=lambda: table_of(range(len(VOC)), void=(VOID,)),
)
LAYOUTS = {
    "folder": Layout(images=(), labels=()),
    "coco-stuff": Layout(
        images=("{split}2017", "images/{split}2017"),
        labels=tuple(
            f"{folder}/{{split}}2017"
            for folder in ("stuffthingmaps", "stuffthingmaps_trainval2017", "annotations")
        ),
        names=tuple(COCO_CLASSES),
        ids=lambda: stuff_map_table(UNKNOWN),
    ),
    "coco-panoptic": Layout(
        images=("{split}2017", "images/{split}2017"),
        labels=(
            "annotations/panoptic_{split}2017",
            "annotations/panoptic_{split}2017/panoptic_{split}2017",  # as the ZIP files unpack
            "panoptic_{split}2017",
        ),
        names=tuple(COCO_CLASSES),
    ),
    "camvid": Layout(
        images=("{split}",),
        labels=("{split}annot",),
        names=tuple(CAMVID),
        ids=lambda: table_of(range(len(CAMVID)), void=(len(CAMVID), VOID)),
    ),
    "cityscapes": Layout(
        images=("leftImg8bit/{split}",),
        labels=("gtFine/{split}",),
        image_ending="_leftImg8bit",
        label_ending="_gtFine_labelIds.png",
        names=tuple(CITYSCAPES.values()),
        ids=lambda: table_of(CITYSCAPES, void=[*(set(range(34)) - set(CITYSCAPES)), VOID]),
    ),
    "voc": VOC_LAYOUT,
    # The Semantic Boundaries Dataset has labels for images that VOC has not labelled.
    "voc-aug": replace(
        VOC_LAYOUT,
        more_labels="SegmentationClassAug",
        wider_lists=("train_aug.txt", "trainaug.txt"),
        more_listed="aug.txt",
    ),
    "ade20k": Layout(
        images=("images/{split}",),
        labels=("annotations/{split}",),
        folders={"train": "training", "val": "validation"},
        names=tuple(f"class {n}" for n in range(1, ADE20K_CLASSES + 1)),
        names_file="objectInfo150.txt",
        ids=lambda: table_of(range(1, ADE20K_CLASSES + 1), void=(0, VOID)),
    ),
}  # fmt: skip
KINDS = tuple(LAYOUTS)


def open_labelled(
    kind: str = "folder",
    *,
    root: Path | None = None,
    split: str = "val",
    images: Path | None = None,
    labels: Path | None = None,
    classes: Path | None = None,
    void: Collection[int] | None = None,
    listed: Path | None = None,
    section: str = "",
    part: str = "",
) -> LabelledImages:
    """Open images with label maps.

    Args:
        kind: one of KINDS; "folder" is any folder of images and one of PNGs of the same names.
        root: the data set's folder, to find images and labels in where they are not given.
        split: its part.
        images, labels: the folders themselves.
        classes: for "folder", JSON list of class names by id; without one, `find_classes`.
        void: for "folder", ids to ignore (255 where None).
        listed: file of image names or ids, one a line: only these, in its order.
        section, part: what the options are called with, in messages: --SECTIONdataset,
            --SECTIONPARTimages.

    Raises:
        UserError: where something is missing, or not of the layout.
    """
    layout = LAYOUTS[kind]
    if kind != "folder" and (classes is not None or void is not None):
        raise UserError(
            f"--{section}classes and --{section}void are for --{section}dataset folder: {kind} has"
            " its own"
        )
    lists = [] if listed is None else [listed]
    if listed is None and root is not None and layout.listed:
        lists = split_lists(kind, root, split)
    folders = []
    known = ("images", images, layout.images), ("labels", labels, layout.labels)
    for what, given, places in known:
        if given is None:
            if root is None or not places:
                instead = f" or --{section}root" if places else ""
                raise UserError(f"--{section}dataset {kind} needs --{section}{part}{what}{instead}")
            folder = layout.folders.get(split, split)
            given = under(root, places, folder, f"{what} of {kind}")  # noqa: PLW2901
        folders.append(given)
    images, labels = folders
    pairs = pair(images, labels, layout)
    if lists:
        pairs = choose(pairs, lists, images)
    check_labels(pairs, labels, some_have_none=layout.labelled_only and not lists)
    paths = [image for image, _ in pairs]
    maps = [label for _, label in pairs]
    if kind == "coco-panoptic":
        return LabelledImages(paths, PanopticMaps(maps, panoptic_file(labels)), labels)
    if layout.ids is not None and layout.names is not None:
        own = root / layout.names_file if root and layout.names_file else None
        table = read_object_info(own) if own and own.is_file() else list(layout.names)
        return LabelledImages(paths, IdMaps(maps, table, layout.ids()), labels)
    names = find_classes(classes, labels)
    ids = table_of(range(VOID if names is None else len(names)), (VOID,) if void is None else void)
    return LabelledImages(paths, IdMaps(maps, names, ids), labels)


def under(root: Path, places: Sequence[str], split: str, what: str) -> Path:
    """The first of `places` that there is. Raises UserError."""
    if not root.is_dir():
        raise UserError(f"{root}: no such folder")
    filled = [place.format(split=split) for place in places]
    found = [root / place for place in filled if (root / place).exists()]
    if not found:
        raise UserError(
            f"{root}: no {what} there: expected {' or '.join(filled)},"
            f" found {', '.join(sorted(p.name for p in root.iterdir())[:8]) or 'nothing'}"
        )
    return found[0]


def split_lists(kind: str, root: Path, split: str) -> list[Path]:
    """The files under `root` that list the split. Raises UserError."""
    layout = LAYOUTS[kind]
    first = under(root, layout.listed, split, f"list of the split {split} of {kind}")
    if not layout.more_listed or split != "train":
        return [first]
    for name in layout.wider_lists:
        if first.with_name(name).is_file():
            return [first.with_name(name)]
    second = first.with_name(layout.more_listed)
    if not second.is_file():
        wider = ", ".join(layout.wider_lists)
        raise UserError(
            f"{first.parent}: {kind} learns from the images of {wider}, or {first.name} and"
            f" {second.name}: found {first.name} alone"
        )
    return [first, second]


def pair(images: Path, labels: Path, layout: Layout) -> list[tuple[Path, Path]]:
    """All images under a folder in the order of their names, each with its label map's place."""
    more = labels.with_name(layout.more_labels) if layout.more_labels else None
    found = FolderImages(images).paths
    if not labels.is_dir():
        raise UserError(f"{labels}: no such folder")
    ending = layout.image_ending
    pairs = []
    for path in found:
        if path.stem.endswith(ending):
            name = path.stem[: len(path.stem) - len(ending)] + layout.label_ending
            place = path.relative_to(images).with_name(name)
            elsewhere = more and not (labels / place).is_file() and (more / place).is_file()
            pairs.append((path, (more if more and elsewhere else labels) / place))
    if not pairs:
        raise UserError(f"{images}: expected images called *{ending}, found {found[0].name}")
    by_label = {label: image for image, label in pairs}
    for image, label in pairs:
        if by_label[label] != image:
            other = by_label[label].name
            raise UserError(f"{labels}: {label.name} would be of both {image.name} and {other}")
    return pairs


def choose(
    pairs: list[tuple[Path, Path]], lists: Sequence[Path], images: Path
) -> list[tuple[Path, Path]]:
    """The pairs that files name, in their order: file names with or without folder and suffix, or
    COCO's ids with or without leading zeros.
    """
    listed = " and ".join(str(path) for path in lists)
    wanted = [line for path in lists for line in read_lines(path)]
    if not wanted:
        raise UserError(f"{listed}: no image named in it")
    by_name: dict[str, list[tuple[Path, Path]]] = defaultdict(list)
    for image, label in pairs:
        for name in {number(image.stem), str(image.relative_to(images).with_suffix(""))}:
            by_name[name].append((image, label))
    found = [by_name.get(stem(line)) or by_name.get(number(stem(line)), []) for line in wanted]
    missing = [line for line, some in zip(wanted, found, strict=True) if not some]
    if missing:
        raise UserError(
            f"{listed}: {len(missing)} of {len(wanted)} images are not in {images}"
            f" (the first: {missing[0]})"
        )
    several = [line for line, some in zip(wanted, found, strict=True) if len(some) > 1]
    if several:
        raise UserError(f"{listed}: {images} has several images called {several[0]}")
    chosen = [some[0] for some in found]
    if len(set(chosen)) < len(chosen):
        twice = next(image for image, _ in chosen if [i for i, _ in chosen].count(image) > 1)
        raise UserError(f"{listed}: names {twice.name} twice")
    return chosen


def read_lines(path: Path) -> list[str]:
    """The lines of a text file that are not empty. Raises UserError."""
    try:
        return [line.strip() for line in path.read_text().splitlines() if line.strip()]
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except ValueError:
        raise UserError(f"{path}: not a text file") from None


def stem(name: str) -> str:
    """A file's name, with its folder if it has one, without an image's suffix."""
    path = Path(name)
    return str(path.with_suffix("") if path.suffix.lower() in IMAGE_SUFFIXES else path)


def number(name: str) -> str:
    """A name that is a number without its leading zeros; others as they are."""
    return str(int(name)) if name.isascii() and name.isdigit() else name


def check_labels(pairs: list[tuple[Path, Path]], labels: Path, *, some_have_none: bool) -> None:
    """Raise UserError where label maps are missing; leave images out where that is no mistake."""
    there = [pair for pair in pairs if pair[1].is_file()]
    if len(there) == len(pairs):
        return
    missing = next(label for _, label in pairs if not label.is_file())
    if some_have_none and there:
        pairs[:] = there
        return
    raise UserError(
        f"{labels}: no label map for {len(pairs) - len(there)} of {len(pairs)} images"
        f" (the first: {missing.relative_to(labels)})"
    )


def open_label_map(path: Path, size: tuple[int, int], kind: MapKind) -> Image.Image:
    """The PNG at `path`. Raises UserError unless it is of the kind and has the image's `size`,
    width and height.
    """
    image = open_image(path)
    check_label_map(path, image, size, kind)
    return image


def check_label_map(path: Path, image: Image.Image, size: tuple[int, int], kind: MapKind) -> None:
    """Raise UserError as `open_label_map` does."""
    if image.size != size:
        raise UserError(
            f"{path}: label map of {image.width}×{image.height} pixels"
            f" for an image of {size[0]}×{size[1]}"
        )
    if image.mode not in kind.modes:
        raise UserError(
            f"{path}: not a {kind.name}: its pixels are {image.mode}, not {kind.pixels}"
        )


def panoptic_file(labels: Path) -> Path:
    """The JSON file of a folder of panoptic PNGs: of its name, beside it or one folder up."""
    places = [folder / f"{labels.name}.json" for folder in (labels.parent, labels.parent.parent)]
    found = [place for place in places if place.is_file()]
    if not found:
        raise UserError(f"{labels}: expected {places[0].name} beside this folder, found none")
    return found[0]


def read_panoptic(path: Path) -> dict[str, dict[int, int]]:
    """PNG name → segment number → class id (0: no segment, void). Raises UserError."""
    try:
        content = json.loads(path.read_text())
        groups = {c["id"]: c["supercategory"] for c in content["categories"]}
        unknown = [group for group in groups.values() if group not in COCO_CLASSES]
        if unknown:
            raise UserError(f"{path}: supercategory {unknown[0]!r} is none of COCO's 27")
        coarse = {category: COCO_CLASSES.index(group) for category, group in groups.items()}
        return {
            a["file_name"]: {0: VOID}
            | {s["id"]: coarse[s["category_id"]] for s in a["segments_info"]}
            for a in content["annotations"]
        }
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except UserError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: expected COCO panoptic annotations, found none ({error!r})"
        ) from None


def find_classes(given: Path | None, labels: Path) -> list[str] | None:
    """The class table: `given`, or classes.json in the labels' folder or up to two above it, or
    None.
    """
    if given is not None:
        return read_classes(given)
    folders = [labels, *labels.resolve().parents[:2]]
    found = [folder / "classes.json" for folder in folders if (folder / "classes.json").is_file()]
    return read_classes(found[0]) if found else None


def read_classes(path: Path) -> list[str]:
    """Class names, a JSON list in the order of their ids. Raises UserError if it is not that."""
    names = read_json(path)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path}: not a list of class names")
    if not 0 < len(names) <= VOID or len(set(names)) != len(names):
        raise UserError(f"{path}: needs 1 to {VOID} class names, each once")
    return names


def read_object_info(path: Path) -> list[str]:
    """ADE20K's names in the order of their ids: columns parted by tabs, a head line, the id first,
    the names last, of which we take the first. Raises UserError.
    """
    rows = [line.split("\t") for line in read_lines(path)[1:]]
    if [row[0].strip() for row in rows] != [str(n) for n in range(1, ADE20K_CLASSES + 1)]:
        raise UserError(f"{path}: expected ADE20K's table of {ADE20K_CLASSES} classes")
    return [row[-1].split(",")[0].strip() for row in rows]


def add_dataset_options(parser: CommandParser) -> None:
    """The options that `labelled_from` reads."""
    parser.add_argument("--dataset", choices=KINDS, default="folder", help="layout (folder)")
    parser.add_argument("--root", type=Path, help="the data set's folder, instead of the next two")
    parser.add_argument("--images", type=Path, help="folder of images")
    parser.add_argument("--labels", type=Path, help="folder of label PNGs of the same names")
    parser.add_argument("--split", default="val", help="part of the data set under --root (val)")
    parser.add_argument(
        "--list", type=Path, metavar="FILE", help="only these images: names or ids, one a line"
    )
    parser.add_argument(
        "--classes",
        type=Path,
        help="JSON list of class names by id (default: classes.json beside or above the labels; "
        "without one, every id in the labels is a class)",
    )
    parser.add_argument(
        "--void", type=int, nargs="+", metavar="ID", help="ids to ignore (255); for folder only"
    )


def labelled_from(args: argparse.Namespace, prefix: str = "") -> LabelledImages:
    """The data set that the options of `add_dataset_options` name; with a `prefix` as in "train-",
    the one that --train-images, --train-labels, --train-split and --train-list name. Raises
    UserError.
    """
    own = {
        name: getattr(args, f"{prefix}{name}".replace("-", "_"))
        for name in ("images", "labels", "split", "list")
    }
    return open_labelled(
        args.dataset,
        root=args.root,
        split=own["split"],
        images=own["images"],
        labels=own["labels"],
        classes=args.classes,
        void=args.void,
        listed=own["list"],
        part=prefix,
    )
