"""The life of a run, whatever it trains: its processes, folder, log, checkpoints, and its end.

A trainer has one `Run` and uses it in this order: construct it, build the data and the model, call
`resume` and `start`, then train inside `alive`, with `log`, `save` and `end_if` after the steps.
"""

import math
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from torch.optim import Optimizer

from pipeline.errors import UserError
from train.run import checkpoint
from train.run.ends import (
    Collapsed,
    Diverged,
    EarlyEnd,
    EndedElsewhere,
    Reason,
    Stopped,
    naming,
)
from train.run.launch import launch, lock, unlock
from train.run.log import Journal, Stopwatch, tell
from train.run.provenance import provenance, write_bytes
from train.run.resume import candidates, restore_first_whole
from train.run.settings import Settings, to_dict, to_yaml
from train.run.signals import StopSignals
from train.run.trackers import Trackers
from train.run.watchdog import Watchdog

_STORM = 20  # steps in a row that fp16 skips before loss scaling counts as failed


class Run:
    """One run in its folder, on this process.

    `step` counts the optimiser steps that are done, `seconds` the training time up to the last log
    line, over all resumes. The trainer calls `advance` after each step.
    """

    def __init__(
        self,
        config: Any,
        settings: Settings[Any],
        resume: str | None,
        signals: StopSignals | None,
        *,
        timeout_minutes: float,
        trackers: tuple[str, ...] = (),
        accumulation: int = 1,
        parts_rest: bool = False,
    ) -> None:
        """Find the checkpoints to resume from, join the other processes, lock the folder.

        `config`: read by `settings`, with `name`, `log.dir` and `efficiency.precision`. `resume`:
        None (a new run), "auto" or the path of a checkpoint or run. `timeout_minutes`: how long to
        wait for other processes, the disk and the `trackers`. `accumulation`: micro-batches of a
        step. `parts_rest`: parts of the model that learn get no gradients in some steps. Raises
        UserError.
        """
        self._config, self._patience_s = config, 60 * timeout_minutes
        self.folder = Path(config.log.dir) / config.name
        self._origins = candidates(config, settings, self.folder, resume)
        precision = config.efficiency.precision
        self.accelerator = launch(
            self.folder, precision, trackers, timeout_minutes, accumulation, parts_rest
        )
        self.is_main = self.accelerator.is_main_process
        if self.is_main:
            made = not self.folder.exists()
            self._lock = lock(self.folder)  # held until the process ends
            # A start that is refused removes the folder that it has made. `start` calls this off.
            self._refused = weakref.finalize(self, unlock, self.folder, self._lock)
            if not made:
                self._refused.detach()

        self.step, self.last_step, self.seconds = 0, 0, 0.0
        self._saved = 0  # the step of the last checkpoint
        self._overflows: list[int] = []  # steps of the last log lines, if fp16 skipped all of them
        self._journal: Journal | None = None  # on the main process
        self.signals = signals or StopSignals()
        self.watchdog = Watchdog(self._patience_s, self._process())
        self.stopwatch = Stopwatch(self.accelerator.device)

    @property
    def resumes(self) -> bool:
        """The run continues from a checkpoint."""
        return bool(self._origins)

    def resume(self, restore: Callable[[Path], None]) -> None:
        """Load the newest whole checkpoint, if the run resumes. `restore` loads one with `load`; it
        raises UserError, or Damaged, and then has changed nothing. Raises UserError.
        """
        if self.resumes:
            restore_first_whole(self._origins, restore, self.accelerator)

    def load(
        self, origin: Path, record: checkpoint.Record, model: nn.Module, optimizer: Optimizer
    ) -> None:
        """Continue from the checkpoint `origin`. Raises Damaged, and then has changed nothing."""
        checkpoint.restore(origin, record, model, optimizer, self.accelerator.scaler)
        self.step, self.seconds, self._saved = record.step, record.seconds, record.step
        self._overflows = []

    def start(self, retention: checkpoint.Retention, last_step: int, data: str, model: str) -> None:
        """Open the files of the run and its trackers; print one line about `data` and `model`.

        Raises UserError.
        """
        self.last_step = last_step
        self._writer = checkpoint.Writer(self.folder, retention, self._patience_s)
        if self.is_main:
            self._refused.detach()
            self._journal = Journal(self.folder)
            self._write_config()
            self._journal.rewind(self.step)
        processes, device = self.accelerator.num_processes, self.accelerator.device.type
        done = f", {self.step} of them done" if self.step else ""
        self.accelerator.print(
            f"{self.folder}: {data}, {last_step} steps{done}; {model}, {processes} x {device}, "
            f"precision {self._config.efficiency.precision}"
        )
        self.trackers = Trackers(
            self.accelerator, self.folder, self._config, self.step, self._patience_s
        )

    @contextmanager
    def alive(self) -> Iterator[None]:
        """Train inside its `with`. When it ends, for whatever reason, all files are written.

        Adds the last checkpoint to the message of Diverged and Collapsed. Raises LostProcess if
        another process is lost, UserError if a disk fails. The watchdog ends the process itself.
        """
        try:
            with naming(self._process(), lambda: f"; {self._last(Diverged)}"), self.watchdog:
                self.stopwatch.restart()
                try:
                    yield
                except (Diverged, Collapsed) as error:
                    self.settle()
                    raise type(error)(f"{error}; {self._last(type(error))}") from None
                self.wait_for_disk()
                self.trackers.finish()
            self.accelerator.end_training()
        finally:  # leave no half checkpoint, and no log line that a tracker has not sent
            with suppress(Exception):
                self._writer.wait()
            self.trackers.finish()
            self._writer.close()

    def advance(self) -> None:
        """Count one more optimiser step."""
        self.step += 1
        self.stopwatch.steps += 1

    def is_due(self, every: int) -> bool:
        """Whether a task is due now that is done after each `every` steps (0: never) and after the
        last step.
        """
        return self.step == self.last_step or (every > 0 and self.step % every == 0)

    def measure(
        self, averages: Mapping[str, float], steps: int, skipped: int, batch_size: int
    ) -> dict[str, float]:
        """Check the `steps` since the last log line; return their speed since the last log line or
        resume, as values for the log.

        `averages`: losses and statistics; `skipped`: steps that fp16 has skipped. Raises Diverged.
        """
        self._check_losses(averages)
        timed, seconds, wait_share = self.stopwatch.read()
        self.check_overflows(steps, skipped)
        self.seconds += seconds
        speed = {
            "images_per_s": timed * batch_size / seconds,
            "wait_share": wait_share,
            "seconds": self.seconds,
        }
        in_fp16 = self._config.efficiency.precision == "fp16"
        return {**speed, "skipped": skipped} if in_fp16 else speed

    def log(self, values: Mapping[str, float], progress: str) -> None:
        """One log line in the journal and the trackers."""
        self.write(values, progress)
        if self.is_main:
            measured = {name: value for name, value in values.items() if name != "step"}
            self.trackers.log(measured, self.step)
        self.stopwatch.restart()

    def write(self, values: Mapping[str, Any], progress: str) -> None:
        """One line in the journal alone."""
        if self._journal:
            self._journal.write(values, progress)

    def rewind(self) -> None:
        """Delete the journal's lines after the present step; restart the stopwatch. Raises
        UserError.
        """
        if self._journal:
            self._journal.rewind(self.step)
        self.stopwatch.restart()

    def is_scored(self) -> bool:
        """Whether the journal's last line with results is of the present step. All processes call
        it and get the same answer.
        """
        return any(gather_object([self._journal is not None and self._journal.scored == self.step]))

    def save(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        averages: Mapping[str, float],
        data: dict[str, Any],
        *,
        meter: list[list[float]] | None = None,
        more: Mapping[str, Any] | None = None,
        is_best: bool = False,
    ) -> None:
        """Begin to write a checkpoint of this step. Raises Diverged if a loss in `averages` or a
        weight is not finite. If the disk has failed, it writes nothing: all processes end at the
        next log line.

        `data`: its identity; `meter`: sums for the next log line; `more`: added to the provenance;
        `is_best`: checkpoints/best shall point to it.
        """
        self._check_losses(averages)
        self._check(_all_finite(model, self.accelerator), "a weight is not finite")
        if self.is_main and self._disk_problem():
            return
        self._saved = self.step
        if not self.is_main:
            return
        self.watchdog.beat()
        with self.stopwatch.paused():
            record = checkpoint.Record(
                step=self.step,
                config=to_dict(self._config),
                data=data,
                seconds=self.seconds + self.stopwatch.read()[1],
                meter=meter or [],
                provenance={**provenance(), **(more or {})},
            )
            self._writer.save(record, model, optimizer, self.accelerator.scaler, is_best)

    def check_overflows(self, steps: int, skipped: int) -> None:
        """Raises Diverged if loss scaling has failed: fp16 skipped all steps of two log lines.

        The first steps of a run may overflow until the scale fits.
        """
        self._overflows = [*self._overflows, steps] if skipped >= steps else []
        total = sum(self._overflows)
        storm = len(self._overflows) >= 2 and total >= _STORM
        self._check(not storm, f"all of the last {total} steps overflow in fp16")

    def reason_to_end(self) -> Reason:
        """Why this process wants to end the run. A log line shares it with the others."""
        if self._disk_problem():
            return Reason.DISK
        return Reason.SIGNAL if self.signals.received else Reason.NONE

    def reason_without_log(self) -> Reason:
        """The same between two log lines, where only a single process can decide."""
        return self.reason_to_end() if self.accelerator.num_processes == 1 else Reason.NONE

    @property
    def is_saved(self) -> bool:
        """Whether this step has a checkpoint, or is the beginning of the run."""
        return self._saved == self.step

    def end_if(self, reason: Reason, save: Callable[[], None], *, complete: bool = True) -> None:
        """End the run early if all processes agree on a `reason`. `save` writes a checkpoint first,
        unless the disk has failed. After the last step, if all is done that belongs to it
        (`complete`), a signal comes too late.

        Raises Stopped, EndedElsewhere, or UserError on the process that has the problem.
        """
        done = complete and self.step == self.last_step
        if reason == Reason.NONE or (reason == Reason.SIGNAL and done):
            return
        if reason == Reason.DISK:
            self.wait_for_disk()  # raises on the process whose disk has failed
            raise EndedElsewhere
        name = self.signals.received.name if self.signals.received else "a signal"
        message = f"stopped by {name} at step {self.step}, which has a checkpoint; "
        self.end(Stopped(f"{self.folder}: {message}continue with --resume auto"), save)

    def end(self, how: EarlyEnd, save: Callable[[], None]) -> NoReturn:
        """Raise `how` when this step has a checkpoint, which `save` begins to write."""
        if not self.is_saved:
            save()
        self.trackers.finish()
        self.settle()
        raise how

    def settle(self) -> None:
        """Return when the last checkpoint is written and all processes are here. A launcher that
        sees one process end kills the others, which may still write. Raises UserError.
        """
        self.wait_for_disk()
        self.accelerator.wait_for_everyone()

    def wait_for_disk(self) -> None:
        """Return when the last checkpoint is written. Raises UserError, also if a log line could
        not be written.
        """
        self.watchdog.beat()
        failed = None
        try:
            self._writer.wait()
        except UserError as error:
            failed = error
        self.watchdog.beat()
        if self._journal and (problem := self._journal.problem()):  # it says more
            last = f"step {self._saved}" + (", which is not whole" if failed else "")
            raise UserError(f"{problem}; step {self.step}, last checkpoint: {last}")
        if failed:
            raise failed

    def say(self, message: str) -> None:
        """One line on stderr, from the main process."""
        if self.is_main:
            tell(message)

    def _write_config(self) -> None:
        """Write config.yaml, if it differs. Raises UserError."""
        path, content = self.folder / "config.yaml", to_yaml(self._config).encode()
        if not path.is_file() or path.read_bytes() != content:
            write_bytes(path, content)

    def _disk_problem(self) -> Exception | None:
        """Why nothing more can be written, if so."""
        return (self._journal and self._journal.problem()) or self._writer.problem()

    def _check_losses(self, averages: Mapping[str, float]) -> None:
        finite = all(math.isfinite(value) for value in averages.values())
        self._check(finite, "the loss is not finite")

    def _check(self, good: bool, problem: str) -> None:
        """Raises Diverged unless `good`, which is equal on all processes."""
        if not good:
            raise Diverged(f"{self.folder}: {problem} at step {self.step}")

    def _process(self) -> str:
        index, count = self.accelerator.process_index, self.accelerator.num_processes
        return f"{self.folder}" + (f", process {index} of {count}" if count > 1 else "")

    def _last(self, end: type[Diverged] | type[Collapsed]) -> str:
        return f"{end.checkpoint}: {checkpoint.latest(self.folder) or 'none'}"


def _all_finite(model: nn.Module, accelerator: Accelerator) -> bool:
    """Whether all parameters and buffers are finite, on every process."""
    tensors = [*model.parameters(), *model.buffers()]
    floats = [tensor.detach() for tensor in tensors if tensor.is_floating_point()]
    largest = torch.stack(torch._foreach_norm(floats, ord=math.inf))
    return bool(accelerator.gather(largest).isfinite().all())
