"""Images, networks and result files of the commands that score."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.datasets.images import EVALUATION_SIDE, ImageSource, evaluation_size, spread
from evaluation.datasets.labelled_images import LabelledImages
from evaluation.datasets.labelled_squares import LabelledSquares
from evaluation.datasets.squares import SquareImages
from evaluation.networks import default_device, load_network, run_config
from evaluation.pictures.drawing import write_picture
from evaluation.pictures.segmentation import Column, draw_segmentations, read_samples
from evaluation.scoring import summarise
from model import SlotCon
from train.config import RunConfig
from train.run.provenance import provenance, write_json

SAMPLES = 4
"""Images of a picture."""


def squares_of(args: argparse.Namespace, data: LabelledImages) -> LabelledSquares:
    """The images of `data` at --size, else at the side for the views of --checkpoint, else at 320
    pixels. Raises UserError.
    """
    size = args.size or EVALUATION_SIDE
    if args.checkpoint and not args.size:
        size = evaluation_size(run_config(args.checkpoint).views.size)
    return LabelledSquares(data, size, default_device(), args.batch)


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
) -> None:
    """Write the files --json and --picture, and say what is odd about the label maps. Raises
    UserError.
    """
    notes = [note for data in (squares.images, *others) for note in data.notes()]
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    if args.json:
        content = {"results": rows, "summary": summarise(rows)}
        write_json(args.json, provenance() | content | ({"notes": notes} if notes else {}))
    if args.picture:
        data = squares.images
        samples = read_samples(squares, samples_of(args, data))
        write_picture(args.picture, draw_segmentations(samples, columns, data.class_names))
