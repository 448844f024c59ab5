"""A run of either task: its files, its exact resume, its end."""

import json
import multiprocessing
import re
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline.errors import UserError
from tests.helpers.tiny_task import (
    IMAGES,
    NAMES,
    DataConfig,
    ModelConfig,
    TinyConfig,
    TinyTask,
    command,
    in_this_process,
    launched,
    tiny_config,
    trainer,
)
from train.run import checkpoint
from train.run.ends import Diverged, Stopped
from train.run.signals import StopSignals
from train.run.watchdog import Watchdog
from transfer import statistics
from transfer.command import settings_of
from transfer.examples import Order, generator
from transfer.scoring import evaluation
from transfer.step import beat_in_forward, place
from transfer.task import Row


def run_dir(config: TinyConfig) -> Path:
    return Path(config.log.dir) / config.name


def tensors(config: TinyConfig) -> dict[str, torch.Tensor]:
    """Weights, statistics and momenta of the newest checkpoint."""
    newest = run_dir(config) / "checkpoints" / "latest"
    found = load_file(newest / "model.safetensors")
    state = torch.load(newest / "optimizer.bin", weights_only=True)["state"]
    return found | {f"momentum {n}": value["momentum_buffer"] for n, value in state.items()}


def assert_same_run(one: TinyConfig, other: TinyConfig) -> None:
    """Equal bits, equal scores."""
    a, b = tensors(one), tensors(other)
    assert a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)
    assert result(one)["results"] == result(other)["results"]


def result(config: TinyConfig) -> dict[str, Any]:
    return json.loads((run_dir(config) / "result.json").read_text())  # type: ignore[no-any-return]


def lines(config: TinyConfig) -> list[dict[str, Any]]:
    text = (run_dir(config) / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> TinyConfig:
    """A run of 15 steps without an interruption."""
    config = tiny_config(tmp_path_factory.mktemp("whole"), "whole", precise_bn=2)
    trainer(config).train()
    return config


def test_a_run_writes_its_result(whole: TinyConfig) -> None:
    """Tables and users read these values."""
    written = result(whole)
    assert written.keys() >= {"hardware", "versions", "command"}
    assert (written["task"], written["dataset"], written["step"]) == (
        "classification",
        "bright",
        15,
    )
    assert written["schedule"] == {"steps": 15, "batch_size": 4}
    assert written["init"]["weights"] == "random"
    assert [row["metric"] for row in written["results"]] == ["accuracy", "accuracy"]
    cost = written["cost"]
    assert cost["memory"] == "host" and cost["peak_memory_bytes"] > 1e6
    assert written["images"] == 22 and written["scored"] == {
        "dataset": "bright", "images": 7, "fingerprint": "0" * 64, "classes": list(NAMES),
    }  # fmt: skip
    assert cost["images_per_s"] == pytest.approx(4 * cost["steps_per_s"])
    losses = [line for line in lines(whole) if "loss" in line]
    assert [line["step"] for line in losses] == [3, 6, 9, 12, 15]
    for line in losses:
        assert line["loss"] == pytest.approx(line["class"] + line["size"])
    assert lines(whole)[-1] == {"step": 15, "results": written["results"]}


def test_it_learns(tmp_path: Path) -> None:
    """A trainer that never changes the weights passes all other tests."""
    config = tiny_config(tmp_path, steps=75)
    config = replace(config, log=replace(config.log, evaluate_every=30))
    trainer(config).train()
    losses = [line["loss"] for line in lines(config) if "loss" in line]
    assert losses[-1] < 0.7 * losses[0]
    scored = [line["step"] for line in lines(config) if "results" in line]
    assert scored == [30, 60, 75]


def test_steps_follow_the_schedule(tmp_path: Path) -> None:
    """The optimiser, and not only the log, must use the scheduled rate."""
    run = trainer(tiny_config(tmp_path, lr=0.5, warmup_steps=10, warmup_factor=0.0, max_steps=6))
    run.train()
    expected = 0.5 * 5 / 10 * (1 - 5 / 15) ** 0.9  # warm-up times "poly", of the sixth step
    assert [group["lr"] for group in run.sgd.param_groups] == pytest.approx([expected] * 2)


def test_scores_use_precise_statistics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each evaluation, and nothing else, averages statistics over `precise_bn` batches."""
    counts = []
    evaluate = TinyTask.evaluate

    def noted(task: TinyTask, model: torch.nn.Module, *rest: Any) -> list[Row]:
        counts.append(int(model.get_buffer("features.1.num_batches_tracked")))
        return evaluate(task, model, *rest)

    monkeypatch.setattr(TinyTask, "evaluate", noted)
    config = tiny_config(tmp_path, precise_bn=2)
    run = trainer(replace(config, log=replace(config.log, evaluate_every=6)))
    run.train()
    assert counts == [2, 2, 2]
    assert run.net.get_buffer("features.1.num_batches_tracked") == 15


def test_norms_cover_all_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The authors' setting: statistics of two images alone are too noisy to learn from."""
    config = tiny_config(tmp_path)
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, *_, **__: self)
    for processes, kind in ((1, torch.nn.BatchNorm2d), (2, torch.nn.SyncBatchNorm)):
        gpus = SimpleNamespace(num_processes=processes, device=torch.device("cuda"))
        model = place(TinyTask(config).model, config, gpus)  # type: ignore[arg-type]
        assert type(model.get_submodule("features.1")) is kind


