"""How each data set stores its images and label maps: one function a data set.

A new data set is a new function, added to `LAYOUTS`. Each function turns a `Request` into
`LabelledImages` and raises UserError if the files are not in its layout.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from evaluation.datasets.coco_classes import CLASSES as COCO_CLASSES
from evaluation.datasets.coco_classes import (
    STUFF_15,
    THINGS_12,
    coarse_classes,
    stuff_15_table,
    stuff_map_table,
)
from evaluation.datasets.label_maps import (
    UNKNOWN,
    VOID,
    IdReader,
    PanopticReader,
    find_classes,
    table_of,
)
from evaluation.datasets.labelled_images import LabelledImages
from evaluation.datasets.numbering import Numbering
from evaluation.datasets.pairs import Pair, pair, read_lines, select
from evaluation.datasets.stored_ids import voc_colours
from pipeline.errors import UserError
from pipeline.folders import require_root, say_taken

CAMVID = [
    "sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian",
    "bicyclist",
]  # fmt: skip
VOC = [
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair",
    "cow", "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa",
    "train", "tvmonitor",
]  # fmt: skip
VOC_FOLDERS = ("", "VOC2012/", "VOCdevkit/VOC2012/")
"""Where VOC's folders can be, below the root."""
CITYSCAPES = {
    7: "road", 8: "sidewalk", 11: "building", 12: "wall", 13: "fence", 17: "pole",
    19: "traffic light", 20: "traffic sign", 21: "vegetation", 22: "terrain", 23: "sky",
    24: "person", 25: "rider", 26: "car", 27: "truck", 28: "bus", 31: "train", 32: "motorcycle",
    33: "bicycle",
}  # fmt: skip
"""The benchmark's 19 classes by their id in *_labelIds.png. Other ids up to 33 are void."""
CITYSCAPES_27 = [
    "road", "sidewalk", "parking", "rail track", "building", "wall", "fence", "guard rail",
    "bridge", "tunnel", "pole", "polegroup", "traffic light", "traffic sign", "vegetation",
    "terrain", "sky", "person", "rider", "car", "truck", "bus", "caravan", "trailer", "train",
    "motorcycle", "bicycle",
]  # fmt: skip
"""Ids 7 to 33 of *_labelIds.png, which unsupervised methods score."""
ADE20K_CLASSES = 150
CONTEXT = [
    "aeroplane", "bag", "bed", "bedclothes", "bench", "bicycle", "bird", "boat", "book", "bottle",
    "building", "bus", "cabinet", "car", "cat", "ceiling", "chair", "cloth", "computer", "cow",
    "cup", "curtain", "dog", "door", "fence", "floor", "flower", "food", "grass", "ground",
    "horse", "keyboard", "light", "motorbike", "mountain", "mouse", "person", "plate", "platform",
    "pottedplant", "road", "rock", "sheep", "shelves", "sidewalk", "sign", "sky", "snow", "sofa",
    "table", "track", "train", "tree", "truck", "tvmonitor", "wall", "water", "window", "wood",
]  # fmt: skip
"""The 59 classes of PASCAL Context, ids 1 to 59 of its maps; 0 is background."""
CONTEXT_FOLDERS = ("", "VOC2010/", "VOCdevkit/VOC2010/")


@dataclass(frozen=True)
class Request:
    """One part of a data set, as a user names it."""

    kind: str
    """Name of the layout, one of `LAYOUTS`."""
    root: Path | None
    """Folder of the data set, where images and labels are found unless they are given."""
    split: str
    """Part of the data set: train, val, …"""
    images: Path | None
    labels: Path | None
    """Folders of images and label maps, in place of those below `root`."""
    classes: Path | None
    """Only for "folder": JSON list of class names by id. None: see `find_classes`."""
    void: Collection[int] | None
    """Only for "folder": ids to ignore. None: 255."""
    lists: Sequence[Path]
    """Files of image names or ids, one a line: only these images, in this order."""
    section: str
    part: str
    """Prefixes of the options in messages: --SECTIONdataset, --SECTIONPARTimages."""

    def folder(self, name: Literal["images", "labels"], below_root: Sequence[str]) -> Path:
        """The given folder of this name, or the first of `below_root` that exists."""
        given = self.images if name == "images" else self.labels
        if given is not None:
            return given
        if self.root is None or not below_root:
            alternative = f" or --{self.section}root" if below_root else ""
            raise UserError(
                f"--{self.section}dataset {self.kind} needs --{self.section}{self.part}{name}"
                f"{alternative}"
            )
        return first_existing(self.root, below_root, f"{name} of {self.kind}")

    def pairs(
        self, images: Sequence[str], labels: Sequence[str], *endings: str
    ) -> tuple[list[Pair], Path]:
        """Images with their label maps, only the listed ones if there are lists, and the folder of
        the label maps. `images`, `labels`: possible folders below the root; `endings` as in `pair`.
        """
        image_folder, label_folder = self.folder("images", images), self.folder("labels", labels)
        pairs = pair(image_folder, label_folder, *endings)
        if self.lists:
            pairs = select(pairs, self.lists, image_folder)
            say_taken(len(pairs), self.lists)
        return pairs, label_folder


