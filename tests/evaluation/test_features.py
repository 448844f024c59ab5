"""Feature maps: the right part of the right network, and bad input."""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from evaluation import specs
from evaluation.datasets.images import FileImages, FolderImages
from evaluation.datasets.squares import SquareImages
from evaluation.features import Features, Network, fuse
from evaluation.options import stage
from evaluation.specs import open_all, open_trained, open_untrained, read
from model import ModelConfig, SlotCon
from pipeline.errors import UserError
from tests.helpers.checkpoints import rewrite_record, write_checkpoint
from tests.helpers.coloured import write_scenes
from train.encoders import load
from train.start import digest
from train.weights import read_weights

CPU = torch.device("cpu")
Capture = pytest.CaptureFixture[str]
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


def open_features(
    spec: str,
    checkpoint: Path | None,
    device: torch.device,
    *,
    weights: Path | None = None,
    images: SquareImages | None = None,
) -> Features:
    """What `spec` names, at the last stage; `images` calibrate "untrained"."""
    network = open_trained(spec, checkpoint, device, weights=weights)
    if network is None:
        assert images is not None, "BatchNorm's statistics need images"
        network = open_untrained(spec, checkpoint, images)
    return read(network)


def test_the_start_of_a_run_is_its_baseline(tmp_path: Path, capsys: Capture) -> None:
    """A run that began from weights is compared with these, their statistics kept, and with new
    ones only if the file is gone, which is said. Without it each such run seems to gain what others
    have trained."""
    torch.manual_seed(1)
    start = SlotCon(TINY)
    with torch.no_grad():
        start.teacher.encoder(images())  # statistics
    weights = tmp_path / "w.pth"
    torch.save(start.teacher.encoder.state_dict(), weights)
    checkpoint = write_checkpoint(tmp_path / "run", SlotCon(TINY), TINY)
    record = json.loads((checkpoint / "run.json").read_text())
    config = record["config"] | {"init": {"weights": "w.pth", "part": "encoder"}}
    about = {"weights": str(weights), "kind": "file", "sha256": digest(weights)}
    rewrite_record(checkpoint, config=config, provenance={"init": about})
    squares = SquareImages(FolderImages(write_scenes(tmp_path, 3 * MAPS)[0]), 64, CPU)

    before = open_all(options("teacher", "projector", checkpoint=checkpoint), squares)
    assert [each.name for each in before] == ["teacher", "start", "projector", "projector, start"]
    with torch.inference_mode():
        expected = start.teacher.encoder.eval()(images())
    torch.testing.assert_close(before[1](images()), expected)
    assert f"from {weights}" in capsys.readouterr().err
    unread = replace(squares, images=FileImages([tmp_path / "no.jpg"] * 3, ["no.jpg"] * 3))
    assert torch.equal(
        open_all(options("teacher", checkpoint=checkpoint), unread)[1](images()),
        before[1](images()),
    )  # only a projector is new, and is not asked for
    weights.write_bytes(b"another")
    found = open_all(options("teacher", checkpoint=checkpoint), squares)
    assert [each.name for each in found] == ["teacher", "untrained"]
    assert "which is not there as it was" in capsys.readouterr().err


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
    with pytest.raises(UserError, match=r"it lacks bias, of 2 tensors"):
        load(nn.Linear(3, 3), read_weights(tmp_path / "w.safetensors", ["weight"])[0], tmp_path)
    with pytest.raises(UserError, match=r"weight has shape \[3, 2\], not \[3, 3\]"):
        load(
            nn.Linear(3, 3, bias=False),
            read_weights(tmp_path / "w.safetensors", ["weight"])[0],
            tmp_path,
        )
    save_file({"weight": torch.full((3, 2), torch.nan)}, tmp_path / "nan.safetensors")
    with pytest.raises(UserError, match="weight is not finite"):  # every arg-max of NaN is 0
        load(
            nn.Linear(2, 3, bias=False),
            read_weights(tmp_path / "nan.safetensors", ["weight"])[0],
            tmp_path,
        )


