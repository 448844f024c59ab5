"""Probe frozen features with labels: fit a probe (k-NN, linear, or clusters named by class) on a
training set, and predict the classes of another set.

Prints mIoU and pixel accuracy over the whole set, mean ± deviation over --seeds.
"""

import argparse
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from evaluation.commands import (
    add_scoring_options,
    check_scoring_options,
    samples_of,
    squares_of,
    write_results,
)
from evaluation.confusion import score_classes
from evaluation.datasets.labelled_images import LabelledImages, LabelledSquares
from evaluation.datasets.open import labelled_from
from evaluation.features import Features, open_all
from evaluation.kmeans import kmeans
from evaluation.pictures.segmentation import Column
from evaluation.probes.linear import fit_linear
from evaluation.probes.memory import LabelledFeatures, Memory, gather_memory
from evaluation.probes.overclustering import Overclustering
from evaluation.probes.retrieval import Retrieval
from evaluation.scoring import Predictor, Result, evaluate, print_scores, score_rows
from pipeline.errors import UserError
from train.run.cli import CommandParser, run

EXAMPLES = """examples:
  python -m evaluation.probe knn --checkpoint runs/demo --features teacher untrained pixels \\
      --train-images data/scenes/train/images --train-labels data/scenes/train/labels \\
      --images data/scenes/val/images --labels data/scenes/val/labels --json knn.json
  python -m evaluation.probe linear --checkpoint runs/camvid --dataset camvid --root CamVid
  python -m evaluation.probe clusters --clusters 200 --features timm:vit_small_patch16_224.dino \\
      --dataset voc --root VOCdevkit/VOC2012
"""

Head = Callable[[Tensor], Tensor]
"""A fitted probe: cells [Q, D] → class scores [Q, C]."""


@dataclass(frozen=True)
class Task:
    """Features, the set that probes are fitted to, and the set to score."""

    network: Features
    train: LabelledSquares
    val: LabelledSquares


def gather(args: argparse.Namespace, task: Task, seed: int) -> Memory:
    """The cells of the training set that `seed` draws. Raises UserError."""
    network, train = task.network, task.train
    batches = (
        LabelledFeatures(squares, network(squares.normalised(train.device)), train.labels(squares))
        for squares in train.batches(f"{network.name}: training set")
    )
    try:
        return gather_memory(
            batches,
            len(train.images),
            train.images.num_classes,
            capacity=args.memory,
            seed=seed,
            balanced=args.probe == "knn",
        )
    except ValueError as error:
        raise UserError(f"{train.images.source}: {error}") from None


def fit(args: argparse.Namespace, memory: Memory, seed: int, task: Task) -> Head:
    """The probe that the options name, fitted to `memory`. Raises UserError."""
    try:
        if args.probe == "knn":
            return Retrieval(memory, neighbours=args.neighbours, temperature=args.temperature)
        if args.probe == "linear":
            return fit_linear(memory, seed, steps=args.steps, learning_rate=args.learning_rate)
        clusters = kmeans(memory.features, args.clusters, seed, cosine=task.network.cosine)
        return Overclustering(memory, clusters)
    except ValueError as error:
        raise UserError(f"{task.train.images.source}: {error}") from None


def as_predictor(kind: str, network: Features, heads: Mapping[int, Head]) -> Predictor:
    """A predictor from `heads`, one for each seed, on features of `network`."""

    def logits(images: Tensor) -> list[Tensor]:
        features = network(images)  # [B, D, h, w]
        batch, _, height, width = features.shape
        cells = features.permute(0, 2, 3, 1).flatten(0, 2)
        scores = [head(cells).view(batch, height, width, -1) for head in heads.values()]
        return [maps.permute(0, 3, 1, 2) for maps in scores]

    return Predictor(network.name, kind, [*heads], logits)


def probe(args: argparse.Namespace, task: Task) -> list[Result]:
    """Fit and score a head for each seed.

    If the memory holds every cell, k-NN is the same for all seeds, and only the first one is
    scored. Otherwise the training set is read once per seed. The scored set is read once; by k-NN
    once per seed, because each of its heads holds a memory.
    """
    retrieval = args.probe == "knn"
    keep = samples_of(args, task.val.images).tolist()
    memory: Memory | None = None
    results: list[Result] = []
    for seeds in [[seed] for seed in args.seeds] if retrieval else [args.seeds]:
        heads: dict[int, Head] = {}
        for seed in seeds:
            if memory is None or not memory.complete:
                memory = gather(args, task, seed)
            heads[seed] = fit(args, memory, seed, task)
        predictor = as_predictor(args.probe, task.network, heads)
        results += evaluate(predictor, task.val, score_classes, keep=keep)
        if retrieval and memory is not None and memory.complete:
            break
    return results


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
        type=int,
        default=100_000,
        metavar="CELLS",
        help="cells of the training set to keep and learn from (100000)",
    )
    return parser


def open_both(args: argparse.Namespace) -> tuple[LabelledImages, LabelledImages]:
    """The training set and the set to score. Raises UserError if their classes differ, or if they
    share an image.
    """
    val, train = labelled_from(args), labelled_from(args, "train-")
    if train.names != val.names:
        raise UserError(f"{train.source}: has other classes than {val.source}")
    common = {path.resolve() for path in train.paths} & {path.resolve() for path in val.paths}
    if common:
        raise UserError(f"{min(common)}: belongs to the training set and to the set to score")
    return train, val


def main() -> None:
    args = parse(sys.argv[1:])
    counts = ("memory", "neighbours", "steps", "clusters", "temperature", "learning_rate")
    check_scoring_options(args, counts)
    train, val = (squares_of(args, data) for data in open_both(args))
    names = val.images.class_names
    common = {
        "probe": args.probe,
        "images": len(val.images),
        "train_images": len(train.images),
        "size": val.size,
    }
    rows: list[dict[str, Any]] = []
    columns: list[Column] = []
    for network in open_all(args.features, args.checkpoint, args.weights, train):
        results = probe(args, Task(network, train, val))
        for result in results:
            head = common | {"network": network.name, "seed": result.seed}
            rows += score_rows(result.score, names, head)
        iou = np.mean([result.score.iou for result in results], axis=0)
        columns.append(Column(network.name, results[0].kept, np.arange(len(names)), iou))
        note = f"seeds: {len(results)}"
        if len(results) < len(args.seeds):
            note += " (one result for all seeds: the memory holds all cells)"
        print_scores(network.name, [result.score for result in results], note)
    write_results(args, rows, columns, val, train.images)


if __name__ == "__main__":
    run(main)
