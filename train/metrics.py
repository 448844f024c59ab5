"""What a run tells while it trains: averages kept on the device, one log line every few steps."""

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from model import ModelOutput
from pipeline.errors import UserError
from train.run.provenance import write_bytes

STATS = ("active_slots", "active_pairs", "dropped_pairs")


class Diverged(RuntimeError):
    """The loss or a weight is no longer finite, or no step is taken any more."""


class Reading(NamedTuple):
    """What a meter tells; equal on all processes."""

    averages: dict[str, float]
    """By name; empty if nothing was added."""
    skipped: int
    """Steps that the optimiser has left out so far."""
    end: int
    """The largest reason for ending the run that a process has brought."""
    usage: Tensor
    """float64 [K] on the host: cells that each of the teacher's prototypes has won."""
    duplicates: int
    """Pairs of prototypes that are nearly the same, as brought."""


class Meter:
    """What has come together since the last log line, over micro-batches and processes: averages
    of the loss, its `terms` and the model's statistics, and the usage of the K prototypes.

    Adding stays on the device; reading is one collective and one synchronisation, which takes along
    how many steps the optimiser has left out (`skipped`, a scalar on the device).
    """

    def __init__(
        self,
        accelerator: Accelerator,
        terms: Sequence[str],
        num_prototypes: int,
        skipped: Tensor | None = None,
    ) -> None:
        self._accelerator, self._terms, self._skipped = accelerator, terms, skipped
        self.names = ("loss", *terms, *STATS)
        self._sizes = [len(self.names) + 1, num_prototypes]
        self._values = torch.zeros(sum(self._sizes), dtype=torch.float64, device=accelerator.device)
        self._sums, self._usage = self._values.split(self._sizes)  # views of one tensor

    def add(self, output: ModelOutput) -> None:
        """Take in one micro-batch."""
        values = [output.loss.detach()]
        values += [output.terms[name] for name in self._terms]
        values += [output.stats[name] for name in STATS]
        values.append(torch.ones_like(values[0]))
        self._sums += torch.stack(values)
        self._usage += output.usage

    def read(self, end: int = 0, duplicates: Tensor | None = None) -> Reading:
        """All of it; `end` is this process's reason for ending the run, 0 for none, `duplicates` a
        scalar on the device that is to come along.
        """
        others = torch.zeros_like(self._values[:3])
        others[0] = end
        for place, scalar in enumerate((self._skipped, duplicates), start=1):
            if scalar is not None:
                others[place] = scalar
        rows = self._gathered(torch.cat([self._values, others])).cpu()
        sums, usage, others = rows.split([*self._sizes, 3], dim=1)
        *totals, count = sums.sum(dim=0).tolist()
        averages = {n: total / count for n, total in zip(self.names, totals, strict=True) if count}
        largest, latest, pairs = (int(value) for value in others.amax(dim=0))
        return Reading(averages, latest, largest, usage.sum(dim=0), pairs)

    def clear(self) -> None:
        """Start the next log line."""
        self._values.zero_()

    def state(self) -> list[list[float]]:
        """For each process its sums, how many micro-batches they hold, and the usage."""
        state: list[list[float]] = self._gathered(self._values).tolist()
        return state

    def load(self, state: list[list[float]]) -> None:
        """Go on from `state`; with another number of processes, from an equal part of it; from
        nothing, if it is of other values. Older checkpoints hold no usage: it begins at zero.
        """
        self.clear()
        saved = torch.tensor(state, dtype=torch.float64)
        if saved.ndim != 2:
            return
        processes = self._accelerator.num_processes
        if len(state) == processes:
            own = saved[self._accelerator.process_index]
        else:  # averages stay what they are if sums and count change together
            own = saved.mean(dim=0)
            own[self._sizes[0] :] *= len(state) / processes
        if len(own) in (len(self._sums), len(self._values)):
            self._values[: len(own)] = own.to(self._values)

    def _gathered(self, values: Tensor) -> Tensor:
        """[processes, values]"""
        gathered: Tensor = self._accelerator.gather(values[None])
        return gathered


class Stopwatch:
    """Time since the last log line, and the share of it that was spent waiting for data.

    On a GPU that share is the device's: from the end of one step to the views of the next. The host
    runs ahead there, and what it waits for is no loss as long as the device has work.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.restart()

    def restart(self) -> None:
        """Start the next log line."""
        self.steps = 0
        self._began, self._waited = time.perf_counter(), 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def read(self) -> tuple[int, float, float]:
        """Steps (counted by the caller), seconds so far, share of waiting. Waits for the device, if
        it still works on a batch that was waited for.
        """
        if self._events:
            self._events[-1][1].synchronize()
        self._waited += sum(begun.elapsed_time(ended) for begun, ended in self._events) / 1e3
        self._events = []
        seconds = time.perf_counter() - self._began
        return self.steps, seconds, self._waited / seconds

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time spent inside counts as waiting."""
        if self._device.type == "cuda":
            begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begun.record()
            yield
            ended.record()
            self._events.append((begun, ended))
            return
        began = time.perf_counter()
        yield
        self._waited += time.perf_counter() - began

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent inside does not count at all."""
        began = time.perf_counter()
        yield
        self._began += time.perf_counter() - began


class Journal:
    """The run's log for people and programs: the progress line and metrics.jsonl, one JSON object a
    line.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def rewind(self, step: int) -> None:
        """Forget what was logged after `step`: a run that was killed repeats those steps.

        Raises UserError.
        """
        if not self._path.exists():
            return
        kept = [line for line in self._path.read_text().splitlines() if _step_of(line) <= step]
        write_bytes(self._path, "".join(f"{line}\n" for line in kept).encode())

    def write(self, values: Mapping[str, float], progress: str) -> None:
        """One log line. Raises UserError."""
        try:
            with self._path.open("a") as file:
                file.write(json.dumps(values) + "\n")
        except OSError as error:
            raise UserError(f"{self._path}: {error.strerror}") from None
        print(progress, flush=True)


def finite(values: Mapping[str, float]) -> bool:
    """No NaN, no infinity."""
    return all(math.isfinite(value) for value in values.values())


def progress_line(values: Mapping[str, Any], epochs: int, total: int, seconds_left: float) -> str:
    """A log line for people."""
    epoch = math.ceil(values["epoch"])
    grouping, slots = (
        f"{values[f'{term}_12']:.3f} {values[f'{term}_21']:.3f}" for term in ("grouping", "slot")
    )
    return (
        f"epoch {epoch}/{epochs}  step {values['step']}/{total}  "
        f"{values['images_per_s']:.1f} images/s  "
        f"loss {values['loss']:.4f} (grouping {grouping}, slots {slots})  "
        f"{values['active_slots']:.1f} slots/image  dead prototypes {values['dead_prototypes']}  "
        f"data wait {values['wait_share']:.0%}  {duration(seconds_left)} left"
    )


def duration(seconds: float) -> str:
    """45 s, 12 min, 3 h 05 min, 2 d 07 h."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60:02} min"
    return f"{minutes // 1440} d {minutes % 1440 // 60:02} h"


def _step_of(line: str) -> float:
    """The step of a line of metrics.jsonl; infinity for the torn last line of a killed run."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf
