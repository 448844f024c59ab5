"""Checkpoints of the authors' code become runs or files of a backbone."""

import argparse
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from evaluation.slots import main as slots
from model import ModelConfig, SlotCon
from pipeline.errors import UserError
from pipeline.views import ViewConfig
from tests.helpers.betons import varied, write_beton
from tests.helpers.checkpoints import rewrite_record, write_checkpoint
from tests.helpers.exported import CONFIG, call, trained_model
from tests.helpers.training import small_run, trainer
from tools.export import main as export
from tools.import_official import main
from tools.report.__main__ import main as report
from tools.weights.model_card import model_card
from tools.weights.official import Official, configured, loaded
from tools.weights.official_settings import official_settings, with_official_settings
from train.config import DataConfig, RunConfig, TrainConfig
from train.pretrained import load_model, read_record
from train.run.checkpoint import find
from train.weights import describe, read_backbone

pytestmark = pytest.mark.usefixtures("no_flush")
IMAGES, STEPS, EPOCHS = 118_287, 184_800, 800


@pytest.fixture(scope="module")
def model() -> SlotCon:
    return trained_model()


def full_checkpoint(trained: SlotCon, **changes: Any) -> dict[str, Any]:
    """The content that save_checkpoint in main_pretrain.py writes."""
    args = argparse.Namespace(
        dataset="COCO", data_dir="./datasets/coco/", image_size=224, min_scale=0.08,
        arch="resnet18", dim_hidden=8, dim_out=6, num_prototypes=4, teacher_momentum=0.99,
        teacher_temp=0.05, student_temp=0.1, center_momentum=0.9, group_loss_weight=0.5,
        batch_size=64, world_size=8, base_lr=1.0, optimizer="lars", warmup_epoch=5,
        warmup_multiplier=100, weight_decay=1e-5, momentum=0.9, fp16=True, start_epoch=1,
        epochs=EPOCHS, output_dir="./output", auto_resume=True, resume="", seed=None, local_rank=0,
        num_instances=IMAGES,
    )  # fmt: skip
    weights = {f"module.{name}": value for name, value in trained.official_state_dict().items()}
    content = {
        "args": args,
        "model": weights,
        "optimizer": {
            "state": {0: {"momentum_buffer": torch.ones(3)}},
            "param_groups": [{"lr": 0.1, "momentum": 0.9, "params": [0]}],
        },
        "scheduler": {
            "multiplier": 100.0,
            "warmup_epoch": 1155,
            "finished": False,
            "base_lrs": [2.0],
            "last_epoch": STEPS,
            "_step_count": STEPS + 1,
            "after_scheduler": {"T_max": 183_645, "eta_min": 1e-6, "last_epoch": 183_645},
        },
        "epoch": EPOCHS,
        "scaler": {"scale": 65536.0, "growth_factor": 2.0, "_growth_tracker": 3},
    }
    return content | changes


