"""Encoders of timm: exported, loaded by timm with equal features, and read back."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from evaluation.datasets.images import open_images
from evaluation.datasets.squares import SquareImages
from evaluation.features import Network, of_encoder
from evaluation.reduction import whitened
from evaluation.specs import open_trained
from model import ModelConfig, SlotCon
from model.encoder import build_encoder
from model.timm_encoder import TimmEncoder
from pipeline.augment import IMAGENET_MEAN, IMAGENET_STD
from pipeline.errors import UserError
from tests.helpers.checkpoints import write_checkpoint
from tests.helpers.exported import call, images
from tools.export import main
from tools.weights.whitening import last_layers
from train.encoders import image_stats, read_encoder
from transfer.backbone import build_backbone
from transfer.config import InitConfig

timm = pytest.importorskip("timm")
NAMES = ["test_vit", "test_convnext", "test_efficientnet"]


def trained(name: str, **more: Any) -> tuple[SlotCon, ModelConfig]:
    """A SlotCon whose student and teacher differ, with statistics of some images."""
    torch.manual_seed(0)
    config = ModelConfig(f"timm:{name}", dim_hidden=8, dim_out=6, num_prototypes=4, **more)
    model = SlotCon(config)
    with torch.no_grad():
        model.teacher.encoder(images())
        for weight in model.student.encoder.parameters():
            weight.mul_(1.1)
    return model.eval(), config


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[SlotCon, Path]]:
    folder = tmp_path_factory.mktemp("runs")
    made = {}
    for name in NAMES:
        model, config = trained(name)
        made[name] = model, write_checkpoint(folder / name, model, config)
    return made


def features(network: Any, pixels: Tensor) -> Tensor:
    """The last map that timm's own model computes, of images normalised by its settings."""
    settings = timm.data.resolve_model_data_config(network)
    mean, std = (torch.tensor(settings[key])[:, None, None] for key in ("mean", "std"))
    with torch.inference_mode():
        maps: list[Tensor] = network.eval().forward_intermediates(
            (pixels - mean) / std, norm=True, intermediates_only=True
        )
    return maps[-1]


@pytest.mark.parametrize("name", NAMES)
def test_timm_loads_the_folder_and_the_files(
    name: str, checkpoints: dict[str, tuple[SlotCon, Path]], tmp_path: Path
) -> None:
    """Strictly, with the features that the run's encoder has of the same pixels. Without it the
    files could lack weights, or name a normalisation that the run did not use.
    """
    model, checkpoint = checkpoints[name]
    call(main, checkpoint, "--to", "huggingface", "--out", tmp_path / "hub", "--license", "MIT")
    call(main, checkpoint, "--to", "timm", "--out", tmp_path / "w.safetensors")
    call(main, checkpoint, "--to", "timm", "--out", tmp_path / "w.pth")
    side = timm.create_model(name).pretrained_cfg["input_size"][-1]
    pixels = torch.rand(2, 3, side, side)
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    with torch.inference_mode():
        expected = model.teacher.encoder((pixels - mean) / std)
    hub = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True)
    assert hub.num_classes == 0
    for network in (
        hub,
        timm.create_model(name, num_classes=0, checkpoint_path=str(tmp_path / "w.safetensors")),
        timm.create_model(name, num_classes=0, checkpoint_path=str(tmp_path / "w.pth")),
    ):
        torch.testing.assert_close(features(network, pixels), expected, rtol=1e-4, atol=1e-5)
    card = (tmp_path / "hub" / "README.md").read_text()
    assert f"# SlotCon {name}, x" in card and "license: mit" in card
    assert ("`conv_head`" in card) == (name == "test_efficientnet")


