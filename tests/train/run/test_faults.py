"""Faults of a run of days, injected. The run must survive the fault, or end with a clear line,
within a time limit, and lose no more than the steps since the last checkpoint."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from safetensors.torch import load_file, save_file

from pipeline.errors import UserError
from tests import ROOT
from tests.helpers.faulty import Pair, at_micro_batch, make, separable_run, watch
from tests.helpers.training import TIMES, assert_same_tensors, run_dir, small_beton, tensors
from train.config import RunConfig
from train.metrics import Meter
from train.pretrained import load_model
from train.run import checkpoint
from train.run.ends import Diverged, Stopped
from train.run.signals import StopSignals
from train.run.watchdog import Watchdog
from train.trainer import Trainer


@pytest.fixture(scope="module")
def beton(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_beton(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def seen() -> dict[int, list[tuple[int, float]]]:
    """The images that the steps of `whole` have read."""
    return {}


@pytest.fixture(scope="module")
def whole(
    beton: Path,
    seen: dict[int, list[tuple[int, float]]],
    tmp_path_factory: pytest.TempPathFactory,
) -> RunConfig:
    """A run of 10 steps without a fault: checkpoints at 4, 8, 10, log lines every 3 steps."""
    config = separable_run(beton, tmp_path_factory.mktemp("whole"))
    config = replace(config, log=replace(config.log, keep=3))
    training = make(config)
    watched = watch(training)
    training.train()
    seen.update(watched)
    return config


@pytest.fixture
def config(whole: RunConfig, tmp_path: Path) -> RunConfig:
    """The same configuration in another folder."""
    return replace(whole, log=replace(whole.log, dir=str(tmp_path)))


def share(source: str, target: str) -> None:
    """Copy a file. Link the files of a checkpoint, which are large and never written again."""
    (os.link if "checkpoints" in source else shutil.copy)(source, target)


@pytest.fixture
def copied(whole: RunConfig, config: RunConfig) -> RunConfig:
    """A copy of `whole` up to step 8."""
    shutil.copytree(run_dir(whole), run_dir(config), symlinks=True, copy_function=share)
    shutil.rmtree(run_dir(config) / "checkpoints" / "step_10")
    return config


def impatient(config: RunConfig, seconds: float) -> Trainer:
    """A run that waits so long for disk and trackers. Its watchdog does not end pytest."""
    training = make(with_log(config, timeout_minutes=seconds / 60))
    training.run.watchdog = Watchdog(600, "")
    return training


def with_log(config: RunConfig, **changes: Any) -> RunConfig:
    return replace(config, log=replace(config.log, **changes))


def with_steps(config: RunConfig, steps: int) -> RunConfig:
    return replace(config, train=replace(config.train, max_steps=steps))


def curve(config: RunConfig) -> list[dict[str, float]]:
    lines = (run_dir(config) / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]


def newest(config: RunConfig) -> Path:
    found = checkpoint.latest(run_dir(config))
    assert found
    return found


def run_code(code: str) -> "subprocess.CompletedProcess[str]":
    """Run `code` in a new process until it ends."""
    return subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, text=True, cwd=ROOT
    )


def assert_same_end(one: RunConfig, other: RunConfig) -> None:
    assert curve(one) == curve(other)
    assert newest(one).name == newest(other).name
    assert_same_tensors(newest(one), newest(other))


# ---- signals to stop ----


def test_a_signal_leaves_a_checkpoint_and_costs_nothing(
    whole: RunConfig, config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scheduler takes the machine away. No step may be lost and no bit of the curve may change:
    steps 2 and 3 share a log line across the interruption."""
    before = signal.getsignal(signal.SIGUSR1)
    with monkeypatch.context() as patch:
        send = at_micro_batch(2, lambda: os.kill(os.getpid(), signal.SIGUSR1))
        patch.setattr(Meter, "add", send)
        with (
            pytest.raises(Stopped, match=r"stopped by SIGUSR1 at step \d+, which has"),
            StopSignals() as signals,
        ):
            make(config, signals=signals).train()
    stopped_at = checkpoint.step_of(newest(config))
    assert 2 <= stopped_at < 4 and signal.getsignal(signal.SIGUSR1) == before
    make(config, "auto").train()
    assert_same_end(config, whole)


