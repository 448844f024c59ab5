"""Probes of frozen features: the memory, retrieval, linear classifier and over-clustering, compared
with naive loops and with features whose result is known; then the command.
"""

import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from evaluation import probe
from evaluation.confusion import score_classes
from evaluation.datasets.squares import Squares
from evaluation.features import block_means
from evaluation.probes import overclustering, retrieval
from evaluation.probes.linear import fit_linear, pixel_cross_entropy
from evaluation.probes.memory import (
    LabelledFeatures,
    Memory,
    cell_counts,
    draw_cells,
    gather_memory,
)
from evaluation.probes.overclustering import Overclustering, majority
from evaluation.probes.retrieval import Retrieval
from pipeline.errors import UserError
from tests.helpers.coloured import CELL, COLOURS, write_scenes

VOID = 255


def random_labels(batch: int, side: int, num_classes: int, seed: int = 0) -> np.ndarray:
    """uint8 [B, R, R] with some void."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, num_classes, (batch, side, side), dtype=np.uint8)
    return np.where(generator.random(labels.shape) < 0.2, VOID, labels).astype(np.uint8)


def batches(features: Tensor, labels: np.ndarray, batch_size: int) -> Iterator[LabelledFeatures]:
    """Features [N, D, h, w] and labels uint8 [N, R, R] as the batches that the memory reads."""
    for first in range(0, len(labels), batch_size):
        index = np.arange(first, min(first + batch_size, len(labels)))
        squares = Squares(index, [], np.zeros((len(index), 1, 1, 3), np.uint8))
        yield LabelledFeatures(squares, features[index], labels[index])


# ---- memory ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("side", "height", "width"), [(8, 4, 4), (10, 3, 4), (7, 7, 2)])
def test_cells_count_the_pixels_whose_centre_they_hold(side: int, height: int, width: int) -> None:
    """A pixel counted in a neighbouring cell would train and score with wrong labels. With ViTs the
    side may be no multiple of the cells.
    """
    labels = random_labels(2, side, 5)
    expected = np.zeros((2, height, width, 5), np.int64)
    for b, y, x in itertools.product(range(2), range(side), range(side)):
        if labels[b, y, x] != VOID:
            row, column = (
                math.floor((y + 0.5) * height / side),
                math.floor((x + 0.5) * width / side),
            )
            expected[b, row, column, labels[b, y, x]] += 1
    counts = cell_counts(labels, height, width, 5)
    np.testing.assert_array_equal(counts, expected.reshape(2, height * width, 5))


def test_memory_is_bounded_and_holds_what_it_says() -> None:
    """Too many cells would not fit into memory. A feature with wrong labels, or an unlabelled cell,
    would train the probes on wrong data.
    """
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(7, 3, 4, 4, generator=generator)
    labels = random_labels(7, 8, 5)
    labels[2] = VOID
    labels[3, :4] = VOID
    counts = cell_counts(labels, 4, 4, 5)
    owner = {
        tuple(features[i, :, c // 4, c % 4].tolist()): (i, c) for i in range(7) for c in range(16)
    }
    for capacity in (1, 5, 20, 10**6):
        memory = gather_memory(
            batches(features, labels, 3), 7, 5, capacity=capacity, seed=0, balanced=capacity == 20
        )
        rows = [owner[tuple(row)] for row in memory.features.tolist()]
        assert len(set(rows)) == len(rows) <= capacity
        expected = np.stack([counts[i, c] for i, c in rows])
        np.testing.assert_array_equal(memory.counts.numpy(), expected)
        assert expected.any(axis=1).all()
        assert memory.complete == (capacity == 10**6)
    assert len(rows) == counts.any(axis=2).sum()
    with pytest.raises(ValueError, match="no labelled pixel"):
        void = np.full_like(labels, VOID)
        gather_memory(batches(features, void, 3), 7, 5, capacity=9, seed=0, balanced=False)


def test_memory_does_not_depend_on_the_batch_size() -> None:
    """A seed determines the memory on any machine; another seed gives another memory."""
    features, labels = torch.randn(5, 3, 4, 4), random_labels(5, 8, 5)

    def gather(seed: int, size: int) -> Tensor:
        stream = batches(features, labels, size)
        return gather_memory(stream, 5, 5, capacity=20, seed=seed, balanced=True).features

    assert torch.equal(gather(0, 1), gather(0, 5))
    assert not torch.equal(gather(0, 5), gather(1, 5))


def test_balanced_drawing_prefers_rare_classes() -> None:
    """Without it a small memory would contain almost only sky and road. Closed form for two classes
    and one draw: the rare cell is drawn if u·1 is below n times the least of n uniform numbers.
    """
    counts = np.zeros((11, 2), np.int64)
    counts[:10, 0] = counts[10, 1] = 4
    wins = [
        draw_cells(counts, 1, np.random.default_rng(seed), balanced=True)[0] == 10
        for seed in range(2000)
    ]
    # P(u < 10·min of 10) = ∫ (1 - u/10)^10 du = (10/11)(1 - 0.9^11)
    assert np.mean(wins) == pytest.approx(10 / 11 * (1 - 0.9**11), abs=0.035)
    plain = [
        draw_cells(counts, 1, np.random.default_rng(s), balanced=False)[0] for s in range(2000)
    ]
    assert np.mean(np.array(plain) == 10) == pytest.approx(1 / 11, abs=0.025)


# ---- scores ---------------------------------------------------------------------------------


def test_class_iou_equals_the_naive_loop() -> None:
    """Predictions are class ids: a permuted prediction must not score like a matched one."""
    generator = np.random.default_rng(0)
    truth, predicted = generator.integers(0, 4, (2, 500))
    confusion = np.zeros((5, 5), np.int64)
    np.add.at(confusion, (predicted, truth), 1)
    scored = score_classes(confusion)
    for c in range(4):
        both = np.sum((truth == c) & (predicted == c))
        assert scored.iou[c] == both / np.sum((truth == c) | (predicted == c))
    assert np.isnan(scored.iou[4])
    assert scored.miou == pytest.approx(scored.iou[:4].mean())
    assert scored.accuracy == np.mean(truth == predicted)
    assert score_classes(np.roll(np.eye(3, dtype=np.int64), 1, axis=0)).miou == 0


# ---- retrieval ------------------------------------------------------------------------------


def naive_retrieval(memory: Memory, feature: Tensor, k: int, temperature: float) -> Tensor:
    """One feature [D] → label shares [C], as in the paper."""
    cosine = torch.stack([F.cosine_similarity(feature, key, dim=0) for key in memory.features])
    order = cosine.argsort(descending=True)[:k]
    weight = [float(torch.exp(cosine[i] / temperature)) for i in order]
    shares = [memory.counts[i] / memory.counts[i].sum() for i in order]
    return torch.stack([w * s for w, s in zip(weight, shares, strict=True)]).sum(0) / sum(weight)


def test_retrieval_equals_the_naive_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neighbours, weights and soft labels as in the paper, for features of any length."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(40, 6, generator=generator) * torch.rand(40, 1, generator=generator) * 9
    counts = torch.randint(0, 5, (40, 3), generator=generator) + 1
    memory = Memory(features, counts, complete=True)
    cells = torch.randn(9, 6, generator=generator) * 5
    monkeypatch.setattr(retrieval, "SHARES", 2 * 7 * 3)  # two cells at a time
    scores = Retrieval(memory, neighbours=7, temperature=0.1)(cells)
    expected = torch.stack([naive_retrieval(memory, cell, 7, 0.1) for cell in cells])
    torch.testing.assert_close(scores, expected)


# ---- linear ---------------------------------------------------------------------------------


def test_cell_loss_is_the_mean_over_pixels() -> None:
    """The loss on counts must equal the loss on labelled pixels, also with void and mixed cells."""
    labels = random_labels(2, 6, 4)
    logits = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    counts = torch.from_numpy(cell_counts(labels, 3, 3, 4)).flatten(0, 1).float()
    pixels = F.interpolate(logits, (6, 6), mode="nearest")
    truth = torch.from_numpy(labels).long()
    expected = F.cross_entropy(pixels, truth, ignore_index=VOID)
    ours = pixel_cross_entropy(logits.permute(0, 2, 3, 1).flatten(0, 2), counts)
    torch.testing.assert_close(ours, expected)


def test_linear_probe_finds_the_optimum() -> None:
    """The optimum is known: features that only identify one of C cells can predict no more than the
    label shares of the cell. The best loss is the entropy of the shares, the best logits are their
    logarithms.
    """
    counts = torch.tensor([[6.0, 2.0, 1.0], [1.0, 1.0, 4.0], [2.0, 8.0, 2.0]])
    memory = Memory(torch.eye(3).repeat(40, 1), counts.repeat(40, 1), complete=True)
    model = fit_linear(memory, 0, steps=400, learning_rate=0.05, weight_decay=0)
    with torch.inference_mode():
        logits = model(torch.eye(3))
    shares = counts / counts.sum(dim=1, keepdim=True)
    torch.testing.assert_close(logits.softmax(dim=1), shares, atol=0.03, rtol=0)
    again = fit_linear(memory, 0, steps=3)
    torch.manual_seed(5)
    for ours, theirs in zip(
        again.parameters(), fit_linear(memory, 0, steps=3).parameters(), strict=True
    ):
        assert torch.equal(ours, theirs)
    with pytest.raises(ValueError, match="two labelled cells"):
        fit_linear(Memory(torch.ones(1, 3), torch.ones(1, 2), complete=True), 0)


# ---- over-clustering ------------------------------------------------------------------------


def test_majority_equals_the_naive_loop() -> None:
    """Pixels vote, not cells. A cluster without cells must not get a random class."""
    generator = np.random.default_rng(0)
    clusters, counts = generator.integers(0, 5, 30), generator.integers(0, 9, (30, 4))
    expected = [int(np.argmax(counts[clusters == k].sum(axis=0))) for k in range(5)]
    expected.append(int(np.argmax(counts.sum(axis=0))))
    ours = majority(torch.from_numpy(clusters), torch.from_numpy(counts).float(), 6)
    assert ours.tolist() == expected


class Nearest:
    """Clusters with given centres, by distance."""

    def __init__(self, centres: Tensor) -> None:
        self.centres = centres

    def logits(self, features: Tensor) -> Tensor:
        return -((features[:, None] - self.centres[None, :, :, None, None]) ** 2).sum(dim=2)


def test_cells_take_their_clusters_class(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole head, computed by hand; the number of cells processed together has no effect."""
    centres = torch.tensor([[1.0, 0], [0, 1], [-1, 0], [9, 9]])
    cells = torch.tensor([[1.0, 0.1], [0.9, 0], [0, 1.2], [-1, 0.1], [-1.1, 0]])
    counts = torch.tensor([[0, 1, 0], [0, 1, 0], [2, 0, 0], [0, 0, 1], [0, 3, 0]]).float()
    for logits in (1, 8, 2**24):
        monkeypatch.setattr(overclustering, "LOGITS", logits)
        head = Overclustering(Memory(cells, counts, complete=True), Nearest(centres))
        scores = head(torch.tensor([[0.9, 0.2], [0.1, 0.7], [-2, 0.2], [8, 8]]))
        assert scores.tolist() == [[0, 1, 0], [1, 0, 0], [0, 1, 0], [0, 1, 0]]


