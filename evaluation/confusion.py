"""Confusion matrices, and the scores computed from them.

Clusters are scored by the protocol of unsupervised semantic segmentation (arXiv 2205.15288, table
5): one confusion matrix over the whole set, one-to-one matching of clusters and classes.

Letters: K clusters (or prototypes), C classes.
"""

from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment


@dataclass(frozen=True)
class GroupingScore:
    """Agreement of clusters and classes over a whole set; all shares in 0..1."""

    miou: float
    """Mean IoU over the classes that occur in the labels."""
    accuracy: float
    """Share of labelled pixels whose cluster is matched to their class."""
    iou: np.ndarray
    """float64 [C]; NaN for a class that does not occur in the labels."""
    cluster: np.ndarray
    """int64 [C], the cluster matched to each class; -1 for none."""
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


def match(confusion: np.ndarray) -> np.ndarray:
    """int64 [C]: the cluster of each class, so that as many pixels as possible match. With K < C,
    -1 for a class without cluster.
    """
    cluster = np.full(confusion.shape[1], -1, np.int64)
    rows, columns = linear_sum_assignment(confusion, maximize=True)
    cluster[columns] = rows
    return cluster


def score_grouping(confusion: np.ndarray) -> GroupingScore:
    """Match and score an int64 [K, C] confusion matrix.

    With K > C, pixels of unmatched clusters count as errors of their classes. With K < C, an
    unmatched class has IoU 0. Classes without labelled pixels are skipped. Raises ValueError if no
    pixel is labelled.
    """
    pixels = confusion.sum(axis=0)
    shown = np.flatnonzero(pixels)
    cluster = np.full(len(pixels), -1, np.int64)
    cluster[shown] = match(confusion[:, shown])
    return score_matched(confusion, cluster)


def score_classes(confusion: np.ndarray) -> GroupingScore:
    """Score predicted classes: an int64 [C, C] confusion matrix (predicted, true).

    Classes without labelled pixels are skipped, but a pixel predicted as one of them is an error.
    Raises ValueError if no pixel is labelled.
    """
    return score_matched(confusion, np.arange(len(confusion)))


def score_matched(confusion: np.ndarray, cluster: np.ndarray) -> GroupingScore:
    """Score an int64 [K, C] confusion matrix given the `cluster` int64 [C] of each class, -1 for
    none. Raises ValueError if no pixel is labelled.
    """
    pixels = confusion.sum(axis=0)
    shown = np.flatnonzero(pixels)
    if not len(shown):
        raise ValueError("no labelled pixel to score")
    cluster = np.where(pixels > 0, cluster, -1)
    matched = shown[cluster[shown] >= 0]
    hit = confusion[cluster[matched], matched]
    iou = np.where(pixels > 0, 0.0, np.nan)
    iou[matched] = hit / (pixels[matched] + confusion[cluster[matched]].sum(axis=1) - hit)
    return GroupingScore(
        miou=float(iou[shown].mean()),
        accuracy=float(hit.sum() / pixels.sum()),
        iou=iou,
        cluster=cluster,
        used=int((confusion.sum(axis=1) > 0).sum()),
    )
