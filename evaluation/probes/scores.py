"""Fits probes to features and scores them; `evaluation.probe` is the command."""

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from evaluation.commands import samples_of, squares_of, write_results
from evaluation.confusion import score_classes
from evaluation.datasets.labelled_images import LabelledImages
from evaluation.datasets.labelled_squares import LabelledSquares
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


def score_probes(args: argparse.Namespace) -> None:
    """Fit, score, print, and write the files that the options name. Raises UserError."""
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
