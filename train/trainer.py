"""The run: what it is made of, in the order in which it is made, and the step."""

import fcntl
import math
import os
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import IO, Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, DistributedType
from accelerate.tracking import get_available_trackers
from accelerate.utils import gather_object, get_int_from_env, parse_flag_from_env
from torch import nn

from model import SlotCon
from pipeline.beton import Beton
from pipeline.errors import UserError
from pipeline.loader import Batch, make_loader
from train import checkpoint
from train.config import RunConfig, flatten, from_dict, to_dict, to_yaml
from train.lars import LARS
from train.metrics import Diverged, Journal, Meter, Stopwatch, finite, progress_line
from train.provenance import provenance
from train.schedule import learning_rate, teacher_momentum

_DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# What a resumed run may not change, for it would be another run; nor may its data.
_FIXED = ("data.order", "data.window_gb", "views.", "model.", "train.")
_FREE = ("train.max_steps",)


class Trainer:
    """One run of one configuration. Construction loads everything; `train` does the steps.

    `resume` is None (a new run), "auto" or the path of a checkpoint or run. Everything in a step
    follows from the step's number, so an interrupted run goes on exactly where its checkpoint was
    made, also in mid-epoch.
    """

    def __init__(self, config: RunConfig, resume: str | None = None) -> None:
        self.config = config
        self.run_dir = Path(config.log.dir) / config.name
        origin = _origin(config, self.run_dir, resume)

        self.accelerator = _launch(config, self.run_dir)
        if self.accelerator.is_main_process:
            self._lock = _lock(self.run_dir)  # held as long as the process lives
        self.beton = Beton(config.data.path)
        self.loader = make_loader(
            self.beton,
            config.views,
            config.train.batch_size,
            crops=config.data.crops,
            backend=config.data.backend,
            order=config.data.order,
            window_bytes=round(config.data.window_gb * 1e9),
            seed=config.train.seed,
            device=self.accelerator.device,
            dtype=_DTYPES[config.efficiency.precision],
            rank=self.accelerator.process_index,
            world=self.accelerator.num_processes,
            accumulation=config.efficiency.accumulation,
            threads=config.data.threads or _share_of_cores(),
            on_corrupt=config.data.on_corrupt,
        )
        self._check_batch_statistics()
        self.total_steps = config.train.epochs * self.loader.steps_per_epoch
        self.last_step = min(self.total_steps, config.train.max_steps or self.total_steps)

        torch.manual_seed(config.train.seed)
        self.slotcon = self._place(SlotCon(config.model))
        weights = [weight for weight in self.slotcon.parameters() if weight.requires_grad]
        optimizer = LARS(
            weights,
            lr=0.0,  # set at each step
            momentum=config.train.momentum,
            weight_decay=config.train.weight_decay,
            eta=config.train.eta,
        )
        self.model, self.optimizer = self.accelerator.prepare(self.slotcon, optimizer)
        checkpoint.register(self.accelerator)

        self.step = 0
        self.seconds = 0.0
        self.meter = Meter(self.accelerator)
        self.stopwatch = Stopwatch(self.accelerator.device)
        if origin:
            self._restore(origin)
        self.journal = self._open_journal()

    def train(self) -> None:
        """Train on to the last step, which gets a checkpoint. Raises Diverged."""
        self.stopwatch.restart()
        while self.step < self.last_step:
            epoch, start = divmod(self.step, self.loader.steps_per_epoch)
            stop = min(self.loader.steps_per_epoch, start + self.last_step - self.step)
            batches = self.loader.epoch(epoch, start)
            for _ in range(start, stop):
                self._train_step(batches)
                self.step += 1
                if self.step % self.config.log.every == 0 or self.step == self.last_step:
                    self._log()
                if self._checkpoint_is_due():
                    self._checkpoint()
        self.accelerator.end_training()

    def _train_step(self, batches: Iterator[Batch]) -> None:
        lr, momentum = self._schedule(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.slotcon.update_teacher(momentum)
        count = self.config.efficiency.accumulation
        for micro in range(count):
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
            warmup_steps=round(train.warmup_epochs * self.loader.steps_per_epoch),
            warmup_multiplier=train.warmup_multiplier,
            total_steps=self.total_steps,
        )
        base = train.teacher_momentum
        return lr, teacher_momentum(step, base=base, total_steps=self.total_steps)

    def _log(self) -> None:
        """One log line for the steps since the last, and their only host synchronisation."""
        averages = self.meter.read()
        self._check(finite(averages), "the loss")
        steps, seconds, wait_share = self.stopwatch.read()
        self.seconds += seconds
        lr, momentum = self._schedule(self.step - 1)
        values = {
            "step": self.step,
            "epoch": round(self.step / self.loader.steps_per_epoch, 4),
            **averages,
            "lr": lr,
            "teacher_momentum": momentum,
            "images_per_s": steps * self.config.train.batch_size / seconds,
            "wait_share": wait_share,
            "seconds": self.seconds,
        }
        if self.config.data.on_corrupt == "replace":
            values["replaced"] = len(set(gather_object(list(self.loader.replaced))))
        left = (self.last_step - self.step) * seconds / steps
        line = progress_line(values, self.config.train.epochs, self.last_step, left)
        self.journal.write(values, line)
        self.meter.clear()
        self.stopwatch.restart()

    def _checkpoint_is_due(self) -> bool:
        every = self.config.log.checkpoint_every
        return self.step == self.last_step or (every > 0 and self.step % every == 0)

    def _checkpoint(self) -> None:
        """Save, unless there is something in it that nobody should go on from."""
        self._check(finite(self.meter.read()), "the loss")
        self._check(self._weights_are_finite(), "a weight")
        with self.stopwatch.paused():
            record = checkpoint.Record(
                step=self.step,
                config=to_dict(self.config),
                data=self._data(),
                seconds=self.seconds + self.stopwatch.read()[1],
                meter=self.meter.state(),
                provenance=provenance(),
            )
            self.journal.flush()
            checkpoint.save(self.accelerator, self.run_dir, record, self.config.log.keep)

    def _check(self, good: bool, what: str) -> None:
        if not good:
            last = checkpoint.latest(self.run_dir)
            raise Diverged(
                f"{self.run_dir}: {what} is not finite at step {self.step}; "
                f"last good checkpoint: {last or 'none'}"
            )

    def _weights_are_finite(self) -> bool:
        """On every process, all parameters and buffers."""
        tensors = [*self.slotcon.parameters(), *self.slotcon.buffers()]
        floats = [tensor.detach() for tensor in tensors if tensor.is_floating_point()]
        largest = torch.stack(torch._foreach_norm(floats, ord=math.inf))
        return bool(self.accelerator.gather(largest).isfinite().all())

    def _place(self, model: SlotCon) -> SlotCon:
        """`model` on this process's device; on GPUs, with batch statistics over all of them."""
        device, processes = self.accelerator.device, self.accelerator.num_processes
        if processes > 1 and device.type == "cuda":
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        elif processes > 1:
            self.accelerator.print("note: on CPUs each process has batch statistics of its own")
        model = model.to(device)
        if self.config.efficiency.channels_last:
            model = model.to(memory_format=torch.channels_last)
        return model

    def _check_batch_statistics(self) -> None:
        """BatchNorm needs two cells at least, of all images that are normalised together."""
        train, cells = self.config.train, math.ceil(self.config.views.size / 32) ** 2
        parts = self.accelerator.num_processes * self.config.efficiency.accumulation
        if train.batch_size // parts * cells < 2:
            raise UserError(
                f"train.batch_size: {train.batch_size} images on {parts} processes and"
                f" micro-batches, with views of {self.config.views.size} pixels, leave one cell to"
                " a batch: it has no variance"
            )

    def _data(self) -> dict[str, int | str]:
        """What tells this beton from another, wherever it lies."""
        return {"images": len(self.beton), "fingerprint": self.beton.fingerprint()}

    def _restore(self, origin: Path) -> None:
        record = checkpoint.read_record(origin)
        if record.data != self._data():
            raise UserError(
                f"data.path: {self.beton.path} is not what {origin} was trained on "
                f"({_describe(self._data())}; it was {_describe(record.data)})"
            )
        checkpoint.restore(self.accelerator, origin)
        self.step, self.seconds = record.step, record.seconds
        self.meter.load(record.meter)

    def _open_journal(self) -> Journal:
        if self.accelerator.is_main_process:
            (self.run_dir / "config.yaml").write_text(to_yaml(self.config))
        self._start_trackers()
        self.accelerator.print(self._introduction())
        journal = Journal(self.accelerator, self.run_dir / "metrics.jsonl")
        journal.rewind(self.step)
        return journal

    def _start_trackers(self) -> None:
        purge = {"purge_step": self.step + 1} if self.step else {}  # as metrics.jsonl is rewound
        self.accelerator.init_trackers("slotstream", init_kwargs={"tensorboard": purge})
        settings = {key: _scalar(value) for key, value in flatten(to_dict(self.config)).items()}
        for tracker in self.accelerator.trackers:
            if tracker.name != "tensorboard":  # which would start one more folder at each resume
                tracker.store_init_configuration(settings)

    def _introduction(self) -> str:
        processes, device = self.accelerator.num_processes, self.accelerator.device.type
        start = f", {self.step} of them done" if self.step else ""
        return (
            f"{self.run_dir}: {len(self.beton)} images, {self.loader.steps_per_epoch} steps/epoch, "
            f"{self.last_step} steps{start}; {self.config.model.arch} with "
            f"{self.config.model.num_prototypes} prototypes, {processes} x {device}, "
            f"precision {self.config.efficiency.precision}"
        )


