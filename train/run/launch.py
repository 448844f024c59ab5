"""A process's place: among the other processes of the run, on its device, alone in its folder."""

import fcntl
import os
import warnings
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import IO

import torch
from accelerate import (
    Accelerator,
    DistributedDataParallelKwargs,
    DistributedType,
    InitProcessGroupKwargs,
)
from accelerate.tracking import get_available_trackers
from accelerate.utils import get_int_from_env, parse_flag_from_env

from pipeline.errors import UserError


def launch(
    run_dir: Path, precision: str, trackers: Sequence[str], timeout_minutes: float
) -> Accelerator:
    """This process's place among the others, its device and `precision`, efficiency.precision; the
    `trackers` write to `run_dir`; others are waited for `timeout_minutes`.

    Raises UserError.
    """
    on_gpu = torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU")
    if precision == "fp16" and not on_gpu:
        raise UserError("efficiency.precision: fp16 needs a CUDA GPU; use bf16 or no")
    has_bf16 = not on_gpu or torch.cuda.is_bf16_supported(including_emulation=False)
    if precision == "bf16" and not has_bf16:
        raise UserError("efficiency.precision: this GPU has no bf16; use fp16 or no")
    installed = {str(tracker) for tracker in get_available_trackers()}
    for tracker in trackers:
        if tracker not in installed:
            raise UserError(f"log.trackers: the package of {tracker} is not installed")
    # torch 2.15 has another word for it, which Accelerate does not pass on yet.
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
    launcher = os.environ.get("ACCELERATE_MIXED_PRECISION", precision)
    # On GPUs the watchdog speaks first: NCCL would end the process with pages of traces.
    patience = timedelta(minutes=timeout_minutes * (2 if on_gpu else 1))
    accelerator = Accelerator(
        cpu=not on_gpu,  # or processes that torchrun starts on a CPU would not know each other
        mixed_precision=precision,
        log_with=list(trackers) or None,
        project_dir=run_dir,
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=patience),
            # Running statistics take no part in training and, synchronised, are equal anyway.
            # Gradients are summed in buckets while backward goes on.
            DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
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


def lock(run_dir: Path) -> IO[str]:
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


def share_of_cores() -> int:
    """The cores of this machine for each of the processes that were launched on it."""
    return max(1, len(os.sched_getaffinity(0)) // get_int_from_env(["LOCAL_WORLD_SIZE"], 1))
