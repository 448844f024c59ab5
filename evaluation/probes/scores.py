"""Fits probes to features and scores them; `evaluation.probe` is the command.

Letters: B images, D features, Q cells to classify, C classes, h w cells of an image.
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evaluation.commands import (
    facts,
    in_words,
    require_table,
    samples_of,
    squares_of,
    write_results,
)
from evaluation.datasets.label_maps import VOID
from evaluation.datasets.labelled_images import LabelledImages
from evaluation.datasets.labelled_squares import LabelledSquares
from evaluation.datasets.open import labelled_from
from evaluation.datasets.random_squares import HUMMINGBIRD, LEOPART, RandomSquares, Recipe
from evaluation.features import Features
from evaluation.pictures.segmentation import Column
from evaluation.probes.linear import fit_linear
from evaluation.probes.linear_sgd import Schedule, fit_sgd
from evaluation.probes.memory import LabelledFeatures, Memory, gather_memory, room_for
from evaluation.probes.overclustering import Overclustering
from evaluation.probes.retrieval import Retrieval
from evaluation.probes.selection import Held, regressions, select, votes
from evaluation.probes.storage import Storage
from evaluation.probes.voting import gather_pixels, join_pixels, room_for_pixels
from evaluation.reduction import reduced, require_cells, whitened
from evaluation.scoring import Counting, Predictor, Result, evaluate, print_scores, score_rows
from evaluation.specs import open_all
from model.kmeans import kmeans
from pipeline.errors import UserError, about

Head = Callable[[Tensor], Tensor]
"""A fitted probe: cells [Q, D] → class scores [Q, C]."""


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
    network = reduced(task.network, task.train, standardise=True, indices=indices)
    return replace(task, network=network)


def gather(args: argparse.Namespace, task: Task, seed: int) -> Memory:
    """The cells of the training set that `seed` draws. Raises UserError."""
    train, count = task.train, len(task.train.images)
    void_as = getattr(args, "void_as", None)
    if random_crops(args):
        train = random_squares(train, HUMMINGBIRD, seed)
    with about(train.images.source):
        return gather_memory(
            labelled_features(task.network, train, void_as),
            count,
            train.images.num_classes,
            capacity=capacity_of(args, count),
            seed=seed,
            balanced=args.probe == "knn",
            storage=storage_of(args),
        )


def capacity_of(args: argparse.Namespace, num_images: int) -> int:
    """Cells in the memory, at most. Of random crops each image gives as many."""
    memory: int = args.memory
    return max(memory // num_images, 1) * num_images if random_crops(args) else memory


def require_room(args: argparse.Namespace, network: Features, train: LabelledSquares) -> None:
    """Refuse a memory without room, and too few cells, before whitening and standardising read the
    whole training set: a single image says how many cells and features there are. Raises UserError.
    """
    squares, count = train.first(), len(train.images)
    features = network(squares.normalised(train.device))
    clusters = args.clusters if args.probe == "clusters" else None
    require_cells(network.name, features, count, whiten=args.whiten, clusters=clusters)
    if getattr(args, "head", None) == "sgd":  # it keeps no cells
        return
    first = LabelledFeatures(squares, features, train.labels(squares))
    classes = train.images.num_classes
    if learns_from_pixels(args):
        copies = int(args.probe == "linear")  # of the cells that it learns from
        with about(train.images.source):
            room = room_for_pixels(first, count, copies=copies)
        Storage(whole=True).place(*room, train.device)
        return
    copies = int(args.probe == "clusters")  # k-means scales cells to length 1
    room = room_for(first, count, classes, capacity=capacity_of(args, count), copies=copies)
    storage_of(args).place(*room, train.device)


def learns_from_pixels(args: argparse.Namespace) -> bool:
    """Whether the probe is one of CAPI's."""
    return getattr(args, "vote", None) == "pixels" or getattr(args, "head", None) == "lbfgs"


def storage_of(args: argparse.Namespace) -> Storage:
    """Where the options keep a memory; that of k-NN may lie anywhere."""
    if args.probe != "knn":
        return Storage()
    return Storage(getattr(torch, args.memory_precision), args.memory_folder, anywhere=True)


def random_crops(args: argparse.Namespace) -> bool:
    """Whether the memory is one of random crops, which differ by seed."""
    return bool(getattr(args, "crops", False))


def random_squares(train: LabelledSquares, recipe: Recipe, seed: int) -> RandomSquares:
    """Random crops of the training images."""
    fields = {f.name: getattr(train, f.name) for f in dataclasses.fields(train)}
    return RandomSquares(**fields, recipe=recipe, seed=seed)


