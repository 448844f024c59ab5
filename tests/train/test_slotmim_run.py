"""Runs of SlotMIM: what the trainer adds to a step, resumed bit for bit, refused if impossible."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("timm")

from model import ModelConfig
from model.architectures import IMAGENET
from pipeline.errors import UserError
from pipeline.views import ViewConfig
from tests.helpers.training import (
    assert_same_tensors,
    run_dir,
    small_beton,
    small_run,
    tensors,
    train_in_two,
    trainer,
)
from train.config import LogConfig, RunConfig, from_dict, load_config
from train.run.ends import Collapsed, Diverged
from train.run.settings import to_dict

RECIPE: dict[str, Any] = {
    "optimizer": "adamw",
    "base_lr": 0.1,
    "warmup_multiplier": None,
    "warmup_reaches_peak": True,
    "final_lr": 2e-6,
    "weight_decay": 0.04,
    "final_weight_decay": 0.4,
    "decay_positions": True,
    "clip_grad": 0.3,
    "freeze_prototypes_epochs": 1,
    "warmup_teacher_temp": 0.04,
    "warmup_teacher_temp_epochs": 2,
}
PROTOTYPES = "student.grouping.prototypes"


def slotmim_run(beton: Path, folder: Path, name: str = "run", **train: Any) -> RunConfig:
    """Two epochs of five steps, with everything that a recipe of SlotMIM sets."""
    config = small_run(beton, folder, name, **{**RECIPE, **train})
    model = ModelConfig(
        "timm:test_vit",
        dim_hidden=16,
        dim_out=8,
        num_prototypes=8,
        objective="slotmim",
        drop_path=0.1,
    )
    views = ViewConfig(size=64, mask_ratio=0.3, mask_ratio_spread=0.2)
    return replace(config, model=model, views=views)


@pytest.fixture(scope="module")
def beton(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_beton(tmp_path_factory.mktemp("slotmim"))


@pytest.fixture(scope="module")
def whole(beton: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run that was never interrupted."""
    config = slotmim_run(beton, tmp_path_factory.mktemp("whole"))
    trainer(config).train()
    return config


