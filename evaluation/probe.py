"""Probe frozen features with labels: what a dense k-NN retrieval, a linear classifier or named
clusters, fitted to a training set, find in another.

Prints mIoU and pixel accuracy over the whole set, their mean and deviation over --seeds.
"""

import argparse
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evaluation.datasets.images import spread
from evaluation.datasets.layouts import (
    LabelledImages,
    add_dataset_options,
    labelled_from,
)
from evaluation.features import FEATURES_HELP, Features, open_all
from evaluation.grouping import GroupingScore, confusion_matrix, score_classes
from evaluation.kmeans import kmeans
from evaluation.labelled import LabelledFeatures, labelled_features
from evaluation.networks import default_device, evaluated_side
from evaluation.pictures.drawing import check_picture, write_picture
from evaluation.pictures.segmentation import Column, Sample, draw_segmentations
from evaluation.probes.linear import fit_linear
from evaluation.probes.memory import Memory, gather_memory
from evaluation.probes.overclustering import Overclustering
from evaluation.probes.retrieval import Retrieval
from evaluation.segment import assign
from evaluation.unsupervised_segmentation import summarise
from pipeline.errors import UserError
from train.run.cli import CommandParser, check_writable, run
from train.run.provenance import provenance, write_json

EXAMPLES = """examples:
  python -m evaluation.probe knn --checkpoint runs/demo --features teacher untrained pixels \\
      --train-images data/scenes/train/images --train-labels data/scenes/train/labels \\
      --images data/scenes/val/images --labels data/scenes/val/labels --json knn.json
  python -m evaluation.probe linear --checkpoint runs/camvid --dataset camvid --root CamVid
  python -m evaluation.probe clusters --clusters 200 --features timm:vit_small_patch16_224.dino \\
      --dataset voc --root VOCdevkit/VOC2012
"""

SAMPLES = 4

Head = Callable[[Tensor], Tensor]
"""Cells [Q, D] → class scores [Q, C]: a fitted probe."""


@dataclass(frozen=True)
class Task:
    """One set of features on two sets of images."""

    network: Features
    train: LabelledImages
    val: LabelledImages
    size: int
    device: torch.device
    batch_size: int = 8

    def stream(self, data: LabelledImages, name: str) -> Iterable[LabelledFeatures]:
        return labelled_features(
            self.network,
            data,
            self.size,
            device=self.device,
            batch_size=self.batch_size,
            progress=f"{self.network.name}: {name}",
        )


def predict(head: Head, features: Tensor, size: int) -> np.ndarray:
    """Features [B, D, h, w] → int64 [B, R, R], the class of each pixel: the head's scores upsampled
    bilinearly, the highest wins.
    """
    batch, _, height, width = features.shape
    with torch.inference_mode():
        scores = head(features.permute(0, 2, 3, 1).flatten(0, 2))
        maps = scores.view(batch, height, width, -1).permute(0, 3, 1, 2)
        return assign(maps, size).cpu().numpy()


@dataclass
class Outcome:
    """What heads, by seed, find."""

    confusions: dict[int, np.ndarray]
    """int64 [C, C] (predicted, true)."""
    samples: list[Sample]
    predicted: list[np.ndarray]
    """int64 [R, R] of each sample, by the first head."""


def evaluate(
    heads: Mapping[int, Head],
    batches: Iterable[LabelledFeatures],
    num_classes: int,
    samples: Collection[int],
) -> Outcome:
    """One pass over `batches`; the images numbered `samples` are kept."""
    total = {seed: np.zeros((num_classes, num_classes), np.int64) for seed in heads}
    outcome = Outcome(total, [], [])
    for batch in batches:
        found = {
            seed: predict(head, batch.features, batch.labels.shape[1])
            for seed, head in heads.items()
        }
        for seed, predicted in found.items():
            total[seed] += confusion_matrix(predicted, batch.labels, num_classes, num_classes)
        first = next(iter(found.values()))
        for pixels, labels, predicted, i in zip(
            batch.squares.pixels, batch.labels, first, batch.squares.index.tolist(), strict=True
        ):
            if i in samples:
                outcome.samples.append(Sample(pixels, labels))
                outcome.predicted.append(predicted)
    return outcome