def test_files_are_read_back(checkpoints: dict[str, tuple[SlotCon, Path]], tmp_path: Path) -> None:
    """Bit for bit, from the run, the folder and both kinds of files, of the branch that is asked
    for. Without it transfer would measure another network.
    """
    model, checkpoint = checkpoints["test_vit"]
    expected = {
        side: getattr(model, side).encoder.net.state_dict() for side in ("teacher", "student")
    }
    call(main, checkpoint, "--to", "huggingface", "--out", tmp_path / "hub", "--student")
    call(main, checkpoint, "--to", "timm", "--out", tmp_path / "w.safetensors")
    call(main, tmp_path / "w.safetensors", "--to", "timm", "--out", tmp_path / "again.safetensors")
    call(main, checkpoint, "--to", "timm", "--out", tmp_path / "w.pth")
    found = {
        "run": (read_encoder(checkpoint), "teacher"),
        "hub": (read_encoder(tmp_path / "hub", branch="student"), "student"),
        "file": (read_encoder(tmp_path / "again.safetensors"), "teacher"),
        "pth": (read_encoder(tmp_path / "w.pth", "timm:test_vit"), "teacher"),
    }
    for backbone, side in found.values():
        assert backbone.weights.keys() == expected[side].keys()
        assert all(torch.equal(value, expected[side][n]) for n, value in backbone.weights.items())
        assert image_stats(backbone) == ((0.5,) * 3, (0.5,) * 3)
    assert found["file"][0].metadata["run"] == "x"
    encoder, about = build_backbone(InitConfig(str(tmp_path / "hub"), "timm:test_vit", "student"))
    with torch.inference_mode():
        torch.testing.assert_close(encoder.eval()(images()), model.student.encoder(images()))
    assert about["metadata"]["branch"] == "student"


def test_evaluation_reads_the_run(checkpoints: dict[str, tuple[SlotCon, Path]]) -> None:
    """At each stage, dilated too, and images that are no multiple of a patch. Without it a run of
    timm's encoder could be trained but not judged."""
    model, checkpoint = checkpoints["test_efficientnet"]
    network = open_trained("teacher", checkpoint, torch.device("cpu"))
    assert isinstance(network, Network) and list(network.strides.values()) == [4, 8, 16, 32]
    with torch.inference_mode():
        torch.testing.assert_close(network.read()(images()), model.teacher.encoder(images()))
    assert network.read("2+4")(images()).shape[2:] == (8, 8)
    finer = open_trained("student", checkpoint, torch.device("cpu"), output_stride=16)
    assert isinstance(finer, Network) and finer.read()(images()).shape[2:] == (4, 4)
    vit = open_trained("teacher", checkpoints["test_vit"][1], torch.device("cpu"))
    assert isinstance(vit, Network) and vit.read()(images(70)).shape[2:] == (5, 5)
    fixed = of_encoder("fixed", TimmEncoder("timm:test_maxvit"))
    with pytest.raises(UserError, match="fixed on images of 96×96 pixels: "):
        fixed.read()(images(96))
    with pytest.raises(UserError, match="--output-stride 8: arch timm:test_vit: it cannot be dil"):
        open_trained("teacher", checkpoints["test_vit"][1], torch.device("cpu"), output_stride=8)


@pytest.mark.parametrize("to", ["torchvision", "detectron2", "mmseg", "official"])
def test_formats_of_resnets_are_refused(
    to: str, checkpoints: dict[str, tuple[SlotCon, Path]], tmp_path: Path
) -> None:
    """In one line that names a format that works. Without it their readers would meet names that
    they do not know, and mmengine would leave everything random."""
    suffix = {"torchvision": ".safetensors", "detectron2": ".pkl"}.get(to, ".pth")
    with pytest.raises(
        UserError, match=r"ResNets of torchvision (alone|and for SlotMIM), and .*timm:test_vit"
    ) as no:
        call(main, checkpoints["test_vit"][1], "--to", to, "--out", tmp_path / f"w{suffix}")
    assert "\n" not in str(no.value) and not any(tmp_path.iterdir())


