"""The run: what it is made of, in the order in which it is made, and the step."""

import sys
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import nn

from model import SlotCon, prepare
from model.encoder import cells_of
from pipeline.beton import Beton
from pipeline.errors import UserError
from pipeline.loader import make_loader
from pipeline.source import Batch
from train.config import SETTINGS, RunConfig, flatten, to_dict, to_yaml
from train.health import CollapseAlarm, Collapsed, near_duplicates, usage_entropy
from train.lars import LARS
from train.metrics import Diverged, Journal, Meter, Stopwatch, finite, progress_line
from train.run import checkpoint
from train.run.launch import launch, lock, share_of_cores
from train.run.provenance import provenance, write_bytes
from train.run.resume import go_on, origins
from train.run.signals import Stopped, StopSignals
from train.run.trackers import Trackers
from train.run.watchdog import LostProcess, Watchdog, lost
from train.schedule import learning_rate, teacher_momentum

_DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_ROLL_BACKS = 3  # without passing the place, before giving up
_STORM = 20  # steps in a row, all of them too large for fp16 at any loss scale
# Why a run ends early, agreed on by all processes at a log line; the largest counts.
_GO_ON, _SIGNAL, _TRACKER, _DISK = range(4)


class Trainer:
    """One run of one configuration. Construction loads everything; `train` does the steps.

    `resume` is None (a new run), "auto" or the path of a checkpoint or run. Everything in a step
    follows from the step's number, so an interrupted run goes on exactly where its checkpoint was
    made, also in mid-epoch. What `signals` receives ends it with a checkpoint.
    """

    def __init__(
        self, config: RunConfig, resume: str | None = None, signals: StopSignals | None = None
    ) -> None:
        self.config = config
        self.run_dir = Path(config.log.dir) / config.name
        candidates = origins(config, SETTINGS, self.run_dir, resume)

        self.accelerator = launch(
            self.run_dir,
            config.efficiency.precision,
            config.log.trackers,
            config.log.timeout_minutes,
        )
        if self.accelerator.is_main_process:
            self._lock = lock(self.run_dir)  # held as long as the process lives
        self.beton = Beton(config.data.path)
        self.loader = make_loader(
            self.beton,
            config.views,
            config.train.batch_size,
            crops=config.data.crops,
            backend=config.data.backend,
            order=config.data.order,
            window_bytes=round(config.data.window_gb * 1e9),
            size_of=config.view_size,
            seed=config.train.seed,
            device=self.accelerator.device,
            dtype=_DTYPES[config.efficiency.precision],
            rank=self.accelerator.process_index,
            world=self.accelerator.num_processes,
            accumulation=config.efficiency.accumulation,
            threads=config.data.threads or share_of_cores(),
            on_corrupt=config.data.on_corrupt,
        )
        self._check_batch_statistics()
        self.total_steps = config.train.epochs * self.loader.steps_per_epoch
        self.last_step = min(self.total_steps, config.train.max_steps or self.total_steps)
        self.warmup_steps = round(config.train.warmup_epochs * self.loader.steps_per_epoch)

        torch.manual_seed(config.train.seed)
        self.slotcon = self._place(SlotCon(config.model))
        weights = [weight for weight in self.slotcon.parameters() if weight.requires_grad]
        self.lars = LARS(
            weights,
            lr=0.0,  # set at each step
            momentum=config.train.momentum,
            weight_decay=config.train.weight_decay,
            eta=config.train.eta,
        )
        self.model, self.optimizer = self.accelerator.prepare(self.slotcon, self.lars)

        self.step = 0
        self.seconds = 0.0
        self.static_slots = config.efficiency.selects_statically(self.accelerator.device.type)
        self.view_size = 0  # of the last step
        self.skipped = 0  # steps that overflowed, up to the last log line
        self.overflows: list[int] = []  # steps of the last log lines, if none of them was taken
        self.roll_backs, self.place = 0, 0  # how many, since the run has come past this step
        prototypes = config.model.num_prototypes
        self.meter = Meter(self.accelerator, self.slotcon.term_names, prototypes, self.lars.skipped)
        self.alarm = CollapseAlarm(prototypes, self.warmup_steps)
        self.stopwatch = Stopwatch(self.accelerator.device)
        if candidates:
            go_on(candidates, self._restore, self.accelerator)

        patience = 60 * config.log.timeout_minutes
        self.signals = signals or StopSignals()
        self.watchdog = Watchdog(1.1 * patience, self._who())  # after those that know more
        log = config.log
        retention = checkpoint.Retention(log.keep, log.history, self.total_steps)
        self.writer = checkpoint.Writer(self.run_dir, retention, patience)
        self.journal = self._open_journal()
        settings = {key: _scalar(value) for key, value in flatten(to_dict(config)).items()}
        self.trackers = Trackers(self.accelerator, settings, self.step, patience)

    def train(self) -> None:
        """Train on to the last step, which gets a checkpoint.

        Raises Diverged; Collapsed; Stopped, after a signal and its checkpoint; LostProcess;
        UserError where a disk, a tracker or an image fails. The watchdog ends the process itself.
        """
        try:
            with self.watchdog:
                while self.step < self.last_step:
                    try:
                        self._train_epoch()
                    except Diverged as error:
                        self._roll_back(error)
                self._wait_for_disk()
                self.watchdog.beat()
                self.trackers.finish()
        except (Diverged, Collapsed, Stopped):
            raise
        except RuntimeError as error:
            if not lost(error):
                raise
            raise LostProcess(
                f"{self._who()}: {LostProcess.REASON} ({lost(error)});"
                f" last good checkpoint: {checkpoint.latest(self.run_dir) or 'none'}"
            ) from error
        else:
            self.accelerator.end_training()
        finally:
            self._close()

    def _train_epoch(self) -> None:
        """From the present step to the end of its epoch, or to the last step."""
        epoch, start = divmod(self.step, self.loader.steps_per_epoch)
        stop = min(self.loader.steps_per_epoch, start + self.last_step - self.step)
        batches = self.loader.epoch(epoch, start)
        if self.view_size != (size := self.config.view_size(epoch)):
            self.view_size, self.slotcon.capacity = size, None  # its first step counts the slots
        for _ in range(start, stop):
            self._train_step(batches)
            self.step += 1
            end = self._end_without_log()
            if log_is_due := self._log_is_due():
                end = self._log()
            if self.static_slots and (log_is_due or self.slotcon.capacity is None):
                self.slotcon.adapt_capacity()
            if self._checkpoint_is_due():
                self._checkpoint()
            if end != _GO_ON:
                self._end(end)

    def _train_step(self, batches: Iterator[Batch]) -> None:
        lr, momentum = self._schedule(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.slotcon.update_teacher(momentum)
        count = self.config.efficiency.accumulation
        for micro in range(count):
            self.watchdog.beat()
            with self.stopwatch.waiting():
                batch = next(batches)
            last = micro == count - 1
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                output = self.model(batch.views, batch.overlap, batch.flipped, micro_batches=count)
                self.accelerator.backward(output.loss / count)
            self.meter.add(output)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.stopwatch.steps += 1

    def _schedule(self, step: int) -> tuple[float, float]:
        """Learning rate and teacher momentum of `step`."""
        train = self.config.train
        lr = learning_rate(
            step,
            peak=train.base_lr * train.batch_size / 256,
            warmup_steps=self.warmup_steps,
            warmup_multiplier=train.warmup_multiplier,
            total_steps=self.total_steps,
        )
        base = train.teacher_momentum
        return lr, teacher_momentum(step, base=base, total_steps=self.total_steps)

    def _log(self) -> int:
        """One log line for the steps since the last, and their only host synchronisation.

        Returns why the run is to end, or _GO_ON.
        """
        prototypes = self.slotcon.teacher.grouping.prototypes
        averages, skipped, end, usage, duplicates = self.meter.read(
            self._reason_to_end(), near_duplicates(prototypes)
        )
        if not self.static_slots:
            averages.pop("dropped_pairs")  # there are none
        steps, seconds, wait_share = self.stopwatch.read()
        self._check(finite(averages), "the loss is not finite")
        self._check_overflows(steps, skipped - self.skipped)
        self.seconds += seconds
        lr, momentum = self._schedule(self.step - 1)
        values = {
            "step": self.step,
            "epoch": round(self.step / self.loader.steps_per_epoch, 4),
            **averages,
            "usage_entropy": usage_entropy(usage),
            "dead_prototypes": int((usage == 0).sum()),
            "near_duplicates": duplicates,
            "lr": lr,
            "teacher_momentum": momentum,
            "images_per_s": steps * self.config.train.batch_size / seconds,
            "wait_share": wait_share,
            "seconds": self.seconds,
        }
        if self.config.efficiency.precision == "fp16":
            values["skipped"] = skipped - self.skipped
        if self.config.data.on_corrupt == "replace":
            values["replaced"] = len(set(gather_object(list(self.loader.replaced))))
        if self.accelerator.is_main_process:
            left = (self.last_step - self.step) * seconds / steps
            line = progress_line(values, self.config.train.epochs, self.last_step, left)
            self.journal.write(values, line)
            measured = {name: value for name, value in values.items() if name != "step"}
            self.trackers.log(measured, self.step)
        self._check_collapse(self.step - steps, values)
        self.skipped = skipped
        self.meter.clear()
        self.stopwatch.restart()
        return end

    def _log_is_due(self) -> bool:
        return self.step % self.config.log.every == 0 or self.step == self.last_step

    def _checkpoint_is_due(self) -> bool:
        every = self.config.log.checkpoint_every
        return self.step == self.last_step or (every > 0 and self.step % every == 0)

    def _checkpoint(self) -> None:
        """Begin to save, unless there is something in it that nobody should go on from."""
        self._check(finite(self.meter.read().averages), "the loss is not finite")
        self._check(checkpoint.all_finite(self.slotcon, self.accelerator), "a weight is not finite")
        with self.stopwatch.paused():
            record = checkpoint.Record(
                step=self.step,
                config=to_dict(self.config),
                data=self._data(),
                seconds=self.seconds + self.stopwatch.read()[1],
                meter=self.meter.state(),
                provenance=provenance(),
            )
            if self.accelerator.is_main_process:
                self.watchdog.beat()
                scaler = self.accelerator.scaler
                self.writer.save(record, self.slotcon, self.lars, scaler)

    def _wait_for_disk(self) -> None:
        """Until the last checkpoint is written. Raises UserError."""
        self.watchdog.beat()
        self.writer.wait()

    def _reason_to_end(self) -> int:
        """Why this process wants to end the run, or _GO_ON."""
        if self.writer.problem():
            return _DISK
        if self.trackers.problem():
            return _TRACKER
        return _SIGNAL if self.signals.received else _GO_ON

    def _end_without_log(self) -> int:
        """The same where no other process has to be asked."""
        return self._reason_to_end() if self.accelerator.num_processes == 1 else _GO_ON

    def _end(self, reason: int) -> None:
        """End the run early: with a checkpoint, unless it is the disk that fails."""
        if reason == _SIGNAL and self.step == self.last_step:
            return  # it ends anyway
        if reason != _DISK and not self._checkpoint_is_due():
            self._checkpoint()
        self._wait_for_disk()
        if reason == _DISK:
            raise UserError("")  # another process says why
        problem = self.trackers.problem()
        if not problem:
            self.trackers.finish()
        # A launcher that sees one process end ends the others, which may still be writing.
        self.accelerator.wait_for_everyone()
        if problem:
            raise problem
        if reason == _TRACKER:
            raise UserError("")  # as above
        raise self.signals.stopped(self.run_dir, self.step)

    def _check(self, good: bool, problem: str) -> None:
        if not good:
            raise Diverged(f"{self.run_dir}: {problem} at step {self.step}")

    def _check_overflows(self, steps: int, skipped: int) -> None:
        """Two log lines of which fp16's loss scaling has left out every step are no search for the
        right scale any more."""
        self.overflows = [*self.overflows, steps] if skipped >= steps else []
        total = sum(self.overflows)
        storm = len(self.overflows) >= 2 and total >= _STORM
        self._check(not storm, f"all of the last {total} steps overflow in fp16")

    def _check_collapse(self, begin: int, values: dict[str, float]) -> None:
        """Of the log line that begins with step `begin`. Raises Collapsed."""
        symptom = self.alarm.check(begin, self.step, cells_of(self.view_size), values)
        if not symptom:
            return
        message = f"{self.run_dir}: the grouping has collapsed at step {self.step}: {symptom}"
        if self.config.log.on_collapse == "stop":
            self._wait_for_disk()
            last = checkpoint.latest(self.run_dir) or "none"
            raise Collapsed(f"{message}; last checkpoint: {last}")
        self._say(f"warning: {message}; going on (log.on_collapse)")

    def _roll_back(self, error: Diverged) -> None:
        """Go on from the last good checkpoint, if the run is to do that and it helps.

        Raises Diverged.
        """
        self._wait_for_disk()
        self.accelerator.wait_for_everyone()
        origin = checkpoint.latest(self.run_dir)
        if origin and checkpoint.step_of(origin) >= self.place:
            self.roll_backs = 0
        self.place = max(self.place, self.step)
        message = f"{error}; last good checkpoint: {origin or 'none'}"
        if self.config.log.on_divergence == "stop" or origin is None:
            raise Diverged(message) from None
        if self.roll_backs == _ROLL_BACKS:
            raise Diverged(f"{message}; rolled back {_ROLL_BACKS} times in vain") from None
        self.roll_backs += 1
        self._say(f"warning: {message}; going on from there (roll-back {self.roll_backs})")
        self.optimizer.zero_grad()
        self._restore(origin)
        if self.accelerator.is_main_process:
            self.journal.rewind(self.step)
        self.stopwatch.restart()

    def _close(self) -> None:
        """Leave nothing behind: neither half a checkpoint, nor log lines that a tracker holds."""
        with suppress(Exception):
            self.writer.wait()
        with suppress(Exception):
            self.trackers.finish()
        self.writer.close()

    def _who(self) -> str:
        index, count = self.accelerator.process_index, self.accelerator.num_processes
        return f"{self.run_dir}" + (f", process {index} of {count}" if count > 1 else "")

    def _say(self, message: str) -> None:
        if self.accelerator.is_main_process:
            print(message, file=sys.stderr, flush=True)

    def _place(self, model: SlotCon) -> SlotCon:
        """`model` on this process's device; on GPUs, with batch statistics over all of them."""
        device, processes = self.accelerator.device, self.accelerator.num_processes
        if processes > 1 and device.type == "cuda":
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        elif processes > 1:
            self.accelerator.print("note: on CPUs each process has batch statistics of its own")
        model = model.to(device)
        efficiency = self.config.efficiency
        prepare(
            model,
            channels_last=efficiency.channels_last,
            checkpointing=efficiency.checkpointing,
            compile=efficiency.compile,
            warn=self._say,
        )
        return model

    def _check_batch_statistics(self) -> None:
        """BatchNorm needs two cells at least, of all images that are normalised together; that of
        the image-level predictor, two images.
        """
        train, cells = self.config.train, cells_of(self.config.view_size(0))
        rows, unit = (1, "image") if self.config.model.image_loss_weight else (cells, "cell")
        parts = self.accelerator.num_processes * self.config.efficiency.accumulation
        if train.batch_size // parts * rows < 2:
            raise UserError(
                f"train.batch_size: {train.batch_size} images on {parts} processes and"
                f" micro-batches, with views of {self.config.view_size(0)} pixels, leave one {unit}"
                " to a batch: it has no variance"
            )

    def _data(self) -> dict[str, int | str]:
        """What tells this beton from another, wherever it lies."""
        return {"images": len(self.beton), "fingerprint": self.beton.fingerprint()}

    def _restore(self, origin: Path) -> None:
        """Raises Damaged, and then has changed nothing, or UserError."""
        record = checkpoint.read_record(origin)
        if record.data != self._data():
            raise UserError(
                f"data.path: {self.beton.path} is not what {origin} was trained on "
                f"({_describe(self._data())}; it was {_describe(record.data)})"
            )
        checkpoint.restore(origin, record, self.slotcon, self.lars, self.accelerator.scaler)
        self.step, self.seconds = record.step, record.seconds
        self.meter.load(record.meter)
        self.overflows = []
        self.alarm.reset()

    def _open_journal(self) -> Journal:
        journal = Journal(self.run_dir / "metrics.jsonl")
        if self.accelerator.is_main_process:
            write_bytes(self.run_dir / "config.yaml", to_yaml(self.config).encode())
            journal.rewind(self.step)
        self.accelerator.print(self._introduction())
        return journal

    def _introduction(self) -> str:
        processes, device = self.accelerator.num_processes, self.accelerator.device.type
        start = f", {self.step} of them done" if self.step else ""
        return (
            f"{self.run_dir}: {len(self.beton)} images, {self.loader.steps_per_epoch} steps/epoch, "
            f"{self.last_step} steps{start}; {self.config.model.arch} with "
            f"{self.config.model.num_prototypes} prototypes, {processes} x {device}, "
            f"precision {self.config.efficiency.precision}"
        )


def _describe(data: dict[str, Any]) -> str:
    return f"{data['images']} images, fingerprint {data['fingerprint'][:12]}"


def _scalar(value: object) -> bool | int | float | str:
    """Trackers take no lists and no None."""
    return value if isinstance(value, bool | int | float | str) else str(value)
