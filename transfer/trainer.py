"""A run of either task, from top to bottom: what it is made of, in the order of construction; then
training, a step, a log line, an evaluation, a checkpoint.

What every run needs, whatever it trains, is in `train.run.run.Run`.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from train.run import checkpoint
from train.run.ends import Reason
from train.run.log import progress
from train.run.provenance import write_json
from train.run.run import Run
from train.run.settings import Settings
from train.run.signals import StopSignals
from transfer import statistics
from transfer.config import Config, without_weights
from transfer.examples import Order, batches
from transfer.losses import LossMeter
from transfer.optimizer import build_optimizer
from transfer.result import RESULT, cost, result, summary
from transfer.schedule import learning_rate
from transfer.scoring import TIMEOUT_MINUTES, check_data, score
from transfer.step import beat_in_forward, place, seed_step
from transfer.task import Row, Task


class Trainer:
    """One run of one configuration. The constructor loads everything; `train` does the steps.

    `resume` is None (a new run), "auto" or the path of a checkpoint or run. Everything in a step
    follows from the step's number, so an interrupted run continues exactly where its checkpoint was
    made, also in the middle of an epoch. A signal in `signals` ends it with a checkpoint.
    """

    def __init__(
        self,
        config: Config,
        build_task: Callable[[Config], Task],
        settings: Settings[Config],
        resume: str | None = None,
        signals: StopSignals | None = None,
    ) -> None:
        self.config, self._settings, optim = config, settings, config.optim
        self.run = Run(config, settings, resume, signals, timeout_minutes=TIMEOUT_MINUTES)
        self.accelerator = self.run.accelerator

        torch.manual_seed(optim.seed)
        self.task = build_task(without_weights(config) if self.run.resumes else config)
        self.init = self.task.init
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        self.order = Order(len(self.task), optim, rank, world)

        self.net = place(self.task.model, config, self.accelerator).train()
        beat_in_forward(self.net, self.run.watchdog)
        self.sgd = build_optimizer(self.net, optim)
        self.model, self.optimizer = self.accelerator.prepare(self.net, self.sgd)

        self.meter = LossMeter(self.accelerator)

        self.run.resume(self._restore)
        self.run.start(
            checkpoint.Retention(config.log.keep, parts=0, total_steps=optim.steps),
            last_step=optim.last_step,
            data=f"{self.task.name} on {self.task.data['dataset']}, {len(self.task)} images",
            model=f"{self.init['arch']} from {self.init['weights']}",
        )

    def train(self) -> None:
        """Train up to the last step, which gets a checkpoint, and score the result.

        Raises Diverged; Stopped, after a signal and its checkpoint; LostProcess; UserError if a
        disk or an example fails; EndedElsewhere if another process raises it.
        """
        run, workers = self.run, self.config.efficiency.workers
        with run.alive():
            with batches(
                self.task, self.order, run.step, run.last_step, workers, self.accelerator
            ) as ahead:
                self._train(ahead)
            run.wait_for_disk()
            self._finish(self._evaluate())

    def _train(self, ahead: Iterator[Any]) -> None:
        """From the present step to the last one; `ahead` yields the batches of these steps."""
        run, log = self.run, self.config.log
        if run.resumes and self._evaluates() and not run.is_scored():
            self._evaluate()  # the run was killed between its checkpoint and this
        run.stopwatch.restart()  # starting the workers is not training time
        while run.step < run.last_step:
            self._train_step(ahead)
            run.advance()
            reason = self._log() if run.is_due(log.every) else run.reason_without_log()
            if self._evaluates() or run.is_due(log.checkpoint_every):
                self._checkpoint()
            run.end_if(reason, self._checkpoint)
            if self._evaluates():
                self._evaluate()

    def _evaluates(self) -> bool:
        """Whether this step ends with an evaluation. `train` does the last one."""
        run = self.run
        return run.is_due(self.config.log.evaluate_every) and 0 < run.step < run.last_step

    def _train_step(self, ahead: Iterator[Any]) -> None:
        step, optim = self.run.step, self.config.optim
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, optim)
        with self.run.stopwatch.waiting():
            batch = next(ahead)
        seed_step(optim.seed, step, self.accelerator.process_index)
        losses = self.model(batch)
        self.accelerator.backward(torch.stack(list(losses.values())).sum())
        self.meter.add(losses)
        self.optimizer.step()
        self.meter.skipped += self.accelerator.optimizer_step_was_skipped
        self.optimizer.zero_grad()

    def _log(self) -> Reason:
        """One log line for the steps since the last one, with their only host synchronisation.

        Returns why the run has to end; all processes agree on it.
        """
        run, optim, meter = self.run, self.config.optim, self.meter
        averages, reason = meter.read(run.reason_to_end())
        values = {
            "step": run.step,
            "epoch": round(run.step / self.order.steps_per_epoch, 4),
            **averages,
            "lr": learning_rate(run.step - 1, optim),
            **run.measure(averages, meter.steps, meter.skipped, optim.batch_size),
        }
        terms = " ".join(f"{k} {v:.3f}" for k, v in averages.items() if k != "loss")
        text = f"loss {averages['loss']:.4f} ({terms})  lr {values['lr']:.2g}"
        run.log(values, progress(values, run.last_step, optim.batch_size, text))
        meter.clear()
        return Reason(reason)

    def _evaluate(self) -> list[Row]:
        run = self.run
        with run.stopwatch.paused():
            rows = score(self.task, self.config, self.accelerator, self.order, run.step)
            line = f"step {run.step}/{run.last_step}  {summary(rows)}"
            run.write({"step": run.step, "results": rows}, line)
        return rows

    def _finish(self, rows: list[Row]) -> None:
        """Write result.json."""
        step, batch_size = self.run.step, self.config.optim.batch_size
        measured = cost(self.run.seconds, step, batch_size, self.accelerator)
        content = result(self.task, self.config, self.init, step, rows)
        if self.run.is_main:
            write_json(self.run.folder / RESULT, {**content, "cost": measured})

    def _checkpoint(self) -> None:
        """Begin to save, unless the loss or a weight is not finite. Raises Diverged."""
        averages, _ = self.meter.read()
        statistics.share(self.net)
        self.run.save(
            self.net,
            self.sgd,
            averages,
            self.task.data,
            meter=self.meter.state(),
            more={"init": self.init},
        )

    def _restore(self, origin: Path) -> None:
        """Raises UserError, or Damaged, and then has changed nothing."""
        record = checkpoint.read_record(origin, self._settings)
        check_data(origin, record.data, self.task)
        self.run.load(origin, record, self.net, self.sgd)
        self.meter.load(record.meter)
        self.init = record.provenance["init"]
