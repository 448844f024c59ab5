"""Scores clusters or classes of pixels against label maps, over a whole set of images.

Letters: B images, K clusters, C classes, h w cells, R the side of an evaluated image in pixels.
"""

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evaluation.confusion import (
    GroupingScore,
    confusion_matrix,
    score_classes,
    score_grouping,
)
from evaluation.crf import refine_clusters
from evaluation.datasets.images import torch_nearest
from evaluation.datasets.labelled_images import LabelledImages
from evaluation.datasets.labelled_squares import LabelledSquares
from evaluation.protocols import Absent, Match
from evaluation.segment import assign
from pipeline.errors import UserError


@dataclass(frozen=True)
class Predictor:
    """Predicts a cluster or class for each pixel. Several seeds share one pass of a network."""

    name: str
    kind: str
    """prototypes, groups (of prototypes), k-means, or the name of a probe."""
    seeds: list[int]
    logits: Callable[[Tensor], list[Tensor]]
    """Normalised images [B, 3, R, R] → [B, K, h, w] for each seed: scores of the clusters or
    classes. For a CRF: log-likelihoods, up to a constant for each cell."""
    decide: Callable[[Tensor, int], Tensor] = assign
    """Logits [B, K, h, w] and a side → int64 [B, side, side]: cluster or class of each pixel."""
    num_clusters: int | None = None
    """None: as many as there are logits."""
    memory: int | None = None
    """Cells that the clusters or the probe were fitted to; None for prototypes."""
    made: str | None = None
    """How the clusters were made, in words, if `kind` does not say it."""
    stage: str | None = None
    """Of the network, as in `Features`."""
    refine: Callable[[Tensor, Tensor, np.ndarray], Tensor] = refine_clusters
    """By a CRF: logits, clusters and pixels → clusters."""


@dataclass(frozen=True)
class Counting:
    """How clusters become classes, and which of these count."""

    matches: Sequence[Match]
    """A result for each."""
    absent: Absent = "skip"
    masks: int | None = None
    """Side in pixels at which predictions and labels are compared; None: that of the images."""
    as_many: bool = False
    """There must be as many clusters as classes."""

    def require(self, count: int, class_names: Sequence[str] | None, what: str) -> None:
        """Raise UserError unless `what` has enough clusters for a matching one to one, or as many
        as classes if the rule asks for it. Without names, the number of classes is not known yet.
        """
        classes = len(class_names or [])
        if class_names is None or count == classes:
            return
        if self.as_many:
            raise UserError(
                f"{what}: {count} clusters for {classes} classes: the protocol has as many"
            )
        one_to_one = [match for match in self.matches if match in ("pixels", "iou")]
        if one_to_one and count < classes:
            raise UserError(
                f"{what}: {count} clusters are fewer than {classes} classes: --match"
                f" {one_to_one[0]} gives each class its own; --match majority does not"
            )

    def score(
        self, confusion: np.ndarray, match: Match, class_names: Sequence[str] | None
    ) -> GroupingScore:
        """Score an int64 [K, C] confusion matrix. Without names the classes are those that the
        labels show. Raises ValueError if no pixel is labelled.
        """
        if match == "none":
            return score_classes(confusion, self.absent)
        if class_names is not None:
            return score_grouping(confusion, match, self.absent)
        shown = np.flatnonzero(confusion.sum(axis=0))
        part = score_grouping(confusion[:, shown], match, self.absent)
        iou = np.full(confusion.shape[1], np.nan)
        iou[shown] = part.iou
        classes = np.append(shown, -1)[part.classes]
        return replace(part, iou=iou, classes=classes)


@dataclass(frozen=True)
class Result:
    """The predictions of one seed over the whole set."""

    network: str
    """Name of the predictor, with or without CRF."""
    kind: str
    seed: int
    crf: bool
    num_clusters: int
    match: Match
    memory: int | None
    made: str | None
    stage: str | None
    score: GroupingScore
    kept: list[np.ndarray]
    """int64 [R, R], the clusters in each image to show in a picture."""


def evaluate(
    predictor: Predictor,
    squares: LabelledSquares,
    counting: Counting,
    *,
    crf: bool = False,
    keep: Sequence[int] = (),
) -> list[Result]:
    """Predict all images, one batch in memory at a time.

    Returns a result for each seed and match; with `crf` also one with refined clusters. `keep`:
    numbers of the images to show in a picture. Raises UserError for an image or label map that
    cannot be used, if no pixel is labelled, and for a matching one to one with too few clusters.
    """
    confusions: dict[tuple[int, bool], np.ndarray] = {}
    kept: dict[tuple[int, bool], list[np.ndarray]] = defaultdict(list)
    data, side = squares.images, counting.masks or squares.size
    for batch in squares.batches(f"{predictor.name}: scoring"):
        truth = squares.labels(batch)
        if side != squares.size:
            truth = torch_nearest(truth, side)
        shown = np.flatnonzero(np.isin(batch.index, list(keep)))
        with torch.inference_mode():
            predicted = predictor.logits(batch.normalised(squares.device))
        for seed, logits in zip(predictor.seeds, predicted, strict=True):
            count = predictor.num_clusters or logits.shape[1]
            counting.require(count, data.names, predictor.name)
            clusters = predictor.decide(logits.float(), side)
            for refined in (False, True) if crf else (False,):
                if refined:
                    clusters = predictor.refine(logits.float(), clusters, batch.pixels)
                host, variant = clusters.cpu().numpy(), (seed, refined)
                counts = confusion_matrix(host, truth, count, data.num_classes)
                confusions[variant] = confusions.get(variant, 0) + counts
                kept[variant] += [host[i] for i in shown]
    return [
        Result(
            title(predictor.name, match if match != counting.matches[0] else None, refined),
            predictor.kind,
            seed,
            refined,
            len(confusion),
            match,
            predictor.memory,
            predictor.made,
            predictor.stage,
            scored(counting, confusion, match, data),
            kept[seed, refined],
        )
        for match in counting.matches
        for (seed, refined), confusion in confusions.items()
    ]


def title(name: str, match: Match | None, refined: bool) -> str:
    """Name of a predictor, with what makes this result of it another than the first."""
    return ", ".join([name, *(["CRF"] if refined else []), *([f"by {match}"] if match else [])])


def scored(
    counting: Counting, confusion: np.ndarray, match: Match, data: LabelledImages
) -> GroupingScore:
    """`Counting.score`. Raises UserError if no pixel is labelled."""
    try:
        return counting.score(confusion, match, data.names)
    except ValueError as error:
        raise UserError(f"{data.source}: {error}: the label maps are all void") from None


def score_rows(
    score: GroupingScore, names: Sequence[str], common: Mapping[str, Any], used: str | None = None
) -> list[dict[str, Any]]:
    """One row a number, for --json: miou, pixel_accuracy and the iou of each class that counts,
    each with the fields of `common`. `used` names a row for the number of clusters in use.
    """
    whole = {"miou": score.miou, "pixel_accuracy": score.accuracy}
    if used:
        whole[used] = score.used
    rows = [{"metric": metric, "value": value, **common} for metric, value in whole.items()]
    return rows + [
        {"metric": "iou", "class": name, "value": float(iou), **common}
        for name, iou in zip([*names, "void"], score.iou, strict=False)
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
