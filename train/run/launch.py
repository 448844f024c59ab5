"""How a process joins its run: the other processes, its device, the lock of the run's folder."""

import fcntl
import os
import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import IO, Any, TypeVar

import torch
from accelerate import (
    Accelerator,
    DistributedDataParallelKwargs,
    DistributedType,
    InitProcessGroupKwargs,
)
from accelerate.tracking import get_available_trackers
from accelerate.utils import (
    GradientAccumulationPlugin,
    TorchDynamoPlugin,
    get_int_from_env,
)
from torch import nn

from pipeline.errors import UserError, printable
from pipeline.folders import refuse_url
from train.run.environment import check_environment, is_set

Model = TypeVar("Model", bound=nn.Module)


def launch(
    run_dir: Path,
    precision: str,
    trackers: Sequence[str],
    timeout_minutes: float,
    accumulation: int = 1,
    parts_rest: bool = False,
) -> Accelerator:
    """Form a group with the other processes; each waits up to `timeout_minutes` for the others.

    `precision` is efficiency.precision, `accumulation` the trainer's own micro-batches of a step;
    the `trackers` write to `run_dir`; with `parts_rest` a step may leave parameters without
    gradients. Raises UserError, also if the environment says otherwise.
    """
    on_gpu = torch.cuda.is_available() and not is_set("ACCELERATE_USE_CPU")
    check_environment(precision, accumulation, on_gpu)
    if precision == "fp16" and not on_gpu:
        raise UserError("efficiency.precision: fp16 needs a CUDA GPU; use bf16 or no")
    has_bf16 = not on_gpu or torch.cuda.is_bf16_supported(including_emulation=False)
    if precision == "bf16" and not has_bf16:
        raise UserError("efficiency.precision: this GPU has no bf16; use fp16 or no")
    installed = {str(tracker) for tracker in get_available_trackers()}
    for tracker in trackers:
        if tracker not in installed:
            raise UserError(f"log.trackers: the package of {tracker} is not installed")
    # torch 2.15 has a new name for this option; Accelerate still uses the old one.
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
    # On GPUs the watchdog comes first: NCCL would end the process with pages of traces.
    patience = timedelta(minutes=timeout_minutes * (2 if on_gpu else 1))
    accelerator = _join(
        cpu=not on_gpu,  # or processes that torchrun starts on CPUs would not form a group
        mixed_precision=precision,
        # Both are our own part. Given here, they are not read from the environment.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        dynamo_plugin=TorchDynamoPlugin(
            backend="no",
            mode="default",
            fullgraph=False,
            dynamic=False,
            use_regional_compilation=False,
        ),
        log_with=list(trackers) or None,
        project_dir=run_dir,
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=patience),
            _parallel(parts_rest),
        ],
    )
    known = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)
    if accelerator.distributed_type not in known:
        raise UserError(
            f"accelerate's {accelerator.distributed_type.value} is not supported: "
            "use plain data parallelism"
        )
    return accelerator


def _parallel(parts_rest: bool) -> DistributedDataParallelKwargs:
    """How the model is trained in parallel. Running statistics are not sent: training does not use
    them, and SyncBatchNorm keeps them equal. Gradients are summed in buckets during the backward
    pass.
    """
    return DistributedDataParallelKwargs(
        broadcast_buffers=False,
        gradient_as_bucket_view=True,
        find_unused_parameters=parts_rest,
    )


def _join(**options: Any) -> Accelerator:
    """Accelerator(**options). Raises UserError if the processes that a launcher has started do not
    find each other: a port in use, a wrong address or interface, a process that does not come.
    """
    try:
        return Accelerator(**options)
    except (RuntimeError, ValueError) as error:  # torch's errors of the network are RuntimeErrors
        launched = {"WORLD_SIZE", "MASTER_ADDR"} & os.environ.keys()
        if not launched or torch.distributed.is_initialized():  # the group stands: another fault
            raise
        place = ":".join(os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        raise UserError(
            f"the processes of this run cannot form a group at {printable(place[:80])} "
            f"(MASTER_ADDR:MASTER_PORT): {printable(reason)}"
        ) from error


def lock(run_dir: Path) -> IO[str]:
    """Lock a run's folder. The operating system removes the lock when the process ends; a folder
    that then holds nothing else is deleted: the start was refused.

    Raises UserError if another process trains there, for example the first start of a requeued job.
    """
    refuse_url(run_dir)
    path = run_dir / ".lock"
    try:
        while True:
            run_dir.mkdir(parents=True, exist_ok=True)
            file = path.open("w")
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file  # `unlock` of another process has not removed it
    except BlockingIOError:
        raise UserError(f"{run_dir}: another process is training there") from None
    except OSError as error:
        raise UserError(f"log.dir: {run_dir}: {error.strerror}") from None


def unlock(run_dir: Path, file: IO[str]) -> None:
    """Remove a folder that holds nothing but its lock `file`."""
    with file, suppress(OSError):
        if [entry.name for entry in run_dir.iterdir()] == [".lock"]:
            (run_dir / ".lock").unlink()
            run_dir.rmdir()


def to_device(model: Model, accelerator: Accelerator) -> Model:
    """`model` on this process's device. On several GPUs its BatchNorms share their statistics."""
    processes, device = accelerator.num_processes, accelerator.device
    if processes > 1 and device.type == "cuda":
        model = _synchronised(model)
    elif processes > 1:
        accelerator.print("note: on CPUs each process has its own batch statistics")
    return model.to(device)


def _synchronised(model: Model) -> Model:
    """`model` with SyncBatchNorm. timm's norms have an activation within, which PyTorch's own
    conversion would lose."""
    if "timm" in sys.modules:  # nothing else makes such norms
        from timm.layers.norm_act import convert_sync_batchnorm

        converted: Model = convert_sync_batchnorm(model)
        return converted
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)


def share_of_cores(device: torch.device) -> int:
    """The cores of this machine, divided by the processes that were launched on it. With a GPU one
    of them is left to the thread that launches its work.
    """
    share = len(os.sched_getaffinity(0)) // get_int_from_env(["LOCAL_WORLD_SIZE"], 1)
    return max(1, share - (device.type == "cuda"))
