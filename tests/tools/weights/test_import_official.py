"""Checkpoints of the authors' code become runs, or files of a backbone."""

import argparse
import json
import os
from collections.abc import Iterator
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
from tests.helpers.checkpoints import write_checkpoint
from tests.helpers.exported import CONFIG, call, trained_model
from tests.helpers.training import small_run, trainer
from tools.export import main as export
from tools.import_official import Official, configured, loaded, main
from tools.report.__main__ import main as report
from tools.weights.model_card import model_card
from tools.weights.official_settings import official_settings, with_official_settings
from train.config import DataConfig, RunConfig, TrainConfig
from train.run.checkpoint import find, load_model, read_record
from train.weights import describe, read_backbone

IMAGES, STEPS, EPOCHS = 118_287, 184_800, 800


@pytest.fixture(scope="module", autouse=True)
def _no_flush() -> Iterator[None]:
    """Nothing here outlives the machine, and the models are 100 MB each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.run.checkpoint._flush", lambda _: None)
        yield


@pytest.fixture(scope="module")
def model() -> SlotCon:
    return trained_model()


def full_checkpoint(trained: SlotCon, **changes: Any) -> dict[str, Any]:
    """What main_pretrain.py's save_checkpoint writes."""
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
    """The run that a full checkpoint becomes."""
    folder = tmp_path_factory.mktemp("official")
    torch.save(full_checkpoint(model), folder / "ckpt_epoch_800.pth")
    call(main, folder / "ckpt_epoch_800.pth", "--out", folder / "run")
    return folder / "run"


def test_a_full_checkpoint_becomes_a_run(model: SlotCon, imported: Path) -> None:
    """Every weight, and every setting that both codes have."""
    loaded, config = load_model(imported)
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert config.model == ModelConfig("resnet18", 8, 6, 4, teacher_temp=0.05)
    assert (config.train.batch_size, config.train.epochs, config.train.seed) == (512, EPOCHS, 0)
    assert (config.views.size, config.data.path, config.name) == (224, "COCO", "run")


def test_it_says_what_is_known_and_no_more(imported: Path) -> None:
    """A digest that nobody took would be believed."""
    record = read_record(find(imported))
    assert record.data == {"images": IMAGES, "fingerprint": "unknown"}
    assert record.step == STEPS
    assert record.provenance["imported"] == "ckpt_epoch_800.pth"
    assert record.provenance["args"]["optimizer"] == "lars"
    line = {"step": STEPS, "epoch": EPOCHS}
    assert json.loads((imported / "metrics.jsonl").read_text()) == line
    metadata = read_backbone(imported).metadata
    assert (metadata["data"], metadata["epochs"], metadata["step"]) == ("COCO", "800", str(STEPS))
    assert metadata["imported"] == "ckpt_epoch_800.pth"  # or its card says that slotstream made it


def test_commands_run_on_it(imported: Path, tmp_path: Path) -> None:
    """Evaluation, report and export take it for a run."""
    beton = write_beton(tmp_path / "small.beton", varied(4))
    slots_json = tmp_path / "slots.json"
    call(slots, "--checkpoint", imported, "--data", beton, "--size", 64, "--json", slots_json)
    assert json.loads(slots_json.read_text())["results"]
    call(report, imported, "--out", tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "COCO (118,287 images)" in page
    assert "184,800 steps, 800 epochs" in page
    assert "| Epochs of the schedule | 800 |" in model_card(read_backbone(imported))


def test_training_does_not_go_on_from_it(imported: Path, tmp_path: Path) -> None:
    """Without the optimiser's momenta it would be another training."""
    beton = write_beton(tmp_path / "small.beton", varied(4))
    config = small_run(beton, tmp_path)
    with pytest.raises(UserError, match=r"was .* in .*step_184800 and is now|is missing"):
        trainer(config, str(imported))


def test_there_and_back(model: SlotCon, imported: Path, tmp_path: Path) -> None:
    """An official file of ours keeps what the authors' would: steps, images, settings."""
    call(export, imported, "--to", "official", "--out", tmp_path / "full.pth")
    call(main, tmp_path / "full.pth", "--out", tmp_path / "again")
    (one, a), (other, b) = load_model(imported), load_model(tmp_path / "again")
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in one.state_dict().items())
    assert (a.model, a.train, a.views, a.data) == (b.model, b.train, b.views, b.data)
    records = [read_record(find(run)) for run in (imported, tmp_path / "again")]
    assert (records[0].step, records[0].data) == (records[1].step, records[1].data)


def test_what_is_known_of_the_data_goes_along(model: SlotCon, tmp_path: Path) -> None:
    """Two sets of one name and size are told apart by the fingerprint alone; the licence of the
    images binds whoever has the weights, however they came."""
    checkpoint = write_checkpoint(tmp_path / "checkpoint", model, CONFIG)
    record = json.loads((checkpoint / "run.json").read_text())
    record["data"] = {"images": 8, "fingerprint": "1234abcd"}
    (checkpoint / "run.json").write_text(json.dumps(record))
    official = ("--to", "official", "--out", tmp_path / "full.pth", "--license", "CC BY 4.0")
    call(export, checkpoint, *official)
    call(main, tmp_path / "full.pth", "--out", tmp_path / "run")
    known = read_record(find(tmp_path / "run")).data
    assert known == {**record["data"], "license": "CC BY 4.0"}
    assert read_backbone(tmp_path / "run").metadata["data_license"] == "CC BY 4.0"


