"""Runs with an encoder of timm: trained, resumed bit for bit, refused where views do not fit."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from evaluation.online import copy_of
from model import ModelConfig, SlotCon
from pipeline.errors import UserError
from pipeline.views import ViewConfig
from tests.helpers.training import (
    assert_same_tensors,
    run_dir,
    small_beton,
    small_run,
    tensors,
    trainer,
)
from train.config import RunConfig, from_dict, load_config
from train.run.settings import to_dict

timm = pytest.importorskip("timm")
MODEL = {"dim_hidden": 16, "dim_out": 8, "num_prototypes": 8}


def timm_run(beton: Path, folder: Path, name: str, arch: str, **model: object) -> RunConfig:
    config = small_run(beton, folder, name)
    return replace(config, model=ModelConfig(f"timm:{arch}", **MODEL, **model))  # type: ignore[arg-type]


@pytest.mark.parametrize(("arch", "drop_path"), [("test_vit", 0.3), ("test_efficientnet", 0.0)])
def test_a_resumed_run_is_the_same_bit_for_bit(arch: str, drop_path: float, tmp_path: Path) -> None:
    """From a checkpoint in the middle of an epoch, drop paths too. Without it an interrupted run
    would be another experiment.
    """
    beton = small_beton(tmp_path)
    config = timm_run(beton, tmp_path, "whole", arch, drop_path=drop_path)
    trainer(config).train()
    part = replace(config, name="part", train=replace(config.train, max_steps=7))
    trainer(part).train()
    trainer(replace(part, train=config.train), "auto").train()
    whole, resumed = (run_dir(c) / "checkpoints" / "step_10" for c in (config, part))
    assert_same_tensors(whole, resumed)
    began = tensors(run_dir(config) / "checkpoints" / "step_8")
    ended = tensors(whole)
    moved = [n for n in ended if "encoder.net" in n and not ended[n].equal(began[n])]
    assert any(n.startswith("student.") for n in moved) and any(
        n.startswith("teacher.") for n in moved
    )


def test_an_evaluation_copies_what_no_state_dict_holds() -> None:
    """CoAtNet's table of relative positions, as Swin's, is not in its state dict. Without it the
    copy that is scored while a run trains would have no values there.
    """
    torch.manual_seed(0)
    config = ModelConfig("timm:test_coatnet", **MODEL)  # type: ignore[arg-type]
    model = SlotCon(config).eval()
    net = model.teacher.encoder.net
    assert {name for name, _ in net.named_buffers()} - net.state_dict().keys()
    copied = copy_of(model.teacher, config, Accelerator(cpu=True))
    images = torch.randn(1, 3, 160, 160)
    assert torch.equal(copied.encoder(images), model.teacher.encoder(images))


def test_the_configuration_records_the_normalisation(tmp_path: Path) -> None:
    """And is the same after it has been stored. Without it a resume would be refused, or another
    release of timm would normalise otherwise."""
    config = timm_run(tmp_path / "x.beton", tmp_path, "run", "test_vit")
    assert config.model.image_stats == ((0.5,) * 3, (0.5,) * 3)
    stored = to_dict(config)
    assert stored["model"]["image_stats"] == [[0.5] * 3, [0.5] * 3]
    assert from_dict(stored) == config


def test_what_cannot_be_trained_is_refused_in_one_line(tmp_path: Path) -> None:
    """Before any file is opened. Without it the run would end in a traceback after minutes of
    loading, or train on a map that covers a part of its views."""
    options = ["--name", "x", "--data.path", "missing.beton", "--log.dir", str(tmp_path)]
    refused = {
        ("timm:test_vit", "--views.size", "72"): "views.size must be a multiple of 16",
        ("timm:test_convnext", "--views.size", "16"): "views.size must be a multiple of 32",
        ("timm:test_maxvit", "--views.size", "96"): "views.size must be a size that timm:test_max",
        ("timm:convnxt_atto",): "model.arch timm:convnxt_atto: timm has no such network; near it",
        ("timm:test_vit", "--model.drop_path", "1"): "model.drop_path must be at least 0 and less",
        ("resnet18", "--model.drop_path", "0.1"): "model.drop_path must be 0 unless arch is a ",
        ("resnet9",): "model.arch must be one of resnet18",
    }
    for (arch, *more), message in refused.items():
        with pytest.raises(UserError) as caught:
            load_config(["--model.arch", arch, *more, *options])
        assert message in str(caught.value) and "\n" not in str(caught.value)
    config = timm_run(tmp_path / "x.beton", tmp_path, "run", "test_vit")
    efficiency = replace(config.efficiency, checkpointing=True)
    with pytest.raises(ValueError, match=r"efficiency.checkpointing must be false with this model"):
        model = ModelConfig("timm:convit_tiny", **MODEL)  # type: ignore[arg-type]
        replace(config, model=model, views=ViewConfig(size=224), efficiency=efficiency)
