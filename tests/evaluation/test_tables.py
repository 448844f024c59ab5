"""Tables of scores: what stands beside a network, and what a row says about where it was read."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from evaluation import probe, unsupervised_segmentation
from model import ModelConfig, SlotCon
from pipeline.errors import UserError
from tests.helpers.checkpoints import write_checkpoint
from tests.helpers.coloured import write_scenes

TINY = ModelConfig(arch="resnet18", dim_hidden=8, dim_out=6, num_prototypes=4)
MAPS = [np.array([[0, 1], [1, 2]]), np.array([[2, 2], [0, 1]])]
CLUSTERS = "clusters of a set"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scenes to learn from and to score, and a checkpoint."""
    folder = tmp_path_factory.mktemp("tables")
    for part, maps in (("train", MAPS * 3), ("val", MAPS)):
        write_scenes(folder / part, maps)
        (folder / part / "classes.json").write_text('["a", "b", "c"]')
    torch.manual_seed(0)
    write_checkpoint(folder / "checkpoint", SlotCon(TINY), TINY)
    return folder


def rows(root: Path, monkeypatch: pytest.MonkeyPatch, command: str, *more: str) -> list[Any]:
    """Run a probe, or `CLUSTERS`, and return the rows of mIoU."""
    out = root / "out.json"
    words = ["--images", f"{root}/val/images", "--labels", f"{root}/val/labels", "--size", "64"]
    words += ["--checkpoint", f"{root}/checkpoint", "--json", str(out), *more]
    if command == CLUSTERS:
        monkeypatch.setattr("sys.argv", ["x", *words])
        unsupervised_segmentation.main()
    else:
        learn = ["--train-images", f"{root}/train/images", "--train-labels", f"{root}/train/labels"]
        monkeypatch.setattr("sys.argv", ["x", command, *learn, *words, "--seeds", "0"])
        probe.main()
    return [row for row in json.loads(out.read_text())["results"] if row["metric"] == "miou"]


def named(found: list[Any]) -> list[tuple[str, str | None]]:
    return [(row["network"], row["stage"]) for row in found]


@pytest.mark.parametrize("kind", ["knn", "linear"])
def test_probes_show_the_untrained_network_at_the_same_stage(
    kind: str, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By default, and it says so. An early stage scores much before any training, so a score alone,
    or beside another stage, shows nothing.
    """
    more = ("--steps", "2") if kind == "linear" else ()
    assert named(rows(root, monkeypatch, kind, *more)) == [("teacher", "4"), ("untrained", "4")]
    assert "untrained: the same network before training (--baseline none leaves" in (
        capsys.readouterr().err
    )
    found = rows(root, monkeypatch, kind, *more, "--stage", "2", "--whiten", "0.5")
    assert named(found) == [
        ("teacher, stage 2, whitened", "2"),
        ("untrained, stage 2, whitened", "2"),
    ]
    assert {(row["whiten"], row["output_stride"]) for row in found} == {(0.5, None)}
    found = rows(root, monkeypatch, kind, *more, "--baseline", "none", "--output-stride", "16")
    assert named(found) == [("teacher, output stride 16", "4")] and found[0]["output_stride"] == 16


def test_clusters_show_the_untrained_network_too(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prototypes and k-means, each beside those of the network before training."""
    found = rows(root, monkeypatch, CLUSTERS, "--features", "teacher", "pixels", "--stage", "3")
    assert named(found) == [
        ("trained", None),
        ("untrained", None),
        ("teacher, stage 3, k-means", "3"),
        ("untrained, stage 3, k-means", "3"),
        ("pixels, k-means", None),
    ]
    alone = rows(root, monkeypatch, CLUSTERS, "--baseline", "none", "--output-stride", "8")
    assert named(alone) == [("trained, output stride 8", None)]


def test_dilated_prototypes(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--output-stride` without --features is of the run's prototypes. Without it the option would
    be taken and do nothing.
    """
    sizes = []
    segment = SlotCon.segment

    def watched(self: SlotCon, images: torch.Tensor) -> Any:
        result = segment(self, images)
        sizes.append(tuple(result[0].shape[2:]))
        return result

    monkeypatch.setattr(SlotCon, "segment", watched)
    rows(root, monkeypatch, CLUSTERS, "--output-stride", "8")
    assert sizes == [(8, 8), (8, 8)]


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        ("knn", "--stage 5", "--stage 5: teacher has the stages 1 to 4"),
        ("knn", "--features projector --stage 3", "--stage is of encoders: the projector follows"),
        ("knn", "--features teacher teacher", "--features names the same features twice"),
        ("knn", "--stage 3+4 --whiten", "96 cells are fewer than 768 features"),
        ("linear", "--whiten 0", "--whiten must be above 0 and at most 1, not 0.0"),
        ("linear", "--whiten nan", "--whiten must be above 0 and at most 1, not nan"),
        ("knn", "--size 31", "^teacher: images of 31 pixels are smaller than a cell of 32"),
        ("linear", "--head lbfgs --size 31", "^teacher: images of 31 pixels are smaller"),
        (CLUSTERS, "--stage 3", "--stage 3 is for k-means, which needs --features"),
        (CLUSTERS, "--whiten", "--whiten 0.25 is for k-means, which needs --features"),
    ],
)
def test_bad_options_are_one_line(
    command: str, options: str, message: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of them would otherwise end in a traceback, or be taken and do nothing."""
    with pytest.raises(UserError, match=message) as caught:
        rows(root, monkeypatch, command, *options.split())
    assert len(caught.value.lines) == 1