# ---- stages ----


def test_stages_of_a_run(run: tuple[Path, SlotCon]) -> None:
    """Without it another stage, or the student's, could be scored under a stage's name."""
    checkpoint, model = run
    network = open_trained("teacher", checkpoint, CPU)
    assert isinstance(network, Network)
    with torch.inference_mode():
        expected = {"4": model.teacher.encoder(images())}
        layers = model.teacher.encoder
        early = layers.layer1(layers.maxpool(layers.relu(layers.bn1(layers.conv1(images())))))
        expected["2"] = layers.layer2(early)
    for number, value in expected.items():
        features = network.read(number)
        assert features.name == f"teacher, stage {number}" and features.stage == number
        torch.testing.assert_close(features(images()), value)
    assert network.read().name == "teacher" and network.read().stage == "4"


def test_joined_stages_are_scaled_by_cell_and_brought_to_the_finest_grid() -> None:
    """By NumPy, cell by cell: a bilinear map to twice the side takes 3/4 of the nearest cell and
    1/4 of the next one, in each direction. Without scaling, the stage of the largest numbers would
    decide alone.
    """
    generator = torch.Generator().manual_seed(3)
    fine, coarse = (torch.randn(2, d, s, s, generator=generator) for d, s in ((5, 8), (7, 4)))
    found = fuse([coarse * 100, fine]).numpy()
    assert found.shape == (2, 12, 8, 8)
    unit = [
        m.numpy() / np.sqrt((m.numpy() ** 2).sum(axis=1, keepdims=True)) for m in (coarse, fine)
    ]
    weights = np.zeros((8, 4))
    for cell in range(8):
        near = cell // 2
        other = min(max(near + (1 if cell % 2 else -1), 0), 3)
        weights[cell, near] += 0.75
        weights[cell, other] += 0.25
    expected = np.einsum("ip,jq,bdpq->bdij", weights, weights, unit[0])
    np.testing.assert_allclose(found[:, :7], expected, atol=1e-6)
    np.testing.assert_allclose(found[:, 7:], unit[1], atol=1e-6)
    assert fuse([coarse]) is coarse


def test_dilated_stages(run: tuple[Path, SlotCon]) -> None:
    """`--output-stride 8`: the last stage has cells of 8 pixels, among them the old ones."""
    checkpoint, _ = run
    coarse, fine = (
        open_trained("teacher", checkpoint, CPU, output_stride=stride) for stride in (None, 8)
    )
    assert isinstance(coarse, Network) and isinstance(fine, Network)
    found = fine.read("4")(images())
    assert found.shape == (2, 512, 8, 12)
    torch.testing.assert_close(found[:, :, ::4, ::4], coarse.read()(images()), rtol=1e-3, atol=1e-3)
    assert fine.read("2+4")(images()).shape == (2, 640, 8, 12)
    projector = open_trained("projector", checkpoint, CPU, output_stride=16)
    assert isinstance(projector, Features) and projector(images()).shape == (2, 6, 4, 6)


def options(*features: str, **more: object) -> argparse.Namespace:
    usual = {"weights": None, "checkpoint": None, "stage": None, "output_stride": None}
    return argparse.Namespace(features=features, **{**usual, "baseline": "untrained", **more})