def test_every_forward_is_a_sign_of_life(tmp_path: Path) -> None:
    """The watchdog must not take an evaluation of hours for a hang."""
    model = TinyTask(tiny_config(tmp_path)).model
    watching = Watchdog(600, "run")
    beat_in_forward(model, watching)
    batch = {"image": torch.zeros(2, 3, 8, 8), "label": torch.zeros(2, dtype=torch.int64)}
    for mode in (True, False):
        watching._waited = 1.0
        model.train(mode)(batch)
        assert watching._waited == 0.0


def test_mixed_precision(tmp_path: Path) -> None:
    """Losses, scores and precise statistics are in bf16, weights and checkpoints in float32. The
    error of fp16 says that it needs a GPU."""
    config = tiny_config(tmp_path, max_steps=2, precise_bn=1)
    config = replace(config, efficiency=replace(config.efficiency, precision="bf16"))
    trainer(config).train()
    weights = [value for value in tensors(config).values() if value.is_floating_point()]
    assert {value.dtype for value in weights} == {torch.float32}
    if not torch.cuda.is_available():
        config = replace(config, efficiency=replace(config.efficiency, precision="fp16"))
        with pytest.raises(UserError, match=r"efficiency.precision: fp16 needs a CUDA GPU"):
            trainer(config, "auto")


@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_in_mid_epoch_is_the_same_run(
    whole: TinyConfig, tmp_path: Path, workers: int
) -> None:
    """A run that resumes with other images, random numbers or momenta is another run; so is a run
    whose examples depend on the number of workers."""
    config = replace(whole, name="resumed", log=replace(whole.log, dir=str(tmp_path)))
    config = replace(config, efficiency=replace(config.efficiency, workers=workers))
    trainer(replace(config, optim=replace(config.optim, max_steps=7))).train()
    moved = replace(config, data=DataConfig(root="elsewhere"))
    trainer(moved, "auto").train()
    assert_same_run(config, whole)
    steps = [line["step"] for line in lines(config) if "loss" in line]
    assert steps == [3, 6, 7, 9, 12, 15]


def test_a_signal_ends_with_a_checkpoint_and_75(whole: TinyConfig, tmp_path: Path) -> None:
    """A scheduler takes the machine away. No step is lost; code 75 asks for a new start."""
    config = replace(whole, name="stopped", log=replace(whole.log, dir=str(tmp_path)))
    config = replace(config, efficiency=replace(config.efficiency, workers=1))
    ended = launched(config, STOP_AT="6")
    assert ended.returncode == 75, ended.stderr
    # Another thread receives the signal; a few of these tiny steps pass meanwhile.
    stopped = re.fullmatch(r".*: stopped by SIGTERM at step (\d+), which has .*\n", ended.stderr)
    assert stopped and 6 <= int(stopped[1]) < 15, ended.stderr
    trainer(config, "auto").train()
    assert_same_run(config, whole)


