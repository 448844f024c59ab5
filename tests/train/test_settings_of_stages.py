"""Runs with several stages, balanced targets, the contrast of cells, and other teachers."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from model import ModelConfig
from pipeline.errors import UserError
from tests import ROOT
from tests.helpers.training import (
    assert_same_tensors,
    run_dir,
    small_beton,
    small_run,
    train_in_two,
    trainer,
    with_accumulation,
)
from train.config import RunConfig, TrainConfig, from_dict, load_config
from train.run.settings import to_dict
from train.schedule import teacher_momentum

MODEL = ModelConfig(
    "resnet18",
    dim_hidden=16,
    dim_out=8,
    num_prototypes=8,
    stages=3,
    supervise=(2, 3),
    stage_sizes=((2, 8, 6, 9),),
    targets="balanced",
    cell_loss_weight=1.0,
    cells=4,
)
TEACHERS: dict[str, dict[str, Any]] = {
    "ema": {},
    "student": {"teacher": "student", "teacher_momentum": 0},
    "switch": {"teacher": "switch", "teacher_from": 0.5},
}


def deep_run(beton: Path, folder: Path, name: str, **train: Any) -> RunConfig:
    """Ten steps; a checkpoint at the fourth, and the teacher switched at the fifth."""
    return replace(small_run(beton, folder, name, **train), model=MODEL)


@pytest.mark.parametrize("teacher", TEACHERS)
def test_a_resumed_run_ends_bit_for_bit_alike(teacher: str, tmp_path: Path) -> None:
    """Without it a run that was interrupted is another one: by the sample of cells, by a teacher
    that was not stored, or by the step of the switch.
    """
    beton = small_beton(tmp_path)
    whole = deep_run(beton, tmp_path, "whole", **TEACHERS[teacher])
    trainer(whole).train()
    torch.manual_seed(5)  # the state of torch must not matter
    for steps in (4, 7, None):
        part = deep_run(beton, tmp_path, "parts", **TEACHERS[teacher], max_steps=steps)
        trainer(part, "auto").train()
    ends = [run_dir(config) / "checkpoints" / "step_10" for config in (whole, part)]
    assert_same_tensors(*ends)


def test_the_stored_teacher_is_the_student(tmp_path: Path) -> None:
    """Without it the teacher of a checkpoint, which is evaluated and exported, is a step old or
    untrained.
    """
    beton = small_beton(tmp_path)
    for teacher, same in (("student", True), ("switch", False)):
        run = trainer(deep_run(beton, tmp_path, teacher, **TEACHERS[teacher]))
        run.train()
        student, taught = run.slotcon.student.state_dict(), run.slotcon.teacher.state_dict()
        assert all(torch.equal(student[name], value) for name, value in taught.items()) == same


def test_the_average_begins_at_the_switch(tmp_path: Path) -> None:
    """Without it the average begins with the weights that the run started from."""
    config = deep_run(small_beton(tmp_path), tmp_path, "run", **TEACHERS["switch"])
    run = trainer(replace(config, train=replace(config.train, max_steps=6)))
    assert [run._schedule(step)[1] for step in (0, 4)] == [0, 0]
    assert run._schedule(5)[1] == 0.99
    assert run._schedule(9)[1] == teacher_momentum(4, base=0.99, total_steps=5)
    momenta, differences = list[float](), list[float]()

    def noted(momentum: float) -> None:
        student, teacher = (
            torch.cat([weight.flatten() for weight in branch.parameters()])
            for branch in (run.slotcon.student, run.slotcon.teacher)
        )
        momenta.append(momentum)
        differences.append((student - teacher).abs().max().item())

    run.slotcon.update_teacher = noted  # type: ignore[method-assign]
    run.train()
    assert (momenta, differences) == ([0.99], [0])


@pytest.mark.parametrize("accumulation", [1, 2])
def test_all_settings_train(accumulation: int, tmp_path: Path) -> None:
    """Without it a step that accumulates draws one sample twice, or a term is not logged."""
    config = with_accumulation(deep_run(small_beton(tmp_path), tmp_path, "run"), accumulation)
    run = trainer(config)
    run.train()
    assert set(run.slotcon.term_names) <= set(run.meter.names)
    lines = (run_dir(config) / "metrics.jsonl").read_text()
    assert "stage2_cells" in lines and "stage2_grouping_12" in lines


def test_two_processes_agree(tmp_path: Path) -> None:
    """Without it their weights drift apart: other shares, other samples, another teacher."""
    config = deep_run(small_beton(tmp_path), tmp_path, "two", **TEACHERS["switch"])
    train_in_two(config)
    first, second = (torch.load(tmp_path / f"two.rank{rank}") for rank in (0, 1))
    statistics = ("running_mean", "running_var")
    for name, value in first.items():
        assert name.endswith(statistics) or torch.equal(value, second[name]), name


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": {"stages": 5}}, "model.stages must be a whole number in 1..4, not 5"),
        ({"model": {"supervise": [3, 4]}}, "model.supervise must be a list that ends with 3"),
        (
            {"views": {"size": 16}},
            r"model.supervise must be stages with more than one cell of a view \(stage 3 has one "
            r"of 16 pixels\), not \[2, 3\]",
        ),
        (
            {"train": {"view_sizes": [[0, 32], [0.5, 64]]}},
            r"model.cells must be at most the 4 cells that stage 3 has of a view of 32 pixels \(.*"
            r"\), not 5",
        ),
        ({"train": {"teacher": "student"}}, "teacher_momentum must be 0 with train.teacher stu"),
        (
            {"train": {"teacher": "switch", "teacher_momentum": 0}},
            "train.teacher_momentum must be above 0 with train.teacher switch, not 0",
        ),
        ({"train": {"teacher": "tutor"}}, "train.teacher must be one of ema, student, switch"),
        ({"train": {"teacher_from": 1.5}}, "train.teacher_from must be in 0..1"),
        (
            {"train": {"teacher_from": 0.3}},
            "train.teacher_from must be 0.5 unless train.teacher is switch, not 0.3",
        ),
    ],
)
def test_settings_that_cannot_be(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    """Without it a run fails after its data are loaded, or trains something else than it says."""
    config = deep_run(tmp_path / "no.beton", tmp_path, "run")
    values = to_dict(replace(config, model=replace(MODEL, cells=5)))
    for section, fields in changes.items():
        values[section] |= fields
    with pytest.raises(UserError, match=words) as caught:
        from_dict(values)
    assert "\n" not in str(caught.value)


def test_defaults_are_the_authors() -> None:
    """Without it an old configuration trains another method."""
    model, train = ModelConfig(), TrainConfig()
    assert (model.stages, model.supervised, model.targets, model.cell_loss_weight) == (
        4, (4,), "centred", 0
    )  # fmt: skip
    assert train.teacher == "ema"


@pytest.mark.parametrize(
    "file", sorted((ROOT / "configs/fast").glob("*.yaml")), ids=lambda f: f.stem
)
def test_a_fast_recipe_steps(file: Path, tmp_path: Path) -> None:
    """Without it a recipe that nobody has trained yet may not even start. Its networks are narrow
    here; its views, stages, cells and teacher are its own.
    """
    config, _ = load_config(["--config", str(file)])
    assert config.name.replace("_fast", "") == file.stem.replace("_cpu", "")
    small = small_run(small_beton(tmp_path), tmp_path, "recipe", max_steps=1)
    sizes = tuple((stage, 16, 8, cells) for stage, _, _, cells in config.model.stage_sizes)
    narrow = {"arch": "resnet18", "dim_hidden": 16, "dim_out": 8, "num_prototypes": 8}
    taken = {name: getattr(config.train, name) for name in ("teacher", "teacher_momentum")}
    config = replace(
        small,
        views=config.views,
        model=replace(config.model, **narrow, stage_sizes=sizes),
        train=replace(small.train, **taken),
    )
    trainer(config).train()
    line = json.loads((run_dir(config) / "metrics.jsonl").read_text().splitlines()[-1])
    assert math.isfinite(line["loss"])
    assert line["step"] == 1