def test_an_untrained_network_stands_beside_each(run: tuple[Path, SlotCon], tmp_path: Path) -> None:
    """At the same stages, whatever they are: otherwise a trained network's last stage would be
    compared with nothing, or an untrained one's second stage with it.
    """
    checkpoint, _ = run
    squares = SquareImages(FolderImages(write_scenes(tmp_path, MAPS)[0]), 64, CPU)
    specs = ("teacher", "student", "projector", "pixels")
    found = open_all(options(*specs, checkpoint=checkpoint), squares)
    names = ["teacher", "untrained", "student", "projector", "projector, untrained", "pixels"]
    assert [features.name for features in found] == names
    found = open_all(options("teacher", checkpoint=checkpoint, stage=["2", "3+4"]), squares)
    assert [(features.name, features.stage) for features in found] == [
        ("teacher, stage 2", "2"),
        ("untrained, stage 2", "2"),
        ("teacher, stage 3+4", "3+4"),
        ("untrained, stage 3+4", "3+4"),
    ]
    assert [features(images()).shape[1] for features in found] == [128, 128, 768, 768]
    assert not torch.equal(found[0](images()), found[1](images()))
    of_student = open_all(options("student", checkpoint=checkpoint), squares)[1]
    assert of_student.name == "untrained"
    of_teacher = open_all(options("teacher", checkpoint=checkpoint), squares)[1]
    assert torch.equal(of_student(images()), of_teacher(images()))  # calibrated as well
    left_out = options("teacher", "untrained", checkpoint=checkpoint, baseline="none")
    assert [features.name for features in open_all(left_out, squares)] == ["teacher", "untrained"]


def test_mistakes_are_found_before_the_work(
    run: tuple[Path, SlotCon], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An untrained network reads hundreds of images: a stage or a file that does not exist must not
    wait for it.
    """
    squares = SquareImages(FolderImages(write_scenes(tmp_path, MAPS)[0]), 64, CPU)

    def work(*_: object) -> None:
        pytest.fail("calibrated")

    monkeypatch.setattr(specs, "open_untrained", work)
    with pytest.raises(UserError, match="--stage 5"):
        open_all(options("teacher", checkpoint=run[0], stage=["2", "5"]), squares)
    with pytest.raises(UserError, match="No such file"):
        missing = tmp_path / "no.pth"
        several = options("teacher", "supervised", checkpoint=run[0], weights=missing)
        open_all(several, squares)


def test_untrained_network_of_others_is_drawn_with_a_fixed_seed(tmp_path: Path) -> None:
    """The same architecture with other weights, the same ones whatever was drawn before; its
    BatchNorm has seen the images.
    """
    squares = SquareImages(FolderImages(write_scenes(tmp_path, MAPS)[0]), 64, CPU)
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "w.pth")
    spec, outputs = "supervised:resnet18", []
    for seed in (1, 2):
        torch.manual_seed(seed)
        found = open_all(options(spec, weights=tmp_path / "w.pth"), squares)
        assert [features.name for features in found] == [spec, f"{spec}, untrained"]
        outputs.append([features(images()) for features in found])
    assert torch.equal(outputs[0][1], outputs[1][1])
    assert not torch.allclose(outputs[0][0], outputs[0][1])


@pytest.mark.parametrize(
    ("stage", "side", "message"),
    [
        ("5", 64, "--stage 5: teacher has the stages 1 to 4"),
        ("2+9", 64, "--stage 9: teacher has the stages 1 to 4"),
        ("4", 31, r"images of 31 pixels are smaller than a cell of 32 \(--size\)"),
        ("1+3", 8, r"smaller than a cell of 16"),
    ],
)
def test_impossible_stages(stage: str, side: int, message: str, run: tuple[Path, SlotCon]) -> None:
    """One line each, before anything is scored."""
    network = open_trained("teacher", run[0], CPU)
    assert isinstance(network, Network)
    with pytest.raises(UserError, match=message):
        network.read(stage)(torch.zeros(1, 3, side, side))
    if side >= 16:
        assert network.read("1+3")(torch.zeros(1, 3, 16, 16)).shape == (1, 320, 4, 4)


@pytest.mark.parametrize("text", ["0", "2+2", "x", "", "1+", "-1"])
def test_stages_are_numbers(text: str) -> None:
    """argparse makes one line of a ValueError."""
    with pytest.raises(ValueError):
        stage(text)
    assert stage("03+2") == "3+2"
