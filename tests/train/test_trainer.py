"""The run as a whole: it trains, stops and resumes exactly where it stopped, but not with other
settings or data."""

import gc
import json
import os
import signal
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.augment import IMAGENET_MEAN, IMAGENET_STD
from pipeline.beton import Beton
from pipeline.errors import UserError
from tests.helpers.betons import varied, write_beton
from tests.helpers.killed import killed
from tests.helpers.manifests import damage
from tests.helpers.training import (
    TIMES,
    assert_same_tensors,
    launch,
    run_dir,
    small_beton,
    small_run,
    tensors,
    trainer,
    with_accumulation,
)
from train.config import RunConfig, load_config
from train.metrics import Meter
from train.pretrained import load_model
from train.run import checkpoint
from train.run.ends import Diverged
from train.trainer import Trainer, _pixels

METERED = (
    "loss",
    "grouping_12",
    "grouping_21",
    "slot_12",
    "slot_21",
    "active_slots",
    "active_pairs",
    "usage_entropy",
    "dead_prototypes",
    "near_duplicates",
)


@pytest.fixture(scope="module")
def beton(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_beton(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def whole(beton: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """An uninterrupted run of 10 steps, each of two micro-batches."""
    config = with_accumulation(small_run(beton, tmp_path_factory.mktemp("whole")), 2)
    trainer(config).train()
    return config


def curve(config: RunConfig) -> list[dict[str, float]]:
    """metrics.jsonl without the values that depend on the clock."""
    lines = (run_dir(config) / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]


def assert_same_run(one: RunConfig, other: RunConfig) -> None:
    assert curve(one) == curve(other)
    latest = [checkpoint.latest(run_dir(config)) for config in (one, other)]
    assert latest[0] and latest[1] and latest[0].name == latest[1].name
    assert_same_tensors(latest[0], latest[1])


def stop_in_step(monkeypatch: pytest.MonkeyPatch, config: RunConfig, step: int) -> None:
    """Train up to the first forward pass of step `step` (counted from 1), then fail."""
    add, done = Meter.add, []

    def failing(meter: Meter, output: object) -> None:
        add(meter, output)  # type: ignore[arg-type]
        done.append(1)
        if len(done) == step:
            raise RuntimeError("stopped by the test")

    with monkeypatch.context() as patch:
        patch.setattr(Meter, "add", failing)
        with pytest.raises(RuntimeError, match="stopped by the test"):
            trainer(config).train()


def test_a_run_writes_what_it_promises(whole: RunConfig) -> None:
    """The files and keys that the report, the evaluation and the README rely on."""
    folder = run_dir(whole)
    assert [line["step"] for line in curve(whole)] == [3, 6, 9, 10]
    line = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
    expected = ["step", "epoch", *METERED, "lr", "teacher_momentum", *TIMES]
    assert list(line) == expected and all(np.isfinite(list(line.values())))
    assert line["epoch"] == 0.6 and 0 <= line["wait_share"] <= 1
    assert load_config(["--config", str(folder / "config.yaml")]) == (whole, None)
    saved = {path.name for path in (folder / "checkpoints").iterdir()}
    assert saved == {"step_8", "step_10", "latest"}  # keep: 2, and the last step always
    assert (folder / "checkpoints" / "latest").resolve().name == "step_10"


def test_training_learns(whole: RunConfig) -> None:
    """The loss must fall: a trainer that never steps its optimiser passes most other tests."""
    losses = [line["loss"] for line in curve(whole)]
    assert losses[-1] < losses[0]
    model, _ = load_model(run_dir(whole))
    student, teacher = model.student.state_dict(), model.teacher.state_dict()
    moved = [name for name in student if not torch.equal(student[name], teacher[name])]
    assert len(moved) > len(student) / 2  # the teacher lags behind


def test_killed_in_mid_step_and_resumed_is_exact(
    whole: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL between the two micro-batches of step 7. The last log line (6) is younger than the
    newest checkpoint (4, in the middle of an epoch and of that line's average). The files on the
    disk must be enough to repeat steps 5 and 6 bit for bit, and no line may appear twice."""
    config = replace(whole, log=replace(whole.log, dir=str(tmp_path)))
    monkeypatch.setenv("KILL_AT", "13")
    ended = launch(config)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    newest = checkpoint.latest(run_dir(config))
    assert newest and newest.name == "step_4" and len(curve(config)) == 2
    with (run_dir(config) / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # a torn line, as after a power cut
    trainer(config, "auto").train()
    assert_same_run(config, whole)


def train(config: RunConfig, resume: str | None = None) -> None:
    trainer(config, resume).train()


@pytest.mark.parametrize("at", [17, 38])
def test_killed_elsewhere_the_curve_is_the_same(whole: RunConfig, tmp_path: Path, at: int) -> None:
    """SIGKILL before the log line of step 6, and when the last checkpoint is just written.
    Without it a resumed run has another curve than one that was never killed."""
    config = replace(whole, log=replace(whole.log, dir=str(tmp_path)))
    assert killed(at, train, config)
    train(config, "auto")
    assert curve(config) == curve(whole)


def test_stopping_early_and_resuming_is_exact(whole: RunConfig, tmp_path: Path) -> None:
    """max_steps must not change the schedules. It may change at a resume, and so may settings of
    speed and log."""
    log = replace(whole.log, dir=str(tmp_path))
    config = replace(whole, log=log, train=replace(whole.train, max_steps=6))
    trainer(config).train()
    newest = checkpoint.latest(run_dir(config))
    assert newest and newest.name == "step_6"
    config = replace(whole, log=replace(log, keep=9), data=replace(whole.data, threads=2))
    trainer(config, "auto").train()
    assert_same_run(config, whole)


def test_a_trainer_is_freed_with_its_last_name(beton: Path, tmp_path: Path) -> None:
    """Without it a circle of references keeps the model's memory and the lock on the run's folder
    until the garbage collector comes, and the run cannot go on in another process."""
    gc.collect()
    gc.disable()
    try:
        freed = weakref.ref(trainer(small_run(beton, tmp_path)))
        assert freed() is None
    finally:
        gc.enable()


def test_two_processes(beton: Path, tmp_path: Path) -> None:
    """Both ranks must form a group, end with the same weights, and leave one checkpoint that a
    single process can load."""
    config = small_run(beton, tmp_path, max_steps=3)
    ended = launch(config, processes=2)
    assert ended.returncode == 0, ended.stderr
    assert "2 x cpu" in ended.stdout and ended.stdout.count("step 3/3") == 1
    ranks = [torch.load(tmp_path / f"run.rank{rank}", weights_only=True) for rank in (0, 1)]
    model, _ = load_model(run_dir(config))
    parameters = dict(model.named_parameters())
    for name, value in parameters.items():
        assert torch.equal(ranks[0][name], ranks[1][name]) and torch.equal(ranks[0][name], value)
    assert torch.equal(ranks[0]["center"], ranks[1]["center"])
    with pytest.raises(UserError, match="a batch of 4 images cannot be shared"):
        trainer(with_accumulation(replace(config, name="odd"), 3))
    trainer(replace(config, train=replace(config.train, max_steps=5)), "auto").train()
    assert [line["step"] for line in curve(config)] == [3, 5]


def test_death_of_one_process_ends_the_others(
    beton: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the system kills a process for its memory, the others must not wait for its share of a
    step. Threads load the data, so loading cannot die alone.
    """
    monkeypatch.setenv("KILL_AT", "2")
    monkeypatch.setenv("KILL_RANK", "1")
    ended = launch(small_run(beton, tmp_path), processes=2)
    assert ended.returncode not in (0, None) and "SIGKILL" in ended.stderr
    assert not (tmp_path / "run.rank0").exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"backend": "triton"}, "data.backend: triton needs a GPU"),
        ({"order": "sequential"}, "data.order was random"),
    ],
)
def test_data_settings_that_cannot_work_are_refused(
    whole: RunConfig,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    change: dict[str, str],
    says: str,
) -> None:
    """The error must come before hours of work. Another order would show images twice."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    config = replace(whole, data=replace(whole.data, **change))
    with pytest.raises(UserError, match=says):
        trainer(config, "auto")


@pytest.mark.parametrize("order", ["quasi-random", "sequential"])
def test_orders_and_host_crops_train_and_resume(beton: Path, tmp_path: Path, order: str) -> None:
    """The settings reach the loader, and a resume in mid-epoch reads the same images."""
    config = small_run(beton, tmp_path, max_steps=3)
    config = replace(config, data=replace(config.data, crops="host", order=order))
    trainer(config).train()
    resumed = replace(config, train=replace(config.train, max_steps=4))
    trainer(resumed, "auto").train()
    straight = replace(resumed, name="straight")
    trainer(straight).train()
    names = [run_dir(c) / "checkpoints" / "step_4" for c in (resumed, straight)]
    assert_same_tensors(*names)


def test_divergence_stops_before_a_checkpoint(beton: Path, tmp_path: Path) -> None:
    """A learning rate of 1e25 makes the second step infinite: the run must say so and must not
    change step 1."""
    config = small_run(beton, tmp_path)
    object.__setattr__(config.train, "base_lr", 1e25)  # beyond the setting's bound
    config = replace(config, log=replace(config.log, every=100, checkpoint_every=1))
    with pytest.raises(Diverged, match=r"not finite at step \d+; last good checkpoint: .*step_\d+"):
        trainer(config).train()
    for name in checkpoint.latest(run_dir(config)), checkpoint.find(run_dir(config)):
        assert name and all(t.isfinite().all() for t in tensors(name).values())


def test_infinite_weights_are_never_saved(whole: RunConfig, tmp_path: Path) -> None:
    """A step computes its loss before its update, so a finite loss does not imply finite
    weights."""
    training = trainer(replace(whole, log=replace(whole.log, dir=str(tmp_path))))
    with torch.no_grad():
        training.slotcon.student.grouping.prototypes[0, 0] = torch.inf
    with pytest.raises(Diverged, match="a weight is not finite"):
        training._checkpoint()
    assert checkpoint.latest(training.run.folder) is None


@pytest.mark.parametrize(
    ("section", "change", "says"),
    [
        ("views", {"size": 96}, "views.size was 64"),
        ("model", {"num_prototypes": 9}, "model.num_prototypes was 8"),
        ("train", {"epochs": 9}, "train.epochs was 2"),
        ("train", {"seed": 1}, "train.seed was 0"),
    ],
)
def test_resume_keeps_the_science(
    whole: RunConfig, section: str, change: dict[str, int], says: str
) -> None:
    """Otherwise one curve would mix two recipes."""
    config = replace(whole, **{section: replace(getattr(whole, section), **change)})
    with pytest.raises(UserError, match=says):
        trainer(config, "auto")


def test_resume_keeps_the_data(whole: RunConfig, tmp_path: Path) -> None:
    """With other images under the same name, positions and indices have another meaning."""
    other = write_beton(tmp_path / "other.beton", varied(23))
    config = replace(whole, data=replace(whole.data, path=str(other)))
    with pytest.raises(UserError, match=r"data.path: .* is not the data of "):
        trainer(config, "auto")


def test_checkpoints_are_not_overwritten(whole: RunConfig, beton: Path, tmp_path: Path) -> None:
    """Starting the same command twice must not destroy the first run or mix two runs."""
    with pytest.raises(UserError, match="already holds checkpoints, up to step_10"):
        trainer(whole)
    with pytest.raises(UserError, match="not the checkpoint to resume from"):
        trainer(whole, str(run_dir(whole) / "checkpoints" / "step_8"))
    with pytest.raises(UserError, match="no such checkpoint"):
        trainer(whole, str(tmp_path / "nothing"))


def test_a_restart_by_torchrun_goes_on(whole: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it `--max_restarts` only repeats the refusal above. An older run stays as it is."""
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    newest = run_dir(whole) / "checkpoints" / "step_10"
    written = newest.stat().st_mtime
    for resume in (None, str(newest.with_name("step_8"))):
        assert trainer(whole, resume).run.step == 10
    os.utime(newest, (1.0, 1.0))
    try:
        with pytest.raises(UserError, match="already holds checkpoints, up to step_10"):
            trainer(whole)
    finally:
        os.utime(newest, (written, written))


def test_a_new_run_may_start_from_a_checkpoint_of_another(whole: RunConfig, tmp_path: Path) -> None:
    """--resume PATH with a new name repeats the steps after that checkpoint, exactly."""
    config = replace(whole, log=replace(whole.log, dir=str(tmp_path)))
    training = trainer(config, str(run_dir(whole) / "checkpoints" / "step_8"))
    assert training.run.step == 8
    training.train()
    assert curve(config) == curve(whole)[-2:]


def test_damaged_images_stop_the_run(beton: Path, tmp_path: Path) -> None:
    """An error of a decoding thread must name the file and end the run, without a hang."""
    damaged = tmp_path / "damaged.beton"
    damaged.write_bytes(beton.read_bytes())
    pointer, size = Beton(beton).records[7, :2]
    with damaged.open("r+b") as file:
        file.seek(pointer)
        file.write(bytes(size))
    with pytest.raises(UserError, match=r"damaged.beton"):
        trainer(small_run(damaged, tmp_path)).train()


def test_fp16_needs_a_gpu(beton: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU fp16 would be slow at best. The authors' configs use it, so the line must be
    clear."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    config = small_run(beton, tmp_path)
    config = replace(config, efficiency=replace(config.efficiency, precision="fp16"))
    with pytest.raises(UserError, match="fp16 needs a CUDA GPU"):
        trainer(config)


def test_bf16_trains(beton: Path, tmp_path: Path) -> None:
    """Autocast must cover the whole step, and weights must stay float32."""
    config = small_run(beton, tmp_path, max_steps=2)
    config = replace(config, efficiency=replace(config.efficiency, precision="bf16"))
    training: Trainer = trainer(config)
    training.train()
    assert all(p.dtype == torch.float32 for p in training.slotcon.parameters())
    assert np.isfinite(curve(config)[0]["loss"])


def test_tensorboard_gets_the_curve_once(
    beton: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The default tracker must hold each log line once, also after a resume."""
    config = small_run(beton, tmp_path)
    config = replace(config, log=replace(config.log, trackers=("tensorboard",)))
    stop_in_step(monkeypatch, config, 7)
    config = replace(config, train=replace(config.train, max_steps=6))
    trainer(config, "auto").train()
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    events = event_accumulator.EventAccumulator(str(run_dir(config) / "slotstream"))
    events.Reload()
    points = events.Scalars("loss")
    assert [point.step for point in points] == [3, 6]
    losses = [line["loss"] for line in curve(config)]
    np.testing.assert_allclose([point.value for point in points], losses, rtol=1e-6)
    (views,) = events.Images("views")
    assert (views.step, views.width, views.height) == (0, 4 * 64, 2 * 64)


def test_pictures_of_views_show_the_images() -> None:
    """A wrong order of axes, or without the mean, would show a tracker's user noise."""
    pixels = torch.randint(0, 256, (2, 3, 5, 5, 3), dtype=torch.uint8)
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    views = ((pixels / 255 - mean) / std).permute(0, 1, 4, 2, 3)
    picture = _pixels(views)
    assert picture.shape == (10, 15, 3)
    for view, image in ((0, 0), (1, 2)):
        part = picture[5 * view : 5 * view + 5, 5 * image : 5 * image + 5]
        np.testing.assert_array_equal(part, pixels[view, image].numpy())


def test_corrupt_image_stops_the_run_or_is_replaced(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The error must name the image, and a run that continues must warn."""
    path = small_beton(tmp_path)
    damage(path, int(Beton(path).records[3, 0]), bytes(20))
    config = small_run(path, tmp_path, "stop", max_steps=5)
    with pytest.raises(UserError, match="record 3: not a JPEG"):
        trainer(replace(config, train=replace(config.train, max_steps=10))).train()
    data = replace(config.data, on_corrupt="replace", max_replaced=0.2)
    training = trainer(replace(config, name="replace", data=data))
    training.train()
    assert training.run.step == 5
    assert curve(replace(config, name="replace"))[-1]["replaced"] == 1
    assert "record 3: not a JPEG" in capfd.readouterr().err


def variants(beton: Path, folder: Path, **train: int) -> RunConfig:
    """A run with all ablations at once."""
    config = small_run(beton, folder, **train)
    model = replace(
        config.model, slot_loss="regression", align="projections", image_loss_weight=0.5
    )
    return replace(config, model=model, views=replace(config.views, geometry=False))


def test_a_variant_trains_and_resumes(beton: Path, tmp_path: Path) -> None:
    """Its loss term must reach the log, its predictor the checkpoint, also after a resume."""
    config = variants(beton, tmp_path, max_steps=2)
    trainer(replace(config, train=replace(config.train, max_steps=1))).train()
    before, _ = load_model(run_dir(config))
    trainer(config, "auto").train()
    after, found = load_model(run_dir(config))
    assert found == config
    assert before.image_predictor and after.image_predictor
    weights = [list(model.image_predictor.parameters()) for model in (before, after)]
    assert not any(torch.equal(*pair) for pair in zip(*weights, strict=True) if pair[0].ndim > 1)
    assert all(line["image"] > 0 for line in curve(config))


def test_one_image_has_no_batch_statistics(beton: Path, tmp_path: Path) -> None:
    """Otherwise the image-level predictor's BatchNorm would fail during training, without naming a
    setting."""
    with pytest.raises(UserError, match=r"train\.batch_size: .* leave one image"):
        trainer(variants(beton, tmp_path, batch_size=1))
