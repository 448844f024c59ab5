"""k-means, compared with its definition in NumPy."""

import itertools

import numpy as np
import pytest
import torch

from evaluation.segment import assign
from model import kmeans as module
from model.kmeans import (
    RECIPES,
    Clusters,
    Recipe,
    errors_and_needs,
    kmeans,
    mean_of_nearest,
    plus_plus,
    remaining,
    sample_cells,
)


def cells(count: int, dim: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


def naive_step(x: np.ndarray, centres: np.ndarray) -> np.ndarray:
    nearest = np.array([np.argmin([((c - p) ** 2).sum() for c in centres]) for p in x])
    return np.stack([x[nearest == k].mean(axis=0) for k in range(len(centres))])


@pytest.mark.parametrize("chunk", [1, 40, 2**22])
def test_step_is_lloyds(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks must not change the result of a step, nor skip the last cells."""
    monkeypatch.setattr(module, "CHUNK_FLOATS", chunk)
    x = cells(53, 4)
    moved = mean_of_nearest(x, x[:5], cosine=False)
    np.testing.assert_allclose(moved, naive_step(x.numpy(), x[:5].numpy()), rtol=1e-5, atol=1e-6)


def test_ends_where_another_step_changes_nothing() -> None:
    """Without it the result would depend on the number of iterations."""
    x = cells(200, 3)
    result = kmeans(x, 6, 0, cosine=False, recipe=Recipe(tolerance=0))
    moved = naive_step(x.numpy(), result.centres.numpy())
    np.testing.assert_allclose(moved, result.centres, atol=1e-5)
    distances = ((x[:, None] - result.centres) ** 2).sum(-1).min(dim=1).values
    assert result.inertia == pytest.approx(float(distances.mean()), rel=1e-4)
    assert 1 < result.iterations < 100


@pytest.mark.parametrize("seed", range(5))
def test_finds_groups_far_apart(seed: int) -> None:
    """With k-means++ each of four distant groups gets one centre, for any seed."""
    means = 100 * torch.eye(4)
    x = (means[:, None] + cells(40, 4).reshape(4, 10, 4)).flatten(0, 1)
    centres = kmeans(x, 4, seed, cosine=False).centres
    order = centres.argmax(dim=1).argsort()
    expected = x.reshape(4, 10, 4).mean(dim=1)
    torch.testing.assert_close(centres[order], expected)


def test_start_follows_the_squared_distance() -> None:
    """Two cells are drawn with probability d², and the better one is taken. Uniform draws would
    miss small groups; a single draw would take bad centres.
    """
    x = torch.tensor([[0.0], [1.0], [3.0], [8.0]])
    drawn = np.zeros((4, 4))
    for seed in range(3000):
        first, second = plus_plus(x, 2, np.random.default_rng(seed))[:, 0]
        drawn[x[:, 0].tolist().index(first), x[:, 0].tolist().index(second)] += 1
    share = drawn / drawn.sum(axis=1, keepdims=True)
    squared = ((x - x.T) ** 2).double().numpy()
    expected = np.zeros((4, 4))
    for first in range(4):
        chance = squared[first] / squared[first].sum()
        left = np.minimum(squared[first], squared).sum(axis=1)
        for a, b in itertools.product(range(4), repeat=2):
            expected[first, a if left[a] <= left[b] else b] += chance[a] * chance[b]
    np.testing.assert_allclose(share, expected, atol=0.04)


def test_ends_near_the_best() -> None:
    """Without a good start, scores would differ by many points between seeds."""
    means = 10 * cells(6, 5)
    x = (means[:, None] + cells(6 * 60, 5, seed=1).reshape(6, 60, 5)).flatten(0, 1)
    inertia = np.array([kmeans(x, 6, seed, cosine=False).inertia for seed in range(20)])
    assert (inertia < 1.05 * inertia.min()).mean() >= 0.85


def test_stops_only_when_it_hardly_moves() -> None:
    """Without it k-means could stop before it converges."""
    x = cells(2000, 3)
    result = kmeans(x, 8, 0, cosine=False)
    rest = kmeans(x, 8, 0, cosine=False, recipe=Recipe(tolerance=0))
    moved = mean_of_nearest(x, result.centres, cosine=False)
    assert result.iterations <= rest.iterations
    assert float((moved - result.centres).square().sum(dim=1).mean()) < 2e-4


def test_cosine_ignores_length() -> None:
    """Spherical k-means: the length of a cell has no effect, and centres have length 1."""
    x = cells(100, 5)
    scaled = x * torch.rand(100, 1, generator=torch.Generator().manual_seed(1)).add(0.1)
    result, other = kmeans(x, 4, 3), kmeans(scaled, 4, 3)
    torch.testing.assert_close(result.centres, other.centres)
    torch.testing.assert_close(result.centres.norm(dim=1), torch.ones(4))


def test_lost_cluster_starts_again() -> None:
    """Without it the mean of an empty cluster would be NaN or 0."""
    x = torch.tensor([[0.0], [1.0], [10.0]])
    moved = mean_of_nearest(x, torch.tensor([[0.0], [500.0]]), cosine=False)
    assert moved[:, 0].tolist() == pytest.approx([11 / 3, 10.0])
    same = kmeans(torch.ones(8, 2), 3, 0, cosine=False)
    assert torch.isfinite(same.centres).all()
    with pytest.raises(ValueError, match="2 cells are fewer than 3 clusters"):
        kmeans(torch.ones(2, 2), 3, 0)


def test_same_seed_same_clusters() -> None:
    """A published number must be reproducible, whatever the global random state."""
    x = cells(100, 5)
    torch.manual_seed(1)
    first = kmeans(x, 7, 5).centres
    torch.manual_seed(2)
    assert torch.equal(first, kmeans(x, 7, 5).centres)
    assert not torch.equal(first, kmeans(x, 7, 6).centres)


@pytest.mark.parametrize("recipe", ["greedy", "faiss"])
def test_best_of_several_starts_counts(recipe: str) -> None:
    """One start of k-means can end far from the best. The first of several is the one alone."""
    x, how = cells(400, 3), RECIPES[recipe]
    starts = [kmeans(x, 30, 5, recipe=how, restarts=count).inertia for count in (1, 2, 20)]
    assert starts == sorted(starts, reverse=True)
    assert starts[2] < starts[0]


@pytest.mark.parametrize("cosine", [True, False])
def test_breathing_nears_the_best_of_many_starts(cosine: bool) -> None:
    """One start ends 1 to 9 % above the best of 30, and scores differ by as much. Breathing is
    within 0.5 % for any seed.
    """
    x = cells(1200, 8) * torch.linspace(0.3, 2, 8)
    best = kmeans(x, 20, 99, cosine=cosine, restarts=30).inertia
    for seed in range(4):
        result = kmeans(x, 20, seed, cosine=cosine, recipe=RECIPES["breathing"])
        assert len(result.centres) == 20
        assert result.inertia < 1.005 * best
    again = kmeans(x, 20, 3, cosine=cosine, recipe=RECIPES["breathing"])
    assert torch.equal(result.centres, again.centres)


def test_breathing_of_few_clusters() -> None:
    """There must be a centre left for each cell: 2 clusters can add and remove only one."""
    assert len(kmeans(cells(30, 2), 2, 0, recipe=RECIPES["breathing"]).centres) == 2
    assert len(kmeans(cells(30, 2), 1, 0, recipe=RECIPES["breathing"]).centres) == 1


@pytest.mark.parametrize("chunk", [1, 40, 2**22])
def test_errors_and_needs(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong sum would remove the centres that are needed most."""
    monkeypatch.setattr(module, "CHUNK_FLOATS", chunk)
    x = cells(53, 4)
    centres = x[:5]
    distance = (x[:, None] - centres).square().sum(dim=2)
    nearest = distance.argmin(dim=1)
    for k in range(5):
        own = distance[nearest == k]
        others = own[:, [other for other in range(5) if other != k]].min(dim=1).values
        error, need = (values[k] for values in errors_and_needs(x, centres))
        assert float(error) == pytest.approx(float(own[:, k].sum()), rel=1e-4, abs=1e-5)
        assert float(need) == pytest.approx(float((others - own[:, k]).sum()), rel=1e-4, abs=1e-5)


def test_neighbour_of_a_removed_centre_stays() -> None:
    """Of two centres in one group the one or the other is dispensable, not both."""
    centres = torch.tensor([[0.0], [1.0], [10.0], [11.5], [20.0]])
    need = torch.tensor([1.0, 2.0, 3.0, 4.0, 9.0])
    assert remaining(centres, need, 2) == [1, 3, 4]
    assert len(remaining(centres, need, 4)) == 1


def test_sample_of_faiss_is_bounded_by_cells() -> None:
    """faiss clusters 256 cells for each centre: another number would be another protocol."""
    features = torch.randn(2, 3, 9, 9)
    assert RECIPES["faiss"].most(2) == 512
    assert RECIPES["greedy"].most(2) is None
    assert len(sample_cells([features], 2, seed=0, most=50)) == 50


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_sample_does_not_depend_on_the_batch(batch: int) -> None:
    """Another batch size must give the same centres. All cells are equally likely, and none is
    drawn twice.
    """
    features = torch.arange(8 * 2 * 3 * 5).reshape(8, 2, 3, 5).float()
    sample = sample_cells(features.split(batch), 8, seed=4, floats=2 * 50)
    whole = sample_cells(features.split(batch), 8, seed=4)
    torch.testing.assert_close(whole, features.permute(0, 2, 3, 1).reshape(-1, 2))
    assert sample.shape == (50, 2)
    assert torch.equal(sample, sample_cells([features], 8, seed=4, floats=2 * 50))
    assert len({tuple(row) for row in sample.tolist()}) == 50
    assert {tuple(row) for row in sample.tolist()} < {tuple(row) for row in whole.tolist()}


@pytest.mark.parametrize("cosine", [True, False])
def test_logits_assign_to_the_nearest_centre(cosine: bool) -> None:
    """At every upsampled pixel the winner is the centre nearest to the upsampled feature."""
    features = cells(2 * 3 * 3, 4).reshape(2, 3, 3, 4).permute(0, 3, 1, 2).contiguous()
    centres = torch.nn.functional.normalize(cells(5, 4, seed=1), dim=1)
    result = Clusters(centres, cosine, 1.0, 1)
    if cosine:
        features = torch.nn.functional.normalize(features, dim=1)
    upsampled = torch.nn.functional.interpolate(features, (12, 12), mode="bilinear")
    distance = ((upsampled[:, None] - centres[:, :, None, None]) ** 2).sum(dim=2)
    assert torch.equal(assign(result.logits(features), 12), distance.argmin(dim=1))
