"""Classifiers of CAPI (arXiv 2502.08769), whose settings are selected on a tenth of the training
images: dense k-NN by a vote of pixels, and logistic regression on cells.

Letters: Q cells to classify, D features, L pixels of a cell, C classes.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from evaluation.confusion import confusion_matrix, score_classes
from evaluation.probes.linear import fit_logistic
from evaluation.probes.nearest import Distance
from evaluation.probes.voting import PixelMemory, PixelVote

STRENGTHS = tuple(float(c) for c in 10 ** np.linspace(-6, 5, 8))
"""Of logistic regression: CAPI's grid of C."""

Classifier = Callable[[Tensor], Tensor]
"""Cells [Q, D] → labels [Q, L]."""
Fit = Callable[[PixelMemory, Tensor], Classifier]
"""A memory and bool [M], the cells to learn from → a classifier."""


def votes(neighbours: Sequence[int], distances: Sequence[Distance]) -> dict[str, Fit]:
    """k-NN for each pair of settings, by name."""

    def fit(memory: PixelMemory, among: Tensor, count: int, distance: Distance) -> Classifier:
        return PixelVote(memory, among, neighbours=count, distance=distance)

    pairs = itertools.product(neighbours, distances)
    return {f"{k} neighbours, {d}": _bound(fit, count=k, distance=d) for k, d in pairs}


def regressions() -> dict[str, Fit]:
    """Logistic regression on the most frequent label of each cell, for each of `STRENGTHS`, by
    name. All pixels of a cell get its class.
    """

    def fit(memory: PixelMemory, among: Tensor, strength: float) -> Classifier:
        memory = memory.only(among)
        counts = F.one_hot(memory.class_of_cell, memory.num_classes).float()
        model = fit_logistic(memory.features, counts, strength=strength)
        pixels = memory.labels.shape[1]

        def classify(cells: Tensor) -> Tensor:
            return model(cells).argmax(dim=1).byte()[:, None].expand(-1, pixels)

        return classify

    return {f"C {c:.2g}": _bound(fit, strength=c) for c in STRENGTHS}


def _bound(fit: Callable[..., Classifier], **settings: Any) -> Fit:
    return lambda memory, among: fit(memory, among, **settings)


@dataclass(frozen=True)
class Held:
    """Which of `count` training images select the settings."""

    count: int
    seed: int

    @property
    def images(self) -> np.ndarray:
        """int64, a tenth of the images, at random."""
        return np.random.default_rng(self.seed).permutation(self.count)[: self.count // 10]

    @property
    def others(self) -> np.ndarray:
        """int64, the rest, in order."""
        return np.setdiff1d(np.arange(self.count), self.images)


def select(fits: dict[str, Fit], memory: PixelMemory, held: Held) -> tuple[str, Classifier]:
    """Of `fits` the one with the highest mIoU on the held-out images, fitted to all of `memory`,
    and its name. A single one is not tried.

    Raises ValueError if there are too few images to hold some out, or no labelled pixel.
    """
    best = next(iter(fits))
    if len(fits) > 1:
        if not len(held.images):
            raise ValueError(f"selecting settings needs 10 training images, not {held.count}")
        apart = torch.isin(memory.image, torch.from_numpy(held.images).to(memory.image))
        rest, tried = memory.known(~apart), memory.only(apart)
        best = max(fits, key=lambda name: _miou(fits[name](memory, rest), tried))
    return best, fits[best](memory, memory.known())


def _miou(classifier: Classifier, memory: PixelMemory) -> float:
    """mIoU over the classes that are labelled or predicted, void among the latter."""
    count = memory.num_classes
    with torch.inference_mode():
        predicted = classifier(memory.features).cpu().numpy()
    confusion = confusion_matrix(predicted, memory.labels.cpu().numpy(), count + 1, count)
    return score_classes(confusion).miou