def fit(args: argparse.Namespace, memory: Memory, seed: int, task: Task) -> Head:
    """The head that `args` ask for. Raises UserError."""
    try:
        if args.probe == "knn":
            return Retrieval(memory, neighbours=args.neighbours, temperature=args.temperature)
        if args.probe == "linear":
            return fit_linear(memory, seed, steps=args.steps, learning_rate=args.learning_rate)
        clusters = kmeans(memory.features, args.clusters, seed, cosine=task.network.cosine)
        return Overclustering(memory, clusters)
    except ValueError as error:
        raise UserError(f"{task.train.source}: {error}") from None


def gather(args: argparse.Namespace, task: Task, seed: int) -> Memory:
    """The cells of the training set that this seed draws. Raises UserError."""
    try:
        return gather_memory(
            task.stream(task.train, "training set"),
            len(task.train),
            task.train.num_classes,
            capacity=args.memory,
            seed=seed,
            balanced=args.probe == "knn",
        )
    except ValueError as error:
        raise UserError(f"{task.train.source}: {error}") from None


def probe(args: argparse.Namespace, task: Task) -> Outcome:
    """Fit and evaluate a head for each seed; for the first alone if nothing is drawn.

    The training set is run through again for each seed only if the memory does not hold all of it,
    the other set for each seed only by retrieval, which keeps its memory.
    """
    retrieval = args.probe == "knn"
    samples = spread(len(task.val), SAMPLES).tolist() if args.picture else []
    memory: Memory | None = None
    outcome = Outcome({}, [], [])
    for seeds in [[seed] for seed in args.seeds] if retrieval else [args.seeds]:
        heads: dict[int, Head] = {}
        for seed in seeds:
            if memory is None or not memory.complete:
                memory = gather(args, task, seed)
            heads[seed] = fit(args, memory, seed, task)
        batches = task.stream(task.val, "scoring")
        some = evaluate(heads, batches, task.val.num_classes, samples)
        outcome.confusions |= some.confusions
        outcome.samples = outcome.samples or some.samples
        outcome.predicted = outcome.predicted or some.predicted
        if retrieval and memory is not None and memory.complete:
            break
    return outcome


def score(confusion: np.ndarray, data: LabelledImages) -> GroupingScore:
    """`score_classes`, with nothing to score as the user's mistake."""
    try:
        return score_classes(confusion)
    except ValueError as error:
        raise UserError(f"{data.source}: {error}: the label maps are all void") from None


def result_rows(
    scores: Mapping[int, GroupingScore], names: Sequence[str], common: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """One row a number, for --json: miou, pixel_accuracy and each class's iou of each seed."""
    rows: list[dict[str, Any]] = []
    for seed, scored in scores.items():
        head = {**common, "seed": seed}
        rows.append({"metric": "miou", "value": scored.miou, **head})
        rows.append({"metric": "pixel_accuracy", "value": scored.accuracy, **head})
        rows += [
            {"metric": "iou", "class": name, "value": float(iou), **head}
            for name, iou in zip(names, scored.iou, strict=True)
            if not np.isnan(iou)
        ]
    return rows


def mean_and_deviation(values: Sequence[float]) -> str:
    """Shares as percentages: 34.21% ± 0.30%, the sample's deviation; of one value there is none."""
    spread = f" ± {np.std(values, ddof=1):.2%}" if len(values) > 1 else ""
    return f"{np.mean(values):7.2%}{spread}"


def parse(argv: list[str]) -> argparse.Namespace:
    parser = CommandParser(prog="python -m evaluation.probe", description=__doc__, epilog=EXAMPLES)
    probes = parser.add_subparsers(dest="probe", required=True, metavar="{knn,linear,clusters}")
    knn = add_probe(probes, "knn", "dense k-NN retrieval (Hummingbird, arXiv 2306.01667)")
    knn.add_argument("--neighbours", type=int, default=30, metavar="K", help="(30)")
    knn.add_argument("--temperature", type=float, default=0.02, help="of the cosines (0.02)")
    linear = add_probe(probes, "linear", "BatchNorm and a 1×1 convolution, trained")
    linear.add_argument("--steps", type=int, default=1000, help="of 1,024 cells each (1000)")
    linear.add_argument("--learning-rate", type=float, default=0.01, help="of AdamW (0.01)")
    clusters = add_probe(probes, "clusters", "k-means clusters, each named by its pixels' majority")
    clusters.add_argument("--clusters", type=int, default=500, metavar="K", help="(500)")
    return parser.parse_args(argv)


def add_probe(probes: Any, name: str, summary: str) -> CommandParser:
    """The parser of one probe with the options that all have."""
    parser: CommandParser = probes.add_parser(name, help=summary, description=summary)
    parser.add_argument("--checkpoint", type=Path, help="run folder, or one of its checkpoints")
    add_dataset_options(parser)
    parser.add_argument("--train-images", type=Path, help="folder of images to learn from")
    parser.add_argument("--train-labels", type=Path, help="folder of their label PNGs")
    parser.add_argument(
        "--train-split", default="train", help="the part of --root to learn from (train)"
    )
    parser.add_argument(
        "--train-list", type=Path, metavar="FILE", help="learn from these images only"
    )
    parser.add_argument(
        "--features", nargs="+", default=["teacher"], metavar="SPEC", help=FEATURES_HELP
    )
    parser.add_argument("--weights", type=Path, help="file of weights for supervised and timm:NAME")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], help="of what is drawn (0 1 2)"
    )
    parser.add_argument(
        "--memory",
        type=int,
        default=100_000,
        metavar="CELLS",
        help="cells of the training set that are kept and learnt from (100000)",
    )
    parser.add_argument(
        "--size",
        type=int,
        help="side of the evaluated square in pixels (in proportion to the views: 320 for 224)",
    )
    parser.add_argument("--batch", type=int, default=8, help="images at once (8)")
    parser.add_argument("--json", type=Path, help="write the results here as well")
    parser.add_argument("--picture", type=Path, help="write samples and bars here as well (PNG)")
    return parser


