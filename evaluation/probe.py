"""Probe frozen features with labels: fit a probe (k-NN, linear, or clusters named by class) on a
training set, and predict the classes of another set.

Prints mIoU and pixel accuracy over the whole set, mean ± deviation over --seeds.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from evaluation.options import add_scoring_options, check_scoring_options
from evaluation.protocols import ALL_CELLS, KNN, LINEAR, MANY, settle
from pipeline.errors import UserError
from train.run.cli import CommandParser, run

EXAMPLES = """examples:
  python -m evaluation.probe knn --checkpoint runs/demo --features teacher pixels \\
      --train-images data/scenes/train/images --train-labels data/scenes/train/labels \\
      --images data/scenes/val/images --labels data/scenes/val/labels --json knn.json
  python -m evaluation.probe linear --checkpoint runs/camvid --dataset camvid --root CamVid
  python -m evaluation.probe knn --checkpoint runs/camvid --dataset camvid --root CamVid \\
      --stage 2 4 3+4 --whiten
  python -m evaluation.probe clusters --clusters 200 --features timm:vit_small_patch16_224.dino \\
      --dataset voc --root VOCdevkit/VOC2012
  python -m evaluation.probe knn --protocol hummingbird --size 512 --memory 1024000 \\
      --features timm:vit_small_patch16_224.dino --dataset voc-aug --root VOCdevkit/VOC2012
"""

TABLES = {"knn": KNN, "linear": LINEAR, "clusters": MANY}
"""Settings and protocols of each probe."""


def parse(argv: list[str]) -> argparse.Namespace:
    parser = CommandParser(prog="python -m evaluation.probe", description=__doc__, epilog=EXAMPLES)
    probes = parser.add_subparsers(dest="probe", required=True, metavar="{knn,linear,clusters}")
    add_knn_options(add_probe(probes, "knn", "dense k-NN retrieval (Hummingbird, CAPI)"))
    add_linear_options(add_probe(probes, "linear", "a linear classifier of cells, trained"))
    clusters = add_probe(probes, "clusters", "k-means clusters, each named by its pixels' majority")
    clusters.add_argument("--clusters", type=int, metavar="K", help="number of clusters (500)")
    return parser.parse_args(argv)


def add_knn_options(parser: CommandParser) -> None:
    parser.add_argument(
        "--neighbours",
        type=int,
        nargs="+",
        metavar="K",
        help="nearest training cells of a cell (30); of several the best on a tenth of the "
        "training images, with --vote pixels",
    )
    parser.add_argument(
        "--memory-precision",
        choices=["float32", "float16"],
        help="of the features in the memory; float16 halves it (float32)",
    )
    parser.add_argument(
        "--memory-folder",
        type=Path,
        metavar="DIR",
        help="keep the features in a temporary file there, not in memory",
    )
    parser.add_argument("--temperature", type=float, help="temperature of the vote (0.02)")
    parser.add_argument(
        "--vote",
        choices=["cells", "pixels"],
        help="cells: shares of labels, weighted by similarity; pixels: the most frequent label at "
        "each place of the cells, all cells kept (cells)",
    )
    parser.add_argument(
        "--distance",
        nargs="+",
        choices=["cosine", "L2"],
        help="of cells, with --vote pixels; of several the best (cosine)",
    )
    parser.add_argument(
        "--void-as", type=int, metavar="N", help="void pixels of the training set are class N"
    )
    parser.add_argument(
        "--crops",
        action="store_true",
        default=None,
        help="fill the memory from random crops in random colours, as open-hummingbird-eval does",
    )
    parser.add_argument(
        "--std",
        type=float,
        nargs=3,
        metavar=("R", "G", "B"),
        help="deviation by which pixels are divided (ImageNet's, 0.229 0.224 0.225)",
    )


def add_linear_options(parser: CommandParser) -> None:
    parser.add_argument(
        "--head",
        choices=["adamw", "sgd", "lbfgs"],
        help="adamw: BatchNorm and a 1×1 convolution, on a sample of cells; sgd: a 1×1 convolution "
        "on random crops; lbfgs: logistic regression on cells, its penalty selected (adamw)",
    )
    parser.add_argument("--steps", type=int, help="steps of 1,024 cells, of adamw (1000)")
    parser.add_argument("--epochs", type=int, help="of sgd (25)")
    parser.add_argument(
        "--step-images", type=int, metavar="N", help="images of a step, of sgd (60)"
    )
    parser.add_argument("--learning-rate", type=float, help="of adamw and sgd (0.01)")


def add_probe(probes: Any, name: str, summary: str) -> CommandParser:
    """The parser of one probe, with the options that all probes have."""
    parser: CommandParser = probes.add_parser(name, help=summary, description=summary)
    add_scoring_options(parser, ["teacher"], TABLES[name])
    parser.add_argument("--train-images", type=Path, help="folder of training images")
    parser.add_argument("--train-labels", type=Path, help="folder of their label PNGs")
    parser.add_argument(
        "--train-split", default="train", help="training part of the data set (train)"
    )
    parser.add_argument(
        "--train-list", type=Path, metavar="FILE", help="use only these training images"
    )
    parser.add_argument(
        "--memory",
        type=cells,
        metavar="CELLS",
        help="cells of the training set to keep and learn from, or all (100000)",
    )
    return parser


def cells(text: str) -> int:
    """A number of cells, or all."""
    return ALL_CELLS if text == "all" else int(text)


def check(args: argparse.Namespace) -> None:
    """Refuse bad options before any work. Raises UserError."""
    settle(args, TABLES[args.probe])
    counts = ("memory", "steps", "clusters", "temperature", "learning_rate", "epochs")
    check_scoring_options(args, (*counts, "step_images"))
    if args.probe == "knn":
        if min(args.neighbours) < 1:
            raise UserError(f"--neighbours must be above 0, not {min(args.neighbours)}")
        if args.vote == "cells" and (len(args.neighbours) > 1 or args.distance != ["cosine"]):
            raise UserError("--vote cells takes one number of --neighbours, and --distance cosine")


def main() -> None:
    args = parse(sys.argv[1:])
    check(args)
    from evaluation.probes.scores import score_probes  # slow: --help does not wait for it

    score_probes(args)


if __name__ == "__main__":
    run(main)
