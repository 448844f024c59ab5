"""Where the time of a training step goes: its operators, summed by part of the step.

The model marks its parts with `record_function("slotcon.NAME")`, and so does the plain step. An
operator belongs to the innermost mark around it. A backward operator belongs to the part of the
forward operator with the same autograd sequence number.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

NETWORKS = ("student forward", "student backward", "teacher forward")
"""Encoder and projector."""
PARTS = (
    *NETWORKS, "geometry", "grouping", "losses", "slots", "image level", "cells",
    "teacher update", "optimiser", "other",
)  # fmt: skip
"""In the order of the picture. Each includes its backward pass; only the student's is separate.
geometry: RoIAlign and un-flip; grouping: scores and slots; losses: grouping loss and centre; slots:
selection, predictor, contrast; cells: contrast of single cells; optimiser: LARS or AdamW; other:
loss scale, clipping, metrics, Python between operators."""

_MARK, _BACKWARD, _OPTIMIZER = "slotcon.", "autograd::engine::evaluate_function", "Optimizer.step#"
_WAITS = {
    "cpu": ("aten::_local_scalar_dense", "aten::nonzero", "tolist"),
    "cuda": ("cudaStreamSynchronize", "cudaEventSynchronize"),
}


@dataclass(frozen=True)
class Profile:
    """One step."""

    parts: dict[str, float]
    """ms of each of `PARTS` that took any time: of its kernels on a GPU, else of the host."""
    operators: int
    """ATen operators that no other operator called."""
    host_waits: int
    """How often a value was copied to the host. On a GPU the host waits for it."""
    launches: int | None
    """Kernels and copies on the GPU; None without a GPU."""


def profile_step(call: Callable[[], object], device: torch.device) -> Profile:
    """Profile one call of a step that has warmed up."""
    on_gpu = device.type == "cuda"
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # its messages are for PyTorch's developers
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with _tolist_recorded(), profile(activities=activities, acc_events=True) as recorded:
        with record_function(_MARK + "other"):
            call()
        if on_gpu:
            torch.cuda.synchronize(device)
    events = [event for event in recorded.events() or [] if event.device_type.name == "CPU"]
    return Profile(
        parts=by_part(events, on_gpu),
        operators=sum(_is_operator(e) and not _is_operator(e.cpu_parent) for e in events),
        host_waits=sum(e.name in _WAITS[device.type] and not _reads_counts(e) for e in events),
        launches=sum(len(_kernels(event)) for event in events) if on_gpu else None,
    )


def beside_networks(parts: dict[str, float], step_ms: float | None = None) -> float:
    """Share of a step that is not the networks' forward and backward.

    On a GPU, `parts` are the times of kernels. The GPU may be idle between them, so give the time
    of the whole step in `step_ms`.
    """
    networks = sum(parts.get(name, 0.0) for name in NETWORKS)
    return 1 - networks / max(sum(parts.values()), step_ms or 0.0)


def by_part(events: Sequence[Any], on_gpu: bool) -> dict[str, float]:
    """ms by part of the host's profiler events (`FunctionEvent`). KeyError for an unknown mark."""
    forward: dict[int, str] = {}
    sums = dict.fromkeys(PARTS, 0.0)
    for event in sorted(events, key=lambda event: event.time_range.start):
        part, backward = _part(event, forward)
        if event.sequence_nr >= 0 and not event.name.startswith(_BACKWARD):
            forward[event.sequence_nr] = part  # the last operator with a number made its node
        if part in ("student", "teacher"):
            part += " backward" if backward else " forward"
        kernels = sum(kernel.duration for kernel in _kernels(event))
        sums[part] += (kernels if on_gpu else event.self_cpu_time_total) / 1e3
    return {part: ms for part, ms in sums.items() if ms > 0}


def _part(event: Any, forward: dict[int, str]) -> tuple[str, bool]:
    """The innermost part around an event, and whether the event belongs to the backward pass."""
    while event is not None:
        if event.name.startswith(_MARK):
            return event.name.removeprefix(_MARK), False
        if event.name.startswith(_OPTIMIZER):
            return "optimiser", False
        if event.name.startswith(_BACKWARD):
            return forward.get(event.sequence_nr, "other"), True
        event = event.cpu_parent
    return "other", False


def _reads_counts(event: Any) -> bool:
    """Whether AdamW reads its counts of steps, one for each weight. On a GPU the kernel does it."""
    while event is not None and event.name != "aten::_fused_adamw_":
        event = event.cpu_parent
    return event is not None


def _is_operator(event: Any) -> bool:
    return event is not None and event.name.startswith(("aten::", "torchvision::"))


def _kernels(event: Any) -> list[Any]:
    return [kernel for kernel in event.kernels if not kernel.name.startswith(_MARK)]


@contextmanager
def _tolist_recorded() -> Iterator[None]:
    """Record calls of `Tensor.tolist`: on a CPU it calls no operator that the profiler sees."""

    def tolist(tensor: torch.Tensor) -> Any:
        with record_function("tolist"):
            return torch._C.TensorBase.tolist(tensor)

    torch.Tensor.tolist = tolist  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        del torch.Tensor.tolist  # uncovers the method of its base class
