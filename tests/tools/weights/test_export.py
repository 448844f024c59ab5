"""Exported files give the same features in the libraries that read them."""

import json
import os
import pickle
import re
from pathlib import Path

import pytest
import torch
import torchvision
import yaml
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from model import ModelConfig, SlotCon
from pipeline.errors import UserError
from tests.helpers.checkpoints import write_checkpoint
from tests.helpers.exported import CONFIG, call, images, meta_state, trained_model
from tools.export import main
from tools.weights.model_card import model_card
from train.weights import Backbone, read_backbone

LICENCE = "CC BY 4.0 |\nmine"
MMSEG_RESNETS = {
    "resnet18": ((2, 2, 2, 2), 2),
    "resnet34": ((3, 4, 6, 3), 2),
    "resnet50": ((3, 4, 6, 3), 3),
}
"""(blocks of each stage, convolutions of a block)"""
FILES = {
    "torchvision": "tv.safetensors",
    "timm": "timm.pth",
    "detectron2": "d2.pkl",
    "mmseg": "mm.pth",
    "huggingface": "hub",
    "official": "full.pth",
}


@pytest.fixture(scope="module")
def model() -> SlotCon:
    return trained_model()


@pytest.fixture(scope="module")
def checkpoint(model: SlotCon, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("run") / "checkpoint", model, CONFIG)