def fit(args: argparse.Namespace, memory: Memory, seed: int, task: Task) -> Head:
    """The probe that the options name, fitted to `memory`. Raises UserError."""
    with about(task.train.images.source):
        if args.probe == "knn":
            count, temperature = args.neighbours[0], args.temperature
            return Retrieval(memory, neighbours=count, temperature=temperature)
        if args.probe == "linear":
            return fit_linear(memory, seed, steps=args.steps, learning_rate=args.learning_rate)
        clusters = kmeans(memory.features, args.clusters, seed, cosine=task.network.cosine)
        return Overclustering(memory, clusters)


def scores_of_cells(head: Head, features: Tensor) -> Tensor:
    """Features [B, D, h, w] → class scores [B, C, h, w]."""
    batch, _, height, width = features.shape
    cells = features.permute(0, 2, 3, 1).flatten(0, 2)
    return head(cells).view(batch, height, width, -1).permute(0, 3, 1, 2)


def as_predictor(
    kind: str, network: Features, heads: Mapping[int, Head], memory: int | None, **more: Any
) -> Predictor:
    """A predictor from `heads`, one for each seed, on features of `network`; each has learnt from
    `memory` cells, or from all images again and again. `more`: other fields of `Predictor`.
    """

    def logits(images: Tensor) -> list[Tensor]:
        features = network(images)
        return [scores_of_cells(head, features) for head in heads.values()]

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
        with about(task.train.images.source):
            batches = labelled_features(scaled.network, task.train)
            memory = gather_pixels(batches, len(task.train.images), classes)
            name, classifier = select(fits, memory, held)
        print(f"{task.network.name}, seed {seed}: {name}", file=sys.stderr)
        yield as_predictor(
            args.probe,
            scaled.network,
            {seed: classifier},
            int(memory.known().sum()),
            decide=join_pixels,
            num_clusters=classes + 1,
        )


def predictors_of(args: argparse.Namespace, task: Task) -> Iterator[Predictor]:
    """The probe that the options name, fitted for each seed. Raises UserError."""
    if learns_from_pixels(args):
        return fitted_to_pixels(args, task)
    if getattr(args, "head", None) == "sgd":
        return fitted_by_steps(args, task)
    return fitted_to_memory(args, standardised(task) if args.standardise else task)


def probe(args: argparse.Namespace, task: Task) -> list[Result]:
    """Fit and score the probe for each seed. Raises UserError."""
    keep = samples_of(args, task.val.images).tolist()
    counting = Counting([args.match], args.absent)
    return [
        result
        for predictor in predictors_of(args, task)
        for result in evaluate(predictor, task.val, counting, keep=keep)
    ]


def check_classes(args: argparse.Namespace, train: LabelledImages) -> None:
    """Refuse settings that do not fit the classes. Raises UserError."""
    void_as = getattr(args, "void_as", None)
    if void_as is not None and not 0 <= void_as < train.num_classes:
        raise UserError(f"--void-as {void_as}: the classes are 0 to {train.num_classes - 1}")
    require_table(args, train)


def open_both(args: argparse.Namespace) -> tuple[LabelledImages, LabelledImages]:
    """The training set and the set to score. Raises UserError if their classes differ, or if they
    share an image.
    """
    val, train = labelled_from(args), labelled_from(args, "train-")
    if train.names != val.names:
        raise UserError(f"{train.source}: has other classes than {val.source}")
    val.require_apart(train)
    return train, val


def score_probes(args: argparse.Namespace) -> None:
    """Fit, score, print, and write the files that the options name. Raises UserError."""
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
    if args.probe == "knn" and args.vote == "cells":
        common["memory_precision"] = args.memory_precision
    rows: list[dict[str, Any]] = []
    columns: list[Column] = []
    opened = open_all(args, train)
    for features in opened:
        require_room(args, features, train)
    for features in opened:
        network = whitened(features, train, args.whiten)
        results = probe(args, Task(network, train, val))
        pixels = results[0].score.pixels
        for result in results:
            head = common | {
                "network": network.name,
                "seed": result.seed,
                "memory": result.memory,
                "stage": network.stage,
            }
            rows += score_rows(result.score, names, head)
        iou = np.mean([result.score.iou for result in results], axis=0)
        columns.append(Column(network.name, results[0].kept, results[0].score.classes, iou))
        note = f"seeds: {len(results)}; {in_words(common, results[0].memory)}"
        if len(results) < len(args.seeds):
            note += " (one result for all seeds: the memory holds all cells)"
        print_scores(network.name, [result.score for result in results], note)
    write_results(args, rows, columns, val, train.images, pixels=pixels)
