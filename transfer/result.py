"""The file with the scores of a run and its cost."""

from __future__ import annotations

import resource
from typing import TYPE_CHECKING, Any

from train.run.provenance import provenance
from train.run.settings import to_dict
from transfer.config import TransferConfig
from transfer.task import Row, Task

if TYPE_CHECKING:
    from accelerate import Accelerator

RESULT = "result.json"
"""Its name in the run's folder."""


def result(
    task: Task, config: TransferConfig, init: dict[str, Any], step: int, rows: list[Row]
) -> dict[str, Any]:
    """The content of result.json after `step` steps, without the cost."""
    return {
        **provenance(),
        "name": config.name,
        "task": task.name,
        "dataset": task.data["dataset"],
        "images": task.data["images"],
        "scored": task.scored,
        "schedule": {"steps": config.optim.steps, "batch_size": config.optim.batch_size},
        "init": init,
        "step": step,
        "results": rows,
        "config": to_dict(config),
    }


def cost(seconds: float, steps: int, batch_size: int, accelerator: Accelerator) -> dict[str, Any]:
    """Time, speed and memory of training, without evaluation. The memory is the peak of the largest
    process: GPU memory on a GPU, otherwise host memory.
    """
    import torch
    from accelerate.utils import gather_object

    on_gpu = accelerator.device.type == "cuda"
    if on_gpu:
        peak = torch.cuda.max_memory_allocated(accelerator.device)
    else:
        peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # Linux counts in KiB
    return {
        "seconds": seconds,
        "steps_per_s": steps / seconds,
        "images_per_s": steps * batch_size / seconds,
        "peak_memory_bytes": max(gather_object([peak])),
        "memory": "cuda" if on_gpu else "host",
    }


def summary(rows: list[Row]) -> str:
    """The results over all classes in one line: "miou 0.312  pixel_accuracy 0.810"."""
    return "  ".join(f"{row['metric']} {row['value']:.3f}" for row in rows if "class" not in row)