@pytest.fixture(scope="module")
def imported(model: SlotCon, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run made from a full checkpoint."""
    folder = tmp_path_factory.mktemp("official")
    torch.save(full_checkpoint(model), folder / "ckpt_epoch_800.pth")
    call(main, folder / "ckpt_epoch_800.pth", "--out", folder / "run")
    return folder / "run"


def test_a_full_checkpoint_becomes_a_run(model: SlotCon, imported: Path) -> None:
    """With every weight, and every setting that both codes have."""
    loaded, config = load_model(imported)
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert config.model == ModelConfig("resnet18", 8, 6, 4, teacher_temp=0.05)
    assert (config.train.batch_size, config.train.epochs, config.train.seed) == (512, EPOCHS, 0)
    assert (config.views.size, config.data.path, config.name) == (224, "COCO", "run")


def test_the_record_holds_only_known_facts(imported: Path) -> None:
    """A reader would believe an invented fingerprint."""
    record = read_record(find(imported))
    assert record.data == {"images": IMAGES, "fingerprint": "unknown"}
    assert record.step == STEPS
    assert record.provenance["imported"] == "ckpt_epoch_800.pth"
    assert record.provenance["args"]["optimizer"] == "lars"
    line = {"step": STEPS, "epoch": EPOCHS}
    assert json.loads((imported / "metrics.jsonl").read_text()) == line
    metadata = read_backbone(imported).metadata
    assert (metadata["data"], metadata["epochs"], metadata["step"]) == ("COCO", "800", str(STEPS))
    assert metadata["imported"] == "ckpt_epoch_800.pth"  # else the card would say "by slotstream"


def test_commands_run_on_it(imported: Path, tmp_path: Path) -> None:
    """Evaluation, report and export accept it as a run."""
    beton = write_beton(tmp_path / "small.beton", varied(4))
    slots_json = tmp_path / "slots.json"
    call(slots, "--checkpoint", imported, "--data", beton, "--size", 64, "--json", slots_json)
    assert json.loads(slots_json.read_text())["results"]
    call(report, imported, "--out", tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "COCO (118,287 images)" in page
    assert "184,800 steps, 800 epochs" in page
    assert "| Epochs of the schedule | 800 |" in model_card(read_backbone(imported))


def test_training_does_not_resume_from_it(imported: Path, tmp_path: Path) -> None:
    """Without the optimiser's momenta the training would be a different one."""
    beton = write_beton(tmp_path / "small.beton", varied(4))
    config = small_run(beton, tmp_path)
    with pytest.raises(UserError, match=r"was .* in .*step_184800 and is now|is missing"):
        trainer(config, str(imported))


def test_there_and_back(model: SlotCon, imported: Path, tmp_path: Path) -> None:
    """An exported official file keeps steps, images and settings, as the authors' files do."""
    call(export, imported, "--to", "official", "--out", tmp_path / "full.pth")
    call(main, tmp_path / "full.pth", "--out", tmp_path / "again")
    (one, a), (other, b) = load_model(imported), load_model(tmp_path / "again")
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in one.state_dict().items())
    assert (a.model, a.train, a.views, a.data) == (b.model, b.train, b.views, b.data)
    records = [read_record(find(run)) for run in (imported, tmp_path / "again")]
    assert (records[0].step, records[0].data) == (records[1].step, records[1].data)


def test_facts_about_the_data_are_kept(model: SlotCon, tmp_path: Path) -> None:
    """Only the fingerprint distinguishes two data sets of the same name and size. The licence of
    the images also binds those who get the weights in another format."""
    checkpoint = write_checkpoint(tmp_path / "checkpoint", model, CONFIG)
    data = {"images": 8, "fingerprint": "1234abcd"}
    rewrite_record(checkpoint, data=data)
    official = ("--to", "official", "--out", tmp_path / "full.pth", "--license", "CC BY 4.0")
    call(export, checkpoint, *official)
    call(main, tmp_path / "full.pth", "--out", tmp_path / "run")
    known = read_record(find(tmp_path / "run")).data
    assert known == {**data, "license": "CC BY 4.0"}
    assert read_backbone(tmp_path / "run").metadata["data_license"] == "CC BY 4.0"


SETTINGS = {
    "dataset": "COCO", "image_size": 96, "min_scale": 0.2, "arch": "resnet18", "dim_hidden": 8,
    "dim_out": 6, "num_prototypes": 4, "teacher_temp": 0.05, "student_temp": 0.2,
    "center_momentum": 0.8, "group_loss_weight": 0.3, "teacher_momentum": 0.95, "base_lr": 0.7,
    "warmup_epoch": 3, "warmup_multiplier": 50, "weight_decay": 2e-5, "momentum": 0.85,
    "epochs": 60, "seed": 7, "batch_size": 64, "world_size": 1,
}  # fmt: skip
"""All different from the defaults, except world_size."""


def test_settings_by_the_authors_names() -> None:
    """A missing or swapped setting would describe a training that never happened."""
    config = RunConfig(
        "x",
        DataConfig("/data/COCO"),
        views=ViewConfig(size=96, min_scale=0.2),
        model=ModelConfig(
            "resnet18", 8, 6, 4, teacher_temp=0.05, student_temp=0.2, center_momentum=0.8,
            group_loss_weight=0.3,
        ),
        train=TrainConfig(
            teacher_momentum=0.95, base_lr=0.7, warmup_epochs=3, warmup_multiplier=50,
            weight_decay=2e-5, momentum=0.85, epochs=60, seed=7, batch_size=64,
        ),
    )  # fmt: skip
    assert official_settings(config) == SETTINGS
    default = RunConfig("x", DataConfig("unknown"), model=config.model)
    found = with_official_settings(default, SETTINGS, config.model)
    assert found == replace(config, data=DataConfig("COCO"))
    processes = SETTINGS | {"batch_size": 8, "world_size": 8}
    assert with_official_settings(default, processes, config.model) == found
    unknown = SETTINGS | {"world_size": None, "seed": None}
    assert with_official_settings(default, unknown, config.model).train.batch_size == 64


