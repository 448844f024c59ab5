"""Evaluation while a run trains: it changes nothing in the training, it survives every end, and
what it decides (the best checkpoint, the end on a plateau) is right."""

import json
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import nn

from evaluation.datasets.squares import SquareImages
from model.encoder import Encoder
from pipeline.errors import UserError
from tests import ROOT
from tests.helpers.killed import killed
from tests.helpers.labelled_sets import write_folder_set
from tests.helpers.runs import in_this_process, launch_module
from tests.helpers.training import (
    TIMES,
    assert_same_tensors,
    run_dir,
    small_beton,
    small_run,
    trainer,
)
from train.config import EfficiencyConfig, RunConfig, from_dict
from train.eval_config import EvalConfig
from train.init_config import InitConfig
from train.pretrain import open_evaluation
from train.pretrained import load_model
from train.run import checkpoint
from train.run.ends import EarlyEnd, Plateau, Stopped
from train.run.settings import to_dict, to_yaml
from train.run.signals import StopSignals
from train.trainer import Trainer


@pytest.fixture(scope="module")
def beton(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_beton(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("labelled")
    write_folder_set(root, train=4, val=3)
    return root


def settings(root: Path, every: int = 3, **more: Any) -> EvalConfig:
    folders = {
        f"{prefix}{name}": str(root / part / name)
        for part, prefix in (("val", ""), ("train", "train_"))
        for name in ("images", "labels")
    }
    return EvalConfig(every, batch_size=2, **{**folders, **more})


@pytest.fixture(scope="module")
def whole(beton: Path, labelled: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """An uninterrupted run of 10 steps, evaluated at steps 0, 3, 6, 9, 10."""
    config = small_run(beton, tmp_path_factory.mktemp("whole"))
    config = replace(config, eval=settings(labelled))
    trainer(config).train()
    return config


def lines(config: RunConfig) -> list[dict[str, Any]]:
    """metrics.jsonl without times."""
    texts = (run_dir(config) / "metrics.jsonl").read_text().splitlines()
    clocks = (*TIMES, "eval_seconds")
    return [{k: v for k, v in json.loads(text).items() if k not in clocks} for text in texts]


def scored(config: RunConfig) -> list[int]:
    return [line["step"] for line in lines(config) if "results" in line]


def assert_same_run(one: RunConfig, other: RunConfig) -> None:
    assert lines(one) == lines(other)
    folders = [run_dir(config) / "checkpoints" for config in (one, other)]
    for name in ("latest", "best"):
        assert (folders[0] / name).resolve().name == (folders[1] / name).resolve().name
    assert_same_tensors(folders[0] / "latest", folders[1] / "latest")


class Scripted:
    """An evaluation that gives the scores of a list, one after the other. It draws from torch's
    generator, as a careless one might."""

    def __init__(self, *scores: float) -> None:
        self.scores = iter(scores)

    def __call__(self, teacher: nn.Module, pulse: Callable[[], None]) -> dict[str, float]:
        torch.rand(3)
        pulse()
        score = next(self.scores)
        return {"knn_miou": score} if score == score else {"not_finite": 1.0}


def scripted(config: RunConfig, *scores: float, resume: str | None = None) -> Trainer:
    return in_this_process(
        lambda: Trainer(config, resume, open_evaluation=lambda *_: Scripted(*scores))
    )


def ended(train: Callable[[], object]) -> EarlyEnd:
    with pytest.raises(EarlyEnd) as end:
        train()
    return end.value


def test_training_is_the_same_bit_for_bit(whole: RunConfig, tmp_path: Path) -> None:
    """Without it a run that is watched is another run than one that is not."""
    plain = replace(whole, eval=EvalConfig(), log=replace(whole.log, dir=str(tmp_path)))
    trainer(plain).train()
    assert lines(plain) == [line for line in lines(whole) if "results" not in line]
    newest = [checkpoint.latest(run_dir(config)) for config in (plain, whole)]
    assert newest[0] and newest[1] and newest[0].name == newest[1].name == "step_10"
    assert_same_tensors(newest[0], newest[1])
    for file in ("model.safetensors", "optimizer.bin"):
        assert (newest[0] / file).read_bytes() == (newest[1] / file).read_bytes()


def test_evaluation_leaves_the_network_alone(
    beton: Path, labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The teacher's own code does not run: it may be compiled for another size. Neither weights,
    buffers, modes nor random state change. Without it the next step differs."""
    config = small_run(beton, tmp_path)
    training = trainer(replace(config, eval=settings(labelled)))
    teacher = training.slotcon.teacher
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    modes = [module.training for module in teacher.modules()]
    states = torch.get_rng_state(), np.random.get_state()[1]  # noqa: NPY002
    monkeypatch.setattr(teacher.encoder, "forward", None)
    training.evaluations.evaluate(teacher)
    assert scored(config) == [0]
    assert torch.equal(states[0], torch.get_rng_state())
    assert np.array_equal(states[1], np.random.get_state()[1])  # noqa: NPY002
    assert modes == [module.training for module in teacher.modules()] and all(modes)
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    careless = scripted(replace(config, name="other", eval=EvalConfig(3)), 0.5)
    state = torch.get_rng_state()
    careless.evaluations.evaluate(teacher)
    assert torch.equal(state, torch.get_rng_state())


def train(config: RunConfig, resume: str | None = None) -> None:
    trainer(config, resume).train()


@pytest.mark.parametrize("at", [11, 29])
def test_killed_and_resumed_is_exact(whole: RunConfig, tmp_path: Path, at: int) -> None:
    """SIGKILL after the scores of step 3 are written, before its checkpoint; and after the scores
    of step 6. Without it a line appears twice, or the best score is forgotten."""
    config = replace(whole, log=replace(whole.log, dir=str(tmp_path)))
    assert killed(at, train, config)
    assert "results" in lines(config)[-1]
    train(config, "auto")
    assert_same_run(config, whole)
    states = [
        json.loads((run_dir(each) / "checkpoints/latest/run.json").read_text())["provenance"][
            "eval"
        ]
        for each in (config, whole)
    ]
    assert states[0] == states[1] and states[0]["last"] == 10


@pytest.mark.parametrize("step", [6, 10])
def test_a_signal_in_the_middle(
    whole: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """SIGTERM while an evaluation reads its images, also after the last step. The run ends at once
    with a checkpoint, and a resumed run makes the evaluation. Without it a scheduler kills the run
    before its checkpoint, or the curve has a gap."""
    config = replace(whole, log=replace(whole.log, dir=str(tmp_path)))
    signals = StopSignals()
    training = trainer(config, signals=signals)
    batches = SquareImages.batches

    def received(self: SquareImages, *args: Any, **options: Any) -> Iterator[Any]:
        if training.run.step == step:
            signals.received = signal.SIGTERM
        yield from batches(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(SquareImages, "batches", received)
        end = ended(training.train)
    assert isinstance(end, Stopped) and f"at step {step}, which has a checkpoint" in str(end)
    assert scored(config) == [each for each in (0, 3, 6, 9, 10) if each < step]
    train(config, "auto")
    assert_same_run(config, whole)


def test_its_time_is_no_training_time(beton: Path, tmp_path: Path) -> None:
    """Without it images/s and the cost of a run depend on how often it is scored."""
    config = replace(small_run(beton, tmp_path, max_steps=1), eval=EvalConfig(1))
    training = scripted(config, 0.1, 0.2)
    began: list[int] = []

    class Slow(Scripted):
        def __call__(self, *args: Any) -> dict[str, float]:
            time.sleep(0 if began else 1)
            began.append(1)
            return super().__call__(*args)

    training.evaluations._evaluation = Slow(0.1, 0.2)
    before = time.perf_counter()
    training.train()
    wall = time.perf_counter() - before
    training_line, scored_line = (
        json.loads(text)
        for text in (run_dir(config) / "metrics.jsonl").read_text().splitlines()[1::-1]
    )
    assert scored_line["eval_seconds"] >= 1 and training_line["seconds"] < wall - 1


@pytest.mark.cuda
def test_on_a_gpu_it_frees_its_memory(beton: Path, labelled: Path, tmp_path: Path) -> None:
    """In mixed precision the scores are those of float32. Without it a run that just fits ends."""
    config = replace(small_run(beton, tmp_path), eval=settings(labelled))
    training = trainer(replace(config, efficiency=EfficiencyConfig(precision="bf16")))
    training.evaluations.evaluate(training.slotcon.teacher)  # libraries take their workspace once
    before, training.run.step = torch.cuda.memory_allocated(), 3
    training.evaluations.evaluate(training.slotcon.teacher)
    assert scored(config) == [0, 3] and torch.cuda.memory_allocated() == before


def test_best_checkpoint_is_kept(beton: Path, tmp_path: Path) -> None:
    """The best of steps 1 to 5 is step 2: not step 0, which has no checkpoint, and not a later one
    of the same score. Without it pruning takes the best, or a resume goes back to it."""
    config = small_run(beton, tmp_path, max_steps=5)
    config = replace(
        config, eval=EvalConfig(1), log=replace(config.log, checkpoint_every=1, keep=1)
    )
    scripted(config, 0.9, 0.2, 0.6, 0.6, float("nan"), 0.1).train()
    folder = run_dir(config) / "checkpoints"
    names = {path.name for path in folder.iterdir()}
    assert names == {"step_2", "step_5", "latest", "best"}
    best = folder / "best"
    assert best.is_symlink() and checkpoint.find(best).name == "step_2"
    model, _ = load_model(best)
    assert torch.equal(model.center, load_model(folder / "step_2")[0].center)
    newest = checkpoint.latest(run_dir(config))
    assert newest and newest.name == "step_5"
    assert lines(config)[-1]["results"] == [{"metric": "knn_miou", "value": 0.1}]
    assert {"metric": "not_finite", "value": 1.0} in [
        row for line in lines(config) for row in line.get("results", [])
    ]

    config = replace(config, train=replace(config.train, max_steps=7))
    best.unlink()
    best.symlink_to("step_5")  # a kill between a checkpoint and its link leaves an older one
    training = scripted(config, 0.59, 0.7, resume="auto")
    assert training.run.step == 5 and checkpoint.find(best).name == "step_2"
    training.train()
    assert {path.name for path in folder.iterdir()} == {"step_7", "latest", "best"}

    checkpoint.set_aside(folder / "step_7")
    assert not best.is_symlink()  # it would lead nowhere


def test_without_evaluation_the_best_is_still_kept(beton: Path, tmp_path: Path) -> None:
    """A run that goes on without evaluation must not prune what another command may read."""
    config = small_run(beton, tmp_path, max_steps=1)
    log = replace(config.log, checkpoint_every=1, keep=1)
    config = replace(config, eval=EvalConfig(1), log=log)
    scripted(config, 0.1, 0.5).train()
    config = replace(config, eval=EvalConfig(), train=replace(config.train, max_steps=3))
    train(config, "auto")
    assert checkpoint.find(run_dir(config) / "checkpoints" / "best").name == "step_1"


def test_a_plateau_ends_the_run(beton: Path, tmp_path: Path) -> None:
    """Two evaluations in a row without a better score. Without it the run goes on, a resume trains
    a run that is done, or a longer patience does not continue it."""
    config = small_run(beton, tmp_path)
    patient = replace(config.train, stop_on_plateau=2)
    config = replace(config, eval=EvalConfig(1), train=patient)
    end = ended(scripted(config, 0.9, 0.2, 0.3, 0.3, 0.1).train)
    assert isinstance(end, Plateau) and end.exit_code == 0
    assert end.line(True) == (
        f"{run_dir(config)}: done at step 4: 2 evaluations without a better knn_miou than "
        "30.0% (step 2) (train.stop_on_plateau)"
    )
    newest = checkpoint.latest(run_dir(config))
    assert newest and newest.name == "step_4" and scored(config) == [0, 1, 2, 3, 4]
    assert str(ended(scripted(config, resume="auto").train)) == str(end)
    longer = replace(config, train=replace(config.train, stop_on_plateau=3, max_steps=6))
    scripted(longer, 0.4, 0.1, resume="auto").train()
    assert scored(config) == [0, 1, 2, 3, 4, 5, 6]


def test_other_settings_begin_a_new_best(
    beton: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Scores on another data set say nothing about a better checkpoint. How often it is scored
    may change."""
    config = small_run(beton, tmp_path, max_steps=1)
    config = replace(config, eval=EvalConfig(1))
    scripted(config, 0.1, 0.9).train()
    more = replace(config, train=replace(config.train, max_steps=2))
    other = scripted(replace(more, eval=EvalConfig(1, memory=99)), 0.3, 0.5, resume="auto")
    assert other.evaluations.standing.best is None
    assert "scored by other settings of eval: best begins anew" in capsys.readouterr().err
    other.run.trackers.finish()
    rarer = scripted(replace(more, eval=EvalConfig(2)), 0.5, resume="auto")
    assert rarer.evaluations.standing.best == 0.9


@pytest.mark.parametrize("state", [3, {"best": float("nan")}, {"best": 1.5}, {"last": "x"}])
def test_a_hostile_state_is_damage(beton: Path, tmp_path: Path, state: Any) -> None:
    """Without it a changed run.json ends in a traceback, or its NaN is the best for ever."""
    config = replace(small_run(beton, tmp_path), eval=EvalConfig(1))
    training = scripted(config, 0.1)
    record = checkpoint.Record(1, {}, {}, 0.0, [], {"eval": state})
    with pytest.raises(checkpoint.Damaged, match="the state of its evaluations"):
        training.evaluations.read(Path("step_1"), record)


def no_classes(config: RunConfig) -> EvalConfig:
    other = dict.fromkeys(("images", "labels", "train_images", "train_labels"))
    return replace(config.eval, dataset="camvid", root=config.log.dir, **other)


def void(config: RunConfig) -> EvalConfig:
    """Labels without a class: those of the first rows of all maps."""
    labels = Path(config.log.dir) / "void"
    write_folder_set(labels, 1, 1, shape=(1, 64))
    return replace(config.eval, images=f"{labels}/val/images", labels=f"{labels}/val/labels")


def torn(config: RunConfig) -> EvalConfig:
    root = Path(config.log.dir) / "torn"
    write_folder_set(root, 1, 2)
    image = root / "val/images/val01.png"
    image.write_bytes(image.read_bytes()[:99])
    return replace(config.eval, images=f"{root}/val/images", labels=f"{root}/val/labels")


def same(config: RunConfig) -> EvalConfig:
    ours = config.eval
    return replace(ours, train_images=ours.images, train_labels=ours.labels)


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        (lambda config: replace(config.eval, images=None), "--eval.dataset folder needs --eval.im"),
        (no_classes, "no images of camvid there"),
        (void, "no labelled pixel"),
        (torn, "val01.png"),
        (same, "belongs to the training set and to the set to score"),
        (
            lambda config: replace(config.eval, clusters=2),
            "eval.clusters: 2 are fewer than the 3 classes",
        ),
    ],
)
def test_bad_data_are_refused_before_training(
    beton: Path, labelled: Path, tmp_path: Path, broken: Callable[..., EvalConfig], says: str
) -> None:
    """Without it a run trains for hours, and ends at its first evaluation."""
    config = replace(small_run(beton, tmp_path), eval=settings(labelled))
    with pytest.raises(UserError, match=says) as refused:
        trainer(replace(config, eval=broken(config)))
    assert len(refused.value.lines) == 1
    del refused
    assert not run_dir(config).exists()


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"eval": {"every": 5, "protocols": ["kmeans"]}}, "eval.metric must be of one of the prot"),
        ({"eval": {"protocols": ["slots"]}}, "eval.protocols must be one or more besides slots"),
        ({"eval": {"every": 0}}, "eval.every must be at least 1"),
        ({"eval": {"protocols": []}}, "eval.protocols must be one or more bes"),
        ({"eval": {"dataset": "cocoa"}}, "eval.dataset must be one of folder"),
        ({"train": {"stop_on_plateau": 3}}, "train.stop_on_plateau must be null without eval.ev"),
    ],
)
def test_settings_that_contradict_each_other(
    beton: Path, tmp_path: Path, values: dict[str, Any], says: str
) -> None:
    """Without it a mistake in them shows after the first evaluation, or never."""
    config = to_dict(small_run(beton, tmp_path))
    with pytest.raises(UserError, match=says):
        from_dict(config | {name: config[name] | part for name, part in values.items()})


