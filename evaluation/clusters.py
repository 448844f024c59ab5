"""Clusters of cells scored against label maps; `evaluation.unsupervised_segmentation` is the
command.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
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
from evaluation.crf import refine_clusters, require_crf
from evaluation.datasets.images import open_images
from evaluation.datasets.labelled_images import LabelledImages
from evaluation.datasets.labelled_squares import LabelledSquares
from evaluation.datasets.open import labelled_from
from evaluation.datasets.squares import SquareImages
from evaluation.features import Features, dilated, dilated_name
from evaluation.merging import Groups, merge_prototypes
from evaluation.networks import load_network, start_of, untrained_network
from evaluation.options import AS_CLASSES
from evaluation.pictures.segmentation import Column
from evaluation.protocols import BY_COUNT, UPSAMPLE, Match, clusters_itself
from evaluation.reduction import reduced, require_cells, whitened
from evaluation.scoring import (
    Counting,
    Predictor,
    Result,
    evaluate,
    print_scores,
    score_rows,
)
from evaluation.segment import Segmenter, assign, assign_cells
from evaluation.specs import open_all
from model.kmeans import COSINE_TEMPERATURE, RECIPES, kmeans, sample_cells
from pipeline.errors import UserError, about
from train.config import RunConfig

Decide = Callable[[Tensor, int], Tensor]
"""As `Predictor.decide`."""
DECIDE: dict[str, Decide] = dict(zip(UPSAMPLE, (assign, assign, assign_cells), strict=True))
"""By --upsample."""
LEAST_SHARE = 1e-2
"""Probability of a group that no cell around a cell has, for a CRF."""


def prototype_clusters(
    name: str, network: Segmenter, config: RunConfig, args: argparse.Namespace
) -> Predictor:
    """Clusters that are a network's prototypes."""
    temperature = args.crf_temperature or config.model.teacher_temp

    def logits(images: Tensor) -> list[Tensor]:
        scores, features = network.segment(images)
        if args.upsample != "features":
            return [scores / temperature]
        scores = scores * torch.linalg.vector_norm(features, dim=1, keepdim=True)
        return [torch.cat([scores / temperature, features], dim=1)]

    predictor = Predictor(name, "prototypes", [config.train.seed], logits, DECIDE[args.upsample])
    if args.upsample != "features":
        return predictor
    return beside_features(predictor, config.model.num_prototypes)


def merged_prototypes(
    name: str, network: Segmenter, groups: Groups, config: RunConfig, args: argparse.Namespace
) -> Predictor:
    """Clusters that are groups of a network's prototypes."""

    def refine(shares: Tensor, clusters: Tensor, pixels: np.ndarray) -> Tensor:
        return refine_clusters(shares.clamp_min(LEAST_SHARE).log(), clusters, pixels)

    return Predictor(
        f"{name}, merged",
        "groups",
        [config.train.seed],
        lambda images: [groups.shares(network.segment(images)[0])],
        DECIDE[args.upsample],
        memory=groups.points,
        made=groups.made,
        refine=refine,
    )


def beside_features(predictor: Predictor, count: int) -> Predictor:
    """The predictor of `count` clusters, whose logits are followed by the features that they are
    products of: these are upsampled, and normalised then.
    """

    def decide(logits: Tensor, side: int) -> Tensor:
        return predictor.decide(logits[:, :count], side)

    def refine(logits: Tensor, clusters: Tensor, pixels: np.ndarray) -> Tensor:
        return refine_clusters(logits[:, :count], clusters, pixels, logits[:, count:])

    return replace(predictor, decide=decide, refine=refine, num_clusters=count)


def kmeans_clusters(
    features: Features, squares: SquareImages, count: int, args: argparse.Namespace
) -> Predictor:
    """`count` clusters of `features` of the images: k-means for each of args.seeds. All share one
    sample of cells. Raises UserError.
    """
    name, seeds = f"{features.name}, k-means", args.seeds
    recipe = RECIPES[args.kmeans]
    if args.standardise or args.pca:
        features = reduced(features, squares, standardise=args.standardise, pca=args.pca)
    maps = (features(b.normalised(squares.device)) for b in squares.batches(f"{name}: cells"))
    cells = sample_cells(maps, len(squares.images), seeds[0], most=recipe.most(count))
    cosine = features.cosine and args.kmeans != "faiss"
    with about(f"--clusters {count}"):
        fits = [
            kmeans(cells, count, seed, cosine=cosine, recipe=recipe, restarts=args.restarts)
            for seed in seeds
        ]

    upsampled = args.upsample == "features"
    temperature = args.crf_temperature or COSINE_TEMPERATURE

    def logits(images: Tensor) -> list[Tensor]:
        maps = features(images)
        scores = [fitted.logits(maps, not upsampled, temperature) for fitted in fits]
        return [torch.cat([each, maps], dim=1) if upsampled and cosine else each for each in scores]

    decide = DECIDE[args.upsample]
    predictor = Predictor(
        name, "k-means", seeds, logits, decide, memory=len(cells), stage=features.stage
    )
    return beside_features(predictor, count) if upsampled and cosine else predictor


def with_mirror_image(predictor: Predictor) -> Predictor:
    """The predictor, its logits averaged over an image and its mirror image."""

    def averaged(images: Tensor) -> list[Tensor]:
        mirrored = predictor.logits(images.flip(3))
        pairs = zip(predictor.logits(images), mirrored, strict=True)
        return [(plain + mirror.flip(3)) / 2 for plain, mirror in pairs]

    return replace(predictor, logits=averaged)


