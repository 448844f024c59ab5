"""A run whose folder is taken away, or whose disk is full, while it trains."""

import errno
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import UserError
from tests.helpers.killed import curve
from tests.helpers.tiny_task import launched, tiny_config
from tests.helpers.training import launch, run_dir, small_beton, small_run, trainer
from train.config import RunConfig
from train.metrics import Meter
from train.run import log
from train.run.ends import EndedElsewhere, Reason
from train.run.log import Journal


@pytest.fixture(scope="module")
def beton(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_beton(tmp_path_factory.mktemp("data"))


def with_tensorboard(beton: Path, folder: Path) -> RunConfig:
    """A run of four steps with a log line after each and a checkpoint after the third."""
    config = small_run(beton, folder, max_steps=4)
    return replace(
        config, log=replace(config.log, every=1, checkpoint_every=3, trackers=("tensorboard",))
    )


def after_steps(count: int, act: Callable[[], None]) -> Callable[..., None]:
    """A Meter.add that calls `act` once, in step `count`."""
    add, done = Meter.add, []

    def counting(meter: Meter, *output: Any) -> None:
        add(meter, *output)
        done.append(1)
        if len(done) == count:
            act()

    return counting


def rename(folder: Path) -> None:
    folder.rename(folder.with_name("moved"))


def exchange(folder: Path) -> None:
    rename(folder)
    folder.mkdir()


@pytest.mark.parametrize("act", [rename, exchange, shutil.rmtree])
@pytest.mark.parametrize("step", [2, 4])
def test_a_folder_that_is_gone_ends_the_run(
    beton: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str], act: Callable[[Path], None], step: int,
) -> None:  # fmt: skip
    """Without it the run dies by the traceback of a thread of TensorBoard's, or makes a new folder
    and trains on without its past."""
    config = with_tensorboard(beton, tmp_path)
    folder = run_dir(config)
    training = trainer(config)

    def take_away() -> None:
        training.run.wait_for_disk()
        act(folder)

    monkeypatch.setattr(Meter, "add", after_steps(step, take_away))
    with pytest.raises(UserError) as gone:
        training.train()
    line, saved = str(gone.value), 3 if step == 4 else 0
    assert line.startswith(f"{folder}: deleted, renamed or replaced while the run trained")
    assert line.endswith(f"step {step}, last checkpoint: step {saved}")
    said = capfd.readouterr().err
    assert "Traceback" not in said and said.count("tensorboard failed") <= 1
    assert not folder.exists() or not list(folder.iterdir())
    if act is not shutil.rmtree and step == 4:
        assert [line["step"] for line in curve(tmp_path / "moved")] == [1, 2, 3]
        assert (tmp_path / "moved/checkpoints/latest/run.json").is_file()


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_under_the_curve_ends_the_run(
    beton: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without it the curve of a run has a hole, or its end is a traceback."""
    training = trainer(with_tensorboard(beton, tmp_path))
    opened = log._at_once

    def open_or_fail(path: str, flags: int) -> int:
        if training.run.step == 4:
            full()
        return opened(path, flags)

    monkeypatch.setattr(log, "_at_once", open_or_fail)
    with pytest.raises(UserError) as ended:
        training.train()
    assert str(ended.value) == (
        f"{training.run.folder}/metrics.jsonl: cannot be written (No space left on device); "
        "step 4, last checkpoint: step 3"
    )
    assert [line["step"] for line in curve(training.run.folder)] == [1, 2, 3]


def test_a_full_disk_under_tensorboard_costs_only_its_lines(
    beton: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """TensorBoard's own thread fails first, in a moment of its own. Without it that ends the run,
    or prints pages."""
    from tensorboard.summary.writer.record_writer import RecordWriter

    training = trainer(with_tensorboard(beton, tmp_path))
    monkeypatch.setattr(RecordWriter, "write", full)
    training.train()
    said = capfd.readouterr().err
    assert said.startswith(
        "warning: log.trackers: tensorboard failed (OSError: [Errno 28] No space"
    )
    assert said.count("\n") == 1
    assert [line["step"] for line in curve(training.run.folder)] == [1, 2, 3, 4]


def test_all_processes_end(beton: Path, tmp_path: Path) -> None:
    """Only the first process writes. Without it the others wait for it until a timeout."""
    training = trainer(with_tensorboard(beton, tmp_path))
    rename(training.run.folder)
    assert training.run.reason_to_end() == Reason.DISK
    training.run.is_main, training.run._journal = False, None
    assert training.run.reason_to_end() == Reason.NONE
    with pytest.raises(EndedElsewhere):
        training.run.end_if(Reason.DISK, lambda: None)


def test_two_processes_end(tmp_path: Path) -> None:
    """The same with a launcher: exit codes, and no line but ours."""
    config = tiny_config(tmp_path, steps=10**5)
    ended = launched(config, processes=2, RENAME_AT="7", RUN_DIR=str(tmp_path / "run"))
    lines = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert ended.returncode == 1 and len(lines) == 1, ended.stderr
    assert "run: deleted, renamed or replaced while the run trained" in lines[0]
    assert not (tmp_path / "run").exists()


def test_a_refused_start_leaves_no_folder(beton: Path, tmp_path: Path) -> None:
    """Without it each mistake leaves a folder that looks like a run."""
    config = small_run(beton, tmp_path)
    refused = launch(replace(config, train=replace(config.train, batch_size=500)))
    assert refused.returncode and "UserError" in refused.stderr
    assert not run_dir(config).exists()


def test_a_curve_without_a_problem_has_none(tmp_path: Path) -> None:
    """A mount that is replaced by itself, or a path through a link, is the same folder."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    journal = Journal(tmp_path / "link")
    journal.rewind(0)
    assert journal.problem() is None
