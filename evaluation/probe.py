"""Probe frozen features with labels: fit a probe (k-NN, linear, or clusters named by class) on a
training set, and predict the classes of another set.

Prints mIoU and pixel accuracy over the whole set, mean ± deviation over --seeds.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from evaluation.options import add_scoring_options, check_scoring_options
from train.run.cli import CommandParser, run

EXAMPLES = """examples:
  python -m evaluation.probe knn --checkpoint runs/demo --features teacher untrained pixels \\
      --train-images data/scenes/train/images --train-labels data/scenes/train/labels \\
      --images data/scenes/val/images --labels data/scenes/val/labels --json knn.json
  python -m evaluation.probe linear --checkpoint runs/camvid --dataset camvid --root CamVid
  python -m evaluation.probe clusters --clusters 200 --features timm:vit_small_patch16_224.dino \\
      --dataset voc --root VOCdevkit/VOC2012
"""


def parse(argv: list[str]) -> argparse.Namespace:
    parser = CommandParser(prog="python -m evaluation.probe", description=__doc__, epilog=EXAMPLES)
    probes = parser.add_subparsers(dest="probe", required=True, metavar="{knn,linear,clusters}")
    knn = add_probe(probes, "knn", "dense k-NN retrieval (Hummingbird, arXiv 2306.01667)")
    knn.add_argument(
        "--neighbours",
        type=int,
        default=30,
        metavar="K",
        help="nearest training cells of a cell (30)",
    )
    knn.add_argument(
        "--temperature", type=float, default=0.02, help="temperature of the vote (0.02)"
    )
    linear = add_probe(probes, "linear", "BatchNorm and a 1×1 convolution, trained")
    linear.add_argument(
        "--steps", type=int, default=1000, help="training steps of 1,024 cells (1000)"
    )
    linear.add_argument(
        "--learning-rate", type=float, default=0.01, help="learning rate of AdamW (0.01)"
    )
    clusters = add_probe(probes, "clusters", "k-means clusters, each named by its pixels' majority")
    clusters.add_argument(
        "--clusters", type=int, default=500, metavar="K", help="number of clusters (500)"
    )
    return parser.parse_args(argv)


def add_probe(probes: Any, name: str, summary: str) -> CommandParser:
    """The parser of one probe, with the options that all probes have."""
    parser: CommandParser = probes.add_parser(name, help=summary, description=summary)
    add_scoring_options(parser, features=["teacher"], seeds=[0, 1, 2])
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
        type=int,
        default=100_000,
        metavar="CELLS",
        help="cells of the training set to keep and learn from (100000)",
    )
    return parser


def main() -> None:
    args = parse(sys.argv[1:])
    counts = ("memory", "neighbours", "steps", "clusters", "temperature", "learning_rate")
    check_scoring_options(args, counts)
    from evaluation.probes.scores import score_probes  # slow: --help does not wait for it

    score_probes(args)


if __name__ == "__main__":
    run(main)
