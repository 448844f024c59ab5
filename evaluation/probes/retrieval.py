"""Dense k-NN retrieval: a cell takes the labels of the nearest training cells (Hummingbird,
arXiv 2306.01667, section 3).

Letters: Q cells to classify, M cells in the memory, D features, C classes.
"""

import torch
from torch import Tensor

from evaluation.probes.memory import Memory
from evaluation.probes.nearest import NearestCells
from evaluation.probes.storage import searching_devices

SHARES = 2**24
"""Label shares of neighbours held at once: 64 MiB."""


class Retrieval:
    """Cells [Q, D] → class scores [Q, C]: mean of the label shares of the k = `neighbours` nearest
    cells of `memory`, weighted by softmax(cosine / `temperature`).
    """

    def __init__(self, memory: Memory, *, neighbours: int = 30, temperature: float = 0.02) -> None:
        self.memory, self.neighbours, self.temperature = memory, neighbours, temperature
        self.search: NearestCells | None = None

    def __call__(self, cells: Tensor) -> Tensor:
        if self.search is None:  # only now the device of the cells is known
            devices = searching_devices(self.memory.features, cells.device)
            self.search = NearestCells(self.memory.features, devices=devices)
        similarity, number = self.search(cells, self.neighbours)
        weights = (similarity / self.temperature).softmax(dim=1)
        counts = self.memory.counts
        step = max(1, SHARES // (self.neighbours * counts.shape[1]))
        scores = []
        for weight, near in zip(weights.split(step), number.split(step), strict=True):
            shares = counts[near.to(counts.device)].to(weight)  # [q, k, C]
            shares = shares / shares.sum(dim=2, keepdim=True)
            scores.append((weight[:, None] @ shares)[:, 0])
        return torch.cat(scores)