def test_an_encoder_that_rests_is_on_no_plateau(beton: Path, tmp_path: Path) -> None:
    """Its score cannot rise. Without it a post-training run ends while only prototypes learn."""
    torch.save(Encoder("resnet18", 2).state_dict(), tmp_path / "w.pth")
    config, start = small_run(beton, tmp_path), InitConfig(str(tmp_path / "w.pth"))
    rests = replace(config.train, freeze_encoder_epochs=1, stop_on_plateau=2)
    config = replace(config, eval=EvalConfig(1), init=start, train=rests)
    training = scripted(config, 0.3, 0.5, 0.5, 0.5, 0.5, 0.5, 0.4, 0.4)
    assert isinstance(ended(training.train), Plateau)
    assert training.run.step == 7 and training.evaluations.standing.best_step == 1


def test_features_that_are_not_finite(beton: Path, labelled: Path, tmp_path: Path) -> None:
    """A collapsed or overflowing teacher has no scores, but does not end the run by that. Without
    it k-means or k-NN raises, or NaN gets into metrics.jsonl, which is then damaged."""
    config = replace(small_run(beton, tmp_path), eval=settings(labelled))
    training = trainer(config)
    with torch.no_grad():
        training.slotcon.teacher.encoder.conv1.weight.fill_(float("inf"))
    training.run.step = 3
    training.evaluations.evaluate(training.slotcon.teacher)
    assert lines(config) == [{"step": 3, "results": [{"metric": "not_finite", "value": 1.0}]}]
    assert training.evaluations.standing.stale == 1
    training.run.rewind()
    assert scored(config) == [3]