def test_a_signal_at_the_last_step_finishes(tmp_path: Path) -> None:
    """Code 75 would start a finished run again for nothing."""
    config = tiny_config(tmp_path, max_steps=1)
    signals = StopSignals()
    signals.received = signal.SIGTERM
    trainer(config, signals=signals).train()
    assert result(config)["step"] == 1
    with pytest.raises(Stopped, match="step 2, which has a checkpoint"):
        trainer(replace(config, optim=replace(config.optim, max_steps=9)), "auto", signals).train()


def test_two_processes_share_the_steps(tmp_path: Path) -> None:
    """Each process takes half the images of a step; the score covers all held-out images."""
    plain = replace(tiny_config(tmp_path, "one"), model=ModelConfig(norm=False, dropout=0))
    trainer(plain).train()
    both = replace(plain, name="two")
    ended = launched(both, processes=2)
    assert ended.returncode == 0, ended.stderr
    one, two = tensors(plain), tensors(both)
    for name, value in one.items():
        assert torch.allclose(value, two[name], atol=1e-6), name
    assert result(both)["results"] == result(plain)["results"]


def test_two_processes_print_a_mistake_once(whole: TinyConfig) -> None:
    """The lines of 64 processes would bury the message."""
    options = ("--evaluate", str(run_dir(whole)), "--optim.batch_size", "3")
    ended = launched(whole, *options, processes=2)
    assert ended.returncode == 1 and ended.stderr.count("error: optim.batch") == 1, ended.stderr


def test_steps_go_through_all_images() -> None:
    """An image that comes twice in an epoch, or on two ranks, would count double."""
    optim = tiny_config(Path()).optim
    shares = [list(Order(IMAGES, optim, rank, 2).steps(3, 12)) for rank in (0, 1)]
    whole = list(Order(IMAGES, optim, 0, 1).steps(3, 12))
    assert [a + b for a, b in zip(*shares, strict=True)] == whole
    epoch = [visit for step in whole[2:7] for visit in step]
    assert {e for _, e in epoch} == {1} and len({i for i, _ in epoch}) == 20
    assert generator(0, 1, 2).random() != generator(0, 2, 1).random()
    with pytest.raises(UserError, match="4 images are more than the 3"):
        Order(3, optim, 0, 1)
    with pytest.raises(UserError, match="cannot be shared equally by 3"):
        Order(IMAGES, optim, 0, 3)


def test_divergence_names_the_last_good_checkpoint(tmp_path: Path) -> None:
    """The run must not train on with a NaN for a day, or save it."""
    config = replace(tiny_config(tmp_path), data=DataConfig(nan_epoch=1))
    with pytest.raises(Diverged, match=r"loss is not finite at step 6; last good .*/step_4$"):
        trainer(config).train()
    config = replace(config, name="none", data=DataConfig(nan_epoch=0))
    with pytest.raises(Diverged, match=r"at step 3; last good checkpoint: none"):
        trainer(config).train()


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_example_is_one_line(tmp_path: Path, workers: int) -> None:
    """A worker's traceback would hide the name of the file."""
    config = replace(tiny_config(tmp_path), data=DataConfig(unreadable=5))
    config = replace(config, efficiency=replace(config.efficiency, workers=workers))
    with pytest.raises(UserError) as refused:
        trainer(config).train()
    assert str(refused.value) == "image 5: cannot be read"
    assert not multiprocessing.active_children()


def test_an_error_leaves_no_workers(tmp_path: Path) -> None:
    """Workers ignore SIGTERM, so Python would wait for them for ever at its end."""
    config = replace(tiny_config(tmp_path), data=DataConfig(nan_epoch=0))
    config = replace(config, efficiency=replace(config.efficiency, workers=2))
    with pytest.raises(Diverged) as diverged:
        trainer(config).train()
    assert diverged.tb and not multiprocessing.active_children()


def test_a_worker_that_ends_is_one_line(tmp_path: Path) -> None:
    """The kernel kills a worker if memory is short. torch then prints pages, or waits."""
    config = replace(tiny_config(tmp_path), data=DataConfig(lethal=5))
    config = replace(config, efficiency=replace(config.efficiency, workers=1))
    with pytest.raises(UserError, match=r"^efficiency.workers: a worker has ended .*memory"):
        trainer(config).train()


