"""A segmentation run from end to end: it learns, it resumes, it reports errors."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from pipeline.errors import UserError
from tests import ROOT
from tests.helpers.killed import curve, killed
from tests.helpers.labelled_sets import NAMES, VOID, save_png, write_folder_set
from tests.helpers.runs import in_this_process
from train.run.settings import to_dict
from transfer.config import EfficiencyConfig, InitConfig, LogConfig, OptimConfig
from transfer.segmentation.config import (
    AugmentConfig,
    DataConfig,
    InferenceConfig,
    ModelConfig,
    SegmentationConfig,
)
from transfer.segmentation.task import Segmentation

CONFIGS = ROOT / "configs/transfer"


def small_config(root: Path, folder: Path, **optim: Any) -> SegmentationConfig:
    """Six steps of four crops."""
    parts = {
        f"{part}_{what}": str(root / part / what)
        for part in ("train", "val")
        for what in ("images", "labels")
    }
    return SegmentationConfig(
        name="run",
        data=DataConfig(**parts),  # type: ignore[arg-type]
        augment=AugmentConfig(crop=33, size=(64, 48), scale=(0.75, 1.25), distort=True),
        model=ModelConfig(output_stride=16, channels=16, convs=1, dilation=1, dropout=0.1),
        inference=InferenceConfig(window=48, stride=32),
        init=InitConfig(arch="resnet18"),
        optim=OptimConfig(**{"steps": 6, "batch_size": 4, "lr": 0.05, **optim}),
        efficiency=EfficiencyConfig(workers=0),
        log=LogConfig(every=2, checkpoint_every=0, dir=str(folder)),
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("set")
    write_folder_set(folder, 10, 3)
    return folder


def trainer(config: SegmentationConfig, resume: str | None = None) -> Any:
    """A trainer in this process."""
    from transfer.command import settings_of
    from transfer.trainer import Trainer

    settings = settings_of(SegmentationConfig)
    return in_this_process(lambda: Trainer(config, Segmentation, settings, resume))


def test_a_run_learns_and_resumes_bit_for_bit(root: Path, tmp_path: Path) -> None:
    """A run that is stopped in mid-epoch and resumed ends with the same scores as an uninterrupted
    one. Its loss falls, because colours distinguish the classes.
    """
    whole = small_config(root, tmp_path / "whole")
    trainer(whole).train()
    result = json.loads((tmp_path / "whole/run/result.json").read_text())
    assert result["task"] == "segmentation"
    assert result["dataset"] == "folder"
    assert (result["images"], result["scored"]["images"]) == (10, 3)
    assert result["scored"]["dataset"] == "folder" and result["scored"]["classes"] == NAMES
    assert len(result["scored"]["fingerprint"]) == 64
    values = {row.get("class", row["metric"]): row["value"] for row in result["results"]}
    assert set(values) == {"miou", "mean_accuracy", "pixel_accuracy", *NAMES}
    assert values["miou"] == pytest.approx(sum(values[name] for name in NAMES) / 3)
    lines = (tmp_path / "whole/run/metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines if "loss" in json.loads(line)]
    assert losses[-1] < losses[0] < 1.5 * math.log(3)

    half = small_config(root, tmp_path / "half", max_steps=3)
    trainer(half).train()
    rest = small_config(root, tmp_path / "half")
    trainer(rest, "auto").train()
    other = json.loads((tmp_path / "half/run/result.json").read_text())
    assert other["results"] == result["results"]


def train(config: SegmentationConfig, resume: str | None = None) -> None:
    trainer(config, resume).train()


def test_a_killed_run_has_the_same_curve(root: Path, tmp_path: Path) -> None:
    """Without it the line after a resume averages over other steps than it says, or a run that was
    killed while it was evaluated lacks the scores."""
    config = small_config(root, tmp_path / "whole", steps=5)
    config = replace(config, log=replace(config.log, checkpoint_every=3, evaluate_every=4))
    train(config)
    for at in (13, 17, 20):  # after the checkpoint of step 3, before and after the scores of step 4
        again = replace(config, log=replace(config.log, dir=str(tmp_path / str(at))))
        assert killed(at, train, again)
        train(again, "auto")
        assert curve(tmp_path / str(at) / "run") == curve(tmp_path / "whole/run")


def test_configs_are_complete_and_fit(tmp_path: Path) -> None:
    """An unknown key, or a window without a stride, shows here and not at the user's."""
    from transfer.command import settings_of

    settings = settings_of(SegmentationConfig)
    found = {}
    for name in (
        "voc", "cityscapes", "ade20k", "camvid", "camvid_cpu",
        "voc_linear", "cityscapes_linear", "ade20k_linear",
    ):  # fmt: skip
        path = CONFIGS / f"{name}.yaml"
        config, _ = settings.load(["--config", str(path)])
        found[name] = config
        assert config.name == name
        assert set(yaml.safe_load(path.read_text())) <= set(vars(config))
        assert config.model.head == ("linear" if "linear" in name else "fcn")
        assert config.init.frozen == (5 if "linear" in name else 0)


