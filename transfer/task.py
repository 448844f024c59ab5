"""What a task is to the trainer."""

from typing import Any, Protocol

from accelerate import Accelerator
from torch import nn

Row = dict[str, Any]
"""A result: {"metric": str, "value": float in 0..1} and, for one class of many, {"class": str}."""


class Task(Protocol):
    """A model, the examples that it learns from, and how it is scored."""

    name: str
    """What result.json calls it: "detection" or "segmentation"."""
    model: nn.Module
    """In training mode, forward(batch) → dict of losses, scalars by name, of which the sum is
    minimised and each is logged; the names are the same for each batch. Whatever it draws, it draws
    from torch's generators, which the trainer seeds at each step."""
    init: dict[str, Any]
    """What `build_backbone` says of the backbone."""
    data: dict[str, Any]
    """The training set's identity: {"dataset": kind, "images": N, "fingerprint": sha256 of the list
    of names and annotations, "classes": names in the order of their labels}. A resumed run must
    find the same, and whoever scores a checkpoint the same classes."""
    scored: dict[str, Any]
    """Likewise of the set that `evaluate` scores on."""

    def __len__(self) -> int:
        """Training examples."""
        ...

    def example(self, index: int, epoch: int) -> Any:
        """Example `index` as `epoch` sees it; its randomness is drawn from
        `transfer.examples.generator(seed, epoch, index)`. Called in worker processes.

        Raises UserError for a file that cannot be read, in one line that names it.
        """
        ...

    def collate(self, examples: list[Any]) -> Any:
        """A batch: tensors in dicts, lists and tuples, which the trainer brings to the device."""
        ...

    def evaluate(self, model: nn.Module, accelerator: Accelerator) -> list[Row]:
        """Score `model`, which is in evaluation mode; called without gradients and inside autocast
        where the run has mixed precision. Each process does its share, and all return all rows.

        Raises UserError.
        """
        ...
