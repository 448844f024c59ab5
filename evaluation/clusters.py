"""Clusters of cells scored against label maps; `evaluation.unsupervised_segmentation` is the
command.
"""

import argparse
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor

from evaluation.commands import samples_of, squares_of, write_results
from evaluation.confusion import score_grouping
from evaluation.datasets.labelled_squares import LabelledSquares
from evaluation.datasets.open import labelled_from
from evaluation.features import Features, open_all
from evaluation.kmeans import kmeans, sample_cells
from evaluation.networks import load_network, untrained_network
from evaluation.pictures.segmentation import Column
from evaluation.scoring import Predictor, Result, evaluate, print_scores, score_rows
from evaluation.segment import Segmenter
from pipeline.errors import UserError


def prototype_clusters(name: str, network: Segmenter, seed: int, temperature: float) -> Predictor:
    """Clusters that are a network's prototypes. `temperature` is that of its assignments."""
    return Predictor(
        name, "prototypes", [seed], lambda images: [network.segment(images)[0] / temperature]
    )


def kmeans_clusters(
    features: Features, squares: LabelledSquares, num_clusters: int, seeds: list[int]
) -> Predictor:
    """K = `num_clusters` clusters of `features` of the images: k-means from a start for each seed.
    All starts share one sample of cells. Raises UserError.
    """
    name = f"{features.name}, k-means"
    maps = (features(b.normalised(squares.device)) for b in squares.batches(f"{name}: cells"))
    cells = sample_cells(maps, len(squares.images), seeds[0])
    try:
        fits = [kmeans(cells, num_clusters, seed, cosine=features.cosine) for seed in seeds]
    except ValueError as error:
        raise UserError(f"--clusters {num_clusters}: {error}") from None

    def logits(images: Tensor) -> list[Tensor]:
        maps = features(images)
        return [clusters.logits(maps) for clusters in fits]

    return Predictor(name, "k-means", seeds, logits)


def with_mirror_image(predictor: Predictor) -> Predictor:
    """The predictor, its logits averaged over an image and its mirror image."""

    def averaged(images: Tensor) -> list[Tensor]:
        mirrored = predictor.logits(images.flip(3))
        pairs = zip(predictor.logits(images), mirrored, strict=True)
        return [(plain + mirror.flip(3)) / 2 for plain, mirror in pairs]

    return replace(predictor, logits=averaged)


def open_predictors(args: argparse.Namespace, squares: LabelledSquares) -> Iterator[Predictor]:
    """The clusterings that the options name, one at a time. Opens all networks first, so that a
    missing file is found before any computation.
    """
    data = squares.images
    if args.features and args.clusters is None and data.names is None:
        raise UserError("k-means needs --clusters: no class table says how many classes")
    opened = open_all(args.features, args.checkpoint, args.weights, squares)
    if args.checkpoint is not None:
        trained, config = load_network(args.checkpoint, squares.device)
        seed, temperature = config.train.seed, config.model.teacher_temp
        yield prototype_clusters("trained", trained, seed, temperature)
        if args.baseline == "untrained":
            network = untrained_network(config.model, seed, squares)
            yield prototype_clusters("untrained", network, seed, temperature)
    for features in opened:
        yield kmeans_clusters(features, squares, args.clusters or data.num_classes, args.seeds)


def result_rows(result: Result, names: list[str], common: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of `score_rows` for one result."""
    head = {
        "network": result.network,
        "clusters": result.kind,
        "num_clusters": result.num_clusters,
        "crf": result.crf,
        "seed": result.seed,
    }
    used = "used_prototypes" if result.kind == "prototypes" else "used_clusters"
    return score_rows(result.score, names, head | common, used)


def print_results(results: list[Result]) -> None:
    """One line for each network, over its seeds."""
    for name in dict.fromkeys(result.network for result in results):
        same = [result for result in results if result.network == name]
        kind = "prototypes" if same[0].kind == "prototypes" else "clusters"
        note = f"{same[0].score.used} of {same[0].num_clusters} {kind} in use"
        print_scores(
            name, [r.score for r in same], note if len(same) == 1 else f"{len(same)} seeds"
        )


def score_clusters(args: argparse.Namespace) -> None:
    """Score, print, and write the files that the options name. Raises UserError."""
    data = labelled_from(args)
    squares, keep = squares_of(args, data), samples_of(args, data).tolist()
    common = {"flip": args.flip, "images": len(data), "size": squares.size, "dataset": args.dataset}
    results: list[Result] = []
    predictors = open_predictors(args, squares)
    for predictor in map(with_mirror_image, predictors) if args.flip else predictors:
        scored = evaluate(predictor, squares, score_grouping, crf=args.crf, keep=keep)
        print_results(scored)
        results += scored
    rows = [row for result in results for row in result_rows(result, data.class_names, common)]
    first = {result.network: result for result in reversed(results)}  # the first seed of each
    columns = [
        Column(name, first[name].kept, first[name].score.cluster, first[name].score.iou)
        for name in dict.fromkeys(result.network for result in results)
    ]
    write_results(args, rows, columns, squares)