def _lock(run_dir: Path) -> IO[str]:
    """The lock of a run's folder, which the operating system lifts when the process ends.

    Raises UserError if another process trains there: a requeued job, say, whose first life goes on.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        file = (run_dir / ".lock").open("w")
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{run_dir}: another process is training there") from None
    except OSError as error:
        raise UserError(f"log.dir: {run_dir}: {error.strerror}") from None
    return file


def _share_of_cores() -> int:
    """The cores of this machine for each of the processes that were launched on it."""
    return max(1, len(os.sched_getaffinity(0)) // get_int_from_env(["LOCAL_WORLD_SIZE"], 1))


def _launch(config: RunConfig, run_dir: Path) -> Accelerator:
    """This process's place among the others, its device and precision. Raises UserError."""
    on_gpu = torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU")
    precision = config.efficiency.precision
    if precision == "fp16" and not on_gpu:
        raise UserError("efficiency.precision: fp16 needs a CUDA GPU; use bf16 or no")
    has_bf16 = not on_gpu or torch.cuda.is_bf16_supported(including_emulation=False)
    if precision == "bf16" and not has_bf16:
        raise UserError("efficiency.precision: this GPU has no bf16; use fp16 or no")
    installed = {str(tracker) for tracker in get_available_trackers()}
    for tracker in config.log.trackers:
        if tracker not in installed:
            raise UserError(f"log.trackers: the package of {tracker} is not installed")
    launcher = os.environ.get("ACCELERATE_MIXED_PRECISION", precision)
    accelerator = Accelerator(
        cpu=not on_gpu,  # or processes that torchrun starts on a CPU would not know each other
        mixed_precision=precision,
        log_with=list(config.log.trackers) or None,
        project_dir=run_dir,
        # Running statistics take no part in training and, synchronised, are equal anyway.
        kwargs_handlers=[
            DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
        ],
    )
    if launcher != precision:
        accelerator.print(
            f"note: efficiency.precision {precision} wins over accelerate's {launcher}"
        )
    known = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)
    if accelerator.distributed_type not in known:
        raise UserError(
            f"accelerate's {accelerator.distributed_type.value} is not supported: "
            "use plain data parallelism"
        )
    return accelerator


