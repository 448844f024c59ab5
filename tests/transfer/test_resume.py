"""A run that is killed anywhere and resumed has the curve of a run that was not."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.helpers.killed import curve, killed
from tests.helpers.tiny_task import TinyConfig, tiny_config, trainer
from transfer.losses import LossMeter

EVENTS = range(1, 60, 2)
"""Events come in pairs: the end of one call and the begin of the next. The run has fewer."""


def small(folder: Path, name: str = "run") -> TinyConfig:
    """Log lines, checkpoints and evaluations end at different steps, and together at the last."""
    config = tiny_config(folder, name, steps=7)
    return replace(config, log=replace(config.log, every=2, checkpoint_every=5, evaluate_every=3))


def train(config: TinyConfig, resume: str | None = None) -> None:
    trainer(config, resume).train()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = small(tmp_path_factory.mktemp("whole"))
    train(config)
    return Path(config.log.dir) / config.name


def test_a_kill_anywhere_leaves_no_trace_in_the_curve(whole: Path, tmp_path: Path) -> None:
    """Without it a resumed run averages its next line over other steps, lacks an evaluation that
    was not finished, or has the last one twice."""
    expected = curve(whole)
    assert [line["step"] for line in expected] == [2, 3, 4, 6, 6, 7, 7]
    kills = 0
    for at in EVENTS:
        config = small(tmp_path, f"run{at}")
        if not killed(at, train, config):
            break
        kills += 1
        train(config, "auto")
        assert curve(tmp_path / f"run{at}") == expected, f"killed at event {at}"
    assert 15 < kills < len(EVENTS)
    train(config, "auto")  # a run that is complete
    assert curve(tmp_path / config.name) == expected


def test_a_run_that_is_killed_twice(whole: Path, tmp_path: Path) -> None:
    """The sums that were restored must be saved again."""
    config = small(tmp_path)
    assert killed(25, train, config) and killed(9, train, config, "auto")
    train(config, "auto")
    assert curve(tmp_path / "run") == curve(whole)


def test_each_process_continues_its_sums() -> None:
    """Without it a line that two processes share is wrong after a resume; a run that goes on with
    one process takes the mean of their sums."""

    def meter(rank: int, world: int) -> LossMeter:
        device = torch.device("cpu")
        accelerator = SimpleNamespace(
            process_index=rank, num_processes=world, device=device, gather=lambda values: values
        )
        return LossMeter(accelerator)  # type: ignore[arg-type]

    first, second = meter(0, 2), meter(1, 2)
    for one, values in ((first, (1.0, 3.0)), (second, (2.0, 6.0))):
        for value in values:
            one.add({"a": torch.tensor(value), "b": torch.tensor(0.1)})
        one.skipped += 1
    state = first.state() + second.state()
    assert [row[:3] for row in state] == [[2, 1, 4.0], [2, 1, 8.0]]
    again = meter(1, 2)
    again.load(state)
    assert again.state() == second.state()
    alone = meter(0, 1)
    alone.load(state)
    assert (alone.steps, alone.skipped) == (2, 1)
    alone.add({"a": torch.tensor(9.0), "b": torch.tensor(0.1)})
    assert alone.read()[0]["a"] == (6 + 9) / 3
    alone.load([])
    assert alone.state() == [[0, 0]]