@pytest.mark.parametrize(
    ("precise_bn", "changes", "says"),
    [
        (2, {"images": 99}, r"bright, 99 images, .*; it was bright, 22 images"),
        (0, {"classes": ["red", "blue", "green"]}, "differs is number 2: blue; it was green"),
        (0, {"classes": ["red"]}, "1 classes, but .* on 3 .* number 2: none; it was green"),
    ],
)
def test_other_data_is_refused(
    whole: TinyConfig,
    monkeypatch: pytest.MonkeyPatch,
    precise_bn: int,
    changes: dict[str, Any],
    says: str,
) -> None:
    """A resume with other images is another run. Scores with another order of classes, or with
    statistics of other images, mean nothing."""
    build = TinyTask.__init__

    def changed(task: TinyTask, config: TinyConfig) -> None:
        build(task, config)
        task.data |= changes

    monkeypatch.setattr(TinyTask, "__init__", changed)
    with pytest.raises(UserError, match=says):
        trainer(whole, "auto")
    with pytest.raises(UserError, match="already holds checkpoints"):
        trainer(whole)
    config = replace(whole, optim=replace(whole.optim, precise_bn=precise_bn))
    origin, settings = checkpoint.find(run_dir(whole)), settings_of(TinyConfig)
    with pytest.raises(UserError, match=says):
        in_this_process(lambda: evaluation(config, TinyTask, settings, origin))


def test_a_checkpoint_is_scored_by_itself(
    whole: TinyConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """--evaluate repeats the scores of a run from its checkpoint, which holds its settings."""
    before = sorted(path.name for path in run_dir(whole).iterdir())
    out = tmp_path / "scores.json"
    in_this_process(lambda: command(["--evaluate", str(run_dir(whole)), "--json", str(out)]))
    scores, expected = json.loads(out.read_text()), result(whole)
    assert scores["results"] == expected["results"] and scores["step"] == 15
    assert scores["init"] == expected["init"] and "cost" not in scores
    assert sorted(path.name for path in run_dir(whole).iterdir()) == before
    with pytest.raises(SystemExit):
        command(["--evaluate", str(run_dir(whole)), "--resume", "auto"])
    assert "error: --resume is for training, --evaluate for scoring" in capsys.readouterr().err
    its_result = run_dir(whole) / "result.json"
    with pytest.raises(SystemExit):  # only this file holds the cost of the run
        command(["--evaluate", str(run_dir(whole)), "--json", str(its_result)])
    assert result(whole) == expected


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--json", "a.json"], "error: --json is for --evaluate"),
        (["--config", '{"evaluate": "runs/a"}'], "error: evaluate: belongs on the command line"),
        (["--evaluate", "nowhere"], "error: nowhere: no such checkpoint or run folder"),
        (["--optim.lr", "0"], "error: optim.lr must be a positive number, not 0"),
    ],
)
def test_mistakes_are_one_line(
    argv: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line, no traceback, no usage text, exit code 2."""
    base = ["--name", "a", "--log.dir", str(tmp_path), "--optim.steps", "9"]
    base += ["--optim.batch_size", "4", "--optim.lr", "0.1"]
    with pytest.raises(SystemExit) as ended:
        command([*base, *argv])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.startswith(says) and error.count("\n") == 1


def test_precise_statistics_are_means_and_go_away() -> None:
    """Running statistics hold only the last batches, which is noise. Training continues with its
    own afterwards."""
    torch.manual_seed(0)
    norm = torch.nn.BatchNorm1d(3).train()
    norm(torch.randn(8, 3))
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    inputs = [torch.randn(8, 3) for _ in range(4)]
    with statistics.measured(norm, (norm(each) for each in inputs)):
        mean = torch.stack([each.mean(dim=0) for each in inputs]).mean(dim=0)
        var = torch.stack([each.var(dim=0) for each in inputs]).mean(dim=0)
        assert torch.allclose(norm.running_mean, mean, atol=1e-6)  # type: ignore[arg-type]
        assert torch.allclose(norm.running_var, var, atol=1e-6)  # type: ignore[arg-type]
    assert all(value.equal(before[name]) for name, value in norm.state_dict().items())
    assert norm.momentum == 0.1
