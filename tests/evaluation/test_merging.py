"""Prototypes merged by how often two views confuse them: the counts, the merging, the command."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from evaluation import unsupervised_segmentation
from evaluation.merging import TEMPERATURE, Groups, Views, count_confusions, merge
from evaluation.networks import untrained_network
from model import ModelConfig, SlotCon
from pipeline.errors import UserError
from tests.helpers.checkpoints import write_checkpoint
from tests.helpers.labelled_sets import NAMES, write_folder_set

TINY = ModelConfig(arch="resnet18", stages=2, dim_hidden=8, dim_out=8, num_prototypes=6)
REGIONS = np.array([0, 0, 0, 1, 1, 2, 2, 2, 2])
"""The region of each prototype of `AtRandom`."""


class AtRandom:
    """Scores of cells whose region is known: any prototype of the region wins, by chance."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, view: Tensor) -> Tensor:
        inside = torch.from_numpy(REGIONS)[:, None, None] == view[:, :1]
        return torch.rand(inside.shape, generator=self.generator) * inside


def whole(regions: Tensor) -> Iterator[Views]:
    """Two equal views of the regions [B, S, S], unflipped, that share all."""
    view = regions[:, None].expand(-1, 3, -1, -1)
    overlap = torch.tensor([0.0, 0, 1, 1]).expand(2, len(regions), 4)
    yield torch.stack([view, view]), overlap, torch.zeros(2, len(regions), dtype=torch.bool)


def test_prototypes_that_share_a_region_at_random_are_merged() -> None:
    """Without it groups are not what two views take for each other."""
    regions = torch.randint(3, (20, 6, 6), generator=torch.Generator().manual_seed(1))
    confusions = count_confusions(AtRandom(), whole(regions))
    assert confusions.sum() == pytest.approx(regions.numel())
    assert merge(confusions, 3).tolist() == REGIONS.tolist()
    again = count_confusions(AtRandom(), whole(regions))
    np.testing.assert_array_equal(merge(again, 5), merge(confusions, 5))


def test_points_of_both_views_are_the_same_points() -> None:
    """View 2 shows the right half of view 1 and more, flipped: no prototype is confused with
    another. Without the alignment neighbours in the image would be merged."""
    columns = torch.arange(12.0)
    first, second = columns[:8], columns[4:].flip(0)
    views = torch.stack([each.expand(1, 3, 8, 8) for each in (first, second)])
    overlap = torch.tensor([[[0.5, 0, 1, 1]], [[0.5, 0, 1, 1]]])
    apart = torch.tensor([[[1.5, 0, 1, 1]], [[0.5, 0, -0.5, 1]]])
    flipped = torch.tensor([[False], [True]])

    def segment(view: Tensor) -> Tensor:
        return F.one_hot(view[:, 0].long(), 12).permute(0, 3, 1, 2).float()

    confusions = count_confusions(segment, iter([(views, overlap, flipped)]))
    assert confusions.sum() == pytest.approx(64) == pytest.approx(confusions.trace())
    assert set(np.flatnonzero(confusions.diagonal())) == {4, 5, 6, 7}
    with pytest.raises(ValueError, match="no two views share a pixel"):
        count_confusions(segment, iter([(views, apart, flipped)]))


def test_a_point_counts_in_parts() -> None:
    """By the softmax of its scores, naively; a prototype that never wins has no part. Without it a
    point that is nearly another's counts as wholly its winner's, and the counts are noisy."""
    cells = np.array([[0.5, 0.46, 0.1, 0.45], [0.3, 0.32, 0.5, 0.45], [0.2, 0.24, 0.1, 0.1]])

    def segment(_: Tensor) -> Tensor:
        return torch.from_numpy(cells.T[None, :, None]).float()

    counts = count_confusions(segment, whole(torch.zeros(1, 1, 3)))
    parts = np.exp(cells / TEMPERATURE)
    parts /= parts.sum(axis=1, keepdims=True)
    expected = sum(np.outer(part, part) for part in parts)
    expected[3] = expected[:, 3] = 0
    np.testing.assert_allclose(counts, expected, rtol=1e-4)


def test_chance_is_taken_off() -> None:
    """The rare prototypes 2 and 3 have half of their points in common, the frequent 0 and 1 a
    twentieth, which is more points. Without it the frequent ones swallow each other first."""
    confusions = np.diag([1000, 1000, 20, 20])
    confusions[0, 1] = confusions[1, 0] = 50
    confusions[2, 3] = confusions[3, 2] = 10
    assert merge(confusions, 3).tolist() == [0, 1, 2, 2]
    assert merge(confusions, 2).tolist() == [0, 0, 1, 1]


def merged_by_definition(twice: np.ndarray, count: int) -> set[frozenset[int]]:
    """Groups of the prototypes, joined by the mean lift of their pairs, computed anew each time."""
    mass = twice.sum(axis=1)
    groups = [frozenset([k]) for k in range(len(twice))]

    def lift(one: frozenset[int], other: frozenset[int]) -> float:
        pairs = list(itertools.product(one, other))
        expected = [mass[i] * mass[j] for i, j in pairs]
        return float(
            np.average([twice[i, j] / (mass[i] * mass[j]) for i, j in pairs], weights=expected)
        )

    while len(groups) > count:
        one, other = max(itertools.combinations(groups, 2), key=lambda pair: lift(*pair))
        groups = [each for each in groups if each not in (one, other)] + [one | other]
    return set(groups)


