"""ONNX files: onnxruntime gives PyTorch's features, scores and segments, for images of any size."""

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import slotstream
from evaluation.segment import assign
from model import ModelConfig, SlotCon
from pipeline.augment import IMAGENET_MEAN, IMAGENET_STD
from pipeline.errors import UserError
from tests.helpers.checkpoints import write_checkpoint
from tests.helpers.exported import CONFIG, call, trained_model
from tests.tools.weights.test_export_timm import trained
from tools.export import main
from tools.weights import onnx_file
from tools.weights.onnx_file import OPSET, TOLERANCE

SIZES = [(1, 64, 64), (3, 96, 160), (2, 128, 32)]


def run_file(path: Path, images: torch.Tensor) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    results: list[np.ndarray] = session.run(None, {"images": images.numpy()})
    return results


def images(count: int, height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(height)
    return torch.randn(count, 3, height, width, generator=generator)


def assert_near(found: np.ndarray, expected: torch.Tensor) -> None:
    scale = max(1.0, float(expected.abs().max()))
    np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=TOLERANCE * scale)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    return write_checkpoint(folder / "checkpoint", trained_model(), CONFIG)


def test_an_encoder(checkpoint: Path, tmp_path: Path) -> None:
    """Without it a file that other programs run gives other features than the run, accepts one
    size of image only, or is not compared with PyTorch."""
    out = tmp_path / "encoder.onnx"
    call(main, checkpoint, "--to", "onnx", "--out", out, "--license", "CC BY 4.0")
    for size in (*SIZES, (1, 75, 50)):  # no whole cells
        pixels = images(*size)
        with torch.no_grad():
            expected = trained_model().teacher.encoder(pixels)
        (found,) = run_file(out, pixels)
        assert_near(found, expected)
    file = onnx.load(out)
    onnx.checker.check_model(file, full_check=True)
    assert [each.version for each in file.opset_import if not each.domain] == [OPSET]
    known = {entry.key: entry.value for entry in file.metadata_props}
    assert json.loads(known["mean"]) == list(IMAGENET_MEAN)
    assert json.loads(known["std"]) == list(IMAGENET_STD)
    assert known["arch"] == "resnet18" and known["data_license"] == "CC BY 4.0"
    with pytest.raises(UserError, match="onnxruntime's output differs"):  # of another network
        onnx_file._check(out.read_bytes(), trained_model().student.encoder, 32)


def test_a_segmenter_that_ends_earlier(tmp_path: Path) -> None:
    """Without it the segments of the file are not those of `slotstream segment`, or runs of two
    stages, as the demo's, or their students cannot be exported."""
    config = ModelConfig("resnet18", stages=2, dim_hidden=8, dim_out=6, num_prototypes=4)
    torch.manual_seed(0)
    model = SlotCon(config).eval()
    torch.nn.init.normal_(model.student.grouping.prototypes)
    run, out = write_checkpoint(tmp_path / "run", model, config), tmp_path / "segmenter.onnx"
    call(main, run, "--to", "onnx-segmenter", "--out", out, "--student")
    for count, height, width in SIZES:
        pixels = images(count, height, width)
        expected, _ = model.segment(pixels, "student")
        scores, ids = run_file(out, pixels)
        assert_near(scores, expected)
        assert ids.dtype == np.int64 and ids.shape == (count, height, width)
        assert (ids == assign(expected, (height, width)).numpy()).mean() > 0.999


def test_a_network_of_timm(tmp_path: Path) -> None:
    """Without it backbones of timm cannot be run by other programs, or `load` takes none."""
    model, config = trained("test_convnext")
    run = write_checkpoint(tmp_path / "run", model, config)
    call(main, run, "--to", "onnx", "--out", tmp_path / "a.onnx")
    for size in SIZES:
        pixels = images(*size)
        with torch.no_grad():
            expected = model.teacher.encoder(pixels)
        assert_near(run_file(tmp_path / "a.onnx", pixels)[0], expected)
    call(main, run, "--to", "timm", "--out", tmp_path / "a.safetensors")
    loaded = slotstream.load(tmp_path / "a.safetensors", device="cpu")
    torch.testing.assert_close(loaded.features(pixels), expected, rtol=0, atol=1e-5)


def test_what_cannot_be_written_is_one_line(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without it the exporter's report of pages is the message, or half a file remains."""
    out = tmp_path / "a.onnx"
    with pytest.raises(UserError, match=r"--to onnx writes a \.onnx file"):
        call(main, checkpoint, "--to", "onnx", "--out", tmp_path / "a.pth")
    call(main, checkpoint, "--to", "torchvision", "--out", tmp_path / "w.pth")
    with pytest.raises(UserError, match="needs a run or a checkpoint"):
        call(main, tmp_path / "w.pth", "--to", "onnx-segmenter", "--out", out)

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("no such operator\na report\nof pages")

    monkeypatch.setattr(torch.onnx, "export", refuse)
    with pytest.raises(UserError, match="network cannot be written: no such operator") as error:
        call(main, checkpoint, "--to", "onnx", "--out", out)
    assert "\n" not in str(error.value) and not out.exists()