def first_existing(root: Path, names: Sequence[str], purpose: str) -> Path:
    """The first of `names` that exists below `root`. Raises UserError if none does."""
    require_root(root)
    for name in names:
        if (root / name).exists():
            return root / name
    raise UserError(
        f"{root}: no {purpose} there: expected {' or '.join(names)},"
        f" found {', '.join(sorted(p.name for p in root.iterdir())[:8]) or 'nothing'}"
    )


def folder(request: Request) -> LabelledImages:
    """Any folder of images, and any folder of PNGs of the same names that hold class ids."""
    pairs, labels = request.pairs((), ())
    names = find_classes(request.classes, labels)
    ids = range(VOID if names is None else len(names))
    void = (VOID,) if request.void is None else request.void
    others = []
    if names is not None and 0 not in void:
        advice = f"class ids run from 0 to {len(names) - 1}; are these numbered from 1?"
        wrong = frozenset((*range(1, len(names) + 1), *void))
        others = [Numbering(wrong, advice, expected=frozenset((0,)))]
    return LabelledImages(pairs, IdReader(names, table_of(ids, void), others=others), labels)


def coco_stuff(request: Request) -> LabelledImages:
    """COCO-Stuff: ROOT/val2017/*.jpg and ROOT/stuffthingmaps/val2017/*.png, in 27 classes. The maps
    hold COCO's ids minus 1, and 255 for void.
    """
    other = Numbering(
        frozenset((0, *coarse_classes())),
        "maps numbered 1 to 182, with 0 for void, need dataset coco-stuff-182",
        expected=frozenset((VOID,)),
    )
    return _coco_stuff(request, stuff_map_table(UNKNOWN), other)


def coco_stuff_182(request: Request) -> LabelledImages:
    """COCO-Stuff whose maps hold COCO's ids, 1 to 182, and 0 for void."""
    other = Numbering(
        frozenset((VOID, *(number - 1 for number in coarse_classes()))),
        "maps numbered 0 to 181, with 255 for void, need dataset coco-stuff",
        expected=frozenset((0,)),
    )
    table = np.roll(stuff_map_table(UNKNOWN), 1)
    return _coco_stuff(request, table, other)


def _coco_stuff(request: Request, table: np.ndarray, other: Numbering) -> LabelledImages:
    part = f"{request.split}2017"
    folders = ("stuffthingmaps", "stuffthingmaps_trainval2017", "annotations")
    pairs, labels = request.pairs((part, f"images/{part}"), [f"{name}/{part}" for name in folders])
    return LabelledImages(pairs, IdReader(COCO_CLASSES, table, others=[other]), labels)


def coco_stuff_15(request: Request) -> LabelledImages:
    """The 15 classes of stuff; things are void. The maps are COCO's own, ROOT/annotations/
    stuff_val2017_pixelmaps/*.png, or those of COCO-Stuff, ROOT/stuffthingmaps/val2017/*.png.
    """
    part = f"{request.split}2017"
    maps = f"stuff_{part}_pixelmaps"
    above = ("annotations/", "", "annotations/stuff_annotations/", "stuff_annotations/")
    folders = [*(f"{up}{maps}" for up in above), f"stuffthingmaps/{part}"]
    pairs, labels = request.pairs((part, f"images/{part}"), folders)
    less_one = "pixelmaps" not in labels.name
    reader = IdReader(STUFF_15, stuff_15_table(UNKNOWN, less_one))
    return LabelledImages(pairs, reader, labels)


def coco_things_12(request: Request) -> LabelledImages:
    """The 12 classes of things in COCO's panoptic labels; stuff is void."""
    return coco_panoptic(request, THINGS_12)


def coco_panoptic(request: Request, names: Sequence[str] = COCO_CLASSES) -> LabelledImages:
    """COCO panoptic: ROOT/val2017/*.jpg, ROOT/annotations/panoptic_val2017/*.png and the JSON file
    of this name beside that folder or one folder up, in 27 classes.
    """
    part = f"{request.split}2017"
    folders = (
        f"annotations/panoptic_{part}",
        f"annotations/panoptic_{part}/panoptic_{part}",  # as the ZIP files unpack
        f"panoptic_{part}",
    )
    pairs, labels = request.pairs((part, f"images/{part}"), folders)
    for parent in (labels.parent, labels.parent.parent):
        file = parent / f"{labels.name}.json"
        if file.is_file():
            reader = PanopticReader(file, [label for _, label in pairs], names)
            return LabelledImages(pairs, reader, labels)
    raise UserError(f"{labels}: expected {labels.name}.json beside this folder, found none")


