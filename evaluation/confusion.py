"""Confusion matrices, and the scores computed from them by the rules of published evaluators.

A rule has two parts: `Match` says which class a cluster stands for, and `Absent` which classes the
mean of IoU is taken over.

Letters: K clusters (or prototypes), C classes.
"""

from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment

from evaluation.protocols import Absent, Match


@dataclass(frozen=True)
class GroupingScore:
    """Agreement of clusters and classes over a whole set; all shares in 0..1."""

    miou: float
    """Mean IoU over the classes that count."""
    accuracy: float
    """Share of labelled pixels whose cluster has their class."""
    iou: np.ndarray
    """float64 [C]; NaN for a class that does not count."""
    classes: np.ndarray
    """int64 [K], the class of each cluster; -1 for none."""
    pixels: np.ndarray
    """int64 [C], labelled pixels of each class."""
    used: int
    """Number of clusters with at least one labelled pixel."""


def confusion_matrix(
    clusters: np.ndarray, labels: np.ndarray, num_clusters: int, num_classes: int
) -> np.ndarray:
    """int64 [K, C]: number of pixels of each cluster with each label.

    `clusters` and `labels` are integer arrays of the same shape. Pixels with a label outside
    0 … C-1 (void) are skipped.
    """
    labels = labels.astype(np.int64)
    valid = (labels >= 0) & (labels < num_classes)
    pair = clusters[valid].astype(np.int64) * num_classes + labels[valid]
    counts = np.bincount(pair, minlength=num_clusters * num_classes)
    return counts.reshape(num_clusters, num_classes)


def match(confusion: np.ndarray, rule: Match = "pixels") -> np.ndarray:
    """int64 [K]: the class of each cluster of an int64 [K, C] confusion matrix, -1 for none.

    One to one with K < C, some classes get no cluster. On a tie `majority` takes the class with the
    lower id.
    """
    if rule == "none":
        return np.arange(len(confusion))
    if rule == "pixels":
        return _most_pixels(confusion)
    iou = _iou(confusion)
    if rule == "iou":
        classes = np.zeros(len(confusion), np.int64)
        columns, rows = linear_sum_assignment(1 - iou.T)
        classes[rows] = columns
        return classes
    best: np.ndarray = (confusion if rule == "majority" else iou).argmax(axis=1)
    return best


def _most_pixels(confusion: np.ndarray) -> np.ndarray:
    """One to one. Of the clusters that are left for classes without pixels, the largest are taken,
    so that the numbering of the clusters does not decide whether such a class counts.
    """
    classes = np.full(len(confusion), -1, np.int64)
    rows, columns = linear_sum_assignment(confusion, maximize=True)
    classes[rows] = columns
    absent = columns[confusion.sum(axis=0)[columns] == 0]
    classes[np.isin(classes, absent)] = -1
    spare = np.flatnonzero(classes < 0)
    largest = spare[np.argsort(-confusion[spare].sum(axis=1), kind="stable")]
    classes[largest[: len(absent)]] = absent
    return classes


def _iou(confusion: np.ndarray) -> np.ndarray:
    """float64 [K, C]: IoU of each cluster and class; 0 if neither has pixels."""
    union = confusion.sum(axis=1)[:, None] + confusion.sum(axis=0) - confusion
    return confusion / np.maximum(union, 1)


def score_grouping(
    confusion: np.ndarray, rule: Match = "pixels", absent: Absent = "skip"
) -> GroupingScore:
    """Match and score an int64 [K, C] confusion matrix. Raises ValueError if no pixel is labelled.

    A class that is labelled but has no cluster has IoU 0.
    """
    if not confusion.any():
        raise ValueError("no labelled pixel to score")
    return score_matched(confusion, match(confusion, rule), absent)


def score_classes(confusion: np.ndarray, absent: Absent = "skip") -> GroupingScore:
    """Score predicted classes: an int64 [C, C] confusion matrix (predicted, true), or [C + 1, C] if
    void can be predicted: then it is one class more, of IoU 0 or left out. Raises ValueError if no
    pixel is labelled.
    """
    beyond = len(confusion) - confusion.shape[1]
    return score_grouping(np.pad(confusion, ((0, 0), (0, beyond))), "none", absent)


def score_matched(
    confusion: np.ndarray, classes: np.ndarray, absent: Absent = "skip"
) -> GroupingScore:
    """Score an int64 [K, C] confusion matrix given the class int64 [K] of each cluster, -1 for
    none; at least one pixel is labelled.
    """
    pixels = confusion.sum(axis=0)
    predicted = np.zeros((len(pixels), len(pixels)), np.int64)
    np.add.at(predicted, classes[classes >= 0], confusion[classes >= 0])
    hit = predicted.diagonal()
    union = pixels + predicted.sum(axis=1) - hit
    iou = np.where(union > 0, hit / np.maximum(union, 1), 0.0 if absent == "zero" else np.nan)
    return GroupingScore(
        miou=float(np.nanmean(iou)),
        accuracy=float(hit.sum() / pixels.sum()),
        iou=iou,
        classes=classes,
        pixels=pixels,
        used=int((confusion.sum(axis=1) > 0).sum()),
    )
