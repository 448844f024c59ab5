"""The run of either task: what it is made of, in the order in which it is made, and the step."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from pipeline.errors import UserError
from train.metrics import Diverged, Journal, Stopwatch, duration, finite
from train.run import checkpoint
from train.run.launch import launch, lock
from train.run.provenance import provenance, write_bytes, write_json
from train.run.resume import go_on, origins
from train.run.settings import Settings, to_dict, to_yaml
from train.run.signals import Stopped, StopSignals
from train.run.watchdog import LostProcess, lost
from transfer import statistics
from transfer.config import Config, without_weights
from transfer.examples import Order, batches
from transfer.losses import LossMeter
from transfer.optimizer import build_optimizer
from transfer.schedule import learning_rate
from transfer.scoring import (
    PATIENCE_MINUTES,
    RESULT,
    check_data,
    cost,
    place,
    result,
    score,
    seed_step,
    summary,
    watchdog,
)
from transfer.task import Row, Task

_GO_ON, _SIGNAL, _DISK = range(3)  # why a run ends early, agreed on by all; the largest counts
_STORM = 20  # steps in a row, all of them too large for fp16 at any loss scale


class Trainer:
    """One run of one configuration. Construction loads everything; `train` does the steps.

    `resume` is None (a new run), "auto" or the path of a checkpoint or run. Everything in a step
    follows from the step's number, so an interrupted run goes on exactly where its checkpoint was
    made, also in mid-epoch. What `signals` receives ends it with a checkpoint.
    """

    def __init__(
        self,
        config: Config,
        build_task: Callable[[Config], Task],
        settings: Settings[Config],
        resume: str | None = None,
        signals: StopSignals | None = None,
    ) -> None:
        self.config, self._settings = config, settings
        self.run_dir = Path(config.log.dir) / config.name
        candidates = origins(config, settings, self.run_dir, resume)

        self.accelerator = launch(self.run_dir, config.efficiency.precision, (), PATIENCE_MINUTES)
        if self.accelerator.is_main_process:
            self._lock = lock(self.run_dir)  # held as long as the process lives
        torch.manual_seed(config.optim.seed)
        self.task = build_task(without_weights(config) if candidates else config)
        self.init = self.task.init
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        self.order = Order(len(self.task), config.optim, rank, world)

        self.net = place(self.task.model, config, self.accelerator).train()
        self.sgd = build_optimizer(self.net, config.optim)
        self.model, self.optimizer = self.accelerator.prepare(self.net, self.sgd)

        self.step, self.saved, self.seconds = 0, 0, 0.0  # saved: the step of the last checkpoint
        self.skipped = 0  # steps since the last log line that overflowed in fp16
        self.storm = 0  # steps of the last log lines, if all of them did
        self.meter = LossMeter(self.accelerator)
        self.stopwatch = Stopwatch(self.accelerator.device)
        if candidates:
            go_on(candidates, self._restore, self.accelerator)
        self.signals = signals or StopSignals()
        self.watchdog = watchdog(self.net, str(self.run_dir))
        retention = checkpoint.Retention(config.log.keep, 0, config.optim.steps)
        self.writer = checkpoint.Writer(self.run_dir, retention, 60 * PATIENCE_MINUTES)
        self.journal = self._open_journal()

    def train(self) -> None:
        """Train on to the last step, which gets a checkpoint, and score the result.

        Raises Diverged; Stopped, after a signal and its checkpoint; LostProcess; UserError where a
        disk or an example fails.
        """
        try:
            last, workers = self.config.optim.last_step, self.config.efficiency.workers
            with self.watchdog:
                with batches(
                    self.task, self.order, self.step, last, workers, self.accelerator
                ) as ahead:
                    self._train(ahead)
                self.writer.wait()
                self._finish(self._evaluate())
        except Diverged as error:
            self.writer.wait()
            raise Diverged(f"{error}; {self._last_good()}") from None
        except Stopped:
            raise
        except RuntimeError as error:
            if not lost(error):
                raise
            reason = f"{LostProcess.REASON} ({lost(error)})"
            raise LostProcess(f"{self.run_dir}: {reason}; {self._last_good()}") from error
        else:
            self.accelerator.end_training()
        finally:
            with suppress(Exception):
                self.writer.wait()
            self.writer.close()

    def _train(self, ahead: Iterator[Any]) -> None:
        """From the present step to the last, on the batches of these steps."""
        last = self.config.optim.last_step
        self.stopwatch.restart()
        while self.step < last:
            self._train_step(ahead)
            self.step += 1
            end = self._reason_to_end() if self.accelerator.num_processes == 1 else _GO_ON
            if self._is_due(self.config.log.every):
                end = self._log()
            evaluates = self._is_due(self.config.log.evaluate_every) and self.step < last
            if evaluates or self._is_due(self.config.log.checkpoint_every):
                self._checkpoint()
            if end != _GO_ON:
                self._end(end)
            if evaluates:
                self._evaluate()

    def _train_step(self, ahead: Iterator[Any]) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.config.optim)
        with self.stopwatch.waiting():
            batch = next(ahead)
        seed_step(self.config.optim.seed, self.step, self.accelerator.process_index)
        losses = self.model(batch)
        self.accelerator.backward(torch.stack(list(losses.values())).sum())
        self.meter.add(losses)
        self.optimizer.step()
        self.skipped += self.accelerator.optimizer_step_was_skipped
        self.optimizer.zero_grad()
        self.stopwatch.steps += 1

    def _is_due(self, every: int) -> bool:
        """What happens every so many steps, 0 for never, and always after the last one."""
        last = self.step == self.config.optim.last_step
        return last or (every > 0 and self.step % every == 0)

    def _log(self) -> int:
        """One log line for the steps since the last, and their only host synchronisation.

        Returns why the run is to end, or _GO_ON.
        """
        averages, end = self.meter.read(self._reason_to_end())
        steps, seconds, wait_share = self.stopwatch.read()
        self._check(finite(averages), "the loss is not finite")
        self.storm = self.storm + steps if self.skipped == steps else 0
        self._check(self.storm < _STORM, f"all of the last {self.storm} steps overflow in fp16")
        self.seconds += seconds
        optim = self.config.optim
        values = {
            "step": self.step,
            "epoch": round(self.step / self.order.steps_per_epoch, 4),
            **averages,
            "lr": learning_rate(self.step - 1, optim),
            "images_per_s": steps * optim.batch_size / seconds,
            "wait_share": wait_share,
            "seconds": self.seconds,
        }
        if self.config.efficiency.precision == "fp16":
            values["skipped"] = self.skipped
        terms = " ".join(f"{k} {v:.3f}" for k, v in averages.items() if k != "loss")
        left = duration((optim.last_step - self.step) * seconds / steps)
        self._write(
            values,
            f"{values['images_per_s']:.1f} images/s  loss {averages['loss']:.4f} ({terms})  "
            f"lr {values['lr']:.2g}  data wait {wait_share:.0%}  {left} left",
        )
        self.meter.clear()
        self.stopwatch.restart()
        self.skipped = 0
        return end

    def _write(self, values: dict[str, Any], text: str) -> None:
        if self.accelerator.is_main_process:
            self.journal.write(values, f"step {self.step}/{self.config.optim.last_step}  {text}")

    def _evaluate(self) -> list[Row]:
        with self.stopwatch.paused():
            rows = score(self.task, self.config, self.accelerator, self.order, self.step)
            self._write({"step": self.step, "results": rows}, summary(rows))
        return rows

    def _finish(self, rows: list[Row]) -> None:
        """Write result.json."""
        measured = cost(self.seconds, self.step, self.config.optim.batch_size, self.accelerator)
        content = result(self.task, self.config, self.init, self.step, rows)
        if self.accelerator.is_main_process:
            write_json(self.run_dir / RESULT, {**content, "cost": measured})

    def _checkpoint(self) -> None:
        """Begin to save, unless there is something in it that nobody should go on from."""
        self._check(finite(self.meter.read()[0]), "the loss is not finite")
        statistics.share(self.net)
        good = checkpoint.all_finite(self.net, self.accelerator)
        self._check(good, "a weight is not finite")
        self.saved = self.step
        if not self.accelerator.is_main_process:
            return
        with self.stopwatch.paused():
            record = checkpoint.Record(
                step=self.step,
                config=to_dict(self.config),
                data=self.task.data,
                seconds=self.seconds + self.stopwatch.read()[1],
                meter=[],  # the next log line averages from here on
                provenance={**provenance(), "init": self.init},
            )
            self.writer.save(record, self.net, self.sgd, self.accelerator.scaler)

    def _reason_to_end(self) -> int:
        """Why this process wants to end the run, or _GO_ON."""
        if self.writer.problem():
            return _DISK
        return _SIGNAL if self.signals.received else _GO_ON

    def _end(self, reason: int) -> None:
        """End the run early: with a checkpoint, unless it is the disk that fails."""
        if reason == _SIGNAL and self.step == self.config.optim.last_step:
            return  # it ends anyway
        if reason == _SIGNAL and self.saved != self.step:
            self._checkpoint()
        self.writer.wait()
        if reason == _DISK:
            raise UserError("")  # another process says why
        # A launcher that sees one process end ends the others, which may still be writing.
        self.accelerator.wait_for_everyone()
        raise self.signals.stopped(self.run_dir, self.step)

    def _check(self, good: bool, problem: str) -> None:
        if not good:
            raise Diverged(f"{self.run_dir}: {problem} at step {self.step}")

    def _last_good(self) -> str:
        return f"last good checkpoint: {checkpoint.latest(self.run_dir) or 'none'}"

    def _restore(self, origin: Path) -> None:
        """Raises Damaged, and then has changed nothing, or UserError."""
        record = checkpoint.read_record(origin, self._settings)
        check_data(origin, record.data, self.task)
        checkpoint.restore(origin, record, self.net, self.sgd, self.accelerator.scaler)
        self.step, self.seconds = record.step, record.seconds
        self.init = record.provenance["init"]

    def _open_journal(self) -> Journal:
        journal = Journal(self.run_dir / "metrics.jsonl")
        if self.accelerator.is_main_process:
            write_bytes(self.run_dir / "config.yaml", to_yaml(self.config).encode())
            journal.rewind(self.step)
        processes, device = self.accelerator.num_processes, self.accelerator.device.type
        start = f", {self.step} of them done" if self.step else ""
        self.accelerator.print(
            f"{self.run_dir}: {self.task.name} on {self.task.data['dataset']}, {len(self.task)} "
            f"images, {self.config.optim.last_step} steps{start}; {self.init['arch']} from "
            f"{self.init['weights']}, {processes} x {device}, precision "
            f"{self.config.efficiency.precision}"
        )
        return journal
