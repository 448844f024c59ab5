"""Published protocols by name, through the commands."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from evaluation import clusters, probe, protocols, unsupervised_segmentation
from evaluation.features import Features
from evaluation.probes import scores, storage
from pipeline.errors import UserError
from tests.helpers.labelled_sets import NAMES, write_folder_set

BLOCK = 16


def blocks(images: Tensor) -> Tensor:
    """The 16 parts of blocks of 16 × 16 pixels: [B, 3, S, S] → [B, 48, S/16, S/16]."""
    side = images.shape[-1] // BLOCK * BLOCK
    return F.pixel_unshuffle(F.avg_pool2d(images[..., :side, :side], 4), BLOCK // 4)


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_folder_set(tmp_path / "set", train=10, val=3)
    for module in (clusters, scores):
        monkeypatch.setattr(module, "open_all", lambda *_: [Features("blocks", blocks)])
    return tmp_path


def command(
    data: Path, monkeypatch: pytest.MonkeyPatch, words: Sequence[str]
) -> list[dict[str, Any]]:
    """Run `clusters` or a probe (also "probe clusters"), and return its rows."""
    root, out = data / "set", data / "out.json"
    name, *options = words
    folders = ["--images", f"{root}/val/images", "--labels", f"{root}/val/labels"]
    learn = ["--train-images", f"{root}/train/images", "--train-labels", f"{root}/train/labels"]
    shared = [*folders, "--classes", f"{root}/classes.json", "--json", str(out), *options]
    if name == "clusters":
        monkeypatch.setattr("sys.argv", ["x", "--features", "blocks", *shared])
        unsupervised_segmentation.main()
    else:
        monkeypatch.setattr("sys.argv", ["x", name.removeprefix("probe "), *learn, *shared])
        probe.main()
    return list(json.loads(out.read_text())["results"])


CLUSTERS = [("clusters", "--protocol", name) for name in ("picie", "stego", "cause")]
PROBES = [
    ("knn", "--protocol", "hummingbird", "--size", "64", "--memory", "150", "--seeds", "0"),
    ("knn", "--protocol", "capi", "--seeds", "0"),
    ("linear", "--protocol", "capi", "--seeds", "0"),
]


@pytest.mark.parametrize("words", [*CLUSTERS, *PROBES], ids=lambda words: f"{words[0]} {words[2]}")
def test_protocols_run_and_name_themselves(
    words: tuple[str, ...],
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Without it a row could not be traced to its protocol, images and memory. The classes have
    colours: a protocol that mixes up cells, pixels or numbers would score near chance.
    """
    if words[2] in ("stego", "cause"):
        pytest.importorskip("pydensecrf", reason="needs the extra [crf]")
    rows = command(data, monkeypatch, words)
    miou, *refined = [row for row in rows if row["metric"] == "miou"]
    assert len(refined) == (words[2] in ("stego", "cause"))
    accuracies = [row["value"] for row in rows if row["metric"] == "pixel_accuracy"]
    assert min(accuracies) > 0.9
    assert (miou["protocol"], miou["images"], miou["list"]) == (words[2], 3, "all")
    assert miou["memory"] > 100
    said = capsys.readouterr().out
    assert f"protocol {words[2]} ({protocols.SOURCES[words[2]]}): " in said
    assert f"{words[2]}; 3 images (all); memory: {miou['memory']:,} cells" in said


