"""Trackers: their names, settings and pictures, and that a resumed run continues their runs. The
libraries are stand-ins with the signatures of wandb 0.31, mlflow 3.17 and trackio 0.43; Accelerate
is the real one."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate import Accelerator

from pipeline.errors import UserError
from tests.helpers.training import small_run
from train.run.settings import to_yaml
from train.run.trackers import Trackers

Runs = dict[str, dict[str, Any]]
"""What a server holds: runs by id, each with its name, params, steps and starts."""


def begun(runs: Runs, identity: str | None, name: str | None) -> dict[str, Any]:
    identity = identity or f"id{len(runs) + 1}"
    new = {"id": identity, "name": name, "params": {}, "steps": [], "starts": 0}
    run = runs.setdefault(identity, new)
    run["starts"] += 1
    return run


def wandb(runs: Runs) -> SimpleNamespace:
    module = SimpleNamespace()

    def init(
        entity: str | None = None, project: str | None = None, dir: str | None = None,
        id: str | None = None, name: str | None = None, notes: str | None = None,
        tags: list[str] | None = None, resume: bool | str | None = None,
    ) -> SimpleNamespace:  # fmt: skip
        if id in runs and resume not in ("allow", "must"):
            raise ValueError("wandb would begin the run anew")
        assert project == "slotstream" and dir and Path(dir).is_dir()
        run = begun(runs, id, name)
        module.config = SimpleNamespace(update=lambda v, allow_val_change: run["params"].update(v))
        log = lambda values, step=None: run["steps"].append(step)  # noqa: E731
        return SimpleNamespace(id=run["id"], log=log, finish=lambda exit_code=None: None)

    module.init = init
    return module


def mlflow(runs: Runs) -> SimpleNamespace:
    active: list[dict[str, Any]] = []

    def start_run(
        run_id: str | None = None, experiment_id: str | None = None, run_name: str | None = None,
        nested: bool = False, parent_run_id: str | None = None, tags: Any = None,
        description: str | None = None, log_system_metrics: bool | None = None,
    ) -> SimpleNamespace:  # fmt: skip
        active[:] = [begun(runs, run_id, run_name)]
        return SimpleNamespace(info=SimpleNamespace(run_id=active[0]["id"]))

    def log_params(params: dict[str, Any]) -> None:
        known = active[0]["params"]
        if any(known.get(key, value) != value for key, value in params.items()):
            raise ValueError("Changing param values is not allowed")
        known.update(params)

    limits = SimpleNamespace(MAX_PARAM_VAL_LENGTH=6000, MAX_PARAMS_TAGS_PER_BATCH=100)
    return SimpleNamespace(
        search_experiments=lambda filter_string: [SimpleNamespace(experiment_id="1")],
        start_run=start_run,
        log_params=log_params,
        log_metrics=lambda metrics, step=None: active[0]["steps"].append(step),
        end_run=lambda status="FINISHED": None,
        utils=SimpleNamespace(validation=limits),
    )


def trackio(runs: Runs) -> SimpleNamespace:
    module = SimpleNamespace()

    def init(
        project: str, name: str | None = None, group: str | None = None, resume: str = "never"
    ) -> SimpleNamespace:
        same = next((key for key, run in runs.items() if run["name"] == name), None)
        run = begun(runs, same if resume == "allow" else None, name)
        module.config = SimpleNamespace(update=lambda v, allow_val_change: run["params"].update(v))
        log = lambda values, step=None: run["steps"].append(step)  # noqa: E731
        return SimpleNamespace(name=name, log=log, finish=lambda: None)

    module.init = init
    return module


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Callable[..., Trackers]]:
    """Starts one tracker of a run named "run" in `tmp_path`."""
    accelerator = Accelerator(cpu=True, project_dir=tmp_path / "run")
    (tmp_path / "run").mkdir()

    def start(name: str, step: int, **train: Any) -> Trackers:
        accelerator.log_with, accelerator.trackers = [name], []  # type: ignore[list-item]
        config = small_run(tmp_path / "x.beton", tmp_path, **train)
        return Trackers(accelerator, tmp_path / "run", config, step, 60)

    yield start
    accelerator.trackers = []


@pytest.mark.parametrize("library", [wandb, mlflow, trackio])
def test_a_resumed_run_continues_the_run_of_its_tracker(
    started: Callable[..., Trackers],
    library: Callable[[Runs], SimpleNamespace],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without it each requeue of a job begins one more run without a name, and a changed setting
    ends the resume."""
    runs: Runs = {}
    monkeypatch.setitem(sys.modules, library.__name__, library(runs))  # type: ignore[arg-type]
    for step, epochs in ((0, 2), (4, 3)):
        trackers = started(library.__name__, step, epochs=epochs)
        trackers.log({"loss": 1.0}, step + 1)
        trackers.finish()
    (run,) = runs.values()
    assert (run["name"], run["steps"], run["starts"]) == ("run", [1, 5], 2)
    assert run["params"]["train.batch_size"] == 4
    started(library.__name__, 0).finish()  # a new run in the same folder
    assert len(runs) == 2


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MLFLOW_RUN_ID", "another"),
        ("MLFLOW_RUN_ID", ""),
        ("MLFLOW_TAGS", "fast"),
        ("MLFLOW_NESTED_RUN", "perhaps"),
    ],
)
def test_what_the_environment_says_against_the_run_is_named(
    name: str,
    value: str,
    started: Callable[..., Trackers],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Accelerate follows these variables first. Without it a resumed run writes into another run of
    mlflow without a word, and a wrong value ends in a message that does not name the variable.
    """
    monkeypatch.setitem(sys.modules, "mlflow", mlflow({}))  # type: ignore[arg-type]
    (tmp_path / "run" / "trackers.json").write_text('{"mlflow": "abc"}')
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"^{name} "):
        started("mlflow", 4)


def test_runs_that_are_gone_are_named(
    started: Callable[..., Trackers], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without it a user who deleted the run on the server does not find what names it."""

    def init(**_: Any) -> None:
        raise ConnectionError("no such run")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))  # type: ignore[arg-type]
    (tmp_path / "run" / "trackers.json").write_text('{"wandb": "abc"}')
    with pytest.raises(UserError, match=r"no such run\); .*trackers\.json names the runs"):
        started("wandb", 4)
    (tmp_path / "run" / "trackers.json").write_text('{"wandb": 3}')
    with pytest.raises(UserError, match=r"trackers\.json: .*expected `?str"):
        started("wandb", 4)


def test_tensorboard_gets_the_settings(started: Callable[..., Trackers], tmp_path: Path) -> None:
    """Without it the page of a run does not say what was trained."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    started("tensorboard", 0).finish()
    events = accumulator.EventAccumulator(str(tmp_path / "run" / "slotstream"))
    events.Reload()
    (text,) = events.Tensors("config/text_summary")
    lines = text.tensor_proto.string_val[0].decode().splitlines()
    config = to_yaml(small_run(tmp_path / "x.beton", tmp_path))
    assert [line.removeprefix("    ") for line in lines] == config.splitlines()