def camvid(request: Request) -> LabelledImages:
    """CamVid (SegNet's split): ROOT/val/*.png and ROOT/valannot/*.png; id 11 is void."""
    pairs, labels = request.pairs([request.split], [f"{request.split}annot"])
    table = table_of(range(len(CAMVID)), void=(len(CAMVID), VOID))
    others = [Numbering(frozenset((len(CAMVID) + 1,)), "ids run from 0 (sky) to 11 (void)")]
    return LabelledImages(pairs, IdReader(CAMVID, table, others=others), labels)


def cityscapes(request: Request) -> LabelledImages:
    """Cityscapes: ROOT/leftImg8bit/val/CITY/*_leftImg8bit.png and ROOT/gtFine/val/CITY/
    *_gtFine_labelIds.png, in the benchmark's 19 classes.
    """
    return _cityscapes(request, CITYSCAPES)


def cityscapes_27(request: Request) -> LabelledImages:
    """Cityscapes, in the 27 classes that unsupervised methods score."""
    return _cityscapes(request, dict(enumerate(CITYSCAPES_27, start=7)))


def _cityscapes(request: Request, classes: dict[int, str]) -> LabelledImages:
    folders = [f"leftImg8bit/{request.split}"], [f"gtFine/{request.split}"]
    pairs, labels = request.pairs(*folders, "_leftImg8bit", "_gtFine_labelIds.png")
    table = table_of(classes, void=[*(set(range(34)) - set(classes)), VOID])
    train_ids = Numbering(
        frozenset((*range(len(CITYSCAPES)), VOID)),
        "train ids (0 to 18) in place of label ids (0 to 33)?",
        expected=frozenset(range(len(CITYSCAPES), 34)),
    )
    reader = IdReader([*classes.values()], table, others=[train_ids])
    return LabelledImages(pairs, reader, labels)


def voc(request: Request, more_labels: str = "") -> LabelledImages:
    """Pascal VOC: ROOT/JPEGImages/*.jpg, ROOT/SegmentationClass/*.png, and the images of a split in
    ROOT/ImageSets/Segmentation/val.txt. ROOT can also be a folder of `VOC_FOLDERS` above these.

    Without a list, takes all images that have a label map. A label map that VOC lacks is taken from
    the folder `more_labels` beside VOC's.
    """
    if not request.lists and request.root is not None:
        request = replace(request, lists=[_voc_list(request.root, request)])
    images = [f"{up}JPEGImages" for up in VOC_FOLDERS]
    pairs, labels = request.pairs(images, [f"{up}SegmentationClass" for up in VOC_FOLDERS])
    if more_labels:
        others = [labels.with_name(more_labels) / label.name for _, label in pairs]
        pairs = [
            (image, other if other.is_file() and not label.is_file() else label)
            for (image, label), other in zip(pairs, others, strict=True)
        ]
    if not request.lists:
        pairs = [each for each in pairs if each[1].is_file()] or pairs
    advice = "VOC's maps hold 0 (background) to 20, and 255 for void; are these numbered from 1?"
    ids, void = range(1, len(VOC) + 1), frozenset((VOID,))
    numberings = [Numbering(void.union(ids), advice, expected=frozenset((0,)))]
    if not more_labels:  # the Semantic Boundaries Dataset marks no borders as void
        numberings.append(Numbering(frozenset((0, *ids)), advice, expected=void))
    table = table_of(range(len(VOC)), (VOID,))
    reader = IdReader(VOC, table, colours=voc_colours(), others=numberings)
    return LabelledImages(pairs, reader, labels)


def voc_aug(request: Request) -> LabelledImages:
    """VOC, with label maps of the Semantic Boundaries Dataset for images that VOC has not labelled
    in ROOT/SegmentationClassAug. A file beside VOC's train.txt lists the larger training set.
    """
    if not request.lists and request.root is not None and request.split == "train":
        first, wider = _voc_list(request.root, request), ("train_aug.txt", "trainaug.txt")
        lists = [path for path in map(first.with_name, wider) if path.is_file()][:1]
        if not lists and not first.with_name("aug.txt").is_file():
            raise UserError(
                f"{first.parent}: voc-aug learns from the images of {', '.join(wider)}, or"
                f" {first.name} and aug.txt: found {first.name} alone"
            )
        request = replace(request, lists=lists or [first, first.with_name("aug.txt")])
    return voc(request, more_labels="SegmentationClassAug")