def check(args: argparse.Namespace) -> None:
    """Refuse what cannot work before anything is read. Raises UserError."""
    counts = ("batch", "size", "memory", "neighbours", "steps", "clusters")
    for name in (*counts, "temperature", "learning_rate"):
        value = getattr(args, name, None)
        if value is not None and not value > 0:
            raise UserError(f"--{name.replace('_', '-')} must be above 0, not {value}")
    if min(args.seeds) < 0 or len(set(args.seeds)) < len(args.seeds):
        raise UserError("--seeds must be numbers from 0 on, each once")
    if args.json:
        check_writable("--json", args.json)
    if args.picture:
        check_picture("--picture", args.picture)


def open_both(args: argparse.Namespace) -> tuple[LabelledImages, LabelledImages]:
    """The training set and the one to score. Raises UserError unless they have the same classes."""
    val, train = labelled_from(args), labelled_from(args, "train-")
    if train.names != val.names:
        raise UserError(f"{train.source}: other classes than those of {val.source}")
    common = {path.resolve() for path in train.paths} & {path.resolve() for path in val.paths}
    if common:
        raise UserError(f"{min(common)}: to be learnt from and to be scored: give another set")
    return train, val


def main() -> None:
    args = parse(sys.argv[1:])
    check(args)
    train, val = open_both(args)
    device = default_device()
    size = evaluated_side(args.size, args.checkpoint)
    names = val.names or [f"class {c}" for c in range(val.num_classes)]
    common = {"probe": args.probe, "images": len(val), "train_images": len(train), "size": size}
    rows: list[dict[str, Any]] = []
    columns: list[Column] = []
    opened = open_all(
        args.features, args.checkpoint, device, weights=args.weights, images=train, size=size
    )
    for network in opened:
        task = Task(network, train, val, size, device, args.batch)
        outcome = probe(args, task)
        scores = {seed: score(found, val) for seed, found in outcome.confusions.items()}
        rows += result_rows(scores, names, common | {"network": network.name})
        iou = np.mean([scored.iou for scored in scores.values()], axis=0)
        columns.append(Column(network.name, outcome.predicted, np.arange(len(names)), iou))
        miou = mean_and_deviation([scored.miou for scored in scores.values()])
        accuracy = mean_and_deviation([scored.accuracy for scored in scores.values()])
        seeds = f"seeds: {len(scores)}"
        if len(scores) < len(args.seeds):
            seeds += " (all alike: the memory holds all cells)"
        print(f"{network.name:12} mIoU {miou}   pixel accuracy {accuracy}   {seeds}")
    if args.json:
        write_json(args.json, provenance() | {"results": rows, "summary": summarise(rows)})
    if args.picture:
        write_picture(args.picture, draw_segmentations(outcome.samples, columns, names))


if __name__ == "__main__":
    run(main)
