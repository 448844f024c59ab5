"""The trackers' side of the log: Accelerate's, on a thread, since some of them talk to servers."""

from collections.abc import Mapping
from typing import Any

from accelerate import Accelerator

from pipeline.errors import UserError
from train.run.background import Background


class Trackers:
    """Started, fed and finished in the background; all methods do nothing but on the main process.

    A tracker that raises or does not answer surfaces in `problem` and in `finish`.
    """

    def __init__(
        self, accelerator: Accelerator, settings: Mapping[str, Any], step: int, timeout_s: float
    ) -> None:
        """Start a run that holds `settings` and goes on after `step`. Raises UserError."""
        self._accelerator, self._settings, self._step = accelerator, settings, step
        names = [str(name) for name in accelerator.log_with]
        self._active = bool(names) and accelerator.is_main_process
        self._thread = Background(f"log.trackers: {', '.join(names)}", timeout_s)
        if self._active:
            self._thread.submit(self._start)
            self._thread.wait()

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """One log line, later."""
        if self._active:
            self._thread.submit(lambda: self._each("log", dict(values), step=step))

    def problem(self) -> Exception | None:
        """What is wrong with one, if anything."""
        return self._thread.problem()

    def finish(self) -> None:
        """Wait until all is written. Raises UserError."""
        if self._active:
            self._active = False
            self._thread.submit(lambda: self._each("finish"))
            self._thread.wait()
            self._accelerator.trackers.clear()  # or they would be finished again
        self._thread.close()

    def _start(self) -> None:
        purge = {"purge_step": self._step + 1} if self._step else {}  # as metrics.jsonl is rewound
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


def _reason(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