def _voc_list(root: Path, request: Request) -> Path:
    """VOC's list of the split. Raises UserError."""
    names = [f"{up}ImageSets/Segmentation/{request.split}.txt" for up in VOC_FOLDERS]
    purpose = f"list of the split {request.split} of {request.kind}"
    return first_existing(root, names, purpose)


def pascal_context(request: Request) -> LabelledImages:
    """PASCAL Context: ROOT/JPEGImages/*.jpg, ROOT/SegmentationClassContext/*.png of ids 0 to 59,
    and the images of a split in ROOT/ImageSets/SegmentationContext/val.txt, in 59 classes;
    background is void. ROOT can also be a folder of `CONTEXT_FOLDERS` above these.
    """
    return _pascal_context(request, background=False)


def pascal_context_60(request: Request) -> LabelledImages:
    """PASCAL Context with background as a class."""
    return _pascal_context(request, background=True)


def _pascal_context(request: Request, *, background: bool) -> LabelledImages:
    if not request.lists and request.root is not None:
        lists = [f"{up}ImageSets/SegmentationContext/{request.split}.txt" for up in CONTEXT_FOLDERS]
        purpose = f"list of the split {request.split} of {request.kind}"
        request = replace(request, lists=[first_existing(request.root, lists, purpose)])
    images, labels = "JPEGImages", "SegmentationClassContext"
    pairs, folder = request.pairs(
        [f"{up}{images}" for up in CONTEXT_FOLDERS], [f"{up}{labels}" for up in CONTEXT_FOLDERS]
    )
    if not request.lists:
        pairs = [each for each in pairs if each[1].is_file()] or pairs
    ids, void = range(1, len(CONTEXT) + 1), (0, VOID)
    if background:
        names, table = ["background", *CONTEXT], table_of((0, *ids), (VOID,))
    else:
        names, table = CONTEXT, table_of(ids, void)
    return LabelledImages(pairs, IdReader(names, table), folder)


def ade20k_151(request: Request) -> LabelledImages:
    """ADE20K as open-hummingbird-eval and NeCo count it: "other" is class 0, of 151, and its pixels
    are not scored. A memory shows it with `--void-as 0`.
    """
    data = ade20k(request)
    names, table = ["other", *data.class_names], table_of(range(ADE20K_CLASSES + 1), (0, VOID))
    assert isinstance(data.reader, IdReader)
    reader = IdReader(names, table, others=data.reader.others)
    pairs = [*zip(data.paths, data.label_paths, strict=True)]
    return LabelledImages(pairs, reader, data.source)


def ade20k(request: Request) -> LabelledImages:
    """ADE20K: ROOT/images/validation/*.jpg and ROOT/annotations/validation/*.png of ids 1 to 150,
    0 for "other". ROOT/objectInfo150.txt gives the class names if it exists.
    """
    part = {"train": "training", "val": "validation"}.get(request.split, request.split)
    pairs, labels = request.pairs([f"images/{part}"], [f"annotations/{part}"])
    names = [f"class {n}" for n in range(1, ADE20K_CLASSES + 1)]
    if request.root and (file := request.root / "objectInfo150.txt").is_file():
        names = read_object_info(file)
    table = table_of(range(1, ADE20K_CLASSES + 1), void=(0, VOID))
    from_zero = Numbering(
        frozenset((*range(ADE20K_CLASSES), VOID)),
        "ADE20K's maps hold 1 to 150, and 0 for void; are these numbered from 0, void 255?",
        unexpected=frozenset((VOID,)),
    )
    return LabelledImages(pairs, IdReader(names, table, others=[from_zero]), labels)


def read_object_info(path: Path) -> list[str]:
    """Class names from ADE20K's table, by id. Raises UserError.

    The columns are separated by tabs, below a head line. The first is the id. The last holds the
    names, of which we take the first.
    """
    rows = [line.split("\t") for line in read_lines(path)[1:]]
    if [row[0].strip() for row in rows] != [str(n) for n in range(1, ADE20K_CLASSES + 1)]:
        raise UserError(f"{path}: expected ADE20K's table of {ADE20K_CLASSES} classes")
    return [row[-1].split(",")[0].strip() for row in rows]


LAYOUTS: dict[str, Callable[[Request], LabelledImages]] = {
    "folder": folder,
    "coco-stuff": coco_stuff,
    "coco-stuff-182": coco_stuff_182,
    "coco-panoptic": coco_panoptic,
    "coco-things-12": coco_things_12,
    "coco-stuff-15": coco_stuff_15,
    "camvid": camvid,
    "cityscapes": cityscapes,
    "cityscapes-27": cityscapes_27,
    "voc": voc,
    "voc-aug": voc_aug,
    "ade20k": ade20k,
    "ade20k-151": ade20k_151,
    "pascal-context": pascal_context,
    "pascal-context-60": pascal_context_60,
}