VOC: dict[str, dict[str, Any]] = {
    "augment": {
        "crop": 513, "size": [2049, 513], "scale": [0.5, 2.0], "max_class_share": 1.0,
        "flip": 0.5, "distort": False,
    },
    "model": {
        "head": "fcn", "output_stride": 16, "channels": 256, "convs": 2, "dilation": 6,
        "concat": False, "dropout": 0.0, "auxiliary_weight": 0.0, "align_corners": True,
    },
    "inference": {"window": 0, "stride": 0},
    "optim": {
        "steps": 30000, "batch_size": 16, "lr": 0.003, "momentum": 0.9, "weight_decay": 1e-4,
        "norm_weight_decay": None, "schedule": "step", "milestones": [21000, 27000],
        "gamma": 0.1, "warmup_steps": 0, "precise_bn": 0,
    },
}  # fmt: skip
PUBLISHED: dict[str, dict[str, dict[str, Any]]] = {
    "voc": VOC,
    "cityscapes": {
        "augment": VOC["augment"] | {"crop": 769, "size": [2049, 1025]},
        "model": VOC["model"],
        "inference": {"window": 769, "stride": 513},
        "optim": VOC["optim"] | {"steps": 90000, "lr": 0.01, "milestones": [63000, 81000]},
    },
    "ade20k": {
        "augment": VOC["augment"]
        | {"crop": 512, "size": [2048, 512], "max_class_share": 0.75, "distort": True},
        "model": VOC["model"]
        | {
            "output_stride": 8, "channels": 512, "dilation": 1, "concat": True, "dropout": 0.1,
            "auxiliary_weight": 0.4, "align_corners": False,
        },
        "inference": {"window": 0, "stride": 0},
        "optim": VOC["optim"]
        | {
            "steps": 80000, "lr": 0.01, "weight_decay": 5e-4, "schedule": "poly",
            "milestones": [], "power": 0.9, "min_lr": 1e-4,
        },
    },
}  # fmt: skip
"""transfer/segmentation/configs of the authors' code."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_configs_are_the_published_settings(name: str) -> None:
    """Each file makes a column of the table. With a wrong setting the column would not be
    comparable.
    """
    from transfer.command import settings_of

    options = ["--config", str(CONFIGS / f"{name}.yaml")]
    config = to_dict(settings_of(SegmentationConfig).load(options)[0])
    for section, values in PUBLISHED[name].items():
        assert {key: config[section][key] for key in values} == values, section


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (DataConfig, {"dataset": "pascal"}, "dataset must be one of folder, coco-stuff"),
        (DataConfig, {"void": (300,)}, r"void must be ids in 0\.\.255"),
        (DataConfig, {"void": (-1, 255)}, r"void must be ids in 0\.\.255"),
        (AugmentConfig, {"size": (513, 2049)}, "size must be longer and shorter side"),
        (AugmentConfig, {"scale": (2.0, 0.5)}, "scale must be two growing positive numbers"),
        (AugmentConfig, {"max_class_share": 0}, "max_class_share must be above 0"),
        (AugmentConfig, {"flip": 1.5}, r"flip must be in 0\.\.1"),
        (ModelConfig, {"dropout": 1.0}, "dropout must be at least 0 and less than 1"),
        (ModelConfig, {"convs": 0}, "convs must be at least 1"),
        (ModelConfig, {"auxiliary_weight": -1.0}, "auxiliary_weight must be 0 or more"),
        (InferenceConfig, {"window": 769}, r"stride must be in 1\.\.window \(769\)"),
        (InferenceConfig, {"stride": 513}, r"stride must be in 1\.\.window \(0\), 0 without one"),
    ],
)
def test_impossible_settings_are_named(kind: Any, values: dict[str, Any], message: str) -> None:
    """Each would fail later, or not at all."""
    with pytest.raises(ValueError, match=message):
        kind(**values)


def test_a_crop_of_one_cell_is_refused(root: Path, tmp_path: Path) -> None:
    """For a batch of one such crop, a norm would have one value per channel: a traceback."""
    config = small_config(root, tmp_path)
    with pytest.raises(ValueError, match=r"augment\.crop must be more than model\.output_stride"):
        replace(config, augment=replace(config.augment, crop=16))


def test_labels_that_are_all_void_are_the_users_mistake(root: Path, tmp_path: Path) -> None:
    """With a wrong class table there is nothing to score. The user learns this before the first
    step.
    """
    config = small_config(root, tmp_path)
    void = replace(config, data=replace(config.data, void=[0, 1, 2, VOID]))
    with pytest.raises(UserError, match=r"no labelled pixel to score: the label maps are all void"):
        Segmentation(void)


def test_a_bad_label_map_ends_the_run_with_its_name(root: Path, tmp_path: Path) -> None:
    """Also deep in an epoch and in a worker process: one line, no traceback."""
    write_folder_set(tmp_path / "set", 4, 1)
    save_png(tmp_path / "set/train/labels/train02.png", torch.full((48, 64), 9).numpy())
    config = small_config(tmp_path / "set", tmp_path)
    two = replace(config, efficiency=EfficiencyConfig(workers=1))
    with pytest.raises(UserError, match=r"^\S+train02\.png: class id 9 is not in the table of 3"):
        trainer(two).train()


def test_a_bad_validation_label_map_is_refused_at_once(tmp_path: Path) -> None:
    """At the start, not after the last step. The file's header says nothing about its ids."""
    write_folder_set(tmp_path / "set", 4, 2)
    save_png(tmp_path / "set/val/labels/val01.png", torch.full((48, 64), 9).numpy())
    with pytest.raises(UserError, match=r"val01\.png: class id 9 is not in the table of 3"):
        Segmentation(small_config(tmp_path / "set", tmp_path))