SETTINGS = {
    "dataset": "COCO", "image_size": 96, "min_scale": 0.2, "arch": "resnet18", "dim_hidden": 8,
    "dim_out": 6, "num_prototypes": 4, "teacher_temp": 0.05, "student_temp": 0.2,
    "center_momentum": 0.8, "group_loss_weight": 0.3, "teacher_momentum": 0.95, "base_lr": 0.7,
    "warmup_epoch": 3, "warmup_multiplier": 50, "weight_decay": 2e-5, "momentum": 0.85,
    "epochs": 60, "seed": 7, "batch_size": 64, "world_size": 1,
}  # fmt: skip
"""None of them what it is by default (but world_size)."""


def test_settings_by_the_authors_names() -> None:
    """A setting that is left out, or takes another's place, is a recipe that nobody ran."""
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
    """Defaults in the place of what the file does not say are no recipe."""
    torch.save({"model": model.official_state_dict()}, tmp_path / "w.pth")
    call(main, tmp_path / "w.pth", "--out", tmp_path / "run")
    assert "a run of an unknown number of steps" in capsys.readouterr().out
    metadata = read_backbone(tmp_path / "run").metadata
    assert not {"epochs", "batch_size", "view_size"} & metadata.keys()
    assert metadata["data"] == "unknown"
    assert metadata["prototypes"] == "4"


def test_another_optimiser_is_said(
    model: SlotCon,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """There is only LARS here, and that is what config.yaml would be read as."""
    content = {"args": {"optimizer": "sgd"}, "model": model.official_state_dict()}
    monkeypatch.setattr("tools.import_official.read_file", lambda _: (content, {}))
    call(main, "w.pth", "--out", tmp_path / "run")
    assert "warning: trained with sgd, not config.yaml's LARS" in capsys.readouterr().err
    assert describe(read_record(find(tmp_path / "run")))["optimizer"] == "sgd"


@pytest.mark.parametrize(
    ("prefix", "wrapped"), [("", False), ("encoder_k.", False), ("module.encoder_k.", True)]
)
def test_backbones(prefix: str, wrapped: bool, model: SlotCon, tmp_path: Path) -> None:
    """A file under torchvision's names, whatever the names were."""
    encoder = model.teacher.encoder.state_dict()
    state = {prefix + name: value for name, value in encoder.items()}
    torch.save({"state_dict": state} if wrapped else state, tmp_path / "w.pth")
    call(main, tmp_path / "w.pth", "--out", tmp_path / "w.safetensors")
    found = load_file(tmp_path / "w.safetensors")
    assert found.keys() == encoder.keys()
    assert all(torch.equal(found[name], value) for name, value in encoder.items())
    assert read_backbone(tmp_path / "w.safetensors").metadata["imported"] == "w.pth"


def test_what_a_backbone_does_not_say(
    model: SlotCon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without it no table has a place for it."""
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
    monkeypatch.setattr("tools.import_official.read_file", lambda _: (content, {}))
    with pytest.raises(UserError, match="for a backbone alone"):
        call(main, "full.pth", "--out", tmp_path / "run", *stated)
    with pytest.raises(UserError, match="for a backbone alone"):
        call(main, "full.pth", "--out", tmp_path / "run", "--student")


def test_of_two_backbones_either(model: SlotCon, tmp_path: Path) -> None:
    """MoCo's figures are those of encoder_q, the student; a file of both gives its teacher else."""
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


def test_names_that_are_no_utf8(model: SlotCon, tmp_path: Path) -> None:
    """The header of a .safetensors file is."""
    file = tmp_path / os.fsdecode(b"w\xff.pth")
    with file.open("wb") as stream:
        torch.save(dict(model.teacher.encoder.state_dict()), stream)
    call(main, file, "--out", tmp_path / "w.safetensors", "--data", os.fsdecode(b"\xff"))
    metadata = read_backbone(tmp_path / "w.safetensors").metadata
    assert (metadata["imported"], metadata["data"]) == ("w\\udcff.pth", "\\udcff")


class Foreign:
    """What a checkpoint has no need of."""


def test_bad_files(model: SlotCon, imported: Path, tmp_path: Path) -> None:
    """One line each, and no folder or file is left."""
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
        (
            {f"encoder_k.layer4.1.conv{n}.weight": None for n in (1, 2)},
            "its encoder is none of resnet18",
        ),
    ],
)
def test_bad_weights(changes: dict[str, Any], message: str, model: SlotCon) -> None:
    """One line each."""
    state = {**model.official_state_dict(), **changes}
    state = {name: value for name, value in state.items() if value is not None}
    with pytest.raises(UserError, match=message) as caught:
        loaded(Official(Path("w.pth"), state, {}, 0, 0, {}))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("args", "key"),
    [
        ({"epochs": 0}, "epochs"),
        ({"dataset": 3}, "data.path must be text"),
        ({"seed": 1.5}, "train.seed must be a whole number"),
        ({"batch_size": 3.5}, "train.batch_size must be a whole number"),
        ({"epochs": "800"}, "'str'"),
    ],
)
def test_bad_settings(args: dict[str, Any], key: str) -> None:
    """Nothing is written that could not be read again."""
    with pytest.raises(UserError, match=f"w.pth: its settings make no run: .*{key}"):
        configured(Official(Path("w.pth"), {}, args, 0, 0, {}), ModelConfig(), "run")
