"""k-means on the cells of many images: a bounded sample of cells, k-means++, Lloyd's iterations.

Letters: N images, B those of a batch, h w cells of an image, M cells sampled, D features, K
clusters.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from model.precision import full_precision

SAMPLE_FLOATS = 2**27
"""Floats of a sample: 512 MiB."""
CHUNK_FLOATS = 2**22
"""Floats of distances, and of cells, held at once beside the sample: 16 MiB each."""
COSINE_TEMPERATURE = 0.07
"""SlotCon's temperature for cells and prototypes, used here for cells and centres."""


@dataclass(frozen=True)
class Recipe:
    """How clusters are found."""

    greedy: bool = True
    """Start by greedy k-means++; otherwise from K of the cells."""
    cells_per_cluster: int | None = None
    """Cluster a sample of so many cells times K; None: of `SAMPLE_FLOATS` floats."""
    tolerance: float = 1e-4
    """Stop when the mean squared step of the centres is at most this share of the mean variance of
    a feature."""
    max_iterations: int = 100
    breath: int = 0
    """Centres to add and remove again at first, see `breathe`; 0: none."""

    def most(self, num_clusters: int) -> int | None:
        """Cells to sample at most; None for no other bound than the sample's."""
        return self.cells_per_cluster and self.cells_per_cluster * num_clusters


RECIPES = {
    "greedy": Recipe(),
    "breathing": Recipe(breath=5),
    "faiss": Recipe(greedy=False, cells_per_cluster=256, tolerance=0),
}
"""By name on the command line. faiss: what faiss.Kmeans does by default, with 100 iterations as
Leopart and NeCo call it."""


