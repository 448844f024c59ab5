"""What the trainer needs from a task."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn

Row = dict[str, Any]
"""A result: {"metric": str, "value": float in 0..1} and, for one class of many, {"class": str}."""


class Task(Protocol):
    """A model, its training examples, and its scores."""

    name: str
    """Its name in result.json: "detection" or "segmentation"."""
    model: nn.Module
    """In training mode, forward(batch) → dict of losses, scalars by name. The trainer minimises
    their sum and logs each; the names are the same for each batch. All random numbers come from
    torch's generators, which the trainer seeds at each step."""
    init: dict[str, Any]
    """The record of the backbone from `build_backbone`."""
    data: dict[str, Any]
    """The training set's identity: {"dataset": kind, "images": N, "fingerprint": sha256 of the list
    of names and annotations, "classes": names in the order of their labels}. A resumed run needs
    the same data; an evaluation of a checkpoint needs the same classes."""
    scored: dict[str, Any]
    """The identity of the held-out set that `evaluate` scores on, in the same form."""

    def __len__(self) -> int:
        """The number of training examples."""
        ...

    def example(self, index: int, epoch: int) -> Any:
        """Example `index` of `epoch`. Its random numbers come from
        `transfer.examples.generator(seed, epoch, index)`. Worker processes call it.

        Raises UserError for a file that cannot be read, in one line that names it.
        """
        ...

    def collate(self, examples: list[Any]) -> Any:
        """A batch: tensors in dicts, lists and tuples. The trainer moves it to the device."""
        ...

    def evaluate(
        self, model: nn.Module, accelerator: Accelerator, predictions: Path | None = None
    ) -> list[Row]:
        """Score `model`, which is in evaluation mode. The caller switches gradients off, and
        autocast on for mixed precision. Each process does its share; all return all rows.
        `predictions` is a folder that gets what the model says, in the benchmark's format.

        Raises UserError.
        """
        ...