def _origin(config: RunConfig, run_dir: Path, resume: str | None) -> Path | None:
    """The checkpoint to go on from, None for a new run.

    Raises UserError rather than overwrite a run or mix two.
    """
    newest = checkpoint.latest(run_dir)
    if resume is None and newest:
        raise UserError(
            f"{run_dir} already holds checkpoints, up to {newest.name}: "
            "go on with --resume auto, or give the new run another --name"
        )
    origin = newest if resume in (None, "auto") else checkpoint.find(Path(str(resume)))
    if origin is None:
        return None
    if newest and newest.resolve() != origin.resolve():
        raise UserError(
            f"{run_dir} holds {newest.name}, which is not the checkpoint to resume from "
            f"({origin}): give the new run another --name, or delete the newer checkpoints"
        )
    _check_same_science(config, origin)
    return origin


def _check_same_science(config: RunConfig, origin: Path) -> None:
    """Refuse settings that would make a curve of two recipes."""
    before = flatten(to_dict(from_dict(checkpoint.read_record(origin).config)))
    for key, value in flatten(to_dict(config)).items():
        fixed = key.startswith(_FIXED) and key not in _FREE
        if fixed and value != before[key]:
            raise UserError(
                f"{key} was {before[key]} in {origin} and is now {value}: a resumed run keeps its "
                "views, model and train settings; give the new run another --name"
            )


def _describe(data: dict[str, Any]) -> str:
    return f"{data['images']} images, fingerprint {data['fingerprint'][:12]}"


def _scalar(value: object) -> bool | int | float | str:
    """Trackers take no lists and no None."""
    return value if isinstance(value, bool | int | float | str) else str(value)
