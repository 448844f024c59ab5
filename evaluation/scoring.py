"""Scores clusters or classes of pixels against label maps, over a whole set of images.

Letters: B images, K clusters, C classes, h w cells, R the side of an evaluated image in pixels.
"""

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evaluation.confusion import GroupingScore, confusion_matrix
from evaluation.crf import refine_clusters
from evaluation.datasets.labelled_squares import LabelledSquares
from evaluation.segment import assign
from pipeline.errors import UserError


@dataclass(frozen=True)
class Predictor:
    """Predicts a cluster or class for each pixel. Several seeds share one pass of a network."""

    name: str
    kind: str
    """prototypes, k-means, or the name of a probe."""
    seeds: list[int]
    logits: Callable[[Tensor], list[Tensor]]
    """Normalised images [B, 3, R, R] → [B, K, h, w] for each seed: scores of the clusters or
    classes. For a CRF: log-likelihoods, up to a constant for each cell."""


@dataclass(frozen=True)
class Result:
    """The predictions of one seed over the whole set."""

    network: str
    """Name of the predictor, with or without CRF."""
    kind: str
    seed: int
    crf: bool
    num_clusters: int
    score: GroupingScore
    kept: list[np.ndarray]
    """int64 [R, R], the clusters in each image to show in a picture."""


def evaluate(
    predictor: Predictor,
    squares: LabelledSquares,
    rule: Callable[[np.ndarray], GroupingScore],
    *,
    crf: bool = False,
    keep: Sequence[int] = (),
) -> list[Result]:
    """Predict all images, one batch in memory at a time.

    Returns a result for each seed; with `crf` it is followed by one with refined clusters. `rule`
    turns a confusion matrix into scores. `keep`: numbers of the images to show in a picture.
    Raises UserError for an image or label map that cannot be used, and if no pixel is labelled.
    """
    confusions: dict[tuple[int, bool], np.ndarray] = {}
    kept: dict[tuple[int, bool], list[np.ndarray]] = defaultdict(list)
    data = squares.images
    for batch in squares.batches(f"{predictor.name}: scoring"):
        truth = squares.labels(batch)
        shown = np.flatnonzero(np.isin(batch.index, list(keep)))
        with torch.inference_mode():
            predicted = predictor.logits(batch.normalised(squares.device))
        for seed, logits in zip(predictor.seeds, predicted, strict=True):
            clusters = assign(logits.float(), squares.size)
            for refined in (False, True) if crf else (False,):
                if refined:
                    clusters = refine_clusters(logits.float(), clusters, batch.pixels)
                host, variant = clusters.cpu().numpy(), (seed, refined)
                counts = confusion_matrix(host, truth, logits.shape[1], data.num_classes)
                confusions[variant] = confusions.get(variant, 0) + counts
                kept[variant] += [host[i] for i in shown]
    try:
        scores = {variant: rule(confusion) for variant, confusion in confusions.items()}
    except ValueError as error:
        raise UserError(f"{data.source}: {error}: the label maps are all void") from None
    return [
        Result(
            f"{predictor.name}, CRF" if refined else predictor.name,
            predictor.kind,
            seed,
            refined,
            len(confusions[seed, refined]),
            score,
            kept[seed, refined],
        )
        for (seed, refined), score in scores.items()
    ]


def score_rows(
    score: GroupingScore, names: Sequence[str], common: Mapping[str, Any], used: str | None = None
) -> list[dict[str, Any]]:
    """One row a number, for --json: miou, pixel_accuracy and the iou of each class that the labels
    show, each with the fields of `common`. `used` names a row for the number of clusters in use.
    """
    whole = {"miou": score.miou, "pixel_accuracy": score.accuracy}
    if used:
        whole[used] = score.used
    rows = [{"metric": metric, "value": value, **common} for metric, value in whole.items()]
    return rows + [
        {"metric": "iou", "class": name, "value": float(iou), **common}
        for name, iou in zip(names, score.iou, strict=True)
        if not np.isnan(iou)
    ]


def summarise(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean over seeds of each network's miou and pixel_accuracy, and their sample deviation (None
    for one seed).
    """
    values: dict[tuple[str, str], list[float]] = defaultdict(list)
    for row in rows:
        if row["metric"] in ("miou", "pixel_accuracy"):
            values[row["network"], row["metric"]].append(row["value"])
    return [
        {
            "network": network,
            "metric": metric,
            "mean": statistics.mean(each),
            "sd": statistics.stdev(each) if len(each) > 1 else None,
            "seeds": len(each),
        }
        for (network, metric), each in values.items()
    ]


def print_scores(name: str, scores: Sequence[GroupingScore], note: str) -> None:
    """One line for a network: mean and sample deviation over its seeds, in percent."""

    def mean_and_deviation(values: list[float]) -> str:
        deviation = f" ± {100 * statistics.stdev(values):.2f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):7.2%}{deviation}"

    miou = mean_and_deviation([score.miou for score in scores])
    accuracy = mean_and_deviation([score.accuracy for score in scores])
    print(f"{name:24} mIoU {miou}   pixel accuracy {accuracy}   {note}", flush=True)
