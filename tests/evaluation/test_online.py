"""The scores while a run trains are those of the commands that score its checkpoint."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from evaluation import probe, slots, unsupervised_segmentation
from evaluation.networks import new_norms
from tests.helpers.exported import call
from tests.helpers.labelled_sets import write_folder_set
from tests.helpers.tiny_slotcon import tiny_model
from tests.helpers.training import run_dir, small_beton, small_run, trainer
from train.config import RunConfig, from_dict
from train.run.settings import to_dict


@pytest.fixture(scope="module", params=[{}, {"stages": 3, "supervise": [2, 3]}])
def config(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run of one step, scored with fewer cells in memory than there are."""
    folder = tmp_path_factory.mktemp("online")
    root = folder / "set"
    write_folder_set(root, train=5, val=3)
    values = to_dict(small_run(small_beton(folder), folder, max_steps=1))
    values["model"] |= request.param
    values["eval"] |= {"every": 1, "memory": 20, "batch_size": 2, "max_images": 5}
    values["eval"] |= {name: f"{root}/val/{name}" for name in ("images", "labels")}
    values["eval"] |= {f"train_{name}": f"{root}/train/{name}" for name in ("images", "labels")}
    config = from_dict(values)
    trainer(config).train()
    return config


def scores(config: RunConfig, step: int) -> dict[str, float]:
    lines = map(json.loads, (run_dir(config) / "metrics.jsonl").read_text().splitlines())
    rows = next(line["results"] for line in lines if line["step"] == step and "results" in line)
    return {row["metric"]: row["value"] for row in rows}


def of_command(
    main: Callable[[], None], config: RunConfig, file: Path, *options: object
) -> list[dict[str, Any]]:
    common = ("--checkpoint", run_dir(config) / "checkpoints/best", "--batch", 2, "--json", file)
    call(main, *options, *common)
    results: list[dict[str, Any]] = json.loads(file.read_text())["results"]
    return results


def folders(config: RunConfig, *names: str) -> list[str]:
    """The options of the commands for these settings."""
    return [
        word
        for name in names
        for word in (f"--{name.replace('_', '-')}", getattr(config.eval, name))
    ]


def test_clusters_and_probe(config: RunConfig, tmp_path: Path) -> None:
    """Without it a curve while training and the table after it measure different things."""
    val = folders(config, "images", "labels")
    train = [*folders(config, "train_images", "train_labels"), "--memory", 20, "--seeds", 0]
    knn = of_command(probe.main, config, tmp_path / "knn.json", "knn", *val, *train)
    clusters = of_command(
        unsupervised_segmentation.main, config, tmp_path / "eval.json", *val,
        "--features", "teacher", "--baseline", "untrained",
    )  # fmt: skip
    expected = {
        f"{name}_{row['metric']}": row["value"]
        for name, rows in (("knn", knn), ("clusters", clusters))
        for row in rows
        if row["metric"] in ("miou", "pixel_accuracy")
        for name in [_protocol(name, row)]
        if name
    }
    found = scores(config, 1)
    assert len(expected) == 6 and expected == {name: found[name] for name in expected}


def _protocol(command: str, row: dict[str, Any]) -> str:
    """The online protocol whose score is in a row of a command, if there is one."""
    if "untrained" in row["network"]:
        return ""
    if command == "knn":
        return "knn"
    return "kmeans" if row["clusters"] == "k-means" else "prototypes"


def test_untrained_network(config: RunConfig, tmp_path: Path) -> None:
    """The first point of the curve has calibrated BatchNorms, as the commands' baseline. Without it
    training seems to help where only the statistics do."""
    val = folders(config, "images", "labels", "train_images", "train_labels")
    options = (*val, "--memory", 20, "--seeds", 0, "--features", "untrained")
    rows = of_command(probe.main, config, tmp_path / "knn.json", "knn", *options)
    found = scores(config, 0)
    expected = {row["metric"]: row["value"] for row in rows if "class" not in row}
    assert expected == {name: found[f"knn_{name}"] for name in ("miou", "pixel_accuracy")}
    assert found["knn_miou"] != scores(config, 1)["knn_miou"]


def test_statistics_without_counts_are_kept() -> None:
    """Many files of weights have them, torchvision's first ones too; a projector beside them has
    none. Without it the start of such a run is scored with statistics measured again, which may
    cost it many points, or its prototypes with a projector that divides by 1."""
    model = tiny_model()
    all_norms = new_norms(model.teacher)
    of_encoder = [each for each in model.teacher.encoder.modules() if each in all_norms]
    assert len(of_encoder) == 20 < len(all_norms)
    for norm in of_encoder:
        nn.init.normal_(norm.get_buffer("running_mean"))
    assert new_norms(model.teacher) == all_norms[20:]


def test_slots(config: RunConfig, tmp_path: Path) -> None:
    """The same for the use of the prototypes on whole images."""
    options = ("--data", config.eval.images)
    rows = of_command(slots.main, config, tmp_path / "slots.json", *options)
    expected = {row["metric"]: row["value"] for row in rows if "prototype" not in row}
    found = scores(config, 1)
    names = ("active_slots", "usage_entropy", "dead_prototypes")
    assert {name: expected[name] for name in names} == {name: found[name] for name in names}
