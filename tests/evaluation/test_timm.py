"""Networks of timm: the maps that timm itself computes, on the images that it expects."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from evaluation.datasets.images import FolderImages
from evaluation.datasets.squares import SquareImages
from evaluation.features import Network
from evaluation.specs import open_trained, open_untrained
from evaluation.timm_networks import create_timm, timm_network
from model.timm_encoder import padded
from pipeline.augment import IMAGENET_MEAN, IMAGENET_STD
from pipeline.errors import UserError
from tests.helpers.coloured import write_scenes
from train.encoders import load_weights

timm = pytest.importorskip("timm")
CPU = torch.device("cpu")
MEAN, STD = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))


def saved(name: str, path: Path, **more: Any) -> Any:
    """A model of random weights, saved with a classifier, in eval mode."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7, **more).eval()
    torch.save(model.state_dict(), path)
    return model


def opened(name: str, path: Path) -> Network:
    network = open_trained(f"timm:{name}", None, CPU, weights=path)
    assert isinstance(network, Network)
    return network


def pixels(height: int, width: int) -> Tensor:
    """[2, 3, H, W], between 0 and 1."""
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(1))


def test_without_timm_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """timm is an optional dependency."""
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match=r"needs timm \(pip install \.\[timm\]\)"):
        open_trained("timm:resnet18", None, CPU)


