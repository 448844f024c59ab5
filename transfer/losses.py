"""The losses since the last log line: added on the device, read with one synchronisation."""

from collections.abc import Mapping

import torch
from accelerate import Accelerator
from torch import Tensor


class LossMeter:
    """Averages of the losses by name and of their sum, "loss", over steps and processes."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self.clear()

    def clear(self) -> None:
        """Start the next log line."""
        self._names: list[str] = []
        self._sums = torch.zeros(0, dtype=torch.float64, device=self._accelerator.device)
        self.steps = 0
        """Steps in the sums."""
        self.skipped = 0
        """Those of them that overflowed in fp16, as the trainer counts them."""

    def add(self, losses: Mapping[str, Tensor]) -> None:
        """Add the losses of one step, scalars."""
        values = torch.stack([loss.detach().double() for loss in losses.values()])
        self._names = list(losses)
        self._sums = self._sums + values if self.steps else values
        self.steps += 1

    def read(self, reason: int = 0) -> tuple[dict[str, float], int]:
        """The averages (none if nothing was added) and the largest `reason` of all processes to end
        the run.
        """
        last = torch.tensor([float(reason)], dtype=torch.float64, device=self._accelerator.device)
        rows = self._gathered(torch.cat([self._sums, last]))
        means = (rows[:, :-1].mean(dim=0) / max(1, self.steps)).tolist()
        averages = dict(zip(self._names, means, strict=bool(self._names)))
        return {"loss": sum(means), **averages} if averages else {}, int(rows[:, -1].max())

    def state(self) -> list[list[float]]:
        """For each process the steps, those that overflowed, and the sums."""
        counts = self._sums.new_tensor([self.steps, self.skipped])
        state: list[list[float]] = self._gathered(torch.cat([counts, self._sums])).tolist()
        return state

    def load(self, state: list[list[float]]) -> None:
        """Continue from `state`; with another number of processes, each from the mean over the old
        ones. Older checkpoints hold no state: the sums begin at zero.
        """
        self.clear()
        if not state:
            return
        rows = self._sums.new_tensor(state)
        here, count = self._accelerator.process_index, self._accelerator.num_processes
        row = rows[here] if len(rows) == count else rows.mean(dim=0)
        self.steps, self.skipped = (int(value) for value in row[:2])
        self._sums = row[2:]

    def _gathered(self, values: Tensor) -> Tensor:
        """[processes, values], on the host"""
        rows: Tensor = self._accelerator.gather(values[None])
        return rows.cpu()