def counting_of(args: argparse.Namespace, num_classes: int) -> Counting:
    """How the options count."""
    matches: list[Match] = [args.match]
    if args.match == BY_COUNT:
        one_to_one = args.clusters in (None, num_classes)
        matches = ["iou"] if one_to_one else ["majority", "majority-iou"]
    as_many = args.protocol is not None and args.match == "pixels"
    return Counting(matches, args.absent, args.masks, as_many)


def of_prototypes(args: argparse.Namespace, squares: LabelledSquares) -> Iterator[Predictor]:
    """The prototypes of the run, or with --merge their groups, and the same of the network before
    training, unless too few of its prototypes are in use: a note says so. Raises UserError.
    """
    unlabelled = open_images(args.unlabelled) if args.merge else None
    trained, config = load_network(args.checkpoint, squares.device)
    count = number_of_groups(args, squares.images, config.model.num_prototypes)
    stride = args.output_stride
    if stride is not None:
        trained.teacher.encoder = dilated(trained.teacher.encoder, stride)
    networks = {"trained": lambda: trained}
    if args.baseline == "untrained":
        model, seed = config.model, config.train.seed
        init = start_of(args.checkpoint)
        name = "untrained" if init.weights == "random" else "start"
        networks[name] = lambda: untrained_network(model, seed, squares, stride, init)
    for title, load in networks.items():
        name, network = dilated_name(title, stride), load()
        if unlabelled is None:
            yield prototype_clusters(name, network, config, args)
        else:
            try:
                groups = merge_prototypes(network, config, unlabelled, count, squares.device)
            except UserError as error:
                if network is trained:
                    raise
                print(f"note: {name} is left out: {error}", file=sys.stderr)
            else:
                yield merged_prototypes(name, network, groups, config, args)


def number_of_groups(args: argparse.Namespace, data: LabelledImages, prototypes: int) -> int:
    """That of --merge; 0 without it. Raises UserError if there cannot be so many."""
    if args.merge is None:
        return 0
    if args.merge == AS_CLASSES and data.names is None:
        raise UserError("--merge needs a number: no class table says how many classes there are")
    count: int = data.num_classes if args.merge == AS_CLASSES else args.merge
    if count > prototypes:
        raise UserError(f"--merge {count}: {args.checkpoint} has {prototypes} prototypes")
    counting_of(args, data.num_classes).require(count, data.names, f"--merge {count}")
    return count


def open_predictors(args: argparse.Namespace, squares: LabelledSquares) -> Iterator[Predictor]:
    """The clusterings that the options name, one at a time. Opens all networks first, so that a
    missing file is found before any computation.
    """
    data = squares.images
    if args.features and args.clusters is None and data.names is None:
        raise UserError("k-means needs --clusters: no class table says how many classes")
    if args.features:
        counting = counting_of(args, data.num_classes)
        counting.require(args.clusters or data.num_classes, data.names, "k-means")
    opened, count = open_all(args, squares), args.clusters or data.num_classes
    for features in opened:
        first = features(squares.first().normalised(squares.device))
        require_cells(
            features.name, first, len(data), whiten=args.whiten, pca=args.pca, clusters=count
        )
    if args.checkpoint is not None and not clusters_itself(args.protocol):
        yield from of_prototypes(args, squares)
    for features in opened:
        yield kmeans_clusters(whitened(features, squares, args.whiten), squares, count, args)


def result_rows(result: Result, names: list[str], common: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of `score_rows` for one result."""
    head = {
        "network": result.network,
        "clusters": result.kind,
        "num_clusters": result.num_clusters,
        "crf": result.crf,
        "seed": result.seed,
        "match": result.match,
        "memory": result.memory,
        "made": result.made,
        "stage": result.stage,
    }
    used = "used_prototypes" if result.kind == "prototypes" else "used_clusters"
    return score_rows(result.score, names, head | common, used)


def shown(result: Result) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """What a picture's column has of a result: clusters, their classes, IoU by class."""
    return result.kept, result.score.classes, result.score.iou


def print_results(results: list[Result], facts: dict[str, Any]) -> None:
    """One line for each network, over its seeds; `facts` of `commands.facts`."""
    for name in dict.fromkeys(result.network for result in results):
        same = [result for result in results if result.network == name]
        kind = same[0].kind.replace("k-means", "clusters")
        note = f"{same[0].score.used} of {same[0].num_clusters} {kind} in use"
        note = note if len(same) == 1 else f"{len(same)} seeds"
        note = f"{note}; {in_words(facts, same[0].memory)}"
        print_scores(name, [result.score for result in same], note)
        if same[0].made:
            print(f"{'':24} {same[0].made}")


def score_clusters(args: argparse.Namespace) -> None:
    """Score, print, and write the files that the options name. Raises UserError."""
    if args.crf:
        require_crf()
    data = labelled_from(args)
    require_table(args, data)
    squares, keep = squares_of(args, data), samples_of(args, data).tolist()
    counting = counting_of(args, data.num_classes)
    common = {"flip": args.flip, "size": squares.size, "absent": args.absent} | facts(args, data)
    results: list[Result] = []
    predictors = open_predictors(args, squares)
    for predictor in map(with_mirror_image, predictors) if args.flip else predictors:
        scored = evaluate(predictor, squares, counting, crf=args.crf, keep=keep)
        print_results(scored, common)
        results += scored
    rows = [row for result in results for row in result_rows(result, data.class_names, common)]
    first = {result.network: result for result in reversed(results)}  # the first seed of each
    columns = [
        Column(name, *shown(first[name]), note=first[name].made)
        for name in dict.fromkeys(result.network for result in results)
    ]
    write_results(args, rows, columns, squares, pixels=results[0].score.pixels)