# ---- the command ----------------------------------------------------------------------------

MAPS = [np.array([[0, 0], [1, 1]]), np.array([[2, 1], [2, 1]]), np.array([[0, 2], [0, 2]])]
"""Straight borders only: bilinear upsampling keeps them in place, and rounds corners off."""


def command(root: Path, monkeypatch: pytest.MonkeyPatch, name: str, *more: str) -> list[Any]:
    """Run a probe of mean colours, fitted to root/train and scored on root/val, and return its
    rows.
    """
    folders = [
        *(
            "--train-images",
            str(root / "train/images"),
            "--train-labels",
            str(root / "train/labels"),
        ),
        *("--images", str(root / "val/images"), "--labels", str(root / "val/labels")),
    ]
    out = root / "probe.json"
    options = ["--features", "pixels", "--size", str(2 * CELL), "--json", str(out), *more]
    monkeypatch.setattr("sys.argv", ["x", name, *folders, *options])
    probe.main()
    content = json.loads(out.read_text())
    assert {"hardware", "versions", "command", "results"} <= set(content)
    return list(content["results"])


def values(rows: list[Any], metric: str) -> list[float]:
    return [row["value"] for row in rows if row["metric"] == metric]


PROBES = [
    ("knn", "--memory", "60"),
    ("linear", "--steps", "60", "--learning-rate", "0.1"),
    ("clusters", "--clusters", "9"),
]


