"""Opens labelled images: from Python, or from the options of a command."""

import argparse
from collections.abc import Collection
from pathlib import Path

from evaluation.datasets.curated import curated
from evaluation.datasets.kinds import KINDS
from evaluation.datasets.labelled_images import LabelledImages
from evaluation.datasets.layouts import LAYOUTS, Request
from pipeline.errors import UserError
from train.run.cli import CommandParser


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
    """Open images with label maps; `Request` describes the arguments. Raises UserError if something
    is missing or not in the layout.
    """
    if kind != "folder" and (classes is not None or void is not None):
        raise UserError(
            f"--{section}classes and --{section}void are for --{section}dataset folder: {kind}"
            " defines its classes"
        )
    lists = [] if listed is None else [listed]
    request = Request(kind, root, split, images, labels, classes, void, lists, section, part)
    return LAYOUTS[kind](request)


def add_dataset_options(parser: CommandParser) -> None:
    """The options that `labelled_from` reads."""
    parser.add_argument("--dataset", choices=KINDS, default="folder", help="layout (folder)")
    parser.add_argument(
        "--root", type=Path, help="folder of the data set, in place of --images and --labels"
    )
    parser.add_argument("--images", type=Path, help="folder of images")
    parser.add_argument("--labels", type=Path, help="folder of label PNGs of the same names")
    parser.add_argument("--split", default="val", help="part of the data set under --root (val)")
    parser.add_argument(
        "--list", type=Path, metavar="FILE", help="use only these images: names or ids, one a line"
    )
    parser.add_argument(
        "--subset",
        choices=["curated", "all"],
        help="images of COCO's val2017 in 27 classes: PiCIE's 2,175 (default), or all 5,000",
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


CURATED = ("coco-stuff", "coco-stuff-182")
"""Kinds of which PiCIE's list is scored, unless the options say otherwise."""


def labelled_from(args: argparse.Namespace, prefix: str = "") -> LabelledImages:
    """Open the data set that the options of `add_dataset_options` name. With `prefix` "train-",
    --train-images, --train-labels, --train-split and --train-list replace the options without it.
    Of the 27 classes' val2017, only PiCIE's images are taken, unless a list or --subset all is
    given. Raises UserError.
    """
    names = ("images", "labels", "split", "list")
    part = {name: getattr(args, f"{prefix}{name}".replace("-", "_")) for name in names}
    whole = args.dataset not in CURATED or part["split"] != "val" or part["list"] is not None
    if args.subset == "curated" and whole:
        raise UserError(
            f"--subset curated is for {' and '.join(CURATED)}, split val, without --list"
        )
    data = open_labelled(
        args.dataset,
        root=args.root,
        classes=args.classes,
        void=args.void,
        listed=part.pop("list"),
        part=prefix,
        **part,
    )
    return data if whole or args.subset == "all" else curated(data)
