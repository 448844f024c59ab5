"""Images, networks and result files of the commands that score."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.datasets.images import (
    EVALUATION_SIDE,
    FITS,
    ImageSource,
    evaluation_size,
    spread,
)
from evaluation.datasets.labelled_images import LabelledImages
from evaluation.datasets.labelled_squares import LabelledSquares
from evaluation.datasets.squares import SquareImages
from evaluation.networks import default_device, load_network, run_config
from evaluation.pictures.drawing import write_picture
from evaluation.pictures.segmentation import Column, draw_segmentations, read_samples
from evaluation.scoring import summarise
from model import SlotCon
from pipeline.errors import UserError
from train.config import RunConfig
from train.run.provenance import provenance, write_json

SAMPLES = 4
"""Images of a picture."""


def squares_of(args: argparse.Namespace, data: LabelledImages) -> LabelledSquares:
    """The images of `data` at --size, else at the side for the views of --checkpoint, else at 320
    pixels. Raises UserError.
    """
    size = args.size or side_for(args.checkpoint)
    return LabelledSquares(data, size, default_device(), args.batch, FITS[args.fit])


def side_for(checkpoint: Path | None) -> int:
    """The side of an evaluated square for the views of a run; 320 without one. Raises UserError."""
    if checkpoint is None:
        return EVALUATION_SIDE
    return evaluation_size(run_config(checkpoint).views.size)


def facts(args: argparse.Namespace, data: LabelledImages) -> dict[str, Any]:
    """What each row of a result says about its protocol and data."""
    return {
        "protocol": args.protocol,
        "fit": args.fit,
        "dataset": args.dataset,
        "list": str(args.list) if args.list else data.selection,
        "images": len(data),
        "output_stride": args.output_stride,
        "whiten": args.whiten,
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
