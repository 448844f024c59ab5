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
        self._sums = torch.zeros(0)
        self._count = 0

    def add(self, losses: Mapping[str, Tensor]) -> None:
        """Add the losses of one step, scalars."""
        values = torch.stack([loss.detach().double() for loss in losses.values()])
        self._names = list(losses)
        self._sums = self._sums + values if self._count else values
        self._count += 1

    def read(self, reason: int = 0) -> tuple[dict[str, float], int]:
        """The averages (none if nothing was added) and the largest `reason` of all processes to end
        the run.
        """
        last = torch.tensor([float(reason)], dtype=torch.float64, device=self._accelerator.device)
        values = torch.cat([self._sums.to(last), last])
        rows: Tensor = self._accelerator.gather(values[None]).cpu()
        means = (rows[:, :-1].mean(dim=0) / max(1, self._count)).tolist()
        averages = dict(zip(self._names, means, strict=True))
        return {"loss": sum(means), **averages} if averages else {}, int(rows[:, -1].max())
