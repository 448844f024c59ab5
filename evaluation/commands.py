"""Options, checks and result files that the commands share."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.confusion import ABSENT, MATCHES
from evaluation.datasets.images import (
    EVALUATION_SIDE,
    FIT_HELP,
    FITS,
    ImageSource,
    evaluation_size,
    spread,
)
from evaluation.datasets.labelled_images import LabelledImages, LabelledSquares
from evaluation.datasets.open import add_dataset_options
from evaluation.datasets.squares import SquareImages
from evaluation.features import FEATURES_HELP
from evaluation.networks import default_device, load_network, run_config
from evaluation.pictures.drawing import check_picture, write_picture
from evaluation.pictures.segmentation import Column, draw_segmentations, read_samples
from evaluation.protocols import Table
from evaluation.scoring import summarise
from model import SlotCon
from pipeline.errors import UserError
from train.config import RunConfig
from train.run.cli import CommandParser, check_writable
from train.run.provenance import provenance, write_json

SAMPLES = 4
"""Images of a picture."""


def add_scoring_options(parser: CommandParser, features: list[str], table: Table) -> None:
    """The options of commands that score features on labelled images. `features` is the default;
    `table` has the protocols and the usual values of settings, see `protocols.settle`.
    """
    if protocols := [name for name in table if name]:
        parser.add_argument(
            "--protocol",
            choices=protocols,
            help="settings of a published evaluator; prints what it sets",
        )
    else:
        parser.set_defaults(protocol=None)
    parser.add_argument("--checkpoint", type=Path, help="run folder, or one of its checkpoints")
    add_dataset_options(parser)
    parser.add_argument(
        "--features",
        nargs="+",
        default=features,
        metavar="SPEC",
        help=f"features to score (default: {' '.join(features) or 'none'}). {FEATURES_HELP}",
    )
    parser.add_argument("--weights", type=Path, help="file of weights for supervised or timm:NAME")
    parser.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        help=f"random seeds, one result each ({' '.join(map(str, table[None]['seeds']))})",
    )
    parser.add_argument(
        "--size",
        type=int,
        help="side of the evaluated square in pixels (320 for 224-pixel views, others in "
        "proportion)",
    )
    parser.add_argument("--fit", choices=FITS, help=f"how images become squares. {FIT_HELP}")
    parser.add_argument(
        "--match",
        choices=MATCHES,
        help="class of a cluster: one to one by most pixels or by the sum of IoU, by the majority "
        f"of its pixels or by its best IoU, or its own number ({table[None]['match']})",
    )
    parser.add_argument(
        "--absent",
        choices=ABSENT,
        help="classes that are neither labelled nor predicted: left out of mIoU, or 0 (skip)",
    )
    parser.add_argument(
        "--standardise",
        action="store_true",
        default=None,
        help="subtract the mean of each feature, divide by its deviation",
    )
    parser.add_argument("--batch", type=int, default=8, help="images at once (8)")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument(
        "--picture", type=Path, help="draw samples and IoU by class to this file (.png)"
    )


def check_scoring_options(args: argparse.Namespace, positive: Sequence[str]) -> None:
    """Refuse bad options before any work; `positive` as in `require_positive`. Raises UserError."""
    require_positive(args, ("batch", "size", *positive))
    if min(args.seeds) < 0 or len(set(args.seeds)) < len(args.seeds):
        raise UserError("--seeds must be different and at least 0")
    check_outputs(args)


def require_positive(args: argparse.Namespace, names: Sequence[str]) -> None:
    """Raise UserError if one of these options is given and not above 0."""
    for name in names:
        value = getattr(args, name, None)
        if value is not None and not value > 0:
            raise UserError(f"--{name.replace('_', '-')} must be above 0, not {value}")


def check_outputs(args: argparse.Namespace) -> None:
    """Raise UserError if --json or --picture cannot be written."""
    if args.json:
        check_writable("--json", args.json)
    if args.picture:
        check_picture("--picture", args.picture)


def squares_of(args: argparse.Namespace, data: LabelledImages) -> LabelledSquares:
    """The images of `data` at --size, else at the side for the views of --checkpoint, else at 320
    pixels. Raises UserError.
    """
    size = args.size or EVALUATION_SIDE
    if args.checkpoint and not args.size:
        size = evaluation_size(run_config(args.checkpoint).views.size)
    return LabelledSquares(data, size, default_device(), args.batch, FITS[args.fit])


def facts(args: argparse.Namespace, data: LabelledImages) -> dict[str, Any]:
    """What each row of a result says about its protocol and data."""
    return {
        "protocol": args.protocol,
        "fit": args.fit,
        "dataset": args.dataset,
        "list": str(args.list) if args.list else data.selection,
        "images": len(data),
    }


def in_words(facts: dict[str, Any], memory: int | None) -> str:
    """The protocol, the images and the cells learnt from, for a line of the table."""
    cells = f"; memory: {memory:,} cells" if memory else ""
    protocol = facts["protocol"] or "no protocol"
    return f"{protocol}; {facts['images']:,} images ({facts['list']}){cells}"


def require_table(args: argparse.Namespace, data: LabelledImages) -> None:
    """Raise UserError if absent classes shall count, and no table says which there are."""
    if args.absent == "zero" and data.names is None:
        raise UserError("--absent zero needs a table of the classes: --classes FILE")


def absent_classes(data: LabelledImages, pixels: np.ndarray, absent: str) -> list[str]:
    """A note on the classes of the table that no label shows, given the pixels of each, int64 [C];
    none if all occur, or so few that the label maps have a note of their own.
    """
    names = data.names or []
    missing = [name for name, count in zip(names, pixels, strict=False) if not count]
    if not missing or 2 * len(missing) >= len(names):
        return []
    rule = "their IoU is 0" if absent == "zero" else "IoU 0 where they are predicted, else left out"
    listed = ", ".join(missing[:5]) + ", …" * (len(missing) > 5)
    return [f"{data.source}: no pixel of {len(missing)} of {len(names)} classes ({listed}): {rule}"]


def open_run(
    checkpoint: Path, images: ImageSource, size: int | None, batch_size: int = 8
) -> tuple[SlotCon, RunConfig, SquareImages]:
    """The network and configuration of a run or checkpoint, and `images` at `size` or at the side
    for the views of the run. Raises UserError.
    """
    device = default_device()
    network, config = load_network(checkpoint, device)
    size = size or evaluation_size(config.views.size)
    return network, config, SquareImages(images, size, device, batch_size)


def samples_of(args: argparse.Namespace, data: LabelledImages) -> np.ndarray:
    """int64, the numbers of the images to show in --picture; none without it."""
    return spread(len(data), SAMPLES) if args.picture else np.array([], np.int64)


def write_results(
    args: argparse.Namespace,
    rows: list[dict[str, Any]],
    columns: Sequence[Column],
    squares: LabelledSquares,
    *others: LabelledImages,
    pixels: np.ndarray,
) -> None:
    """Write the files --json and --picture, and say what is odd about the label maps. `pixels`
    int64 [C]: those of each class in the scored set. Raises UserError.
    """
    notes = [note for data in (squares.images, *others) for note in data.notes()]
    notes += absent_classes(squares.images, pixels, args.absent)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    if args.json:
        content = {"results": rows, "summary": summarise(rows)}
        write_json(args.json, provenance() | content | ({"notes": notes} if notes else {}))
    if args.picture:
        data = squares.images
        samples = read_samples(squares, samples_of(args, data))
        write_picture(args.picture, draw_segmentations(samples, columns, data.class_names))
