"""Checkpoints are either whole or not there; a model loads from them, or an error says why not."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from model import SlotCon
from pipeline.errors import UserError
from tests.helpers.checkpoints import rewrite_record
from tests.helpers.training import run_dir, small_beton, small_run, trainer
from train.config import RunConfig
from train.pretrained import load_model
from train.run import checkpoint
from train.run.settings import to_dict


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run of one step."""
    folder = tmp_path_factory.mktemp("run")
    config = small_run(small_beton(folder), folder, max_steps=1)
    trainer(config).train()
    return config


@pytest.fixture
def copy(run: RunConfig, tmp_path: Path) -> Path:
    """A copy of the run's folder, to damage."""
    return Path(shutil.copytree(run_dir(run), tmp_path / "copy", symlinks=True))


def test_model_loads_from_every_name_it_has(run: RunConfig) -> None:
    """Users pass any path that they see: the step, the link or the run, also a relative one."""
    folder = run_dir(run)
    models = [
        load_model(path)
        for path in (folder, folder / "checkpoints" / "latest", folder / "checkpoints" / "step_1")
    ]
    for model, config in models:
        assert isinstance(model, SlotCon) and not model.training and config == run
        for name, value in model.state_dict().items():
            assert torch.equal(value, models[0][0].state_dict()[name])


def test_kept_checkpoints_cover_the_whole_run() -> None:
    """A run keeps the newest ones to resume from, and the last one of each quarter to look back at.
    More would fill the disk. Deleting step by step gives the same result as at the end."""
    retention = checkpoint.Retention(newest=2, parts=4, total_steps=100)
    kept: list[Path] = []
    for step in range(10, 101, 10):
        kept.append(Path(f"step_{step}"))
        outdated = retention.outdated(kept)
        kept = [path for path in kept if path not in outdated]
        assert len(kept) <= 2 + 4 and kept[-1].name == f"step_{step}"
    assert [checkpoint.step_of(path) for path in kept] == [20, 50, 70, 90, 100]
    newest = replace(retention, parts=0)
    assert newest.outdated(kept) == kept[:-2]


def test_partial_checkpoints_do_not_count(run: RunConfig, copy: Path) -> None:
    """A run that is killed while it saves leaves step_N.partial, half a model. No run may read it,
    and the next checkpoint must delete it, or the disk fills up."""
    partial = copy / "checkpoints" / "step_2.partial"
    shutil.copytree(copy / "checkpoints" / "step_1", partial)
    newest = checkpoint.latest(copy)
    assert newest and newest.name == "step_1"
    train = replace(run.train, max_steps=2)
    config = replace(run, name=copy.name, log=replace(run.log, dir=str(copy.parent)), train=train)
    trainer(config, "auto").train()
    names = {path.name for path in (copy / "checkpoints").iterdir()}
    assert names == {"step_1", "step_2", "latest"}


