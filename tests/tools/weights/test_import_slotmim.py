"""Checkpoints of SlotMIM's authors become runs, and weights to start from."""

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("timm")

from model import ModelConfig, SlotCon
from model.architectures import IMAGENET
from pipeline.errors import UserError
from tests.helpers.exported import call
from tools.import_official import main
from train.init_config import InitConfig
from train.pretrained import load_model
from train.start import start_from

CONFIG = ModelConfig(
    "timm:vit_tiny_patch16_224", 8, 6, 4, objective="slotmim", image_stats=IMAGENET, drop_path=0.1
)


@pytest.fixture(scope="module")
def model() -> SlotCon:
    """As a trained one: no two weights are equal, nor are student and teacher."""
    torch.manual_seed(0)
    model = SlotCon(CONFIG)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn(weight.shape))
    return model


def content(model: SlotCon, **changes: Any) -> dict[str, Any]:
    args = argparse.Namespace(
        batch_size=256, world_size=4, base_lr=1.5e-4, optimizer="adamw", weight_decay=0.05,
        epochs=400, warmup_epoch=10, warmup_multiplier=100, teacher_momentum=0.996,
        num_instances=1000, image_size=224, min_scale=0.08, arch="vit_tiny",
    )  # fmt: skip
    weights = {f"module.{name}": value for name, value in model.official_state_dict().items()}
    return {"args": args, "model": weights | changes, "epoch": 400}


def test_a_whole_checkpoint_becomes_a_run(
    model: SlotCon, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without it the published SlotMIM could not be evaluated, exported or trained further."""
    torch.save(content(model), tmp_path / "ckpt.pth")
    call(main, tmp_path / "ckpt.pth", "--out", tmp_path / "run")
    assert "warning" not in capsys.readouterr().err
    found, config = load_model(tmp_path / "run")
    assert config.model == CONFIG
    assert config.train.optimizer == "adamw" and config.train.warmup_multiplier is None
    assert (config.train.weight_decay, config.train.final_weight_decay) == (0.05, 0.4)
    assert (config.train.batch_size, config.views.mask_ratio) == (1024, 0.3)
    assert found.state_dict().keys() == model.state_dict().keys()
    for name, value in found.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


def test_a_new_run_starts_from_it(model: SlotCon, tmp_path: Path) -> None:
    """From the file itself, all of it. Without it the projector, a matrix there and a convolution
    here, would begin anew."""
    torch.save(content(model), tmp_path / "ckpt.pth")
    torch.manual_seed(1)
    new = SlotCon(CONFIG)
    about = start_from(InitConfig(str(tmp_path / "ckpt.pth"), "all"), new)
    assert about["new"] == []
    for name, value in new.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


def test_what_is_not_a_vit_of_theirs_is_one_line(model: SlotCon, tmp_path: Path) -> None:
    """Without it a damaged file would end in a traceback."""
    for changes, message in (
        (
            {"module.encoder_k.patch_embed.proj.weight": torch.ones(5, 3, 16, 16)},
            "none of vit_tiny_patch16_224",
        ),
        ({"module.encoder_q.mask_token": torch.ones(1, 5)}, r"mask_token \(1, 5\) instead"),
    ):
        torch.save(content(model, **changes), tmp_path / "w.pth")
        with pytest.raises(UserError, match=message) as error:
            call(main, tmp_path / "w.pth", "--out", tmp_path / "other")
        assert "\n" not in str(error.value)