def test_without_settings_the_recipe_is_not_claimed(
    model: SlotCon, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Default values must not appear as facts about the training."""
    torch.save({"model": model.official_state_dict()}, tmp_path / "w.pth")
    call(main, tmp_path / "w.pth", "--out", tmp_path / "run")
    assert "a run of an unknown number of steps" in capsys.readouterr().out
    metadata = read_backbone(tmp_path / "run").metadata
    assert not {"epochs", "batch_size", "view_size"} & metadata.keys()
    assert metadata["data"] == "unknown"
    assert metadata["prototypes"] == "4"


def test_warning_for_another_optimiser(
    model: SlotCon,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """slotstream has only LARS, so a reader of config.yaml would assume LARS."""
    content = {"args": {"optimizer": "sgd"}, "model": model.official_state_dict()}
    monkeypatch.setattr("train.weights.read_file", lambda _: (content, {}))
    call(main, "w.pth", "--out", tmp_path / "run")
    assert "warning: trained with sgd, not config.yaml's LARS" in capsys.readouterr().err
    assert describe(read_record(find(tmp_path / "run")))["optimizer"] == "sgd"


@pytest.mark.parametrize(
    ("prefix", "wrapped"), [("", False), ("encoder_k.", False), ("module.encoder_k.", True)]
)
def test_backbones(prefix: str, wrapped: bool, model: SlotCon, tmp_path: Path) -> None:
    """The written file has torchvision's names, whatever names the source has."""
    encoder = model.teacher.encoder.state_dict()
    state = {prefix + name: value for name, value in encoder.items()}
    torch.save({"state_dict": state} if wrapped else state, tmp_path / "w.pth")
    call(main, tmp_path / "w.pth", "--out", tmp_path / "w.safetensors")
    found = load_file(tmp_path / "w.safetensors")
    assert found.keys() == encoder.keys()
    assert all(torch.equal(found[name], value) for name, value in encoder.items())
    assert read_backbone(tmp_path / "w.safetensors").metadata["imported"] == "w.pth"


def test_facts_that_the_file_of_a_backbone_lacks(
    model: SlotCon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the data set and the epochs, a table cannot place the backbone."""
    torch.save(dict(model.teacher.encoder.state_dict()), tmp_path / "w.pth")
    out, stated = tmp_path / "w.safetensors", ("--data", "COCO", "--epochs", 800)
    call(main, tmp_path / "w.pth", "--out", out, *stated)
    metadata = read_backbone(out).metadata
    assert (metadata["data"], metadata["epochs"]) == ("COCO", "800")
    call(main, out, "--out", tmp_path / "again.safetensors", *stated)
    for other in (("--data", "ImageNet"), ("--epochs", 200)):
        with pytest.raises(UserError, match=f"{other[0]} {other[1]}: .* says that it is"):
            call(main, out, "--out", tmp_path / "other.safetensors", *other)
    for epochs in (0, -5):
        with pytest.raises(UserError, match=f"--epochs {epochs}: must be 1 or more"):
            call(main, out, "--out", tmp_path / "other.safetensors", "--epochs", epochs)
    assert not (tmp_path / "other.safetensors").exists()
    content = {"model": {"grouping_k.slot_embed.weight": torch.ones(4, 6)}}
    monkeypatch.setattr("train.weights.read_file", lambda _: (content, {}))
    with pytest.raises(UserError, match="only for a backbone"):
        call(main, "full.pth", "--out", tmp_path / "run", *stated)
    with pytest.raises(UserError, match="only for a backbone"):
        call(main, "full.pth", "--out", tmp_path / "run", "--student")
    with pytest.raises(UserError, match="--arch: only for a ViT"):
        call(main, "full.pth", "--out", tmp_path / "run", "--arch", "timm:test_vit")


def test_either_of_two_backbones(model: SlotCon, tmp_path: Path) -> None:
    """MoCo's published figures are those of encoder_q, the student; the default is the teacher."""
    sides = {"encoder_k.": model.teacher.encoder, "encoder_q.": model.student.encoder}
    state = {p + k: v for p, side in sides.items() for k, v in side.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "moco.pth")
    for branch, options in (("teacher", ()), ("student", ("--student",))):
        out = tmp_path / f"{branch}.safetensors"
        call(main, tmp_path / "moco.pth", "--out", out, *options)
        found = read_backbone(out)
        assert found.metadata["branch"] == branch
        expected = getattr(model, branch).encoder.conv1.weight
        assert torch.equal(found.weights["conv1.weight"], expected)


def test_names_that_are_not_utf8(model: SlotCon, tmp_path: Path) -> None:
    """The header of a .safetensors file must be UTF-8."""
    file = tmp_path / os.fsdecode(b"w\xff.pth")
    with file.open("wb") as stream:
        torch.save(dict(model.teacher.encoder.state_dict()), stream)
    call(main, file, "--out", tmp_path / "w.safetensors", "--data", os.fsdecode(b"\xff"))
    metadata = read_backbone(tmp_path / "w.safetensors").metadata
    assert (metadata["imported"], metadata["data"]) == ("w\\udcff.pth", "\\udcff")


class Foreign:
    """A class that a checkpoint does not need."""


def test_bad_files(model: SlotCon, imported: Path, tmp_path: Path) -> None:
    """Each error is one line, and leaves no folder or file."""
    file = tmp_path / "w.pth"
    backbone = dict(model.teacher.encoder.state_dict())

    def refused(message: str, out: Path = tmp_path / "run") -> None:
        with pytest.raises(UserError, match=message) as caught:
            call(main, file, "--out", out)
        assert "\n" not in str(caught.value)
        assert {path.name for path in tmp_path.iterdir()} <= {"w.pth"}

    refused("No such file")
    torch.save({"args": Foreign()}, file)
    refused(r"refused.*names tests.tools.weights.test_import_official.Foreign")
    file.write_bytes(b"text")
    refused("damaged, or not a file of weights")
    torch.save(backbone, file)
    refused("give a .safetensors file", tmp_path / "w.pkl")
    file.write_bytes(file.read_bytes()[:-10_000])
    refused("damaged, or not a file of weights")
    torch.save(full_checkpoint(model), file)
    refused("is there already", imported)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"center": None}, "missing: center"),
        ({"center": torch.full((1, 4), torch.nan)}, "center is not finite"),
        ({"center": torch.full((1, 4), 1e300, dtype=torch.float64)}, "center is not finite"),
        ({"encoder_k.bn1.bias": torch.ones(3)}, "of another shape: encoder_k.bn1.bias"),
        ({"projector_k.mlp.0.weight": None}, "projector_k.mlp.0.weight"),
        ({"projector_k.mlp.0.weight": torch.ones(2**40, 0)}, "w.pth: "),
        ({"projector_k.mlp.0.weight": torch.ones(2**60, 0)}, "w.pth: "),
        ({"projector_k.mlp.0.weight": torch.tensor(1.0)}, "dim_hidden"),
        ({"grouping_k.slot_embed.weight": torch.ones(2**40, 0)}, "w.pth: "),
        (
            {f"encoder_k.layer4.1.conv{n}.weight": None for n in (1, 2)},
            "its encoder is none of resnet18",
        ),
    ],
)
def test_bad_weights(changes: dict[str, Any], message: str, model: SlotCon) -> None:
    """Each error is one line."""
    state = {**model.official_state_dict(), **changes}
    state = {name: value for name, value in state.items() if value is not None}
    with pytest.raises(UserError, match=message) as caught:
        loaded(Official(Path("w.pth"), "slotcon", state, {}, 0, 0, {}))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("args", "key"),
    [
        ({"epochs": 0}, "epochs"),
        ({"dataset": 3}, "data.path must be text"),
        ({"seed": 1.5}, "train.seed must be a whole number"),
        ({"batch_size": 3.5}, "train.batch_size must be a whole number"),
        ({"epochs": "800"}, "'str'"),
        ({"batch_size": "text", "world_size": 10**12}, "train.batch_size must be a whole number"),
    ],
)
def test_bad_settings(args: dict[str, Any], key: str) -> None:
    """A configuration is never written if it could not be read again."""
    with pytest.raises(UserError, match=f"w.pth: impossible settings: .*{key}"):
        configured(Official(Path("w.pth"), "slotcon", {}, args, 0, 0, {}), ModelConfig(), "run")
