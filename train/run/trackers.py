"""Accelerate's trackers. They run on a thread, because some of them talk to servers."""

import threading
from collections.abc import Mapping
from typing import Any

from accelerate import Accelerator

from pipeline.errors import UserError
from train.run.background import Background
from train.run.log import tell


class Trackers:
    """Starts, feeds and finishes the trackers in the background, on the main process only.

    metrics.jsonl holds the same figures. So a tracker that raises or does not answer, once it has
    started, does not end the run: a warning names it, and it gets no more lines.
    """

    def __init__(
        self, accelerator: Accelerator, settings: Mapping[str, Any], step: int, timeout_s: float
    ) -> None:
        """Start the trackers of a run with `settings` that continues after `step`. Raises
        UserError.
        """
        self._accelerator, self._step = accelerator, step
        self._settings = {name: _scalar(value) for name, value in settings.items()}
        names = [str(name) for name in accelerator.log_with]
        self._active = bool(names) and accelerator.is_main_process
        self._thread = Background(f"log.trackers: {', '.join(names)}", timeout_s)
        self._threads: set[threading.Thread] = set()  # of the trackers themselves
        if self._active:
            threading.excepthook = self._on_thread_error
            self._thread.submit(self._start)
            self._thread.wait()

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Queue one log line for the thread."""
        if self._active:
            self._thread.submit(lambda: self._each("log", dict(values), step=step))
            if problem := self._thread.problem():
                self._give_up(problem)

    def finish(self) -> None:
        """Wait until all is written."""
        if self._active:
            self._thread.submit(lambda: self._each("finish"))
            try:
                self._thread.wait()
            except UserError as error:
                self._give_up(error)
            self._active = False
            self._accelerator.trackers.clear()  # or Accelerate would finish them again
            threading.excepthook = threading.__excepthook__
        self._thread.close()

    def _start(self) -> None:
        purge = {"purge_step": self._step + 1} if self._step else {}  # like Journal.rewind
        before = set(threading.enumerate())
        try:
            self._accelerator.init_trackers("slotstream", init_kwargs={"tensorboard": purge})
            # tensorboard would start one more folder for the settings at each resume.
            for tracker in self._accelerator.trackers:
                if tracker.name != "tensorboard":
                    tracker.store_init_configuration(self._settings)
        except Exception as error:
            raise UserError(f"log.trackers: cannot be started ({_reason(error)})") from error
        self._threads = set(threading.enumerate()) - before

    def _each(self, method: str, *values: Any, **options: Any) -> None:
        for tracker in list(self._accelerator.trackers):
            try:
                getattr(tracker, method)(*values, **options)
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


def _scalar(value: object) -> bool | int | float | str:
    """Trackers accept no lists and no None."""
    return value if isinstance(value, bool | int | float | str) else str(value)


def _reason(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
