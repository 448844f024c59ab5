"""A run that starts from a checkpoint of SlotMIM's authors."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("timm")

from model import ModelConfig, SlotCon
from model.architectures import IMAGENET
from train.init_config import InitConfig
from train.start import start_from

CONFIG = ModelConfig(
    "timm:test_vit", 8, 6, 4, objective="slotmim", image_stats=IMAGENET, drop_path=0.1
)


def test_all_of_it_is_taken(tmp_path: Path) -> None:
    """Without it the projector, matrices there and convolutions here, would begin anew."""
    torch.manual_seed(0)
    model = SlotCon(CONFIG)
    with torch.no_grad():
        for weight in model.parameters():  # as trained ones, no two of which are equal
            weight.add_(0.1 * torch.randn(weight.shape))
    official = model.official_state_dict()
    weights = {f"module.{name}": value for name, value in official.items()}
    torch.save({"model": weights, "epoch": 400}, tmp_path / "ckpt.pth")
    torch.manual_seed(1)
    new = SlotCon(CONFIG)
    about = start_from(InitConfig(str(tmp_path / "ckpt.pth"), "all"), new)
    assert about["new"] == []
    for name, value in new.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