def test_a_confusion_may_go_by_a_third() -> None:
    """Against the definition, computed naively. Without the second step a background is left in
    pieces, whose prototypes no two views confuse: half of the demo's water had another group.
    """
    random = np.random.default_rng(1)
    chance = np.diag(random.integers(5, 60, 9)) + 2 * random.exponential(1, (9, 9))
    drawn = random.poisson(chance)
    once = (drawn + drawn.T).astype(float)
    twice = np.zeros_like(once)
    for i, j, k in np.ndindex(9, 9, 9):
        twice[i, j] += once[i, k] * once[k, j] / once[k].sum()
    of = merge(drawn, 4)
    groups = {frozenset(np.flatnonzero(of == group).tolist()) for group in range(4)}
    assert groups == merged_by_definition(twice, 4) != merged_by_definition(once, 4)


def test_prototypes_without_points_have_no_group() -> None:
    """Without it they take groups, and classes go without."""
    confusions = np.diag([5, 0, 5, 5])
    confusions[0, 3] = 1
    assert merge(confusions, 2).tolist() == [0, -1, 1, 0]
    with pytest.raises(ValueError, match="3 of 4 prototypes are in use"):
        merge(confusions, 4)


def test_a_cell_belongs_to_the_group_of_the_cells_around_it() -> None:
    """Shares of groups among 3 × 3 cells, counted one by one. The unused prototype wins nothing."""
    groups = Groups(np.array([0, 1, 0, -1]), points=1, made="")
    scores = torch.rand(2, 4, 5, 4, generator=torch.Generator().manual_seed(2))
    shares = groups.shares(scores).numpy()
    of = groups.of[scores[:, :3].argmax(dim=1).numpy()]
    for b, i, j in np.ndindex(2, 5, 4):
        around = of[b, max(i - 1, 0) : i + 2, max(j - 1, 0) : j + 2]
        np.testing.assert_allclose(shares[b, :, i, j], [(around == g).mean() for g in (0, 1)])


# ---- the command ----


@pytest.fixture
def run(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    write_folder_set(tmp_path / "set", train=6, val=3)
    return write_checkpoint(tmp_path / "run", SlotCon(TINY), TINY)


def options(run: Path, *more: str) -> list[str]:
    part = run.parent / "set/val"
    return [
        "x", "--checkpoint", str(run), "--images", str(part / "images"),
        "--labels", str(part / "labels"), "--size", "64", *more,
    ]  # fmt: skip


def test_merged_groups_are_scored_beside_the_untrained(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As many groups as classes; how they were made stands in the output and in the JSON; the same
    call gives the same scores. No label may matter: the images come from a folder without any."""
    out, rows = run.parent / "x.json", []
    unlabelled = run.parent / "set/train/images"
    for _ in range(2):
        more = ("--merge", "--unlabelled", str(unlabelled), "--json", str(out))
        monkeypatch.setattr("sys.argv", options(run, *more))
        unsupervised_segmentation.main()
        rows.append(json.loads(out.read_text())["results"])
    assert rows[0] == rows[1]
    assert {row["network"] for row in rows[0]} == {"trained, merged", "untrained, merged"}
    assert {row["num_clusters"] for row in rows[0]} == {len(NAMES)}
    made = "6 prototypes merged to 3 groups, without labels, by how often two views of 6 images"
    assert all(row["made"].startswith(made) for row in rows[0])
    assert made in capsys.readouterr().out


def test_an_untrained_network_with_few_prototypes_in_use_is_left_out(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only prototype 0 of the network before training wins. Without it the scores of the run are
    lost, and the message seems to be about the run."""

    def collapsed(*args: Any) -> SlotCon:
        network: SlotCon = untrained_network(*args)
        prototypes = network.teacher.grouping.prototypes
        prototypes.copy_(prototypes[:1].expand_as(prototypes))
        return network

    monkeypatch.setattr("evaluation.clusters.untrained_network", collapsed)
    out = run.parent / "x.json"
    more = ("--merge", "--unlabelled", str(run.parent / "set/train/images"), "--json", str(out))
    monkeypatch.setattr("sys.argv", options(run, *more))
    unsupervised_segmentation.main()
    rows = json.loads(out.read_text())["results"]
    assert {row["network"] for row in rows} == {"trained, merged"}
    assert "note: untrained is left out: --merge 3: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--merge", "needs --unlabelled"),
        ("--unlabelled {images}", "is for --merge"),
        ("--merge 7 --unlabelled {images}", "--merge 7: .* has 6 prototypes"),
        ("--merge 2 --unlabelled {images}", "2 clusters are fewer than 3 classes"),
        ("--merge 0 --unlabelled {images}", "must be above 0"),
        ("--merge --unlabelled {images} --upsample features", "not with --upsample features"),
        ("--merge --unlabelled nowhere", "nowhere"),
    ],
)
def test_what_cannot_be_merged(
    run: Path, monkeypatch: pytest.MonkeyPatch, more: str, message: str
) -> None:
    """Without it a mistaken call ends in a traceback, or scores something else."""
    images = run.parent / "set/train/images"
    monkeypatch.setattr("sys.argv", options(run, *more.format(images=images).split()))
    with pytest.raises(UserError, match=message):
        unsupervised_segmentation.main()


def test_a_word_is_no_number_of_groups(capsys: pytest.CaptureFixture[str]) -> None:
    """Without it the message speaks of an `invalid groups value`."""
    with pytest.raises(SystemExit) as ended:
        unsupervised_segmentation.parse(["--merge", "x"])
    assert ended.value.code == 2
    assert "--merge: expected a whole number of groups, or nothing" in capsys.readouterr().err


def test_only_a_run_has_prototypes_to_merge() -> None:
    """Without it --merge is silently without effect on features."""
    args = unsupervised_segmentation.parse(
        ["--features", "pixels", "--merge", "--unlabelled", "x", "--images", "x", "--labels", "x"]
    )
    with pytest.raises(UserError, match="only a run has"):
        unsupervised_segmentation.check(args)