def test_a_signal_before_the_first_step_is_remembered(config: RunConfig) -> None:
    """A requeued job may have to stop again while it still loads its data."""
    signals = StopSignals()
    signals.received = signal.SIGTERM
    with pytest.raises(Stopped, match="stopped by SIGTERM at step 1, which has a checkpoint"):
        make(config, signals=signals).train()
    assert newest(config).name == "step_1"


def test_a_second_signal_ends_a_process_that_hangs() -> None:
    """A second signal is an order, but a launcher's echo of the first one is not."""
    code = (
        "import os, signal, time\n"
        "from train.run.signals import StopSignals\n"
        "with StopSignals() as signals:\n"
        "    for pause in (0, 0.1, 2.5):\n"
        "        time.sleep(pause)\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "        print(pause, flush=True)\n"
        "    time.sleep(60)\n"
    )
    ended = run_code(code)
    assert ended.returncode == 128 + signal.SIGTERM and ended.stdout.startswith("0\n0.1\n")


def test_another_number_of_processes_goes_on_with_the_same_steps(
    whole: RunConfig, config: RunConfig, seen: dict[int, list[tuple[int, float]]]
) -> None:
    """One process; then two, of which only the second receives a signal to stop; then one again.
    Each step must see the same images and views as ever. If the loss is a mean over images (no
    batch statistics, no slots), the run must stay the same up to rounding. A launcher that sees the
    second process end kills the first: the checkpoint must exist by then."""
    make(with_steps(config, 3)).train()
    two = Pair(config, "SIGTERM:1", "--resume", "auto")
    other = two.end(1)
    assert newest(config).name == "step_6", other
    code, said = two.end(0)
    assert code == other[0] == 75, (said, other)
    assert "step 6, which has a checkpoint" in said
    met: dict[int, list[tuple[int, float]]] = {}
    for rank in (0, 1):
        for line in Path(f"{run_dir(config)}.rank{rank}").read_text().splitlines():
            step, index, total = line.split()
            met.setdefault(int(step), []).append((int(index), float(total)))
    training = make(config, "auto")
    later = watch(training)
    training.train()
    assert set(met) == {3, 4, 5} and set(later) == {6, 7, 8, 9}
    for step, images in {**met, **later}.items():
        assert sorted(images) == sorted(seen[step])
    for one, other in zip(curve(config), curve(whole), strict=True):
        for name in ("loss", "grouping_12", "grouping_21"):
            assert one[name] == pytest.approx(other[name], rel=1e-4)
    weights, expected = tensors(newest(config)), tensors(newest(whole))
    for name in ("student.encoder.conv1.weight", "center", "student.grouping.prototypes"):
        torch.testing.assert_close(weights[name], expected[name], rtol=1e-3, atol=1e-5)


# ---- divergence ----


def poison(training: Trainer) -> None:
    with torch.no_grad():
        training.slotcon.student.grouping.prototypes[0, 0] = torch.nan