def sample_cells(
    batches: Iterable[Tensor],
    num_images: int,
    seed: int,
    floats: int = SAMPLE_FLOATS,
    most: int | None = None,
) -> Tensor:
    """Features [B, D, h, w] of N = `num_images` images, batch by batch → [M, D]: a uniform sample
    of their cells, in order; all of them if they have at most `floats` numbers. M·D ≤ `floats`,
    M ≤ `most`.

    The sample depends on `seed` and N, not on the batches. Raises ValueError if there are none.
    """
    sample: Tensor | None = None
    first = 0
    for features in batches:
        cells = features.permute(0, 2, 3, 1).flatten(0, 2)  # [B·h·w, D]
        if sample is None:
            total = num_images * features.shape[2] * features.shape[3]
            size = min(total, max(floats // features.shape[1], 1), most or total)
            chosen = np.random.default_rng(seed).choice(total, size, replace=False)
            chosen.sort()
            sample = cells.new_empty(size, features.shape[1])
        start, end = np.searchsorted(chosen, [first, first + len(cells)])
        here = torch.from_numpy(chosen[start:end] - first).to(cells.device)
        sample[start:end] = cells[here]
        first += len(cells)
    if sample is None:
        raise ValueError("no cells to sample")
    return sample


@dataclass(frozen=True)
class Clusters:
    """The result of k-means."""

    centres: Tensor
    """[K, D]; with `cosine` each has length 1."""
    cosine: bool
    """Only the direction of a cell matters (spherical k-means)."""
    inertia: float
    """Mean squared distance of a cell to its centre."""
    iterations: int

    @full_precision
    def logits(
        self, features: Tensor, unit: bool = True, temperature: float = COSINE_TEMPERATURE
    ) -> Tensor:
        """Features [B, D, h, w] → [B, K, h, w]: log-likelihood of each cluster, up to a constant
        for each cell. The nearest centre has the largest.

        The result is affine in the features (with `cosine` and `unit`, in their directions).
        Bilinear upsampling therefore gives the same clusters for logits as for features. Without
        `unit`, with `cosine`, a cell's logits grow with its length: their upsampling gives the
        clusters of features that are upsampled first and then normalised. `temperature` is that of
        cosines.
        """
        if self.cosine:
            features = F.normalize(features, dim=1) if unit else features
            return torch.einsum("kd,bdhw->bkhw", self.centres, features) / temperature
        # A Gaussian around each centre, all of the same variance.
        closeness = torch.einsum("kd,bdhw->bkhw", 2 * self.centres, features)
        closeness = closeness - self.centres.square().sum(dim=1)[:, None, None]
        # The variance is 0 if all cells lie on their centres. A lower bound keeps logits finite.
        variance = max(self.inertia / features.shape[1], 1e-6 * float(self.centres.square().mean()))
        return closeness / (2 * max(variance, 1e-12))


@full_precision
@torch.no_grad()
def kmeans(
    cells: Tensor,
    num_clusters: int,
    seed: int,
    *,
    cosine: bool = True,
    recipe: Recipe = RECIPES["greedy"],
    restarts: int = 1,
) -> Clusters:
    """Cluster cells [M, D] on their device: of `restarts` starts drawn with `seed` the one that
    ends with the lowest inertia.

    A cluster that loses its last cell restarts at the cell farthest from its centre. Raises
    ValueError if there are fewer cells than clusters.
    """
    if len(cells) < num_clusters:
        raise ValueError(f"{len(cells)} cells are fewer than {num_clusters} clusters")
    if cosine:
        cells = F.normalize(cells, dim=1)
    generator = np.random.default_rng(seed)
    ends = [_from_start(cells, num_clusters, generator, cosine, recipe) for _ in range(restarts)]
    return min(ends, key=lambda clusters: clusters.inertia)


def _from_start(
    cells: Tensor, num_clusters: int, generator: np.random.Generator, cosine: bool, recipe: Recipe
) -> Clusters:
    """Where one start ends."""
    if recipe.greedy:
        centres = plus_plus(cells, num_clusters, generator)
    else:
        centres = cells[generator.choice(len(cells), num_clusters, replace=False)]
    clusters = lloyd(cells, centres, cosine, recipe)
    return breathe(cells, clusters, generator, recipe) if recipe.breath else clusters


def lloyd(cells: Tensor, centres: Tensor, cosine: bool, recipe: Recipe) -> Clusters:
    """Lloyd's iterations from `centres` [K, D]."""
    stop = recipe.tolerance * float(cells.var(dim=0, correction=0).mean())
    step, iterations = math.inf, 0
    while step > stop and iterations < recipe.max_iterations:
        moved = mean_of_nearest(cells, centres, cosine)
        step = float((moved - centres).square().sum(dim=1).mean())
        centres, iterations = moved, iterations + 1
    distances = torch.cat([distance for _, _, distance in nearest(cells, centres)])
    return Clusters(centres, cosine, float(distances.mean()), iterations)


def breathe(
    cells: Tensor, clusters: Clusters, generator: np.random.Generator, recipe: Recipe
) -> Clusters:
    """Breathing k-means (arXiv 2006.15666): m centres are added where the error is largest, then
    the m most dispensable ones are removed, each with Lloyd's iterations. m falls from
    `recipe.breath` to 0, by 1 whenever the inertia does not fall.
    """
    best, many = clusters, min(recipe.breath, len(clusters.centres) - 1)
    iterations = best.iterations
    while many > 0:
        error, _ = errors_and_needs(cells, best.centres)
        crowded = best.centres[error.topk(many).indices]
        offsets = torch.from_numpy(generator.uniform(-1, 1, crowded.shape)).to(crowded)
        offsets *= 0.1 * math.sqrt(best.inertia / cells.shape[1])
        grown = torch.cat([best.centres, crowded + offsets])
        inhaled = lloyd(cells, grown, best.cosine, recipe)
        _, need = errors_and_needs(cells, inhaled.centres)
        rest = inhaled.centres[remaining(inhaled.centres, need, many)]
        exhaled = lloyd(cells, rest, best.cosine, recipe)
        iterations += inhaled.iterations + exhaled.iterations
        if exhaled.inertia < best.inertia * (1 - recipe.tolerance):
            best = exhaled
        else:
            many -= 1
    return replace(best, iterations=iterations)


def errors_and_needs(cells: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """float64 [K] each: the summed squared distance of each centre's cells, and by how much it
    would grow without the centre.
    """
    totals = torch.zeros(2, len(centres), dtype=torch.float64, device=cells.device)
    for chunk in cells.split(max(CHUNK_FLOATS // max(len(centres), cells.shape[1]), 1)):
        near, number = squared_distance(chunk, centres).topk(2, largest=False)
        member = F.one_hot(number[:, 0], len(centres)).double()  # a product, as in mean_of_nearest
        totals += torch.stack([near[:, 0], near[:, 1] - near[:, 0]]).double() @ member
    return totals[0], totals[1]


def remaining(centres: Tensor, need: Tensor, many: int) -> list[int]:
    """The centres [K, D] without the `many` least needed. The nearest centre of a removed one stays
    where possible: it takes over the cells.
    """
    distance = squared_distance(centres, centres).fill_diagonal_(math.inf)
    neighbour = distance.argmin(dim=1).tolist()
    removed: list[int] = []
    kept: set[int] = set()
    for number in need.argsort().tolist():
        if len(removed) < many and number not in kept:
            removed.append(number)
            if len(kept) + many < len(centres):
                kept.add(neighbour[number])
    spare = [number for number in need.argsort().tolist() if number not in removed]
    removed += spare[: many - len(removed)]
    return [number for number in range(len(centres)) if number not in removed]


def plus_plus(cells: Tensor, num_clusters: int, generator: np.random.Generator) -> Tensor:
    """K of the cells [M, D] as initial centres (greedy k-means++, Arthur and Vassilvitskii, 2007).

    Each centre is the best of 2 + ln K cells. They are drawn with a probability in proportion to
    the squared distance from the nearest earlier centre. With a single draw for each centre,
    k-means often ends far from its best.
    """
    lengths = torch.linalg.vector_norm(cells, dim=1).square()
    distance = torch.full_like(lengths, math.inf)
    tries = 2 + int(math.log(num_clusters))
    drawn, chosen = [int(generator.integers(len(cells)))], []
    while True:
        # Computed by a product, since differences would copy all cells.
        distances = (
            (c, torch.minimum(distance, lengths + lengths[c] - 2 * (cells @ cells[c])))
            for c in drawn
        )
        best, distance = min(distances, key=lambda pair: float(pair[1].sum(dtype=torch.float64)))
        chosen.append(best)
        if len(chosen) == num_clusters:
            return cells[chosen]
        distance = distance.clamp_min(0)
        running = distance.cumsum(dim=0, dtype=torch.float64)
        points = torch.from_numpy(generator.random(tries)).to(running) * running[-1]
        # If all distances are 0 (fewer distinct cells than clusters), this is the last cell.
        numbers = torch.searchsorted(running, points, right=True).clamp_max(len(cells) - 1)
        drawn = numbers.tolist()


def squared_distance(cells: Tensor, centres: Tensor) -> Tensor:
    """Cells [M, D], centres [K, D] → [M, K]."""
    lengths = [torch.linalg.vector_norm(vectors, dim=1).square() for vectors in (cells, centres)]
    return (lengths[0][:, None] + lengths[1] - 2 * (cells @ centres.T)).clamp_min(0)


def nearest(cells: Tensor, centres: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield chunks: cells [m, D], the number of the nearest centre int64 [m], and its squared
    distance [m].
    """
    step = max(CHUNK_FLOATS // max(len(centres), cells.shape[1]), 1)
    for chunk in cells.split(step):
        distance, number = squared_distance(chunk, centres).min(dim=1)
        yield chunk, number, distance


def mean_of_nearest(cells: Tensor, centres: Tensor, cosine: bool) -> Tensor:
    """Lloyd's step: [K, D], the mean of the cells nearest to each centre, of length 1 with
    `cosine`.
    """
    sums, counts = torch.zeros_like(centres), centres.new_zeros(len(centres))
    distances = []
    for chunk, number, distance in nearest(cells, centres):
        # A product, not scatter_add, since its sums are reproducible on a GPU.
        member = F.one_hot(number, len(centres)).to(chunk)
        sums += member.T @ chunk
        counts += member.sum(dim=0)
        distances.append(distance)
    means = sums / counts.clamp_min(1)[:, None]
    empty = (counts == 0).nonzero()[:, 0]
    means[empty] = cells[torch.cat(distances).topk(len(empty)).indices]
    return F.normalize(means, dim=1) if cosine else means