SCRIPT = """
from tests.train.test_evaluations import Scripted
from train import pretrain

pretrain.open_evaluation = lambda *_: Scripted(0.3, 0.2, 0.1)
pretrain.main()
"""


def test_the_plateau_of_two_processes(beton: Path, tmp_path: Path) -> None:
    """Both processes end together, with one line and exit code 0. Without it one of them waits for
    the other, or the launcher takes the end for a failure and kills what still writes."""
    config = small_run(beton, tmp_path)
    patient = replace(config.train, stop_on_plateau=1)
    (tmp_path / "command.py").write_text(SCRIPT)
    file = tmp_path / "run.yaml"
    file.write_text(to_yaml(replace(config, eval=EvalConfig(1), train=patient)))
    ended = launch_module(
        "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(tmp_path / "command.py"),
        "--config", str(file), processes=1, timeout=200, PYTHONPATH=str(ROOT),
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.count("done at step 2: 1 evaluations without a better knn_miou") == 1
    newest = checkpoint.latest(run_dir(config))
    assert newest and newest.name == "step_2"


def test_two_processes_have_the_scores_of_one(whole: RunConfig, tmp_path: Path) -> None:
    """Each evaluates its share: of the weights that both begin with, and after a step the weights
    and BatchNorm statistics of the main process, which its checkpoint holds. Without it the scores
    depend on the number of processes."""
    log, once = replace(whole.log, dir=str(tmp_path)), replace(whole.train, max_steps=1)
    config = replace(whole, log=log, train=once)
    file = tmp_path / "run.yaml"
    file.write_text(to_yaml(config))
    ended = launch_module("train.pretrain", "--config", str(file), processes=2, timeout=200)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("step 0/1  knn mIoU") == 1 and scored(config) == [0, 1]
    assert lines(config)[0] == lines(whole)[0]
    assert lines(config)[-1]["results"] == rows_of(config, run_dir(config))


def rows_of(config: RunConfig, path: Path) -> list[dict[str, object]]:
    """The scores of a checkpoint."""
    model, _ = load_model(path)
    alone = in_this_process(lambda: open_evaluation(config, Accelerator(cpu=True)))
    return [{"metric": m, "value": v} for m, v in alone(model.teacher, lambda: None).items()]


def test_a_teacher_that_is_the_student(beton: Path, labelled: Path, tmp_path: Path) -> None:
    """Its weights are stored for an evaluation, too, at a step without a log line. Without it the
    scores are those of an earlier step."""
    own = {"teacher": "student", "teacher_momentum": 0.0}
    config = small_run(beton, tmp_path, max_steps=3, **own)
    config = replace(config, eval=settings(labelled, every=2))
    trainer(config).train()
    at_2 = next(line["results"] for line in lines(config) if line["step"] == 2)
    assert at_2 == rows_of(config, run_dir(config) / "checkpoints" / "step_2")