@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "test_resnet", "test_efficientnet"])
@pytest.mark.parametrize("side", [160, 150])
def test_last_stage_is_timms_forward_features(name: str, side: int, tmp_path: Path) -> None:
    """With the normalisation of the model's own configuration, and images of whole cells. Without
    it a network would see colours that it does not know, and still give numbers.
    """
    model = saved(name, tmp_path / "w.pth")
    settings = model.pretrained_cfg
    own_mean, own_std = (torch.tensor(settings[key])[:, None, None] for key in ("mean", "std"))
    step = 16 if name == "test_vit" else 32
    whole = -(-side // step) * step
    before = (whole - side) // 2
    images = (pixels(side, side) - own_mean) / own_std
    images = F.pad(images, (before, whole - side - before) * 2)
    with torch.inference_mode():
        expected = model.forward_features(images)
        if name == "test_vit":
            expected = expected[:, 1:].transpose(1, 2).reshape(2, -1, whole // 16, whole // 16)
        found = opened(name, tmp_path / "w.pth").read()((pixels(side, side) - MEAN) / STD)
    if name == "test_efficientnet":  # forward_features ends with the head's convolution
        with torch.inference_mode():
            found = model.bn2(model.conv_head(found))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_registers_and_class_tokens_are_left_out() -> None:
    """Without it a map would begin with tokens that belong to no patch."""
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=0, reg_tokens=4, dynamic_img_size=True).eval()
    images = pixels(64, 96)
    with torch.inference_mode():
        tokens = model.forward_features((images - 0.5) / 0.5)
        maps = timm_network("x", model).read()((images - MEAN) / STD)
    assert model.num_prefix_tokens == 5 and tokens.shape[1] == 5 + 4 * 6
    torch.testing.assert_close(maps[:, :, 3, 5], tokens[:, 5 + 3 * 6 + 5], rtol=1e-4, atol=1e-5)


def test_stages_are_blocks_and_levels(tmp_path: Path) -> None:
    """A ResNet's stages are its layers: timm's first level, the stem, is none. Otherwise stage 2 of
    one library would be stage 3 of another.
    """
    images = (pixels(64, 64) - MEAN) / STD
    resnet = saved("resnet18", tmp_path / "r.pth")
    seen: dict[str, Tensor] = {}
    resnet.layer2.register_forward_hook(lambda _module, _input, output: seen.update(r=output))
    with torch.inference_mode():
        resnet.forward_features(images)
    network = opened("resnet18", tmp_path / "r.pth")
    torch.testing.assert_close(network.read("2")(images), seen["r"])
    assert list(network.strides.values()) == [4, 8, 16, 32]

    vit = saved("test_vit", tmp_path / "v.pth", dynamic_img_size=True)
    vit.blocks[2].register_forward_hook(lambda _module, _input, output: seen.update(v=output))
    with torch.inference_mode():
        vit.forward_features((pixels(64, 64) - 0.5) / 0.5)
        expected = vit.norm(seen["v"])[:, 1:].transpose(1, 2).reshape(2, -1, 4, 4)
    network = opened("test_vit", tmp_path / "v.pth")
    torch.testing.assert_close(network.read("3")(images), expected, rtol=1e-4, atol=1e-5)
    joined = network.read("6+3")(images)
    torch.testing.assert_close(joined[:, 64:], F.normalize(expected, dim=1), rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="--stage 7: timm:test_vit has the stages 1 to 6"):
        network.read("7")


def test_padding_is_centred() -> None:
    """As DINOv2's CenterPadding: of an odd number of columns one more on the right."""
    images = torch.ones(1, 3, 28, 25)
    result = padded(images, 14)
    assert result.shape == (1, 3, 28, 28)
    assert result[0, 0, 0].tolist() == [0] + [1] * 25 + [0, 0]
    assert padded(images[..., :14], 14).shape == (1, 3, 28, 14)


def test_positions_are_interpolated(tmp_path: Path) -> None:
    """In weights of another image size, as timm itself does. They are not those of a new model."""
    stored = saved("test_vit", tmp_path / "w.pth", img_size=96).pos_embed.detach()
    path = tmp_path / "w.pth"
    model = create_timm("test_vit", weights=path, pretrained=False, output_stride=None)
    expected = timm.layers.resample_abs_pos_embed(stored, new_size=[10, 10], num_prefix_tokens=1)
    assert stored.shape != model.pos_embed.shape
    torch.testing.assert_close(model.pos_embed.detach(), expected)


def test_dilated(tmp_path: Path) -> None:
    """A convolutional network of timm can be dilated; a ViT says that it cannot."""
    saved("test_efficientnet", tmp_path / "w.pth")
    network = open_trained(
        "timm:test_efficientnet", None, CPU, weights=tmp_path / "w.pth", output_stride=8
    )
    assert isinstance(network, Network)
    assert network.read()(torch.zeros(1, 3, 64, 64)).shape[2:] == (8, 8)
    with pytest.raises(UserError, match="timm:test_vit: it cannot be dilated to cells of 8"):
        open_trained("timm:test_vit", None, CPU, weights=tmp_path / "w.pth", output_stride=8)


def test_untrained_twin(tmp_path: Path) -> None:
    """The same architecture and normalisation, weights drawn with a fixed seed, BatchNorm that has
    seen the images. Without it there is nothing to compare a published network's stage with.
    """
    squares = SquareImages(FolderImages(write_scenes(tmp_path, [[[0, 1]], [[2, 0]]])[0]), 64, CPU)
    images = (pixels(64, 64) - MEAN) / STD
    for name in ("test_vit", "test_efficientnet"):
        twins = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            twin = open_untrained(f"timm:{name}", None, squares)
            assert isinstance(twin, Network) and twin.name == f"timm:{name}, untrained"
            twins.append(twin.read()(images))
        assert torch.equal(*twins)
        saved(name, tmp_path / "w.pth")
        assert not torch.allclose(opened(name, tmp_path / "w.pth").read()(images), twins[0])


def test_files_of_dinov2s_release(tmp_path: Path) -> None:
    """They have a mask token, and registers under another name, whose class token has no position.
    Without timm's conversion a user would have to convert them.
    """
    torch.manual_seed(0)
    options = {"img_size": 64, "dynamic_img_size": True, "num_classes": 0, "reg_tokens": 4}
    model = timm.create_model("test_vit", no_embed_class=True, **options).eval()
    state = model.state_dict()
    place = torch.randn(1, 1, 64)
    release = {name: value for name, value in state.items() if name != "reg_token"} | {
        "mask_token": torch.zeros(1, 64),
        "register_tokens": state["reg_token"],
        "cls_token": state["cls_token"] - place,
        "pos_embed": torch.cat([place, state["pos_embed"]], dim=1),
    }
    torch.save(release, tmp_path / "release.pth")
    other = timm.create_model("test_vit", no_embed_class=True, **options).eval()
    load_weights(other, tmp_path / "release.pth")
    images = torch.rand(1, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(other(images), model(images))


def refuse(*_: object, **__: object) -> None:
    raise TypeError("no such block")


def test_weights_that_do_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unknown names, and weights of another model, are one line. timm itself would resize patches
    of another size, which makes another model without a word.
    """
    with monkeypatch.context() as patch, pytest.raises(UserError, match="vit: no such block"):
        patch.setattr(timm, "create_model", refuse)
        opened("test_vit", tmp_path / "w.pth")
    with pytest.raises(UserError, match="timm has no such network; near it"):
        open_trained("timm:nonsense", None, CPU, weights=tmp_path / "w.pth")
    saved("test_vit", tmp_path / "w.pth", patch_size=8)
    with pytest.raises(UserError, match=r"another model \(patch_embed.proj.weight has shape \["):
        opened("test_vit", tmp_path / "w.pth")
    saved("test_vit2", tmp_path / "w.pth")
    with pytest.raises(UserError, match="of another model") as caught:
        opened("test_vit", tmp_path / "w.pth")
    assert "\n" not in str(caught.value)
    saved("test_efficientnet", tmp_path / "w.pth")
    with pytest.raises(UserError, match="no weights of this model in it"):
        opened("test_vit", tmp_path / "w.pth")


def test_images_that_a_model_cannot_take(tmp_path: Path) -> None:
    """Smaller than a patch, or of a size that the architecture does not know: one line."""
    saved("test_vit", tmp_path / "w.pth")
    with pytest.raises(UserError, match="images of 15 pixels are smaller than a cell of 16"):
        opened("test_vit", tmp_path / "w.pth").read()(torch.zeros(1, 3, 15, 15))