@pytest.mark.parametrize("options", PROBES)
def test_perfect_features_score_one(
    options: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From files to JSON and picture, with features that equal the classes."""
    write_scenes(tmp_path / "train", MAPS)
    write_scenes(tmp_path / "val", MAPS[::-1])
    picture = tmp_path / "probe.png"
    rows = command(tmp_path, monkeypatch, *options, "--batch", "2", "--picture", str(picture))
    assert values(rows, "miou") == values(rows, "pixel_accuracy") == [1.0] * 3
    assert [row["seed"] for row in rows if row["metric"] == "miou"] == [0, 1, 2]
    assert {row["class"] for row in rows if row["metric"] == "iou"} == {
        "class 0", "class 1", "class 2",
    }  # fmt: skip
    assert Image.open(picture).size[1] > 240


@pytest.mark.parametrize("options", PROBES)
def test_shuffled_labels_score_chance(
    options: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Labels are independent of the image, so a prediction is right for one cell in C. A higher
    score would mean that labels of the scored set leak into the probe.
    """
    generator = np.random.default_rng(0)
    for part in ("train", "val"):
        images, _ = write_scenes(tmp_path / part, list(generator.integers(0, 3, (24, 2, 2))))
        for path in images.iterdir():
            blocks = np.kron(generator.integers(0, 3, (2, 2)), np.ones((CELL, CELL), np.int64))
            Image.fromarray(COLOURS[blocks]).save(path)
    rows = command(tmp_path, monkeypatch, *options, "--seeds", "0")
    assert values(rows, "pixel_accuracy")[0] == pytest.approx(1 / 3, abs=3.5 * (2 / 9 / 96) ** 0.5)


def test_retrieval_without_a_draw_has_one_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three equal results would look like a measured deviation of zero."""
    write_scenes(tmp_path / "train", MAPS)
    write_scenes(tmp_path / "val", MAPS)
    assert values(command(tmp_path, monkeypatch, "knn"), "miou") == [1.0]


@pytest.mark.parametrize("name", ["knn", "linear"])
def test_one_look_at_the_first_image_says_how_many_cells_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Without it each check before the work would encode an image of its own."""
    write_scenes(tmp_path / "train", MAPS)
    write_scenes(tmp_path / "val", MAPS[::-1])
    read: list[int] = []

    def counted(images: Tensor) -> Tensor:
        read.append(len(images))
        return block_means(images)

    monkeypatch.setattr("evaluation.specs.block_means", counted)
    command(tmp_path, monkeypatch, name, "--seeds", "0")
    assert read == [1, 3, 3]  # then the set to learn from, and the one to score


def test_bad_input_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it each of these would end in a traceback or in a meaningless score."""
    train, _ = write_scenes(tmp_path / "train", MAPS)
    _, labels = write_scenes(tmp_path / "val", MAPS)
    for message, *options in (
        ("--memory must be above 0, not 0", "knn", "--memory", "0"),
        ("--temperature must be above 0", "knn", "--temperature", "nan"),
        ("--seeds must be different", "linear", "--seeds", "1", "1"),
        ("192 cells are fewer than 500 clusters", "clusters"),
        ("belongs to the training set and to the set to score", "knn", "--images", str(train)),
        ("must end in .png", "knn", "--picture", str(tmp_path / "p.gif")),
        ("needs --checkpoint", "knn", "--features", "teacher"),
    ):
        with pytest.raises(UserError, match=message):
            command(tmp_path, monkeypatch, *options)
    (tmp_path / "val/classes.json").write_text('["a", "b", "c"]')
    with pytest.raises(UserError, match=r"train/labels: has other classes than .*val/labels"):
        command(tmp_path, monkeypatch, "knn")
    (tmp_path / "train/classes.json").write_text('["a", "b", "c"]')
    for path in labels.iterdir():
        Image.new("L", (2 * CELL, 2 * CELL), VOID).save(path)
    with pytest.raises(UserError, match="val/labels: no labelled pixel to score"):
        command(tmp_path, monkeypatch, "knn")
    with pytest.raises(UserError, match="val/labels: no labelled pixel to learn from"):
        command(tmp_path, monkeypatch, "knn", "--train-labels", str(labels))