def test_the_validation_part_is_scored_at_its_size(tmp_path: Path) -> None:
    """Figures from training images, or at other sizes, would look plausible. For maps of one class,
    its accuracy equals both means.
    """
    write_folder_set(tmp_path / "set", 4, 2)
    for file in (tmp_path / "set/val/labels").iterdir():
        save_png(file, torch.ones(48, 64).numpy().astype("uint8"))
    config = small_config(tmp_path / "set", tmp_path)
    config = replace(config, inference=InferenceConfig())
    task = Segmentation(replace(config, augment=replace(config.augment, size=(32, 24))))
    sizes = []
    first = next(layer for layer in task.model.modules() if isinstance(layer, nn.Conv2d))
    first.register_forward_pre_hook(lambda m, args: sizes.append(tuple(args[0].shape[2:])))
    with torch.no_grad():
        process = Process(0, 1, [])
        rows = task.evaluate(task.model.eval(), process)  # type: ignore[arg-type]
    values = {row["metric"]: row["value"] for row in rows if "class" not in row}
    assert values["mean_accuracy"] == values["pixel_accuracy"]
    assert sizes == [(24, 32), (24, 32)]


class Process:
    """The parts of an Accelerator that the task needs, for one of several processes in turn."""

    device = torch.device("cpu")

    def __init__(self, rank: int, world: int, others: list[torch.Tensor]) -> None:
        self.process_index, self.num_processes, self.others = rank, world, others

    def reduce(self, tensor: torch.Tensor, reduction: str) -> torch.Tensor:
        assert reduction == "sum"
        self.others.append(tensor)
        return torch.stack(self.others).sum(dim=0)


def test_processes_share_the_images(root: Path, tmp_path: Path) -> None:
    """One confusion matrix: an image that counts twice or not at all, or a mean of means, would
    differ.
    """
    torch.manual_seed(0)
    task = Segmentation(replace(small_config(root, tmp_path), inference=InferenceConfig()))
    rows = {}
    with torch.no_grad():
        for world in (1, 2):
            shares: list[torch.Tensor] = []
            for rank in range(world):  # the last of them sees the sum
                process = Process(rank, world, shares)
                rows[world] = task.evaluate(task.model.eval(), process)  # type: ignore[arg-type]
    assert rows[1] == rows[2]