def test_rolling_back_once_repeats_the_steps(
    whole: RunConfig,
    config: RunConfig,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A flipped bit must cost the steps since the last checkpoint and nothing else: no line appears
    twice, and the old momentum is gone."""
    training = make(with_log(config, on_divergence="roll_back"))
    with monkeypatch.context() as patch:
        patch.setattr(Meter, "add", at_micro_batch(6, lambda: poison(training)))
        training.train()
    assert_same_end(config, whole)
    said = [line for line in capsys.readouterr().err.splitlines() if "roll-back" in line]
    assert len(said) == 1 and re.search(r"resuming from .*step_4 \(roll-back 1\)", said[0])


def test_rolling_back_in_vain_ends(
    copied: RunConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that always diverges at the same step would otherwise never end."""
    training = make(with_log(copied, on_divergence="roll_back"), "auto")
    add = Meter.add

    def poisoned(meter: Meter, *output: Any) -> None:
        add(meter, *output)
        poison(training)

    monkeypatch.setattr(Meter, "add", poisoned)
    with pytest.raises(Diverged, match=r"rolled back 3 times in vain; last good .*step_8"):
        training.train()
    assert capsys.readouterr().err.count("warning") == 3 and newest(copied).name == "step_8"


def test_failed_loss_scaling_is_not_the_search_for_a_scale(copied: RunConfig) -> None:
    """fp16's first steps overflow until the loss scale fits. A run that only skips steps must not
    continue for days."""
    training = make(copied, "auto")
    for steps, skipped in ((5, 5), (1, 1), (10, 9), (10, 10), (9, 9)):
        training.run.check_overflows(steps, skipped)
    with pytest.raises(Diverged, match="all of the last 20 steps overflow"):
        training.run.check_overflows(1, 1)
    meter = Meter(training.accelerator, (), 3, torch.tensor(7))
    reading = meter.read(2)
    assert (reading.skipped, reading.reason) == (7, 2)
    meter.clear()
    assert meter.read().skipped == 0


# ---- checkpoints ----


def test_checkpoints_are_written_while_training_continues(
    whole: RunConfig, config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk must not delay the steps, and later steps must not leak into the checkpoint."""
    flush, released = checkpoint._flush, threading.Event()

    def slow(path: Path) -> None:
        released.wait(60)
        flush(path)

    monkeypatch.setattr(checkpoint, "_flush", slow)
    with monkeypatch.context() as patch:  # two steps after the checkpoint of step 4 was begun
        patch.setattr(Meter, "add", at_micro_batch(6, released.set))
        make(with_log(with_steps(config, 7), keep=9)).train()
    steps = [run_dir(each) / "checkpoints" / "step_4" for each in (config, whole)]
    assert_same_tensors(*steps)


def shrink(file: Path) -> None:
    content = file.read_bytes()
    file.unlink()  # it is shared, see `share`
    file.write_bytes(content[: len(content) // 2])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.unlink()
    file.write_bytes(content)


def swap(file: Path) -> None:
    """The same file of another checkpoint, undamaged in itself."""
    file.unlink()
    os.link(file.parent.with_name("step_4") / file.name, file)


def rewrite(file: Path, **changes: Any) -> None:
    record = json.loads(file.read_text()) | changes
    file.unlink()
    file.write_text(json.dumps(record))


def reshape(file: Path) -> None:
    weights = load_file(file)
    weights["center"] = torch.zeros(1, 9)
    file.unlink()
    save_file(weights, file)


def empty_momenta(file: Path) -> None:
    saved = torch.load(file, weights_only=True)
    saved["state"][0] = {"momentum": torch.zeros(2)}
    file.unlink()
    torch.save(saved, file)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("model.safetensors", shrink),
        ("model.safetensors", flip),
        ("model.safetensors", swap),
        ("optimizer.bin", flip),
        ("optimizer.bin", shrink),
        ("optimizer.bin", empty_momenta),
        ("optimizer.bin", Path.unlink),
        ("run.json", shrink),
        ("run.json", Path.unlink),
        ("run.json", swap),
        ("run.json", partial(rewrite, step="a")),
        ("run.json", partial(rewrite, meter="x")),
        ("run.json", partial(rewrite, data={})),
        ("run.json", partial(rewrite, config={})),
        ("run.json", partial(rewrite, sha256={}, step=10**9)),
        ("run.json", partial(rewrite, sha256={})),
        ("run.json", partial(rewrite, meter=[[1.0]])),
    ],
)
def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(
    copied: RunConfig, capsys: pytest.CaptureFixture[str], name: str, damage: Any
) -> None:
    """A power cut must not end a run that has an older checkpoint. The run must say so, and must
    not count the damaged one among the checkpoints that it keeps."""
    damage(run_dir(copied) / "checkpoints" / "step_8" / name)
    training = make(copied, "auto")
    said = capsys.readouterr().err
    assert training.run.step == 4 and said.count("warning") == 1 and len(said.splitlines()) == 1
    assert "step_8" in said and name in said and "resuming from " in said and "step_4" in said
    assert newest(copied).name == "step_4"
    assert (run_dir(copied) / "checkpoints" / "latest").resolve().name == "step_4"


def test_nothing_is_changed_where_every_checkpoint_is_damaged(copied: RunConfig) -> None:
    """A person has to decide then."""
    for step in ("step_8", "step_4"):
        shrink(run_dir(copied) / "checkpoints" / step / "model.safetensors")
    with pytest.raises(UserError, match=r"step_8/model\.safetensors: damaged"):
        make(copied, "auto")
    assert newest(copied).name == "step_8"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder with room for one and a half checkpoints. If we may not mount one, files have a
    limited size."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(folder)]
    if (
        os.geteuid() == 0
        and subprocess.run(mount, check=False, capture_output=True).returncode == 0
    ):
        yield folder
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
        return
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4_000_000, before[1]))
    yield folder
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_one_line(whole: RunConfig, small_disk: Path) -> None:
    """The write fails on another thread. The error must reach the main thread, older checkpoints
    must remain, and the partial one must go."""
    config = with_log(whole, dir=str(small_disk), every=1, checkpoint_every=2)
    with pytest.raises(UserError, match=r"step_\d+.partial: cannot be written \(") as full:
        make(config).train()
    assert "\n" not in str(full.value) and "last good checkpoint: " in str(full.value)
    assert not list(run_dir(config).glob("checkpoints/*.partial"))
    if found := checkpoint.latest(run_dir(config)):
        assert found.name == "step_2" and load_model(found)


def test_a_disk_that_hangs_is_one_line(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network file system that does not answer must not block the machines for ever."""
    released = threading.Event()
    monkeypatch.setattr(checkpoint, "_flush", lambda path: released.wait(60))
    with pytest.raises(UserError, match=r"checkpoints: writing: no answer for \d+ s"):
        impatient(with_steps(config, 1), 1).train()
    released.set()


# ---- trackers ----


class FaultyTracker(GeneralTracker):
    """Raises or sleeps in the method that `fault` names."""

    name = "faulty"
    requires_logging_directory = False
    tracker = None
    fault = ("", 0.0)

    def __init__(self, run_name: str, **options: Any) -> None:
        super().__init__()

    def start(self) -> None:
        self._act("start")

    def log(self, values: dict, step: int | None = None, **options: Any) -> None:
        self._act("log")

    def finish(self) -> None:
        self._act("finish")

    def _act(self, method: str) -> None:
        name, seconds = self.fault
        if name == method and seconds:
            time.sleep(seconds)
        elif name == method:
            raise ConnectionError("the server is gone")


@pytest.mark.parametrize("seconds", [0.0, 30.0])
@pytest.mark.parametrize("method", ["start", "log", "finish"])
def test_a_lost_tracker_is_one_line(
    config: RunConfig,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    method: str,
    seconds: float,
) -> None:
    """A server that is gone, or never answers, must not hang or end a run of days: metrics.jsonl
    has the same figures. A tracker that cannot start is a mistake that its user can still mend."""
    monkeypatch.setattr(FaultyTracker, "fault", (method, seconds))
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "tensorboard", FaultyTracker)
    config = with_log(with_steps(config, 2), trackers=("tensorboard",), every=1)
    expected = r"log\.trackers: .*(the server is gone|no answer for \d s)"
    if method == "start":
        with pytest.raises(UserError, match=expected):
            impatient(config, 8 if seconds else 60)
        return
    impatient(config, 8 if seconds else 60).train()
    assert [line["step"] for line in curve(config)] == [1, 2] and newest(config).name == "step_2"
    said = capsys.readouterr().err
    assert re.fullmatch(f"warning: {expected}.*; the run goes on without it\n", said)


# ---- other processes ----


@pytest.mark.parametrize("name", ["SIGKILL", "SIGSTOP"])
def test_a_dead_process_ends_the_other(config: RunConfig, name: str) -> None:
    """One of two processes dies or freezes, without a launcher that ends the other."""
    minutes = 0.5 if name == "SIGKILL" else 0.1  # without the process there is no wait
    two = Pair(with_log(config, timeout_minutes=minutes), f"{name}:2")
    try:
        code, said = two.end(0)
    finally:
        two.kill()
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert code == 1 and len(errors) == 1 and "Traceback" not in said, said
    assert "process 0 of 2: " in errors[0] and "another process" in errors[0]


def test_the_watchdog_ends_what_nothing_else_ends() -> None:
    """A GPU's collective waits for a dead process inside the driver and raises no exception."""
    code = (
        "import time\n"
        "from train.run.watchdog import Watchdog\n"
        "with Watchdog(0.5, 'runs/a') as watchdog:\n"
        "    for _ in range(8):\n"
        "        time.sleep(0.1)\n"
        "        watchdog.beat()\n"
        "    print('alive', flush=True)\n"
        "    time.sleep(60)\n"
    )
    ended = run_code(code)
    assert ended.returncode == 1 and ended.stdout == "alive\n"
    assert ended.stderr.startswith("error: runs/a: no step for ") and ended.stderr.count("\n") == 1