def test_leopart_scores_its_own_clusters(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many clusters as classes are matched one to one by IoU; more are named by majority, and by
    IoU beside it. Five seeds, and 256 cells a cluster.
    """
    settings = protocols.CLUSTERS["leopart"] | {"size": 224, "pca": 5, "restarts": 2}
    monkeypatch.setitem(protocols.CLUSTERS, "leopart", settings)  # type: ignore[arg-type]
    rows = [
        row for row in command(data, monkeypatch, ("clusters", "--protocol", "leopart"))
        if row["metric"] == "miou"
    ]  # fmt: skip
    assert [row["seed"] for row in rows] == [0, 1, 2, 3, 4]
    assert {(row["match"], row["absent"]) for row in rows} == {("iou", "zero")}
    assert {row["memory"] for row in rows} == {588}  # all of 3 · 14² cells: fewer than 768
    more = ("clusters", "--protocol", "leopart", "--clusters", "12")
    rows = [row for row in command(data, monkeypatch, more) if row["metric"] == "miou"]
    names = {(row["network"], row["match"]) for row in rows}
    assert names == {
        ("blocks, k-means", "majority"),
        ("blocks, k-means, by majority-iou", "majority-iou"),
    }
    assert len(rows) == 10
    assert max(row["value"] for row in rows) > 0.6


def test_leoparts_linear_classifier_learns(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of steps, the crops and the masks: a shift between them would cost most of it."""
    settings = protocols.LINEAR["leopart"] | {"size": 64, "epochs": 25, "step_images": 5}
    monkeypatch.setitem(protocols.LINEAR, "leopart", settings)  # type: ignore[arg-type]
    words = ("linear", "--protocol", "leopart", "--seeds", "0")
    (miou,) = [r for r in command(data, monkeypatch, words) if r["metric"] == "miou"]
    assert miou["value"] > 0.6
    assert miou["match"] == "none"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("clusters", "--protocol", "picie", "--match", "iou"), "sets --match pixels: --match iou"),
        (("clusters", "--protocol", "picie", "--crf"), "sets no --crf: --crf contradicts it"),
        (("clusters", "--protocol", "stego", "--size", "96"), "sets --size 320: --size 96"),
        (("clusters", "--protocol", "neco", "--pca", "9"), "sets --pca 50: --pca 9"),
        (("clusters", "--protocol", "neco", "--match", "iou"), "--match iou with as many clusters"),
        (("clusters", "--protocol", "picie", "--clusters", "4"), "4 clusters for 3 classes"),
        (("clusters", "--clusters", "2"), "k-means: 2 clusters are fewer than 3 classes"),
        (("clusters", "--crf", "--upsample", "cells"), "--crf refines upsampled scores"),
        (("clusters", "--crf-temperature", "0.5"), "--crf-temperature needs --crf"),
        (
            ("clusters", "--protocol", "stego", "--crf-temperature", "1"),
            "sets --crf-temperature 0.5",
        ),
        (("clusters", "--match", "none"), "evaluation.probe predicts classes"),
        (("clusters", "--protocol", "picie", "--subset", "all"), "scores PiCIE's images"),
        (("knn", "--protocol", "capi", "--memory", "99"), "sets --memory all: --memory 99"),
        (("knn", "--protocol", "hummingbird", "--void-as", "1"), "sets --void-as 0"),
        (("knn", "--void-as", "3"), "--void-as 3: the classes are 0 to 2"),
        (("knn", "--neighbours", "1", "3"), "--vote cells takes one number of --neighbours"),
        (("knn", "--features", "pixels", "--stage", "2"), "--stage 2: pixels have no stages"),
        (
            ("knn", "--features", "pixels", "--output-stride", "8", "--checkpoint", "run"),
            "--output-stride 8: no network to dilate",
        ),
        (("knn", "--neighbours", "0"), "--neighbours must be above 0, not 0"),
        (("knn", "--vote", "pixels", "--size", "41"), "41 pixels are no multiple of 2 × 2 cells"),
        (("linear", "--protocol", "leopart"), "10 images do not fill a step of 60"),
        (("linear", "--head", "sgd", "--standardise"), "--head sgd has no use for --standardise"),
        (("linear", "--protocol", "neco", "--steps", "9"), "--head sgd has no use for --steps 9"),
        (("linear", "--head", "lbfgs", "--memory", "all"), "--head lbfgs has no use for --memory"),
        (("linear", "--epochs", "3"), "--head adamw has no use for --epochs 3"),
        (
            ("knn", "--vote", "pixels", "--void-as", "0", "--crops"),
            "--vote pixels has no use for --crops, --void-as 0",
        ),
    ],
)
def test_contradictions_are_one_line(
    words: tuple[str, ...], message: str, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A result called "as in X" must have all settings of X."""
    with pytest.raises(UserError, match=message) as caught:
        command(data, monkeypatch, words)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("words", "share"),
    [
        (("knn", "--whiten"), 0.5),
        (("knn", "--standardise"), 0.5),
        (("knn", "--protocol", "capi"), 0.5),
        (("linear", "--protocol", "capi"), 1.5),
        (("probe clusters", "--memory", "all", "--standardise"), 1.5),
    ],
)
def test_a_memory_without_room_is_refused_at_the_first_image(
    words: tuple[str, ...], share: float, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without it whitening and standardising read the whole training set first, hours on a large
    one; and probes that copy their cells, logistic regression and k-means, would be killed.
    """
    size = 224 if "capi" in words else 320
    cells = 10 * (size // BLOCK) ** 2 * 48 * 4  # bytes of the features of the training set
    monkeypatch.setattr(storage, "free_bytes", lambda _: int(share * cells / storage.SHARE))
    seen: list[int] = []

    def function(images: Tensor) -> Tensor:
        seen.append(len(images))
        return blocks(images)

    monkeypatch.setattr(scores, "open_all", lambda *_: [Features("blocks", function)])
    hint = r"[\d,]+ cells fit; --train-list" if "capi" in words else r"--memory \d+ fits"
    with pytest.raises(UserError, match=rf"[\d,]+ cells of 48 features needs .* free: {hint}"):
        command(data, monkeypatch, words)
    assert sum(seen) <= 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("clusters", "--pca", "49"), "first: --pca 49: there are only 48 features"),
        (("clusters", "--whiten"), "last: --whiten: 27 cells are fewer than 48 features"),
        (("clusters", "--clusters", "28"), "last: 27 cells are fewer than 28 clusters"),
        (("probe clusters", "--clusters", "91"), "last: 90 cells are fewer than 91 clusters"),
        (("knn", "--whiten"), "last: --whiten: 40 cells are fewer than 48 features"),
        (("knn", "--memory-folder", "/none"), "--memory-folder /none: No such file or directory"),
    ],
)
def test_too_few_cells_are_found_before_the_work(
    words: tuple[str, ...], message: str, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without it earlier stages and networks are scored first, and their scores are lost."""
    monkeypatch.setattr(scores, "probe", lambda *_: pytest.fail("probed"))
    monkeypatch.setattr(clusters, "kmeans", lambda *_, **__: pytest.fail("clustered"))
    wide = Features("first", lambda images: torch.cat([blocks(images)] * 2, dim=3))
    both = [Features("first", wide.function), Features("last", blocks)]
    for module in (clusters, scores):
        monkeypatch.setattr(module, "open_all", lambda *_: both)
    size = "32" if words[0] == "knn" else "48"
    with pytest.raises(UserError, match=message):
        command(data, monkeypatch, (*words, "--size", size))


def test_features_with_nan_are_one_line(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN is near to nothing: clusters and neighbours would be those of the order of cells."""
    broken = Features("broken", lambda images: blocks(images) / 0)
    monkeypatch.setattr(scores, "open_all", lambda *_: [broken])
    with pytest.raises(UserError, match=r"^broken: features with NaN or infinite values"):
        command(data, monkeypatch, ("knn",))


def test_absent_classes_are_noted(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A set without a class that it should have scores other than published ones."""
    (data / "set/classes.json").write_text(json.dumps([*NAMES, "white"]))
    command(data, monkeypatch, ("knn", "--size", "64", "--seeds", "0"))
    assert "no pixel of 1 of 4 classes (white): IoU 0 where" in capsys.readouterr().err


def test_without_a_protocol_the_users_settings_count() -> None:
    """Else an option would be ignored in silence."""
    names = {name for settings in protocols.KNN.values() for name in settings}
    args = argparse.Namespace(protocol=None, **(dict.fromkeys(names) | {"memory": 7}))
    protocols.settle(args, protocols.KNN)
    assert (args.memory, args.neighbours, args.void_as) == (7, [30], None)


@pytest.mark.parametrize("table", [protocols.CLUSTERS, protocols.KNN, protocols.LINEAR])
def test_protocols_set_what_the_usual_settings_have(table: protocols.Table) -> None:
    """A setting that only a protocol knows would be missing without it; one that a protocol leaves
    open would take the usual value, and the result would not be as published.
    """
    left_open = {"seeds", "memory", "steps", "kmeans", "restarts", "standardise", "pca"}
    left_open |= {"epochs", "step_images", "learning_rate", "temperature", "memory_folder"}
    left_open |= {"crf_temperature"}
    for name, settings in table.items():
        if name is not None:
            assert table[None].keys() - settings.keys() <= left_open, name
            assert settings.keys() - table[None].keys() <= {"size"}, name


def test_hummingbirds_memory_is_of_random_crops(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seeds differ although the memory holds every cell; each image gives as many cells."""
    monkeypatch.setitem(protocols.SOURCES, "hummingbird", "x")
    words = ("knn", "--crops", "--size", "64", "--memory", "159", "--void-as", "0")
    rows = [r for r in command(data, monkeypatch, words) if r["metric"] == "miou"]
    assert [row["memory"] for row in rows] == [150] * 3
    whole = ("knn", "--crops", "--size", "64", "--memory", "all", "--void-as", "0")
    rows = [r for r in command(data, monkeypatch, whole) if r["metric"] == "miou"]
    assert [row["memory"] for row in rows] == [160] * 3
    assert len({row["value"] for row in rows}) > 1
    assert torch.is_grad_enabled()
    assert np.isfinite([row["value"] for row in rows]).all()
