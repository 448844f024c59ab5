"""What a launcher has put into the environment. Accelerate follows some of it without a word, and
ends in a traceback on the rest, so it is compared with the configuration first."""

import logging
import os
from collections.abc import Sequence

from pipeline.errors import UserError, printable

_FLAGS = ("ACCELERATE_USE_CPU", "ACCELERATE_DEBUG_MODE", "ACCELERATE_CPU_AFFINITY", "FORK_LAUNCHED")
"""These are followed."""
_TRUE, _FALSE = ("y", "yes", "t", "true", "on", "1"), ("n", "no", "f", "false", "off", "0")
_OTHER_WAYS = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config (tensor, context, sequence)",
    "ACCELERATE_USE_SAGEMAKER": "SageMaker",
}
"""Without these Accelerate does not read their settings (FSDP_…, MEGATRON_LM_…)."""
_RANK = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
_WORLD = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_OTHERS = (
    "MPI_LOCALRANKID",
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "MV2_COMM_WORLD_LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MPI_LOCALNRANKS",
    "OMPI_COMM_WORLD_LOCAL_SIZE",
    "MV2_COMM_WORLD_LOCAL_SIZE",
    "MASTER_PORT",
)
"""Further numbers that Accelerate or torch reads."""
_LOCAL_SIZE = ("MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE")
_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun sets."""


def check_before_import() -> None:
    """Check what Accelerate and its packages read as soon as they are imported. Every command calls
    this first. Raises UserError, which names the variable.
    """
    for name in ("USE_TORCH_XLA", "ACCELERATE_USE_MEGATRON_LM", "ACCELERATE_ENABLE_RICH"):
        is_set(name)
    level, known = os.environ.get("ACCELERATE_LOG_LEVEL"), logging.getLevelNamesMapping()
    if level is not None and level.upper() not in known:
        shown = printable(repr(level[:40]))
        raise UserError(f"ACCELERATE_LOG_LEVEL must be one of {', '.join(known)}, not {shown}")


def check_environment(precision: str, accumulation: int, on_gpu: bool) -> None:
    """Compare the environment with `efficiency.precision` and `efficiency.accumulation`, and with
    itself. Raises UserError, which names the variable.
    """
    for name in _FLAGS:
        is_set(name)
    for name, what in _OTHER_WAYS.items():
        if is_set(name):
            raise UserError(f"{name}: {what} is not supported: use plain data parallelism")
    if "ACCELERATE_TORCH_DEVICE" in os.environ:
        raise UserError(
            "ACCELERATE_TORCH_DEVICE: a run chooses its device: unset this variable, and set "
            "CUDA_VISIBLE_DEVICES or ACCELERATE_USE_CPU"
        )
    if (compiler := _text("ACCELERATE_DYNAMO_BACKEND", "no").lower()) != "no":
        raise UserError(
            f"ACCELERATE_DYNAMO_BACKEND is {compiler}: unset it; pre-training compiles with "
            "efficiency.compile"
        )
    if (fp8 := os.environ.get("ACCELERATE_FP8_BACKEND", "NO")) != "NO":
        raise UserError(
            f"ACCELERATE_FP8_BACKEND is {printable(repr(fp8[:40]))}: fp8 is not supported"
        )
    # accelerate launch always sets it; "no" if its user has said nothing
    launched = _text("ACCELERATE_MIXED_PRECISION", "no").lower()
    if launched not in ("no", precision):
        raise UserError(
            f"ACCELERATE_MIXED_PRECISION is {launched}, efficiency.precision is {precision}: set "
            "both alike (accelerate launch sets the first from --mixed_precision or its config)"
        )
    steps = _text("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", str(accumulation))
    if steps != str(accumulation):
        raise UserError(
            f"ACCELERATE_GRADIENT_ACCUMULATION_STEPS is {steps}, a step of this run has "
            f"{accumulation}: unset it; pre-training accumulates with efficiency.accumulation"
        )
    _check_processes(on_gpu)


def _check_processes(on_gpu: bool) -> None:
    """The processes are to find each other: otherwise each would train alone, or wait."""
    rank, world, local, _ = map(_number, (_RANK, _WORLD, ("LOCAL_RANK",), _OTHERS))
    for name, least, most in (("LOCAL_WORLD_SIZE", 1, 1 << 20), ("MASTER_PORT", 1, 65535)):
        number = _number((name,))
        if number is not None and not least <= number <= most:
            raise UserError(f"{name} must be {least} to {most}, not {number}")
    here = _number(("LOCAL_WORLD_SIZE",))
    if here is not None and (here > (world or 1) or (local or 0) >= here):
        raise UserError(
            f"LOCAL_WORLD_SIZE is {here}, WORLD_SIZE is {world or 1} and LOCAL_RANK {local or 0}: "
            "they contradict each other"
        )
    if rank is world is local is None:
        # accelerate launch gives an address, but no number, to the only process that it starts
        if {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"} <= os.environ.keys():
            raise UserError(
                "accelerate launch has started one process instead of several, as always on CPUs "
                "(MASTER_ADDR is set, WORLD_SIZE is not): use torchrun --nproc_per_node N"
            )
        return
    if world == 1 and local is None:
        return
    if not on_gpu:
        _number(("OMP_NUM_THREADS",))
    by_mpi = not on_gpu and not {"RANK", "WORLD_SIZE", "LOCAL_RANK"} & os.environ.keys()
    if rank is not None and (world is not None or by_mpi) and rank >= (world or 1):
        raise UserError(f"{_first(_RANK)} is {rank}, and {_first(_WORLD)} is {world or 'not set'}")
    missing = [] if by_mpi else [name for name in _TORCHRUN if not os.environ.get(name)]
    if by_mpi and world != _number(_LOCAL_SIZE) and not os.environ.get("MASTER_ADDR"):
        missing = ["MASTER_ADDR"]
    if missing:
        raise UserError(
            f"{', '.join(missing)}: not set, although other variables of several processes are: "
            "start them with torchrun or accelerate launch"
        )


def is_first() -> bool:
    """Whether this process is the first one of its machine, and so prints what concerns all. One
    whose number is no number, or has no group, prints too: there may be no other.
    """
    try:
        local, world = _number(("LOCAL_RANK",)) or 0, _number(("WORLD_SIZE",)) or 1
    except UserError:
        return True
    return not 0 < local < world


def _text(name: str, default: str) -> str:
    return printable(os.environ.get(name, "").strip()[:40]) or default


def is_set(name: str) -> bool:
    """Raises UserError if the variable is neither true nor false."""
    word = os.environ.get(name, "false")
    if word.lower() not in _TRUE + _FALSE:
        raise UserError(f"{name} must be true or false, not {printable(repr(word[:40]))}")
    return word.lower() in _TRUE


def _first(names: Sequence[str]) -> str:
    return next((name for name in names if name in os.environ), names[0])


def _number(names: Sequence[str]) -> int | None:
    """The first of the variables that is 0 or more. Raises UserError if one is no number."""
    found = None
    for name in names:
        text = os.environ.get(name, "-1")
        try:
            number = int(text)
        except ValueError:
            shown = printable(repr(text[:40]))
            raise UserError(f"{name} must be a whole number, not {shown}") from None
        found = number if found is None and number >= 0 else found
    return found