@pytest.fixture(scope="module")
def out(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an export in each format."""
    folder = tmp_path_factory.mktemp("out")
    for to, name in FILES.items():
        call(main, checkpoint, "--to", to, "--out", folder / name, "--license", LICENCE)
    return folder


def last_map(model: SlotCon, branch: str = "teacher") -> Tensor:
    with torch.inference_mode():
        return getattr(model, branch).encoder(images())


def torchvision_map(state: dict[str, Tensor]) -> Tensor:
    """The last map of torchvision's ResNet-18, loaded strictly after its classifier is removed."""
    resnet = torchvision.models.resnet18()
    resnet.fc = torch.nn.Identity()
    resnet.load_state_dict(state)
    with torch.inference_mode():
        x = resnet.maxpool(resnet.relu(resnet.bn1(resnet.eval().conv1(images()))))
        return resnet.layer4(resnet.layer3(resnet.layer2(resnet.layer1(x))))


def test_torchvision(model: SlotCon, out: Path, checkpoint: Path, tmp_path: Path) -> None:
    """Both file types load strictly; only the classifier is missing."""
    state = load_file(out / FILES["torchvision"])
    torch.testing.assert_close(torchvision_map(state), last_map(model), rtol=0, atol=1e-5)
    loaded = torchvision.models.resnet18().load_state_dict(state, strict=False)
    assert loaded.missing_keys == ["fc.weight", "fc.bias"]
    assert not loaded.unexpected_keys
    call(main, checkpoint, "--to", "torchvision", "--out", tmp_path / "s.pth", "--student")
    student = torchvision_map(torch.load(tmp_path / "s.pth", weights_only=True))
    torch.testing.assert_close(student, last_map(model, "student"), rtol=0, atol=1e-5)
    assert not torch.allclose(student, last_map(model), atol=0.1)


def test_timm(model: SlotCon, out: Path) -> None:
    """timm itself loads both file types."""
    timm = pytest.importorskip("timm")
    for name in (FILES["timm"], FILES["torchvision"]):
        network = timm.create_model("resnet18", num_classes=0, checkpoint_path=str(out / name))
        with torch.inference_mode():
            found = network.eval().forward_features(images())
        torch.testing.assert_close(found, last_map(model), rtol=0, atol=1e-5)


def test_huggingface(model: SlotCon, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """timm needs only the folder, no network connection, and reads its input settings from it."""
    timm = pytest.importorskip("timm")

    def refuse(*_: object, **__: object) -> None:
        raise OSError("no network here")

    monkeypatch.setattr("socket.socket.connect", refuse)
    folder = out / FILES["huggingface"]
    network = timm.create_model(f"local-dir:{folder}", pretrained=True)
    with torch.inference_mode():
        found = network.eval().forward_features(images())
    torch.testing.assert_close(found, last_map(model), rtol=0, atol=1e-5)
    settings = timm.data.resolve_model_data_config(network)
    assert tuple(settings["input_size"]) == (3, 224, 224)
    assert tuple(settings["mean"]) == (0.485, 0.456, 0.406)
    assert tuple(settings["std"]) == (0.229, 0.224, 0.225)
    assert settings["interpolation"] == "bicubic"
    assert network.num_classes == 0
    assert json.loads((folder / "config.json").read_text())["num_features"] == 512


def test_model_card(out: Path) -> None:
    """The card states the content, how to load it, and the licence of the images."""
    card = (out / FILES["huggingface"] / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: timm\n")
    assert "The teacher encoder of a SlotCon model: a resnet18" in card
    for fact in ("- slotcon\n", "by slotstream", "timm.create_model", "| Optimiser steps | 1 |"):
        assert fact in card
    assert "trained on: CC BY 4.0 &#124; mine.\n" in card


def test_model_card_of_any_weights() -> None:
    """The card is published: it must not claim weights of others for SlotCon or slotstream. Names
    must not break the rows of its table.
    """
    card = model_card(Backbone("resnet18", {}, {"data": "a|b\nc"}))
    assert "# resnet18, weights\n\nA resnet18 without classifier." in card
    assert "slotcon" not in card.lower()
    assert "slotstream" not in card
    assert "| Data | a&#124;b&#92;nc |\n" in card
    facts = {"method": "SlotCon (arXiv 2205.15288)", "imported": "ckpt_epoch_800.pth"}
    card = model_card(Backbone("resnet18", {}, facts))
    assert "The encoder of a SlotCon model: a resnet18" in card
    assert "slotstream" not in card
    assert "| Imported from | ckpt_epoch_800.pth |\n" in card


@pytest.mark.parametrize(
    ("text", "head"),
    [
        ("CC BY 4.0", {"license": "cc-by-4.0"}),
        ("cc-by-nc-4.0", {"license": "cc-by-nc-4.0"}),
        ("MIT", {"license": "mit"}),
        ("Terms of X: 'y'\n# no", {"license": "other", "license_name": "terms-of-x-y-no"}),
        ("自由", {"license": "other"}),
        ("1.0", {"license": "other", "license_name": "1.0"}),
        ("", {}),
    ],
)  # fmt: skip
def test_the_licence_stands_in_the_cards_head(text: str, head: dict[str, str]) -> None:
    """Without it the hub shows and filters the weights as without a licence. It refuses a
    `license` that it does not know, unless it is "other" with a name.
    """
    card = model_card(Backbone("resnet18", {}, {"data_license": text}))
    found = yaml.safe_load(card.split("---\n")[1])
    assert {k: v for k, v in found.items() if k.startswith("license")} == head
    assert found["tags"] == ["image-feature-extraction", "timm"]


def test_metadata_do_nothing_on_the_page() -> None:
    """Without it a file of weights puts scripts, links and headings of its choice on the page that
    is published from it.
    """
    hostile = (
        "<script>x</script>\n---\n# Title [click](https://e.org) ![p](q) **b** `c` _d_ &lt;\u202e"
    )
    names = ("method", "run", "branch", "data", "data_license", "imported")
    for method in (hostile, f"SlotCon {hostile}"):
        facts = dict.fromkeys(names, hostile) | {"method": method}
        card = model_card(Backbone("resnet18", {}, facts))
        plain = model_card(Backbone("resnet18", {}, dict.fromkeys(names, "x") | {
            "method": method.partition("<")[0] + "x"
        }))  # fmt: skip
        assert card.count("\n") == plain.count("\n")
        heads = [
            re.sub(r'(license_name:) "[a-z0-9.-]+"\n', r"\1\n", one).split("# ")[0]
            for one in (card, plain)
        ]
        assert heads[0] == heads[1]  # the YAML head
        for part in ("<script", "[click]", "![", "**b", "`c`", " _d_", "&lt;", "\u202e"):
            assert part not in card


def test_the_card_holds_no_path(out: Path) -> None:
    """The card is published, and must not reveal folders of this machine."""
    card = (out / FILES["huggingface"] / "README.md").read_text()
    assert "/" not in card.split("| Data |")[1].split("\n")[0]  # a name, not a path


def test_detectron2(model: SlotCon, out: Path) -> None:
    """Read by plain pickle, the way DetectionCheckpointer reads it, with the keys that it needs."""
    content = pickle.loads((out / FILES["detectron2"]).read_bytes(), encoding="latin1")
    assert content["__author__"] == "slotstream"
    assert content["matching_heuristics"] is True
    weight = content["model"]["res2.1.conv2.norm.running_var"]
    expected = model.teacher.encoder.state_dict()["layer1.1.bn2.running_var"]
    torch.testing.assert_close(torch.from_numpy(weight), expected, rtol=0, atol=0)
    assert content["meta"]["data_license"] == LICENCE


def mmseg_resnet(arch: str) -> set[str]:
    """Names of mmsegmentation's ResNet(depth=18, 34, 50), from its classes; ResNetV1c's stem
    differs.
    """
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    names = {"conv1.weight", *(f"bn1.{part}" for part in norm)}
    blocks, convolutions = MMSEG_RESNETS[arch]
    for stage, count in enumerate(blocks, 1):
        for block in range(count):
            for number in range(1, convolutions + 1):
                names.add(f"layer{stage}.{block}.conv{number}.weight")
                names |= {f"layer{stage}.{block}.bn{number}.{part}" for part in norm}
        if stage > 1 or convolutions == 3:
            names.add(f"layer{stage}.0.downsample.0.weight")
            names |= {f"layer{stage}.0.downsample.1.{part}" for part in norm}
    return names


@pytest.mark.parametrize("arch", MMSEG_RESNETS)
def test_mmseg_names(arch: str) -> None:
    """mmengine loads with strict=False: a wrong name would only be a line in its log."""
    assert set(meta_state(arch)) == mmseg_resnet(arch)


def test_mmseg(model: SlotCon, out: Path) -> None:
    """Our names of the encoder are those of mmsegmentation."""
    content = torch.load(out / FILES["mmseg"])  # as mmengine does, by torch's default
    assert set(content["state_dict"]) == mmseg_resnet("resnet18")
    assert content["meta"]["method"].startswith("SlotCon")
    torch.testing.assert_close(
        torchvision_map(content["state_dict"]), last_map(model), rtol=0, atol=1e-5
    )


def test_official(model: SlotCon, out: Path) -> None:
    """The whole model is read back, and the authors' two scripts find the keys that they need."""
    content = torch.load(out / FILES["official"], weights_only=True)
    assert all(name.startswith("module.") for name in content["model"])
    assert "module.encoder_k.layer4.1.bn2.running_var" in content["model"]
    other = SlotCon(CONFIG)
    other.load_official_state_dict(content["model"])
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name
    assert content["args"]["num_prototypes"] == 4


@pytest.mark.parametrize("to", FILES)
def test_files_come_back_bit_for_bit(to: str, model: SlotCon, checkpoint: Path, out: Path) -> None:
    """From each format, transfer reads the trained weights and all their metadata."""
    found = read_backbone(out / FILES[to], "resnet18")
    expected = model.teacher.encoder.state_dict()
    assert list(found.weights) == list(expected)
    for name, value in expected.items():
        lost = to == "detectron2" and name.endswith("num_batches_tracked")
        assert lost or torch.equal(found.weights[name], value), name
    if to != "timm":  # a plain state dict has no room for metadata
        known = {"data_license": LICENCE, **read_backbone(checkpoint).metadata}
        assert {k: v for k, v in found.metadata.items() if k != "format"} == known


def test_an_export_can_be_exported_again(out: Path, tmp_path: Path) -> None:
    """An imported backbone can be written for any other library, with its metadata."""
    again = tmp_path / "again.safetensors"
    call(main, out / FILES["detectron2"], "--to", "torchvision", "--out", again)
    with safe_open(again, "pt") as file:
        assert file.metadata()["data_license"] == LICENCE
    found, expected = (load_file(f) for f in (again, out / FILES["torchvision"]))
    assert all(
        torch.equal(found[name], expected[name]) for name in expected if "num_batches" not in name
    )


def test_weights_of_others_keep_what_is_known(
    model: SlotCon, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without it nobody knows later which of a file's networks was exported, and under which
    licence; the command says it too, since a plain .pth has no room for it.
    """
    sides = {"momentum_backbone.": model.teacher, "backbone.": model.student}
    state = {p + k: v for p, side in sides.items() for k, v in side.encoder.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "w.ckpt")
    for to in ("detectron2", "mmseg", "torchvision", "huggingface"):
        out = tmp_path / FILES[to]
        call(main, tmp_path / "w.ckpt", "--to", to, "--out", out, "--license", LICENCE)
        said = capsys.readouterr().out
        assert "w.ckpt: took the weights below 'state_dict.momentum_backbone.', the teacher" in said
        known = {"branch": "teacher", "prefix": "state_dict.momentum_backbone."}
        known |= {"arch": "resnet18", "data_license": LICENCE}
        assert known.items() <= read_backbone(out).metadata.items()
        call(main, out, "--to", "timm", "--out", tmp_path / "again.safetensors")
        assert "took" not in capsys.readouterr().out  # the prefix is not one of this file
        assert known.items() <= read_backbone(tmp_path / "again.safetensors").metadata.items()
    card = (tmp_path / FILES["huggingface"] / "README.md").read_text()
    assert "| Prefix of the weights there | state_dict.momentum_backbone. |" in card


def test_an_encoder_that_ends_early_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without it a library fills the missing stages with random weights, and says nothing."""
    config = ModelConfig("resnet18", 8, 8, 4, stages=2)
    model = SlotCon(config)
    checkpoint = write_checkpoint(tmp_path / "checkpoint", model, config)
    for to, name in [*FILES.items(), ("torchvision", "tv.pth")][1:]:
        others = "" if to == "official" else ".* --to onnx, --to onnx-segmenter, and --to torchvis"
        words = f"{to}: needs four stages, and .*checkpoint ends at stage 2{others}"
        with pytest.raises(UserError, match=words):
            call(main, checkpoint, "--to", to, "--out", tmp_path / name)
        assert not (tmp_path / name).exists()
    out = tmp_path / "tv.safetensors"
    call(main, checkpoint, "--to", "torchvision", "--out", out)
    assert "only the stages 1 to 2 of a resnet18" in capsys.readouterr().out
    with safe_open(out, "pt") as file:
        assert file.metadata()["stages"] == "2"
    weights = load_file(out)
    missing, unexpected = torchvision.models.resnet18().load_state_dict(weights, strict=False)
    assert not unexpected
    assert {name.partition(".")[0] for name in missing} == {"layer3", "layer4", "fc"}
    assert torch.equal(weights["conv1.weight"], model.teacher.encoder.conv1.weight)


def test_bad_input(
    checkpoint: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each error is one line, and leaves no half-written file."""

    def refused(message: str, *argv: object) -> None:
        before = sorted(tmp_path.iterdir())
        with pytest.raises(UserError, match=message) as caught:
            call(main, *argv)
        assert "\n" not in str(caught.value)
        assert sorted(tmp_path.iterdir()) == before

    file, backbone = tmp_path / "w.pth", out / FILES["timm"]
    refused("No such file", tmp_path / "nowhere", "--to", "mmseg", "--out", file)
    refused("writes a .pth file", checkpoint, "--to", "mmseg", "--out", tmp_path / "w.pkl")
    refused("writes a .pkl file", checkpoint, "--to", "detectron2", "--out", file)
    refused("--student", checkpoint, "--to", "official", "--out", file, "--student")
    refused("official needs a run", backbone, "--to", "official", "--out", file)
    (tmp_path / "folder.pth").mkdir()
    refused("is a folder", checkpoint, "--to", "timm", "--out", tmp_path / "folder.pth")
    refused("is there already", checkpoint, "--to", "huggingface", "--out", out)
    (tmp_path / "empty").mkdir()
    with monkeypatch.context() as patch:
        patch.chdir(tmp_path / "empty")
        refused("is there already", checkpoint, "--to", "huggingface", "--out", ".")
    refused("is the file to read", backbone, "--to", "mmseg", "--out", backbone)
    refused("is there already", checkpoint, "--to", "huggingface", "--out", backbone)
    refused("Not a directory", checkpoint, "--to", "huggingface", "--out", backbone / "hub")
    (tmp_path / "broken.pth").write_bytes(backbone.read_bytes()[:100_000])
    refused("damaged", tmp_path / "broken.pth", "--to", "huggingface", "--out", tmp_path / "hub")
    with pytest.raises(SystemExit):
        call(main, checkpoint, "--to", "tensorflow", "--out", file)


def test_files_of_the_source_stay(model: SlotCon, out: Path, tmp_path: Path) -> None:
    """An export over a run's own weights would damage the run; a new file in its folder is fine."""
    checkpoint = write_checkpoint(tmp_path / "checkpoint", model, CONFIG)
    (tmp_path / "latest").symlink_to(checkpoint)
    for source in (checkpoint, tmp_path / "latest", tmp_path):
        with pytest.raises(UserError, match="is a file of"):
            call(main, source, "--to", "timm", "--out", checkpoint / "model.safetensors")
    call(main, checkpoint, "--to", "timm", "--out", checkpoint / "new.safetensors")


@pytest.mark.parametrize("to", FILES)
def test_texts_that_are_not_utf8(to: str, checkpoint: Path, tmp_path: Path) -> None:
    """Linux allows any bytes in a name or an argument; the formats do not."""
    out = tmp_path / FILES[to]
    call(main, checkpoint, "--to", to, "--out", out, "--license", os.fsdecode(b"mine\xff"))
    found = read_backbone(out).metadata
    assert found.get("data_license", "mine").startswith("mine")
    if to == "huggingface":
        assert "trained on: mine\\udcff.\n" in (out / "README.md").read_text()


def test_unwritable_folder(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error comes before the work."""
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(UserError, match=r"not writable"):
        call(main, checkpoint, "--to", "mmseg", "--out", tmp_path / "w.pth")