def lines(config: RunConfig) -> list[dict[str, float]]:
    text = (run_dir(config) / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_a_run_writes_what_it_learns(whole: RunConfig) -> None:
    """Without it a term or a schedule would not be seen."""
    logged = lines(whole)
    assert logged[0]["masked_1"] > 0 < logged[0]["masked_2"]
    terms = {name: logged[0][name] for name in logged[0] if name[-2:] in ("12", "21", "_1", "_2")}
    assert logged[0]["loss"] == pytest.approx(0.25 * sum(terms.values()), rel=1e-5)
    # Steps 3, 6, 9, 10 of 5 an epoch: the last steps are number 2 and 9, from 0.
    assert [logged[at]["teacher_temp"] for at in (0, -1)] == [0.04, 0.07]
    assert logged[0]["lr"] == pytest.approx(0.1 * 4 / 256 * 2 / 4)
    assert logged[0]["weight_decay"] == pytest.approx(0.04 + 0.36 * 0.0954915, rel=1e-5)
    assert logged[-1]["weight_decay"] > 0.38


def test_prototypes_rest_at_first(beton: Path, tmp_path: Path) -> None:
    """In the first epoch they get no step, no decay, no moments. Without it they would be the first
    to follow a network that knows nothing."""
    config = slotmim_run(beton, tmp_path, max_steps=6)
    run = trainer(replace(config, log=replace(config.log, checkpoint_every=1, keep=9)))
    before = run.slotcon.student.grouping.prototypes.detach().clone()
    run.train()
    folder = run_dir(config) / "checkpoints"
    at = {step: tensors(folder / f"step_{step}") for step in (5, 6)}
    assert torch.equal(at[5][PROTOTYPES], before)
    assert not torch.equal(at[6][PROTOTYPES], before)
    counts = {step: [int(v) for n, v in at[step].items() if n.endswith(".step")] for step in at}
    assert set(counts[5]) == {5} and sorted(set(counts[6])) == [1, 6]
    assert len(counts[6]) == len(counts[5]) + 1


@pytest.mark.parametrize("at", [3, 7])
def test_a_resumed_run_is_the_same_bit_for_bit(whole: RunConfig, tmp_path: Path, at: int) -> None:
    """While the prototypes rest and after it: masks, drop paths, schedules. Without it an
    interrupted run would be another experiment."""
    log = replace(whole.log, dir=str(tmp_path))
    part = replace(whole, log=log, train=replace(whole.train, max_steps=at))
    trainer(part).train()
    trainer(replace(part, train=whole.train), "auto").train()
    assert_same_tensors(*(run_dir(c) / "checkpoints" / "step_10" for c in (whole, part)))
    assert [line["loss"] for line in lines(part)][-1] == [line["loss"] for line in lines(whole)][-1]


def test_two_processes_stay_equal(beton: Path, tmp_path: Path) -> None:
    """Through an epoch with resting prototypes and one step after it. Without it the weights of two
    processes would part, or one would wait for the other for ever."""
    config = slotmim_run(beton, tmp_path, max_steps=6)
    train_in_two(config)
    states = [torch.load(tmp_path / f"run.rank{rank}", weights_only=True) for rank in (0, 1)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_a_loss_that_is_no_number_ends_the_run(beton: Path, tmp_path: Path) -> None:
    """Without it a run would go on for days with weights that are no numbers."""
    run = trainer(slotmim_run(beton, tmp_path))
    with torch.no_grad():
        run.slotcon.student.encoder.get_parameter("mask_token").fill_(torch.nan)
    with pytest.raises(Diverged, match="the loss is not finite at step 3"):
        run.train()


def test_a_collapse_is_told(beton: Path, tmp_path: Path) -> None:
    """One prototype wins every patch. Without it a run of many GPUs would learn nothing unseen."""
    config = slotmim_run(beton, tmp_path, warmup_epochs=0, freeze_prototypes_epochs=1)
    log = LogConfig(every=1, trackers=(), dir=str(tmp_path), on_collapse="stop")
    run = trainer(replace(config, log=log))
    with torch.no_grad():
        for branch in (run.slotcon.student, run.slotcon.teacher):
            branch.grouping.prototypes[1:] = -branch.grouping.prototypes[0]
            last: Any = branch.projector[-1]  # type: ignore[index]
            last.bias.copy_(branch.grouping.prototypes[0])
    with pytest.raises(Collapsed, match=r"1\.0 active slots an image"):
        run.train()


def test_what_cannot_work_is_refused_in_one_line(tmp_path: Path) -> None:
    """Before any file is opened. Without it a run would fail in its first step, or learn what it
    should not."""
    options = ["--name", "x", "--data.path", "missing.beton", "--log.dir", str(tmp_path)]
    vit = ["--model.objective", "slotmim", "--model.arch", "timm:test_vit"]
    masked = [*vit, "--views.size", "64", "--views.mask_ratio"]
    adam = ["--train.optimizer", "adamw", "--train.base_lr", "0.01"]
    recipes = ("camvid_cpu", "cocoplus_vitb_800ep")  # the latter has drop paths
    refused = {
        ("--model.objective", "slotmim"): "model.arch must be a ViT of timm",
        **{
            ("--config", f"slotmim/{name}", "--model.arch", "resnet18"): "model.arch must be a ViT"
            for name in recipes
        },
        (*vit, "--views.size", "64"): "views.mask_ratio must be above 0 with model.objective slotm",
        ("--views.mask_ratio", "0.3"): "views.mask_ratio must be 0 without model.objective slotmim",
        (*masked, "0.01"): "views.mask_ratio must be such that",
        (*masked, "0.9", "--views.mask_ratio_spread", "0.1"): "views.mask_ratio must be below 1",
        (*masked, "1"): "views.mask_ratio must be at least 0 and less than 1",
        (*vit, "--views.size", "72", "--views.mask_ratio", "0.3"): "views.size must be a multiple",
        (*masked, "0.3", "--views.mask_cell", "32"): "views.mask_cell must be 16, the patch of ti",
        (*masked, "0.3", "--train.teacher", "student", "--train.teacher_momentum", "0"): (
            "train.teacher must be ema or frozen with model.objective slotmim"
        ),
        ("--train.final_weight_decay", "0.4", "--train.weight_decay", "0"): (
            "train.weight_decay must be above 0 with train.final_weight_decay"
        ),
        ("--train.decay_positions", "true"): "train.decay_positions must be false with lars",
        ("--train.warmup_teacher_temp", "0.04"): "train.warmup_teacher_temp must be given with",
        ("--train.freeze_prototypes_epochs", "800"): "train.freeze_prototypes_epochs must be below",
        (*adam, "--train.clip_grad", "0"): "train.clip_grad must be a positive number",
    }
    for more, message in refused.items():
        with pytest.raises(UserError) as caught:
            load_config([*more, *options])
        assert message in str(caught.value) and "\n" not in str(caught.value), caught.value


def test_the_configuration_survives_its_file(beton: Path, tmp_path: Path) -> None:
    """Without it a resume would be refused."""
    config = slotmim_run(beton, tmp_path)
    assert from_dict(to_dict(config)) == config


@pytest.mark.parametrize(
    ("name", "epochs", "prototypes"),
    [("cocoplus_vitb_800ep", 800, 512), ("imagenet_vitb_400ep", 400, 1024)],
)
def test_recipes_are_the_authors(name: str, epochs: int, prototypes: int) -> None:
    """One wrong value here would waste hundreds of epochs."""
    config, _ = load_config(["--config", f"slotmim/{name}"])
    train, model, views = config.train, config.model, config.views
    assert (train.epochs, model.num_prototypes) == (epochs, prototypes)
    assert (model.arch, model.dim_hidden, model.dim_out) == ("timm:vit_base_patch16_224", 2048, 256)
    assert (model.teacher_temp, model.student_temp, model.contrast_temp) == (0.07, 0.1, 0.2)
    assert (model.center_momentum, model.group_loss_weight, model.drop_path) == (0.9, 0.5, 0.1)
    assert model.image_stats == IMAGENET
    assert (train.batch_size, train.base_lr, train.warmup_epochs) == (1024, 1.5e-4, 10)
    own = {**RECIPE, "base_lr": 1.5e-4, "freeze_prototypes_epochs": 3}
    own |= {"warmup_teacher_temp_epochs": 50, "teacher_momentum": 0.996, "momentum": 0.9}
    assert {key: getattr(train, key) for key in own} == own
    assert (views.size, views.mask_ratio, views.mask_ratio_spread) == (224, 0.3, 0.2)


def test_the_other_recipes_load() -> None:
    """Without it a setting that no longer exists would stop whoever uses them."""
    for name in ("cocoplus_vits_1gpu", "camvid_cpu", "scenes_cpu"):
        assert load_config(["--config", f"slotmim/{name}"])[0].model.hides_patches
