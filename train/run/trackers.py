"""Accelerate's trackers. They run on a thread, because some of them talk to servers."""

from collections.abc import Mapping
from typing import Any

from accelerate import Accelerator

from pipeline.errors import UserError
from train.run.background import Background


class Trackers:
    """Starts, feeds and finishes the trackers in the background, on the main process only.

    `problem` and `finish` report a tracker that raises or does not answer.
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
        if self._active:
            self._thread.submit(self._start)
            self._thread.wait()

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Queue one log line for the thread."""
        if self._active:
            self._thread.submit(lambda: self._each("log", dict(values), step=step))

    def problem(self) -> Exception | None:
        """What is wrong with a tracker, if anything."""
        return self._thread.problem()

    def finish(self) -> None:
        """Wait until all is written. Raises UserError."""
        if self._active:
            self._active = False
            self._thread.submit(lambda: self._each("finish"))
            self._thread.wait()
            self._accelerator.trackers.clear()  # or Accelerate would finish them again
        self._thread.close()

    def _start(self) -> None:
        purge = {"purge_step": self._step + 1} if self._step else {}  # like Journal.rewind
        try:
            self._accelerator.init_trackers("slotstream", init_kwargs={"tensorboard": purge})
        except Exception as error:
            raise UserError(f"log.trackers: cannot be started ({_reason(error)})") from error
        # tensorboard would start one more folder for the settings at each resume.
        others = [each for each in self._accelerator.trackers if each.name != "tensorboard"]
        self._each("store_init_configuration", self._settings, trackers=others)

    def _each(self, method: str, *values: Any, trackers: Any = None, **options: Any) -> None:
        for tracker in self._accelerator.trackers if trackers is None else trackers:
            try:
                getattr(tracker, method)(*values, **options)
            except Exception as error:
                reason = f"log.trackers: {tracker.name} failed ({_reason(error)})"
                raise UserError(reason) from error


def _scalar(value: object) -> bool | int | float | str:
    """Trackers accept no lists and no None."""
    return value if isinstance(value, bool | int | float | str) else str(value)


def _reason(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