def test_failure_while_saving_leaves_the_old_ones(
    run: RunConfig, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk in the middle of a save must not damage the existing checkpoints."""
    train = replace(run.train, max_steps=2)
    config = replace(run, name=copy.name, log=replace(run.log, dir=str(copy.parent)), train=train)
    continued = trainer(config, "auto")

    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "_flush", full)
    with pytest.raises(UserError, match=r"cannot be written .*No space left.*last good .*step_1"):
        continued.train()
    assert not list((copy / "checkpoints").glob("*.partial"))
    assert (copy / "checkpoints" / "latest").resolve().name == "step_1"
    assert load_model(copy)[1] == run


def test_a_damaged_newest_checkpoint_is_made_again(run: RunConfig, copy: Path) -> None:
    """A step_N without its run.json must not block the new checkpoint of the same name."""
    train = replace(run.train, max_steps=2)
    config = replace(run, name=copy.name, log=replace(run.log, dir=str(copy.parent)), train=train)
    trainer(config, "auto").train()
    (copy / "checkpoints" / "step_2" / "run.json").unlink()
    trainer(config, "auto").train()
    assert load_model(copy / "checkpoints" / "step_2")[1] == config


@pytest.mark.parametrize("name", ["model.safetensors", "run.json"])
def test_damage_is_one_line(copy: Path, name: str) -> None:
    """The error must name the truncated file, without a traceback of the library that read it."""
    file = copy / "checkpoints" / "step_1" / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(UserError, match=f"{name}: damaged") as refused:
        load_model(copy)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.bin"])
def test_resuming_from_damage_is_one_line(run: RunConfig, copy: Path, name: str) -> None:
    """A run that cannot resume must name the damaged file."""
    config = replace(run, name=copy.name, log=replace(run.log, dir=str(copy.parent)))
    file = copy / "checkpoints" / "step_1" / name
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match="damaged"):
        trainer(config, "auto")
    file.write_bytes(b"\x80\x02.")  # a pickle that takes a value from an empty stack
    rewrite_record(file.parent)
    with pytest.raises(UserError, match=f"{name}: damaged"):
        trainer(config, "auto")
    file.unlink()
    with pytest.raises(UserError, match=f"{name} is missing"):
        trainer(config, "auto")


def _altered(record: dict[str, Any], key: str) -> dict[str, Any]:
    changed: dict[str, Any] = json.loads(json.dumps(record))
    match key:
        case "meter":
            changed["meter"][0][0] += 0.001
        case "config":
            changed["config"]["train"]["base_lr"] = 0.9
        case "emptied":
            changed["sha256"] = {}
        case "without sums":
            del changed["sha256"]
        case "of an earlier version":
            del changed["checksum"]
        case _:
            changed[key] = changed[key] + 1
    return changed


@pytest.mark.parametrize(
    "key", ["meter", "config", "emptied", "without sums", "of an earlier version", "seconds"]
)
def test_a_changed_record_is_refused(run: RunConfig, copy: Path, key: str) -> None:
    """Without it one digit of the meter changes the curve of a resumed run, and a record without
    checksums lets any weights pass."""
    file = copy / "checkpoints" / "step_1" / "run.json"
    record = json.loads(file.read_text())
    file.write_text(json.dumps(_altered(record, key)))
    says = "no checksum" if key == "of an earlier version" else "its content has changed"
    with pytest.raises(UserError, match=f"run.json: .*{says}") as refused:
        load_model(copy)
    assert "\n" not in str(refused.value)
    config = replace(run, name=copy.name, log=replace(run.log, dir=str(copy.parent)))
    with pytest.raises(UserError, match=says):
        trainer(config, "auto")
    file.write_text(json.dumps(record))  # other spaces, the same content
    load_model(copy)


def test_a_file_without_a_checksum_is_refused(run: RunConfig, copy: Path) -> None:
    """Without it a file that was put beside the others is loaded as if the run had written it."""
    checkpoint_ = copy / "checkpoints" / "step_1"
    kept = (checkpoint_ / "optimizer.bin").read_bytes()
    (checkpoint_ / "optimizer.bin").unlink()
    rewrite_record(checkpoint_)
    (checkpoint_ / "optimizer.bin").write_bytes(kept)
    load_model(copy)
    config = replace(run, name=copy.name, log=replace(run.log, dir=str(copy.parent)))
    with pytest.raises(UserError, match=r"optimizer\.bin: .*run\.json has no checksum of it"):
        trainer(config, "auto")


@pytest.mark.parametrize(
    "content",
    [
        b"[1]",
        b"null",
        b"[" * 100_000,
        b'{"step": ' + b"9" * 5000 + b"}",
        '{"step": 1}'.encode("utf-16"),
        b"\0" * 100,
        b'{"checksum": "x", "step": "1"}',
        b'{"checksum": "x", "step": 1e400}',
    ],
)
def test_any_other_content_of_a_record_is_one_line(copy: Path, content: bytes) -> None:
    """Without it a damaged record ends in a traceback."""
    (copy / "checkpoints" / "step_1" / "run.json").write_bytes(content)
    with pytest.raises(checkpoint.Damaged, match=r"run\.json: ") as refused:
        load_model(copy)
    assert str(refused.value).isprintable() and len(str(refused.value)) < 500


def test_a_record_that_is_no_file_or_too_long_is_refused(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without it a pipe stops the command for ever, and a sparse file fills the memory."""
    file = copy / "checkpoints" / "step_1" / "run.json"
    monkeypatch.setattr(checkpoint, "LARGEST_RECORD", 100)
    with pytest.raises(UserError, match=r"run\.json: too large: [\d,]+ bytes, at most 100"):
        load_model(copy)
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(UserError, match="holds no whole checkpoint"):
        load_model(copy)


def test_missing_weights_and_folders_are_named(copy: Path, tmp_path: Path) -> None:
    """In three cases there is nothing to load."""
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no whole checkpoint"):
        load_model(tmp_path / "empty")
    with pytest.raises(UserError, match="no such checkpoint or run folder"):
        load_model(tmp_path / "nothing")
    (copy / "checkpoints" / "step_1" / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model\.safetensors: no such file"):
        load_model(copy)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("num_prototypes", 9, r"model\.safetensors: damaged, or of another model"),
        ("arch", "resnet34", r"model\.safetensors: damaged, or of another model"),
        ("heads", 4, r"run\.json: damaged.* \(unknown key model\.heads"),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    run: RunConfig, copy: Path, key: str, value: object, says: str
) -> None:
    """Weights of another architecture must not load in part."""
    config = to_dict(run)
    config["model"][key] = value
    rewrite_record(copy / "checkpoints" / "step_1", config=config)
    with pytest.raises(UserError, match=says):
        load_model(copy)
