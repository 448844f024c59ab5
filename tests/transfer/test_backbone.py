"""The encoder of a task: weights and frozen stages."""

import os
from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.optim import SGD

from model.encoder import Encoder
from pipeline.errors import UserError
from tests.helpers.checkpoints import write_checkpoint
from tests.helpers.exported import CONFIG, trained_model
from transfer.backbone import build_backbone
from transfer.config import InitConfig

STAGES = [["conv1", "bn1"], ["layer1"], ["layer2"], ["layer3"], ["layer4"]]


@pytest.mark.parametrize("frozen", [0, 2, 5])
def test_frozen_stages_do_not_move(frozen: int) -> None:
    """A frozen stage must not change through its norms, weight decay or momentum, and the
    conversion to SyncBatchNorm must skip its norms.
    """
    torch.manual_seed(0)
    encoder, about = build_backbone(InitConfig(arch="resnet18", frozen=frozen))
    assert (about["kind"], about["arch"], about["frozen"]) == ("random", "resnet18", frozen)
    head = nn.Conv2d(512, 1, 1)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    sgd = SGD([*encoder.parameters(), *head.parameters()], 0.1, momentum=0.9, weight_decay=0.1)
    encoder.train()
    for _ in range(2):
        head(encoder(torch.rand(2, 3, 32, 32))).square().mean().backward()
        sgd.step()
        sgd.zero_grad()
    moved = {name for name, value in encoder.state_dict().items() if not value.equal(before[name])}
    stays = tuple(f"{name}." for stage in STAGES[:frozen] for name in stage)
    assert moved == {name for name in before if not name.startswith(stays or "none")}
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(encoder)
    synced = [n for n, m in converted.named_modules() if isinstance(m, nn.SyncBatchNorm)]
    assert not [name for name in synced if f"{name}.".startswith(stays or "none")]


def test_frozen_stages_keep_their_output() -> None:
    """Freezing must not change the encoder's output."""
    torch.manual_seed(0)
    encoder = Encoder("resnet18")
    with torch.no_grad():
        encoder.train()(torch.rand(4, 3, 64, 64))  # statistics of something
    torch.manual_seed(0)
    frozen, _ = build_backbone(InitConfig(arch="resnet18", frozen=5))
    frozen.load_state_dict(encoder.state_dict())
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(frozen.train()(images), encoder.eval()(images), atol=1e-5)


def test_weights_come_from_a_file(tmp_path: Path) -> None:
    """If a backbone silently kept its random weights, all results would be wrong."""
    torch.manual_seed(1)
    weights = Encoder("resnet18").state_dict()
    file = tmp_path / "encoder.safetensors"
    save_file(weights, file)
    encoder, about = build_backbone(InitConfig(weights=str(file), arch="resnet18"))
    assert about["kind"] == "file" and about["weights"] == str(file)
    for name, value in encoder.state_dict().items():
        assert value.equal(weights[name])
    nearby = os.path.relpath(file)
    _, about = build_backbone(InitConfig(weights=nearby, arch="resnet18"))
    assert about["weights"] == str(file)  # else two seeds that were started apart are two backbones
    with pytest.raises(UserError) as refused:
        build_backbone(InitConfig(weights=str(file), arch="resnet34"))
    assert str(file) in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("branch", ["teacher", "student"])
def test_the_configured_branch_is_loaded(
    branch: Literal["teacher", "student"], tmp_path: Path
) -> None:
    """The other branch would cost points. The result must name the branch and carry the metadata of
    the weights, or the table cannot place it.
    """
    model = trained_model()
    checkpoint = write_checkpoint(tmp_path / "checkpoint", model, CONFIG)
    init = InitConfig(weights=str(checkpoint), arch="resnet18", branch=branch)
    encoder, about = build_backbone(init)
    expected = getattr(model, branch).encoder.state_dict()
    for name, value in encoder.state_dict().items():
        assert value.equal(expected[name]), name
    metadata = about["metadata"]
    assert (about["branch"], metadata["branch"], metadata["step"]) == (branch, branch, "1")


def test_supervised_weights_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A supervised row with random weights would make every method look good."""
    published = dict(trained_model().teacher.encoder.state_dict())
    monkeypatch.setattr("transfer.backbone.published_weights", lambda _: published)
    encoder, about = build_backbone(InitConfig(weights="supervised", arch="resnet18"))
    assert (about["kind"], about["weights"]) == ("supervised", "supervised")
    for name, value in encoder.state_dict().items():
        assert value.equal(published[name]), name
