"""Segmentation on an encoder of timm."""

from pathlib import Path

import pytest
import torch

from model.timm_encoder import TimmEncoder
from pipeline.errors import UserError
from transfer.backbone import build_backbone
from transfer.config import InitConfig, OptimConfig
from transfer.detection.config import DataConfig as DetectionData
from transfer.detection.config import DetectionConfig
from transfer.segmentation.config import ModelConfig
from transfer.segmentation.model import FCN

pytest.importorskip("timm")


def batch(side: int) -> dict[str, torch.Tensor]:
    draws = torch.Generator().manual_seed(0)
    return {
        "pixels": torch.randint(0, 256, (2, side, side, 3), dtype=torch.uint8, generator=draws),
        "labels": torch.randint(0, 3, (2, side, side), dtype=torch.uint8, generator=draws),
    }


@pytest.mark.parametrize(
    ("name", "stride"), [("test_vit", None), ("test_efficientnet", 16), ("test_convnext", None)]
)
def test_a_head_learns_on_it(name: str, stride: int | None) -> None:
    """With crops that are no multiple of the stride, and a second head on stage 3."""
    torch.manual_seed(0)
    encoder, about = build_backbone(InitConfig(arch=f"timm:{name}"))
    config = ModelConfig(output_stride=stride, channels=8, auxiliary_weight=0.4)  # type: ignore[arg-type]
    model = FCN(encoder, 3, config)
    losses = model(batch(65))
    sum(losses.values()).backward()  # type: ignore[union-attr]
    lost = [n for n, w in model.named_parameters() if w.requires_grad and w.grad is None]
    assert set(losses) == {"seg", "auxiliary"} and not lost and about["arch"] == f"timm:{name}"
    assert model.eval().scores(batch(65)["pixels"]).shape == (2, 3, 65, 65)


def test_scores_lie_on_their_pixels() -> None:
    """Zeros around an image of 24 pixels make it 32: its scores are those of the inner pixels of
    the whole. Without it all classes would be drawn too large, and beside their place.
    """
    config = ModelConfig(output_stride=None, align_corners=False)
    model = FCN(TimmEncoder("timm:test_vit"), 3, config)
    logits = torch.arange(4.0).view(1, 1, 2, 2).expand(1, 3, 2, 2)
    whole = torch.nn.functional.interpolate(logits, (32, 32), mode="bilinear")
    torch.testing.assert_close(
        model._upsampled(logits, torch.Size((24, 24))), whole[..., 4:28, 4:28]
    )


def test_frozen_and_refused() -> None:
    """The whole encoder, or its first stages, do not move; what has no meaning is one line."""
    encoder, _ = build_backbone(InitConfig(arch="timm:test_efficientnet", frozen=5))
    assert isinstance(encoder, TimmEncoder)
    encoder.train()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    encoder(torch.randn(2, 3, 64, 64))
    read = encoder.names_up_to(4)
    assert all(torch.equal(value, before[n]) for n, value in encoder.state_dict().items())
    assert not any(w.requires_grad for n, w in encoder.net.named_parameters() if n in read)
    with pytest.raises(ValueError, match="frozen must be 0 or 2 to 5 with a network of timm"):
        InitConfig(arch="timm:test_vit", frozen=1)
    with pytest.raises(UserError, match=r"init.arch timm:nonsense: timm has no such network"):
        build_backbone(InitConfig(arch="timm:nonsense"))
    with pytest.raises(ValueError, match="it cannot be dilated to cells of 8"):
        FCN(TimmEncoder("timm:test_vit"), 3, ModelConfig(output_stride=8))
    with pytest.raises(ValueError, match=r"init.arch must be one of resnet18.* for detection"):
        DetectionConfig(
            name="x",
            init=InitConfig(arch="timm:test_vit"),
            optim=OptimConfig(steps=1, batch_size=1, lr=0.1),
            data=DetectionData(str(Path("x"))),
        )
