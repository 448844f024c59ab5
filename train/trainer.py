"""A pre-training run of SlotCon or SlotMIM, to be read from top to bottom: construction, training,
an epoch, a step, a log line, a checkpoint.

`train.run.run.Run` holds the parts that any training run needs.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor

from model import SlotCon, prepare
from pipeline.augment import IMAGENET_MEAN, IMAGENET_STD
from pipeline.errors import UserError
from pipeline.image_folder import ImageFolder, open_beton
from pipeline.loader import make_loader
from pipeline.source import Batch, BatchSource
from train.config import SETTINGS, RunConfig
from train.evaluations import Evaluations, OpenEvaluation
from train.health import CollapseAlarm, near_duplicates, usage_entropy
from train.metrics import Meter, progress_line
from train.optimizer import build_optimizer, clip_each, set_rate
from train.pretrained import build_model
from train.prototypes import place_prototypes
from train.run import checkpoint
from train.run.ends import Collapsed, Diverged, Reason
from train.run.launch import share_of_cores, to_device
from train.run.run import Run
from train.run.signals import StopSignals
from train.schedule import learning_rate, teacher_momentum, teacher_temp, weight_decay
from train.start import in_words, start_from

_DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_ROLL_BACKS = 3  # without progress, before the run gives up


class Trainer:
    """One run of one configuration. The constructor loads everything; `train` does the steps.

    `resume` is None (a new run), "auto" or the path of a checkpoint or run. Everything in a step
    follows from the step's number, so an interrupted run continues exactly where its checkpoint was
    made, also in the middle of an epoch. A signal in `signals` ends it with a checkpoint.
    `open_evaluation` opens what `config.eval` names.
    """

    def __init__(
        self,
        config: RunConfig,
        resume: str | None = None,
        signals: StopSignals | None = None,
        open_evaluation: OpenEvaluation | None = None,
    ) -> None:
        self.config, log = config, config.log
        self.run = Run(
            config,
            SETTINGS,
            resume,
            signals,
            timeout_minutes=log.timeout_minutes,
            trackers=log.trackers,
            accumulation=config.efficiency.accumulation,
            parts_rest=config.train.freeze_encoder_epochs > 0,
        )
        self.accelerator = self.run.accelerator

        self.evaluations = Evaluations(config, self.run, open_evaluation)
        self.beton = open_beton(config.data.path)
        self.loader = self._load_data()
        if isinstance(self.beton, ImageFolder) and self.run.is_main:
            self.run.say(f"{self.run.folder}: data.path is {self.beton.saving()}")
        self._check_batch_statistics()
        steps_per_epoch = self.loader.steps_per_epoch
        self.total_steps = config.train.epochs * steps_per_epoch
        self.evaluations.rests_until = config.train.freeze_encoder_epochs * steps_per_epoch
        self.warmup_steps = round(config.train.warmup_epochs * steps_per_epoch)
        own = {"ema": 0.0, "student": 1.0, "switch": config.train.teacher_from, "frozen": 1.0}
        self.average_from = round(own[config.train.teacher] * self.total_steps)
        """The first step with a teacher that is not the student itself."""

        torch.manual_seed(config.train.seed)
        self.init: dict[str, Any] = {}  # what the weights were at step 0
        self.slotcon = self._build_model()
        self.slotcon.train_stages(config.train.trainable_stages)
        self.bare_optimizer = build_optimizer(self.slotcon, config.train)
        self.model, self.optimizer = self.accelerator.prepare(self.slotcon, self.bare_optimizer)
        static = config.efficiency.selects_statically(self.accelerator.device.type)
        self.static_slots = static and self.slotcon.guide is None
        self.view_size = 0  # of the last step

        counts, terms = self.slotcon.prototype_counts, self.slotcon.term_names
        skipped = self.bare_optimizer.skipped
        self.meter = Meter(self.accelerator, terms, sum(counts.values()), skipped)
        self.alarms = {
            name: CollapseAlarm(count, self.warmup_steps, config.model.group_loss_weight > 0)
            for name, count in counts.items()
        }
        self.roll_backs = 0  # since the run has passed `furthest_step`
        self.furthest_step = 0  # the last step at which it has diverged so far

        self.run.resume(self._restore)
        self.run.start(
            checkpoint.Retention(log.keep, log.history, self.total_steps),
            last_step=min(self.total_steps, config.train.max_steps or self.total_steps),
            data=f"{len(self.beton)} images, {steps_per_epoch} steps/epoch",
            model=f"{config.model.arch} with {config.model.num_prototypes} prototypes",
        )

    def _load_data(self) -> BatchSource:
        config = self.config  # views_of holds it alone: holding self, it would keep a run's lock
        data, train, efficiency = config.data, config.train, config.efficiency
        return make_loader(
            self.beton,
            config.loaded(config.views),
            train.batch_size,
            crops=data.crops,
            backend=data.backend,
            order=data.order,
            window_bytes=round(data.window_gb * 1e9),
            views_of=lambda epoch: config.loaded(config.views_of(epoch)),
            seed=train.seed,
            device=self.accelerator.device,
            dtype=_DTYPES[efficiency.precision],
            rank=self.accelerator.process_index,
            world=self.accelerator.num_processes,
            accumulation=efficiency.accumulation,
            threads=data.threads or share_of_cores(self.accelerator.device),
            on_corrupt=data.on_corrupt,
            max_replaced=data.max_replaced,
        )

    def _check_batch_statistics(self) -> None:
        """BatchNorm needs at least two cells among the images that it normalises together; the
        BatchNorm of the image-level predictor needs two images. Raises UserError.
        """
        if self.config.model.hides_patches:
            return  # no BatchNorm anywhere
        size = self.config.view_size(0)
        image_loss = bool(self.config.model.image_loss_weight)
        cells = self.config.model.cells_of(size)
        rows, unit = (1, "image") if image_loss else (cells, "cell")
        parts = self.accelerator.num_processes * self.config.efficiency.accumulation
        batch = self.config.train.batch_size
        if batch // parts * rows < 2:
            raise UserError(
                f"train.batch_size: {batch} images on {parts} processes and micro-batches, with "
                f"views of {size} pixels, leave one {unit} to a batch: it has no variance"
            )

    def _build_model(self) -> SlotCon:
        """SlotCon on this process's device, with the speed settings of the configuration. A new run
        gives it the weights to start from. Raises UserError.
        """
        efficiency = self.config.efficiency
        model = build_model(self.config)
        if not self.run.resumes:
            self.init = start_from(self.config.init, model, self.config.train)
            if words := in_words(self.init):
                self.run.say(f"{self.run.folder}: {words}")
        model = to_device(model, self.accelerator)
        prepare(
            model,
            channels_last=efficiency.channels_last,
            checkpointing=efficiency.checkpointing,
            compile=efficiency.compile,
            warn=self.run.say,
        )
        return model

    def train(self) -> None:
        """Train up to the last step, which gets a checkpoint.

        Raises Diverged; Collapsed; Stopped, after a signal and its checkpoint; Plateau, after its
        checkpoint; LostProcess; UserError if a disk or an image fails; EndedElsewhere if another
        process raises it. The watchdog ends the process itself.
        """
        with self.run.alive():
            if self.run.step == 0 and self.config.model.prototype_init == "kmeans":
                self._place_prototypes()
            self._end_step(Reason.NONE)  # of step 0, or of one that a signal has cut short
            while self.run.step < self.run.last_step:
                try:
                    self._train_epoch()
                except Diverged as error:
                    self._roll_back(error)

    def _place_prototypes(self) -> None:
        """Cluster the cells of the first epoch's first batches, before the first step."""
        self.run.say(f"{self.run.folder}: placing prototypes by k-means")
        self._let_stages_learn(0)  # the statistics of an encoder that rests stay here too
        with self.run.stopwatch.paused():
            seed, batches = self.config.train.seed, self._beating(self.loader.epoch(0))
            place_prototypes(self.slotcon, batches, self.accelerator, seed)

    def _beating(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        for batch in batches:
            self.run.watchdog.beat()
            yield batch

    def _train_epoch(self) -> None:
        """From the present step to the end of its epoch, or to the last step."""
        run, log = self.run, self.config.log
        epoch, start = divmod(run.step, self.loader.steps_per_epoch)
        end = min((epoch + 1) * self.loader.steps_per_epoch, run.last_step)
        batches = self.loader.epoch(epoch, start)
        size = self.config.view_size(epoch)
        if size != self.view_size:
            self.view_size = size
            self.slotcon.forget_capacity()  # the first step with this size counts the slots
        self._let_stages_learn(epoch)
        while run.step < end:
            self._train_step(batches)
            run.advance()
            log_is_due = run.is_due(log.every)
            reason = self._log() if log_is_due else run.reason_without_log()
            if self.static_slots and (log_is_due or self.slotcon.capacity is None):
                self.slotcon.adapt_capacity()
            self._end_step(reason)

    def _let_stages_learn(self, epoch: int) -> None:
        rests = epoch < self.config.train.freeze_encoder_epochs
        self.slotcon.train_stages(0 if rests else self.config.train.trainable_stages)

    def _end_step(self, reason: Reason) -> None:
        """Evaluation and checkpoint, where they are due, and the end of the run for a `reason`."""
        run, evaluations = self.run, self.evaluations
        if evaluations.is_due():
            self._store_teacher()
            reason = reason or evaluations.evaluate(self.slotcon.teacher)
        if not run.is_saved and (
            evaluations.is_best or run.is_due(self.config.log.checkpoint_every)
        ):
            self._checkpoint()
        run.end_if(reason, self._checkpoint, complete=not evaluations.is_due())
        evaluations.end_if_flat(self._checkpoint)

    def _train_step(self, batches: Iterator[Batch]) -> None:
        lr, momentum = self._schedule(self.run.step)
        scheduled = self._scheduled(self.run.step)
        set_rate(self.optimizer, lr, scheduled.get("weight_decay"))
        if (temperature := scheduled.get("teacher_temp")) is not None:
            self.slotcon.set_teacher_temp(temperature)
        own_teacher = self.run.step < self.average_from
        if not own_teacher:
            if self.run.step == self.average_from:
                self._store_teacher()
            self.slotcon.update_teacher(momentum)
        count = self.config.efficiency.accumulation
        for micro in range(count):
            self.run.watchdog.beat()
            with self.run.stopwatch.waiting():
                batch = next(batches)
            if self.run.step == micro == 0 and self.run.trackers.take_pictures():
                self.run.trackers.picture("views", _pixels(batch.views[:, :8]), step=0)
            last = micro == count - 1
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                output = self.model(
                    batch.views,
                    batch.overlap,
                    batch.flipped,
                    batch.masks,
                    micro_batches=count,
                    draw=(self.config.train.seed, self.run.step * count + micro),
                    own_teacher=own_teacher,
                )
                self.accelerator.backward(output.loss / count)
            self.meter.add(output)
        self._limit_gradients()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _limit_gradients(self) -> None:
        """Clip the gradients, and drop those of prototypes that rest: a step passes over these."""
        train = self.config.train
        if train.clip_grad is not None:
            self.accelerator.unscale_gradients(self.optimizer)  # of fp16
            clip_each(self.slotcon.parameters(), train.clip_grad)
        if self.run.step < train.freeze_prototypes_epochs * self.loader.steps_per_epoch:
            for prototypes in self.slotcon.student.prototypes:
                prototypes.grad = None

    def _schedule(self, step: int) -> tuple[float, float]:
        """Learning rate and teacher momentum of `step`; 0 for a teacher that is the student."""
        train = self.config.train
        lr = learning_rate(
            step,
            peak=train.base_lr * train.batch_size / 256,
            warmup_steps=self.warmup_steps,
            warmup_multiplier=train.warmup_multiplier,
            total_steps=self.total_steps,
            reaches_peak=train.warmup_reaches_peak,
            final=train.final_lr,
        )
        begin = self.average_from
        if step < begin:
            return lr, 0.0
        base, total = train.teacher_momentum, self.total_steps
        return lr, teacher_momentum(step, base=base, total_steps=total, begin=begin)

    def _scheduled(self, step: int) -> dict[str, float]:
        """Those of weight decay and teacher temperature that change in the run, at `step`."""
        train, rates = self.config.train, dict[str, float]()
        if (last := train.final_weight_decay) is not None:
            first, total = train.weight_decay, self.total_steps
            rates["weight_decay"] = weight_decay(step, first=first, last=last, total_steps=total)
        if (warm := train.warmup_teacher_temp) is not None:
            rates["teacher_temp"] = teacher_temp(
                step // self.loader.steps_per_epoch,
                first=warm,
                last=self.config.model.teacher_temp,
                warmup_epochs=train.warmup_teacher_temp_epochs,
            )
        return rates

    def _store_teacher(self) -> None:
        """Make the teacher what it is for whoever reads its weights now, if so far it has been the
        student itself: a log line, an evaluation, a checkpoint, the first step of an average.
        """
        if 0 < self.run.step <= self.average_from:
            self.slotcon.copy_to_teacher()

    def _log(self) -> Reason:
        """One log line for the steps since the last one, with their only host synchronisation.

        Returns why the run has to end; all processes agree on it.
        """
        run, train = self.run, self.config.train
        self._store_teacher()
        duplicates = near_duplicates(self.slotcon.teacher.grouping.prototypes)
        reading = self.meter.read(run.reason_to_end(), duplicates)
        if not self.static_slots:
            reading.averages.pop("dropped_pairs")  # always zero
        count = self.config.efficiency.accumulation * self.accelerator.num_processes
        steps = reading.batches // count
        speed = run.measure(reading.averages, steps, reading.skipped, train.batch_size)
        lr, momentum = self._schedule(run.step - 1)
        values = {
            "step": run.step,
            "epoch": round(run.step / self.loader.steps_per_epoch, 4),
            **reading.averages,
            **self._usage(reading.usage),
            "near_duplicates": reading.duplicates,
            "lr": lr,
            "teacher_momentum": momentum,
            **self._scheduled(run.step - 1),
            **speed,
        }
        if self.config.data.on_corrupt == "replace":
            values["replaced"] = len(set(gather_object(list(self.loader.replaced))))
        run.log(values, progress_line(values, train.epochs, run.last_step, train.batch_size))
        self._check_collapse(run.step - steps, values)
        self.meter.clear()
        return Reason(reading.reason)

    def _usage(self, usage: Tensor) -> dict[str, float]:
        """How the prototypes of each supervised stage are used, from the cells that they won."""
        counts, values = self.slotcon.prototype_counts, dict[str, float]()
        for name, part in zip(counts, usage.split([*counts.values()]), strict=True):
            values[f"{name}usage_entropy"] = usage_entropy(part)
            values[f"{name}dead_prototypes"] = int((part == 0).sum())
        return values

    def _check_collapse(self, begin: int, values: dict[str, float]) -> None:
        """Check the log line that begins with step `begin`. Raises Collapsed."""
        step = self.run.step
        symptoms = []
        for name, alarm in self.alarms.items():
            own = {key.removeprefix(name): values[key] for key in values if key.startswith(name)}
            cells = self.slotcon.objectives[name].config.cells_of(self.view_size)
            if symptom := alarm.check(begin, step, cells, own):
                symptoms.append(f"{name.replace('_', ': ')}{symptom}")
        if not symptoms:
            return
        told = "; ".join(symptoms)
        message = f"{self.run.folder}: the grouping has collapsed at step {step}: {told}"
        if self.config.log.on_collapse == "stop":
            raise Collapsed(message)
        self.run.say(f"warning: {message}; training continues (log.on_collapse)")

    def _checkpoint(self) -> None:
        """Begin to save, unless the loss or a weight is not finite. Raises Diverged."""
        self._store_teacher()
        self.run.save(
            self.slotcon,
            self.bare_optimizer,
            self.meter.read().averages,
            self._data(),
            meter=self.meter.state(),
            more={**self.evaluations.state(), "init": self.init},
            is_best=self.evaluations.is_best,
        )

    def _roll_back(self, error: Diverged) -> None:
        """Continue from the last good checkpoint, if the configuration says so and it helps.

        Raises Diverged.
        """
        self.run.settle()
        origin = checkpoint.latest(self.run.folder)
        if origin and checkpoint.step_of(origin) >= self.furthest_step:
            self.roll_backs = 0
        self.furthest_step = max(self.furthest_step, self.run.step)
        if self.config.log.on_divergence == "stop" or origin is None:
            raise error from None
        if self.roll_backs == _ROLL_BACKS:
            raise Diverged(f"{error}; rolled back {_ROLL_BACKS} times in vain") from None
        self.roll_backs += 1
        self.run.say(f"warning: {error}; resuming from {origin} (roll-back {self.roll_backs})")
        self.optimizer.zero_grad()
        self._restore(origin)
        self.run.rewind()

    def _restore(self, origin: Path) -> None:
        """Raises UserError, or Damaged, and then has changed nothing."""
        record = checkpoint.read_record(origin, SETTINGS)
        fingerprint = record.data["fingerprint"]
        if record.data["images"] != len(self.beton) or not self.beton.has_fingerprint(fingerprint):
            raise UserError(
                f"data.path: {self.beton.path} is not the data of {origin} "
                f"({_describe(self._data())}; it was {_describe(record.data)})"
            )
        standing = self.evaluations.read(origin, record)
        self.run.load(origin, record, self.slotcon, self.bare_optimizer)
        self.evaluations.resume(standing)
        self.init = record.provenance.get("init", {})
        self.meter.load(record.meter)
        for alarm in self.alarms.values():
            alarm.reset()

    def _data(self) -> dict[str, int | str]:
        """The identity of the beton, wherever its file is."""
        return {"images": len(self.beton), "fingerprint": self.beton.fingerprint()}


def _describe(data: dict[str, Any]) -> str:
    return f"{data['images']} images, fingerprint {data['fingerprint'][:12]}"


def _pixels(views: Tensor) -> np.ndarray:
    """Normalised views [2, B, 3, S, S] as one picture uint8 [2·S, B·S, 3]: a row for each view."""
    scale = torch.tensor((IMAGENET_MEAN, IMAGENET_STD), device=views.device)
    mean, std = scale[:, None, None, :, None, None].float()
    colours = (views.float() * std + mean).clamp(0, 1).mul(255).round().byte()
    rows, count, _, side, _ = views.shape
    flat = colours.permute(0, 3, 1, 4, 2).reshape(rows * side, count * side, 3)
    return flat.cpu().numpy()
