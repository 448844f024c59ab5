"""SlotCon's figures in the log: averages that accumulate on the device, and the progress line."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from model import ModelOutput
from train.run.log import progress

STATS = ("active_slots", "active_pairs", "dropped_pairs")


class Reading(NamedTuple):
    """The figures of a meter, equal on all processes."""

    averages: dict[str, float]
    """By name; empty if nothing was added."""
    batches: int
    """Micro-batches in the averages, of all processes."""
    skipped: int
    """Steps since the last `clear` that the optimiser has skipped."""
    reason: int
    """The largest `reason` that a process has passed to `read`."""
    usage: Tensor
    """float64 [K] on the host: cells that each of the teacher's prototypes has won, as in
    `ModelOutput.usage`."""
    duplicates: int
    """Pairs of prototypes that are nearly the same, as passed to `read`."""


class Meter:
    """Sums since the last log line, over micro-batches and processes: the loss, its `terms` and the
    model's statistics, which become averages, and the usage of the K prototypes.

    `add` stays on the device. `read` takes one collective and one synchronisation, and also returns
    `skipped`: a scalar on the device in which the optimiser counts the steps that it skips.
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
        """Add one micro-batch."""
        values = [output.loss.detach()]
        values += [output.terms[name] for name in self._terms]
        values += [output.stats[name] for name in STATS]
        values.append(torch.ones_like(values[0]))
        self._sums += torch.stack(values)
        self._usage += output.usage

    def read(self, reason: int = 0, duplicates: Tensor | None = None) -> Reading:
        """The figures so far. `reason`: why this process wants to end the run, 0 for no reason;
        `duplicates`: a scalar on the device.
        """
        others = torch.zeros_like(self._values[:3])
        others[0] = reason
        for index, scalar in enumerate((self._skipped, duplicates), start=1):
            if scalar is not None:
                others[index] = scalar
        rows = self._gathered(torch.cat([self._values, others])).cpu()
        sums, usage, others = rows.split([*self._sizes, 3], dim=1)
        *totals, count = sums.sum(dim=0).tolist()
        averages = {n: total / count for n, total in zip(self.names, totals, strict=True) if count}
        largest, skipped, pairs = (int(value) for value in others.amax(dim=0))
        return Reading(averages, round(count), skipped, largest, usage.sum(dim=0), pairs)

    def clear(self) -> None:
        """Start the next log line."""
        self._values.zero_()
        if self._skipped is not None:
            self._skipped.zero_()

    def state(self) -> list[list[float]]:
        """For each process its sums, the number of micro-batches in them, the usage, and the steps
        skipped.
        """
        skipped = self._values.new_zeros(1)
        if self._skipped is not None:
            skipped += self._skipped
        state: list[list[float]] = self._gathered(torch.cat([self._values, skipped])).tolist()
        return state

    def load(self, state: list[list[float]]) -> None:
        """Continue from `state`. With another number of processes each takes an equal part of it.
        A state of other values is ignored. Older checkpoints hold no usage, or no skipped steps:
        these begin at zero.
        """
        self.clear()
        saved = torch.tensor(state, dtype=torch.float64)
        if saved.ndim != 2:
            return
        processes = self._accelerator.num_processes
        if len(state) == processes:
            values = saved[self._accelerator.process_index]
        else:  # dividing sums and counts by the same number keeps the averages
            values = saved.mean(dim=0)
            usage = slice(self._sizes[0], sum(self._sizes))
            values[usage] *= len(state) / processes
        values, skipped = values[: len(self._values)], values[len(self._values) :]
        if len(values) in (len(self._sums), len(self._values)):
            self._values[: len(values)] = values.to(self._values)
            if self._skipped is not None and len(skipped):
                self._skipped.fill_(skipped[0])

    def _gathered(self, values: Tensor) -> Tensor:
        """[processes, values]"""
        gathered: Tensor = self._accelerator.gather(values[None])
        return gathered


def progress_line(values: Mapping[str, Any], epochs: int, last_step: int, batch_size: int) -> str:
    """The log line on the terminal."""
    titles = {
        "grouping": ("grouping_12", "grouping_21"),
        "masked": ("masked_1", "masked_2"),
        "slots": ("slot_12", "slot_21"),
        "relations": ("relations",),
    }
    terms = [
        " ".join([title, *(f"{values[name]:.3f}" for name in names)])
        for title, names in titles.items()
        if names[0] in values
    ]
    text = (
        f"loss {values['loss']:.4f} ({', '.join(terms)})  "
        f"{values['active_slots']:.1f} slots/image  dead prototypes {values['dead_prototypes']}"
    )
    epoch = math.ceil(values["epoch"])
    return f"epoch {epoch}/{epochs}  {progress(values, last_step, batch_size, text)}"
