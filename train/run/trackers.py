"""Accelerate's trackers. They run on a thread, because some of them talk to servers."""

import json
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker

from pipeline.errors import UserError, printable
from train.run.background import Background
from train.run.environment import is_set
from train.run.json_file import Text, read_json
from train.run.log import tell
from train.run.provenance import write_bytes
from train.run.settings import flatten, to_dict, to_yaml

_IDS: dict[str, Callable[[Any], str]] = {
    "wandb": lambda run: run.id,
    "mlflow": lambda run: run.info.run_id,
    "trackio": lambda run: run.name,  # it resumes by name
}
"""How a tracker names its own run, which a resumed run continues."""


class Trackers:
    """Starts, feeds and finishes the trackers in the background, on the main process only.

    metrics.jsonl holds the same figures. So a tracker that raises or does not answer, once it has
    started, does not end the run: a warning names it, and it gets no more lines.
    """

    def __init__(
        self, accelerator: Accelerator, folder: Path, config: Any, step: int, timeout_s: float
    ) -> None:
        """Start the trackers of the run in `folder`, which continues after `step`. Each tracker
        then continues its own run, named in trackers.json. Raises UserError.
        """
        self._accelerator, self._folder, self._config = accelerator, folder, config
        self._step = step
        self._ids: dict[str, str] = {}
        names = [str(name) for name in accelerator.log_with]
        self._active = bool(names) and accelerator.is_main_process
        self._thread = Background(f"log.trackers: {', '.join(names)}", timeout_s)
        self._threads: set[threading.Thread] = set()  # of the trackers themselves
        if self._active:
            if step and self._file.exists():
                self._ids = read_json(self._file, dict[Text, Text], 1 << 16, "names of runs")
            if "mlflow" in names:
                _check_mlflow(self._ids.get("mlflow"))
            threading.excepthook = self._on_thread_error
            self._thread.submit(self._start)
            self._thread.wait()
            self._write_ids()

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Queue one log line for the thread."""
        if self._active:
            self._thread.submit(lambda: self._each(lambda one: one.log(dict(values), step=step)))
            if problem := self._thread.problem():
                self._give_up(problem)

    def take_pictures(self) -> bool:
        """Whether a tracker takes pictures."""
        trackers = self._accelerator.trackers
        return self._active and any(hasattr(tracker, "log_images") for tracker in trackers)

    def picture(self, name: str, pixels: np.ndarray, step: int) -> None:
        """Queue a picture uint8 [H, W, 3] for the trackers that take pictures."""

        def show(tracker: GeneralTracker) -> None:
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            if hasattr(tracker, "log_images"):
                tracker.log_images({name: pixels[None]}, step=step, **layout)

        if self._active:
            self._thread.submit(lambda: self._each(show))

    def finish(self) -> None:
        """Wait until all is written."""
        if self._active:
            self._thread.submit(lambda: self._each(lambda one: one.finish()))
            try:
                self._thread.wait()
            except UserError as error:
                self._give_up(error)
            self._active = False
            self._accelerator.trackers.clear()  # or Accelerate would finish them again
            threading.excepthook = threading.__excepthook__
        self._thread.close()

    @property
    def _file(self) -> Path:
        return self._folder / "trackers.json"

    def _start(self) -> None:
        before = set(threading.enumerate())
        try:
            self._accelerator.init_trackers("slotstream", init_kwargs=self._options())
            for tracker in self._accelerator.trackers:
                self._describe(tracker)
        except Exception as error:
            hint = f"; {self._file} names the runs to continue" if self._ids else ""
            raise UserError(f"log.trackers: cannot be started ({_reason(error)}){hint}") from error
        self._threads = set(threading.enumerate()) - before

    def _options(self) -> dict[str, dict[str, Any]]:
        """What each tracker's own start takes."""
        name, ids = self._folder.name, self._ids
        resume = {tracker: {"resume": "allow"} for tracker in ids}
        return {
            "tensorboard": {"purge_step": self._step + 1} if self._step else {},  # as the journal
            "wandb": {
                "name": name,
                "dir": str(self._folder),
                "id": ids.get("wandb"),
                **resume.get("wandb", {}),
            },
            "mlflow": {"run_name": name, "run_id": ids.get("mlflow")},
            "trackio": {"name": ids.get("trackio", name), **resume.get("trackio", {})},
        }

    def _describe(self, tracker: GeneralTracker) -> None:
        """Give the tracker the run's settings."""
        if tracker.name == "tensorboard":  # its own way begins one more folder at each resume
            text = "".join(f"    {line}\n" for line in to_yaml(self._config).splitlines())
            tracker.tracker.add_text("config", text, self._step)
        elif tracker.name != "mlflow" or "mlflow" not in self._ids:  # mlflow lets none change
            settings = flatten(to_dict(self._config))
            tracker.store_init_configuration({key: _scalar(v) for key, v in settings.items()})

    def _write_ids(self) -> None:
        trackers = self._accelerator.trackers
        ids = {t.name: _IDS[t.name](t.tracker) for t in trackers if t.name in _IDS}
        if ids:
            write_bytes(self._file, json.dumps(self._ids | ids).encode())

    def _each(self, act: Callable[[GeneralTracker], None]) -> None:
        for tracker in list(self._accelerator.trackers):
            try:
                act(tracker)
            except Exception as error:
                self._accelerator.trackers.remove(tracker)
                tell(
                    f"warning: log.trackers: {tracker.name} failed ({_reason(error)}); the run "
                    "goes on without it"
                )

    def _on_thread_error(self, error: threading.ExceptHookArgs) -> None:
        """tensorboard's thread prints nothing: the next call of the tracker raises its error."""
        if error.thread not in self._threads:
            threading.__excepthook__(error)

    def _give_up(self, problem: Exception) -> None:
        """The thread hangs, or its work has a mistake."""
        self._active = False
        self._accelerator.trackers.clear()
        tell(f"warning: {problem}; the run goes on without it")


def _check_mlflow(known: str | None) -> None:
    """Accelerate prefers these variables to what we say. `known` is the run to continue. Raises
    UserError, which names the variable.
    """
    given = os.environ.get("MLFLOW_RUN_ID")
    if known and given not in (None, known):
        raise UserError(
            f"MLFLOW_RUN_ID is {printable(given[:40]) or 'empty'}, but this run continues mlflow's "
            f"run {known} (trackers.json): unset it"
        )
    is_set("MLFLOW_NESTED_RUN")
    try:
        tags = json.loads(os.environ.get("MLFLOW_TAGS", "{}"))
    except ValueError:
        tags = None
    if not isinstance(tags, dict):
        raise UserError('MLFLOW_TAGS must be a JSON object: {"key": "value"}')


def _scalar(value: object) -> bool | int | float | str:
    """Trackers accept no lists and no None."""
    return value if isinstance(value, bool | int | float | str) else str(value)


def _reason(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