def test_weights_that_do_not_fit(
    checkpoints: dict[str, tuple[SlotCon, Path]], tmp_path: Path
) -> None:
    """Another architecture, a short encoder, a classifier alone, a false record: one line each."""
    vit = checkpoints["test_vit"][1]
    with pytest.raises(UserError, match="weights of a timm:test_vit, not of the timm:test_conv"):
        read_encoder(vit, "timm:test_convnext")
    with pytest.raises(UserError, match="not of the resnet18 that is needed"):
        read_encoder(vit, "resnet18")
    save_file({"fc.weight": torch.ones(2, 2)}, tmp_path / "fc.safetensors")
    with pytest.raises(UserError, match="no weights of this model in it"):
        read_encoder(tmp_path / "fc.safetensors", "timm:test_vit")
    call(main, vit, "--to", "timm", "--out", tmp_path / "w.safetensors")
    with pytest.raises(UserError, match="weights of the teacher, not of the student"):
        read_encoder(tmp_path / "w.safetensors", branch="student")
    state = load_file(tmp_path / "w.safetensors")
    save_file(state, tmp_path / "odd.safetensors", {"arch": "timm:nonsense"})
    with pytest.raises(UserError, match=r"odd.safetensors: arch timm:nonsense: timm has no such"):
        read_encoder(tmp_path / "odd.safetensors")
    model, config = trained("test_convnext", stages=2)
    short = write_checkpoint(tmp_path / "short", model, config)
    with pytest.raises(UserError, match=r"needs four stages, and .* ends at stage 2"):
        call(main, short, "--to", "huggingface", "--out", tmp_path / "hub")
    call(main, short, "--to", "timm", "--out", tmp_path / "short.safetensors")
    with pytest.raises(UserError, match="ends at stage 2; all four are needed"):
        read_encoder(tmp_path / "short.safetensors")
    assert read_encoder(tmp_path / "short.safetensors", partial=True).stages == 2


def noise(folder: Path, count: int) -> Path:
    """A folder of images."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    for number in range(count):
        pixels = generator.integers(256, size=(200, 240, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


def test_whitening_within_the_weights(
    checkpoints: dict[str, tuple[SlotCon, Path]], tmp_path: Path
) -> None:
    """timm's features of the exported file are those of evaluation's `--whiten` on the same images,
    to rounding. Without it a file could hold another whitening, or one of other pixels.
    """
    model, checkpoint = checkpoints["test_efficientnet"]
    out, photos = tmp_path / "w.safetensors", noise(tmp_path / "photos", 8)
    call(main, checkpoint, "--to", "timm", "--out", out, "--whiten", photos)
    squares = SquareImages(open_images(photos), 320, torch.device("cpu"))
    expected = whitened(of_encoder("x", model.teacher.encoder).read(), squares, 0.25)
    network = timm.create_model("test_efficientnet", num_classes=0, checkpoint_path=str(out))
    pixels = torch.rand(2, 3, 320, 320)
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    found, true = features(network, pixels), expected((pixels - mean) / std)
    assert true.std() > 0.1 and not torch.allclose(true, model.teacher.encoder(pixels), atol=0.1)
    torch.testing.assert_close(found, true, rtol=1e-4, atol=1e-4 * float(true.abs().max()))
    told = read_encoder(out).metadata["whitened"]
    assert told == "covariance^-0.25 of 8 images of photos, 320 pixels"


@pytest.mark.parametrize("arch", ["resnet18", "resnet50", "timm:test_resnet"])
def test_a_sum_written_into_the_norms_output(arch: str) -> None:
    """Without it a file holds a whitening before the sum, and says that its map is whitened: a
    ResNet adds and rectifies in place, so its last map is the tensor that the norm gave."""
    encoder = build_encoder(ModelConfig(arch)).eval()
    with torch.inference_mode(), pytest.raises(ValueError, match="cannot hold a whitening"):
        last_layers(encoder, torch.randn(1, 3, 64, 64))


@pytest.mark.parametrize(("name", "message"), [("test_vit", "not the output of a convolution")])
def test_what_cannot_hold_a_whitening(
    name: str, message: str, checkpoints: dict[str, tuple[SlotCon, Path]], tmp_path: Path
) -> None:
    """Without it the weights of another layer are changed, and the features are not those asked."""
    out, photos = tmp_path / "w.safetensors", noise(tmp_path / "photos", 2)
    with pytest.raises(UserError, match=message):
        call(main, checkpoints[name][1], "--to", "timm", "--out", out, "--whiten", photos)
    assert not out.exists()


def test_statistics_that_timm_does_not_expect_are_told(
    checkpoints: dict[str, tuple[SlotCon, Path]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Those of SlotMIM's recipes. Without it timm's settings of the name give other features."""
    imagenet = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    other = write_checkpoint(tmp_path / "other", *trained("test_vit", image_stats=imagenet))
    for run, told in ((checkpoints["test_vit"][1], False), (other, True)):
        call(main, run, "--to", "timm", "--out", tmp_path / f"{told}.safetensors")
        assert ("normalise images with mean [0.485" in capsys.readouterr().out) == told
