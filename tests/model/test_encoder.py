"""The encoder: dilated, and read at each of its stages."""

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

from model.encoder import Encoder, dilate


def random_norms(module: nn.Module) -> None:
    """Residual blocks that start as the identity would hide their convolutions."""
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.uniform_(norm.bias, -0.5, 0.5)


@pytest.mark.parametrize(("stride", "replaced"), [(16, (0, 0, 1)), (8, (0, 1, 1))])
def test_dilation_is_torchvisions(stride: int, replaced: tuple[int, ...]) -> None:
    """On the same weights. Another dilation of a stage's first block would differ."""
    torch.manual_seed(0)
    encoder = Encoder("resnet50")
    random_norms(encoder)
    theirs = torchvision.models.resnet50(
        replace_stride_with_dilation=[bool(flag) for flag in replaced]
    )
    theirs.load_state_dict(encoder.state_dict(), strict=False)
    theirs.avgpool, theirs.fc = nn.Identity(), nn.Identity()
    images = torch.randn(1, 3, 65, 49)
    with torch.inference_mode():
        found = dilate(encoder, stride).eval()(images)
        expected = theirs.eval()(images)
    cells = tuple(-(-side // stride) for side in (65, 49))
    assert found.shape == (1, 2048, *cells)
    torch.testing.assert_close(found.flatten(1), expected)


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
@pytest.mark.parametrize("stride", [16, 8])
def test_dilation_keeps_what_the_encoder_has_learnt(arch: str, stride: int) -> None:
    """Every second (fourth) cell of the finer map equals the coarse map's cell. This holds also for
    blocks of two 3×3 convolutions, which torchvision refuses to dilate.
    """
    torch.manual_seed(0)
    encoder = Encoder(arch)
    random_norms(encoder)
    images = torch.randn(1, 3, 96, 64)
    with torch.inference_mode():
        coarse = encoder.eval()(images)
        fine = dilate(encoder, stride)(images)
    step = 32 // stride
    assert fine.shape[2:] == (96 // stride, 64 // stride)
    torch.testing.assert_close(fine[:, :, ::step, ::step], coarse, rtol=1e-3, atol=2e-3)


def test_stride_32_changes_nothing() -> None:
    """The encoder stays as it was pre-trained."""
    encoder = Encoder("resnet18")
    before = str(encoder)
    assert str(dilate(encoder, 32)) == before


@pytest.mark.parametrize(("stages", "cells"), [(1, 16), (2, 8), (3, 8)])
def test_dilation_of_an_encoder_that_ends_early(stages: int, cells: int) -> None:
    """Without it, a network trained to stage 2 cannot be read with an output stride."""
    images = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        found = dilate(Encoder("resnet18", stages), 8).eval()(images)
    assert found.shape[2:] == (cells, cells)


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_stages_are_torchvisions_layers(arch: str) -> None:
    """Without it `--stage 2` could be another layer than the one that papers call so."""
    torch.manual_seed(0)
    encoder = Encoder(arch)
    random_norms(encoder)
    theirs = torchvision.models.get_model(arch, weights=None)
    theirs.load_state_dict(encoder.state_dict(), strict=False)
    names = {f"layer{stage}": str(stage) for stage in (1, 2, 3, 4)}
    images = torch.randn(2, 3, 64, 96)
    with torch.inference_mode():
        expected = create_feature_extractor(theirs.eval(), names)(images)
        encoder.eval()
        for stages in ([4], [1, 2, 3, 4], [3, 1], [2]):
            found = encoder.maps(images, stages)
            assert len(found) == len(stages)
            for stage, value in zip(stages, found, strict=True):
                torch.testing.assert_close(value, expected[str(stage)])
                assert value.shape[1] == encoder.stage_dims[stage]
        dilated = dilate(encoder, 8).maps(images, [2, 3, 4])
    assert {tuple(value.shape[2:]) for value in dilated} == {(8, 12)}
    torch.testing.assert_close(dilated[0], expected["2"])
