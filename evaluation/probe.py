"""Probe frozen features with labels: fit a probe (k-NN, linear, or clusters named by class) on a
training set, and predict the classes of another set.

Prints mIoU and pixel accuracy over the whole set, mean ± deviation over --seeds.
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from evaluation.commands import (
    add_scoring_options,
    check_scoring_options,
    facts,
    in_words,
    require_table,
    samples_of,
    squares_of,
    write_results,
)
from evaluation.datasets.label_maps import VOID
from evaluation.datasets.labelled_images import LabelledImages, LabelledSquares
from evaluation.datasets.open import labelled_from
from evaluation.datasets.random_squares import HUMMINGBIRD, LEOPART, RandomSquares, Recipe
from evaluation.features import Features, open_all
from evaluation.kmeans import kmeans
from evaluation.pictures.segmentation import Column
from evaluation.probes.linear import fit_linear
from evaluation.probes.linear_sgd import Schedule, fit_sgd
from evaluation.probes.memory import LabelledFeatures, Memory, gather_memory
from evaluation.probes.overclustering import Overclustering
from evaluation.probes.retrieval import Retrieval
from evaluation.probes.selection import Held, regressions, select, votes
from evaluation.probes.voting import gather_pixels, join_pixels
from evaluation.protocols import ALL_CELLS, KNN, LINEAR, MANY, settle
from evaluation.reduction import fit_reduction
from evaluation.scoring import (
    Counting,
    Predictor,
    Result,
    evaluate,
    print_scores,
    require_clusters,
    score_rows,
)
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
TABLES = {"knn": KNN, "linear": LINEAR, "clusters": MANY}
"""Settings and protocols of each probe."""


@dataclass(frozen=True)
class Task:
    """Features, the set that probes are fitted to, and the set to score."""

    network: Features
    train: LabelledSquares
    val: LabelledSquares


def labelled_features(
    network: Features,
    train: LabelledSquares,
    void_as: int | None = None,
    indices: np.ndarray | None = None,
) -> Iterator[LabelledFeatures]:
    """The training set, batch by batch, void as class `void_as` if it is given."""
    for squares in train.batches(f"{network.name}: training set", indices):
        labels = train.labels(squares)
        if void_as is not None:
            labels = np.where(labels == VOID, np.uint8(void_as), labels)
        yield LabelledFeatures(squares, network(squares.normalised(train.device)), labels)


def standardised(task: Task, indices: np.ndarray | None = None) -> Task:
    """The task with features standardised on the training images `indices`, all if None."""
    batches = task.train.batches(f"{task.network.name}: mean and variance", indices)
    maps = (task.network(b.normalised(task.train.device)) for b in batches)
    reduction = fit_reduction(maps, standardise=True, pca=None)
    return replace(task, network=reduction.of(task.network))


def gather(args: argparse.Namespace, task: Task, seed: int) -> Memory:
    """The cells of the training set that `seed` draws. Raises UserError."""
    train, count = task.train, len(task.train.images)
    void_as, capacity = getattr(args, "void_as", None), args.memory
    if random_crops(args):
        train = random_squares(train, HUMMINGBIRD, seed)
        capacity = capacity // count * count  # Hummingbird takes as many cells from each image
    try:
        return gather_memory(
            labelled_features(task.network, train, void_as),
            count,
            train.images.num_classes,
            capacity=capacity,
            seed=seed,
            balanced=args.probe == "knn",
        )
    except ValueError as error:
        raise UserError(f"{train.images.source}: {error}") from None


def random_crops(args: argparse.Namespace) -> bool:
    """Whether the memory is one of random crops, which differ by seed."""
    return bool(getattr(args, "crops", False))


def random_squares(train: LabelledSquares, recipe: Recipe, seed: int) -> RandomSquares:
    """Random crops of the training images."""
    fields = {f.name: getattr(train, f.name) for f in dataclasses.fields(train)}
    return RandomSquares(**fields, recipe=recipe, seed=seed)


def fit(args: argparse.Namespace, memory: Memory, seed: int, task: Task) -> Head:
    """The probe that the options name, fitted to `memory`. Raises UserError."""
    try:
        if args.probe == "knn":
            count, temperature = args.neighbours[0], args.temperature
            return Retrieval(memory, neighbours=count, temperature=temperature)
        if args.probe == "linear":
            return fit_linear(memory, seed, steps=args.steps, learning_rate=args.learning_rate)
        clusters = kmeans(memory.features, args.clusters, seed, cosine=task.network.cosine)
        return Overclustering(memory, clusters)
    except ValueError as error:
        raise UserError(f"{task.train.images.source}: {error}") from None


def as_predictor(
    kind: str, network: Features, heads: Mapping[int, Head], memory: int | None, **more: Any
) -> Predictor:
    """A predictor from `heads`, one for each seed, on features of `network`; each has learnt from
    `memory` cells, or from all images again and again. `more`: other fields of `Predictor`.
    """

    def logits(images: Tensor) -> list[Tensor]:
        features = network(images)  # [B, D, h, w]
        batch, _, height, width = features.shape
        cells = features.permute(0, 2, 3, 1).flatten(0, 2)
        scores = [head(cells).view(batch, height, width, -1) for head in heads.values()]
        return [maps.permute(0, 3, 1, 2) for maps in scores]

    return Predictor(network.name, kind, [*heads], logits, memory=memory, **more)


def fitted_to_memory(args: argparse.Namespace, task: Task) -> Iterator[Predictor]:
    """Probes that learn from a sample of the training set's cells.

    If the memory holds every cell, k-NN is the same for all seeds, and there is only the first one.
    Otherwise the training set is read once per seed. The scored set is read once; by k-NN once per
    seed, because each of its heads holds a memory.
    """
    retrieval = args.probe == "knn"
    memory: Memory | None = None
    for seeds in [[seed] for seed in args.seeds] if retrieval else [args.seeds]:
        heads: dict[int, Head] = {}
        for seed in seeds:
            if memory is None or not memory.complete or random_crops(args):
                memory = gather(args, task, seed)
            heads[seed] = fit(args, memory, seed, task)
        assert memory is not None
        yield as_predictor(args.probe, task.network, heads, len(memory.features))
        if retrieval and memory.complete and not random_crops(args):
            break


def fitted_by_steps(args: argparse.Namespace, task: Task) -> Iterator[Predictor]:
    """Linear classifiers that learn from random crops, as Leopart's."""
    schedule = Schedule(args.learning_rate, args.epochs, args.step_images)
    for seed in args.seeds:
        squares = random_squares(task.train, LEOPART, seed)
        head = fit_sgd(task.network, squares, seed, schedule)
        yield as_predictor(args.probe, task.network, {seed: head}, None)


