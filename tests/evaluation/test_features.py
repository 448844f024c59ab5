"""Feature maps: the right part of the right network, and bad input."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from evaluation.datasets.images import FolderImages
from evaluation.datasets.squares import SquareImages
from evaluation.features import load, open_features
from model import ModelConfig, SlotCon
from pipeline.augment import IMAGENET_MEAN, IMAGENET_STD
from pipeline.errors import UserError
from tests.helpers.checkpoints import write_checkpoint
from tests.helpers.coloured import write_scenes
from train.weights import read_weights

CPU = torch.device("cpu")
TINY = ModelConfig(arch="resnet18", dim_hidden=8, dim_out=6, num_prototypes=4)
MAPS = [np.array([[0, 0], [1, 1]])]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SlotCon]:
    """A checkpoint whose student and teacher differ."""
    torch.manual_seed(0)
    model = SlotCon(TINY)
    nn.init.normal_(model.student.encoder.conv1.weight)
    return write_checkpoint(
        tmp_path_factory.mktemp("run") / "checkpoint", model, TINY
    ), model.eval()


def images() -> torch.Tensor:
    return torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))


def test_networks_of_a_run(run: tuple[Path, SlotCon]) -> None:
    """Without it the student's map could be scored under the teacher's name."""
    checkpoint, model = run
    with torch.inference_mode():
        expected = {
            "teacher": model.teacher.encoder(images()),
            "student": model.student.encoder(images()),
            "projector": model.segment(images())[1],
        }
    assert not torch.equal(expected["teacher"], expected["student"])
    for spec, value in expected.items():
        features = open_features(spec, checkpoint, CPU)
        assert features.name == spec
        assert torch.equal(features(images()), value)
    assert expected["projector"].shape == (2, 6, 2, 3)


def test_untrained_is_another_network(run: tuple[Path, SlotCon], tmp_path: Path) -> None:
    """Without it the baseline could be the trained network, and no gain would show."""
    checkpoint, model = run
    folder, _ = write_scenes(tmp_path, MAPS)
    squares = SquareImages(FolderImages(folder), 64, CPU)
    untrained = open_features("untrained", checkpoint, CPU, images=squares)
    result = untrained(images())
    assert result.shape == (2, 512, 2, 3)
    with torch.inference_mode():
        assert not torch.allclose(result, model.teacher.encoder(images()))


def test_pixels_are_mean_colours() -> None:
    """One block, computed by hand."""
    features = open_features("pixels", None, CPU)(images())
    assert features.shape == (2, 3, 8, 12)
    torch.testing.assert_close(features[1, :, 3, 4], images()[1, :, 24:32, 32:40].mean((1, 2)))


def test_supervised_takes_torchvisions_weights(tmp_path: Path) -> None:
    """From a file with torchvision's names; the classifier is ignored."""
    network = torchvision.models.resnet18().eval()
    torch.save({"state_dict": network.state_dict()}, tmp_path / "resnet18.pth")
    features = open_features("supervised:resnet18", None, CPU, weights=tmp_path / "resnet18.pth")
    stages = nn.Sequential(*list(network.children())[:-2])
    with torch.inference_mode():
        assert torch.equal(features(images()), stages(images()))
    with pytest.raises(UserError) as caught:
        open_features("supervised:resnet34", None, CPU, weights=tmp_path / "resnet18.pth")
    assert "weights of a resnet18, not of the resnet34" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_network_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute nodes have no internet. The message names the file to provide."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError("no route")

    monkeypatch.setattr("torch.hub.load_state_dict_from_url", refuse)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", refuse)
    with pytest.raises(UserError, match=r"resnet18.*downloaded \(no route\).*give its file"):
        open_features("supervised:resnet18", None, CPU)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("teacher", "--features teacher needs --checkpoint"),
        ("nonsense", "must be one of teacher, student"),
        ("timm:", "must be one of teacher, student"),
        ("supervised:vit_b_16", "not a ResNet of torchvision's"),
        ("supervised:nonsense", "not a ResNet of torchvision's"),
    ],
)
def test_bad_specs(spec: str, message: str) -> None:
    """Each gives an error of one line."""
    with pytest.raises(UserError, match=message):
        open_features(spec, None, CPU)


def test_bad_weights(tmp_path: Path) -> None:
    """Files with other content, or with weights that do not fit."""
    with pytest.raises(UserError, match="--weights is for supervised"):
        open_features("pixels", None, CPU, weights=tmp_path)
    with pytest.raises(UserError, match="No such file"):
        read_weights(tmp_path / "nowhere.pth", ["weight"])
    (tmp_path / "text.pth").write_text("text")
    (tmp_path / "text.safetensors").write_text("text")
    for name in ("text.pth", "text.safetensors"):
        with pytest.raises(UserError, match="not a file of weights"):
            read_weights(tmp_path / name, ["weight"])
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(UserError, match="no weights in it"):
        read_weights(tmp_path / "list.pth", ["weight"])
    save_file({"weight": torch.ones(3, 2)}, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match="bias is missing or unknown"):
        load(nn.Linear(3, 3), read_weights(tmp_path / "w.safetensors", ["weight"]), tmp_path)
    with pytest.raises(UserError, match=r"weight has shape \[3, 2\], not \[3, 3\]"):
        load(
            nn.Linear(3, 3, bias=False),
            read_weights(tmp_path / "w.safetensors", ["weight"]),
            tmp_path,
        )
    save_file({"weight": torch.full((3, 2), torch.nan)}, tmp_path / "nan.safetensors")
    with pytest.raises(UserError, match="weight is not finite"):  # every arg-max of NaN is 0
        load(
            nn.Linear(2, 3, bias=False),
            read_weights(tmp_path / "nan.safetensors", ["weight"]),
            tmp_path,
        )


def test_without_timm_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """timm is an optional dependency."""
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match=r"needs timm \(pip install \.\[timm\]\)"):
        open_features("timm:resnet18", None, CPU)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "test_resnet"])
def test_timm_models(name: str, tmp_path: Path) -> None:
    """Patch tokens lie where their patches are, and the model's own normalisation is used."""
    timm = pytest.importorskip("timm")
    model = timm.create_model(name, num_classes=7).eval()
    torch.save(model.state_dict(), tmp_path / "w.pth")
    features = open_features(f"timm:{name}", None, CPU, weights=tmp_path / "w.pth")
    result = features(images())
    assert result.shape[:2] == (2, model.num_features)
    if name.startswith("vit"):
        square = torch.rand(1, 3, 224, 224)
        mean, std = (torch.tensor(v)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
        with torch.inference_mode():
            tokens = model.forward_features((square - 0.5) / 0.5)[0, 1:]
        torch.testing.assert_close(
            features((square - mean) / std)[0, :, 3, 5], tokens[3 * 14 + 5], rtol=1e-3, atol=1e-4
        )
        assert result.shape[2:] == (4, 6)
    with pytest.raises(UserError, match="Unknown model"):
        open_features("timm:nonsense", None, CPU, weights=tmp_path / "w.pth")