def fitted_to_pixels(args: argparse.Namespace, task: Task) -> Iterator[Predictor]:
    """CAPI's classifiers, which learn from all cells and predict labels of pixels. With a single
    choice of settings, nothing is random.
    """
    knn = args.probe == "knn"
    fits = votes(args.neighbours, args.distance) if knn else regressions()
    for seed in args.seeds if len(fits) > 1 else args.seeds[:1]:
        held = Held(len(task.train.images), seed)
        apart = held.others if len(fits) > 1 else None
        scaled = standardised(task, apart) if args.standardise else task
        classes = task.train.images.num_classes
        try:
            batches = labelled_features(scaled.network, task.train)
            memory = gather_pixels(batches, classes)
            name, classifier = select(fits, memory, held)
        except ValueError as error:
            raise UserError(f"{task.train.images.source}: {error}") from None
        print(f"{task.network.name}, seed {seed}: {name}", file=sys.stderr)
        yield as_predictor(
            args.probe,
            scaled.network,
            {seed: classifier},
            len(memory.known().labels),
            decide=join_pixels,
            num_clusters=classes + 1,
        )


def probe(args: argparse.Namespace, task: Task) -> list[Result]:
    """Fit and score the probe for each seed. Raises UserError."""
    by_pixel = getattr(args, "vote", None) == "pixels" or getattr(args, "head", None) == "lbfgs"
    if by_pixel:
        predictors = fitted_to_pixels(args, task)
    elif getattr(args, "head", None) == "sgd":
        predictors = fitted_by_steps(args, task)
    else:
        predictors = fitted_to_memory(args, standardised(task) if args.standardise else task)
    keep = samples_of(args, task.val.images).tolist()
    counting = Counting([args.match], args.absent)
    return [
        result
        for predictor in predictors
        for result in evaluate(predictor, task.val, counting, keep=keep)
    ]


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
    if args.probe == "linear" and args.head == "sgd" and args.standardise:
        raise UserError("--head sgd learns from features as they are: not with --standardise")


def check_classes(args: argparse.Namespace, train: LabelledImages) -> None:
    """Refuse settings that do not fit the classes. Raises UserError."""
    void_as = getattr(args, "void_as", None)
    if void_as is not None and not 0 <= void_as < train.num_classes:
        raise UserError(f"--void-as {void_as}: the classes are 0 to {train.num_classes - 1}")
    require_table(args, train)
    require_clusters(train.num_classes, [args.match], train.names, "predictions")


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
    check(args)
    train, val = (squares_of(args, data) for data in open_both(args))
    check_classes(args, train.images)
    if std := getattr(args, "std", None):
        train, val = (replace(squares, std=std) for squares in (train, val))
    names = val.images.class_names
    common = {
        "probe": args.probe,
        "train_images": len(train.images),
        "train_list": str(args.train_list) if args.train_list else train.images.selection,
        "size": val.size,
        "match": args.match,
        "absent": args.absent,
    } | facts(args, val.images)
    rows: list[dict[str, Any]] = []
    columns: list[Column] = []
    for network in open_all(args.features, args.checkpoint, args.weights, train):
        results = probe(args, Task(network, train, val))
        pixels = results[0].score.pixels
        for result in results:
            head = common | {
                "network": network.name,
                "seed": result.seed,
                "memory": result.memory,
            }
            rows += score_rows(result.score, names, head)
        iou = np.mean([result.score.iou for result in results], axis=0)
        columns.append(Column(network.name, results[0].kept, results[0].score.classes, iou))
        note = f"seeds: {len(results)}; {in_words(common, results[0].memory)}"
        if len(results) < len(args.seeds):
            note += " (one result for all seeds: the memory holds all cells)"
        print_scores(network.name, [result.score for result in results], note)
    write_results(args, rows, columns, val, train.images, pixels=pixels)


if __name__ == "__main__":
    run(main)
