"""Where the time of a training step goes: its operators by the part of the step that they belong
to, those of the backward pass included.

A part is marked while a step is profiled, by wrapping the functions that make it up; a backward
operator belongs to the part of the forward operator with the same autograd sequence number.
"""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from model import SlotCon
from model.slotcon import Branch
from tools.benchmark import plain_step

NETWORKS = ("student forward", "student backward", "teacher forward")
"""Encoder and projector."""
PARTS = (
    *NETWORKS, "geometry", "grouping", "losses", "slots", "image level", "teacher update", "LARS",
    "other",
)  # fmt: skip
"""In the order of the picture. geometry: RoIAlign and un-flip; grouping: scores and slots; losses:
the grouping loss and the centre; slots: selection, predictor, contrast; other: loss scale, metrics,
Python between operators. All but the networks with their backward."""

_BY_MODULE = {
    "model.alignment": "geometry",
    "model.grouping": "grouping",
    "model.losses": "losses",
    "model.slots": "slots",
    "model.image_level": "image level",
}
_BY_NAME = {
    "winning_slots": "slots",
    "won_cells": "slots",
    "slot_loss": "slots",
    "align": "geometry",
    "group": "grouping",
    "wins": "slots",
    "update_teacher": "teacher update",
    "_slot_terms": "slots",
    "_contrast": "slots",
    "_grouping": "losses",
    "_grouping_terms": "losses",
    "_update_center": "losses",
}
_MARK, _BACKWARD, _OPTIMIZER = "part: ", "autograd::engine::evaluate_function", "Optimizer.step#"
_WAITS = {
    "cpu": ("aten::_local_scalar_dense", "aten::nonzero", "tolist"),
    "cuda": ("cudaStreamSynchronize", "cudaEventSynchronize"),
}


@dataclass(frozen=True)
class Profile:
    """One step."""

    parts: dict[str, float]
    """ms of each of `PARTS` that took any; on a GPU of its kernels, else of the host."""
    operators: int
    """ATen operators that no other one called."""
    host_waits: int
    """Times that a value was brought to the host, which on a GPU waits for it."""
    launches: int | None
    """Kernels and copies on the GPU, None without one."""


def profile_step(call: Callable[[], object], model: SlotCon, device: torch.device) -> Profile:
    """Profile one call of a step that has warmed up."""
    on_gpu = device.type == "cuda"
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # its notes are for its developers
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with _marked(model), profile(activities=activities, acc_events=True) as recorded:
        with record_function(_MARK + "other"):
            call()
        if on_gpu:
            torch.cuda.synchronize(device)
    events = [event for event in recorded.events() or [] if _on_host(event)]
    return Profile(
        parts=by_part(events, on_gpu),
        operators=sum(_is_operator(e) and not _is_operator(e.cpu_parent) for e in events),
        host_waits=sum(event.name in _WAITS[device.type] for event in events),
        launches=sum(len(_kernels(event)) for event in events) if on_gpu else None,
    )


def beside_networks(parts: dict[str, float], step_ms: float | None = None) -> float:
    """Share of a step that is not the networks' own forward and backward. `step_ms`: of the whole
    step, where the parts are a GPU's kernels, between which it may have been idle.
    """
    networks = sum(parts.get(name, 0.0) for name in NETWORKS)
    return 1 - networks / max(sum(parts.values()), step_ms or 0.0)


def by_part(events: Sequence[Any], on_gpu: bool) -> dict[str, float]:
    """ms by part of profiler events (`FunctionEvent`) of the host."""
    forward: dict[int, str] = {}
    sums = dict.fromkeys(PARTS, 0.0)
    for event in sorted(events, key=lambda event: event.time_range.start):
        part, backward = _part(event, forward)
        if event.sequence_nr >= 0 and not event.name.startswith(_BACKWARD):
            forward[event.sequence_nr] = part  # the last operator with a number made its node
        if part in ("student", "teacher"):
            part += " backward" if backward else " forward"
        own = sum(kernel.duration for kernel in _kernels(event))
        sums[part] += (own if on_gpu else event.self_cpu_time_total) / 1e3
    return {part: ms for part, ms in sums.items() if ms > 0}


def _part(event: Any, forward: dict[int, str]) -> tuple[str, bool]:
    """The innermost part round an event, and whether it is one of the backward pass."""
    while event is not None:
        if event.name.startswith(_MARK):
            return event.name.removeprefix(_MARK), False
        if event.name.startswith(_OPTIMIZER):
            return "LARS", False
        if event.name.startswith(_BACKWARD):
            return forward.get(event.sequence_nr, "other"), True
        event = event.cpu_parent
    return "other", False


def _is_operator(event: Any) -> bool:
    return event is not None and event.name.startswith(("aten::", "torchvision::"))


def _on_host(event: Any) -> bool:
    return bool(event.device_type.name == "CPU")


def _kernels(event: Any) -> list[Any]:
    return [kernel for kernel in event.kernels if not kernel.name.startswith(_MARK)]


# ---- Marking ----


@contextmanager
def _marked(model: SlotCon) -> Iterator[None]:
    """While inside, functions of the step mark the part that they are."""
    names = [name for name in sys.modules if name == "model" or name.startswith("model.")]
    spaces: list[type | ModuleType] = [sys.modules[name] for name in names]
    spaces += [plain_step, plain_step.PlainStep, SlotCon]
    before = [(space, name, value) for space in spaces for name, value in vars(space).items()]
    changed = [entry for entry in before if _part_of_function(entry[2])]
    forward, features = Branch.forward, plain_step.features_of
    try:
        for space, name, value in changed:
            setattr(space, name, _marking(value, _part_of_function(value)))
        Branch.forward = _marking_branch(forward, model)  # type: ignore[method-assign]
        plain_step.features_of = _marking_branch(features, model)
        torch.Tensor.tolist = _tolist  # type: ignore[assignment,method-assign]
        yield
    finally:
        del torch.Tensor.tolist  # its base's is there again
        Branch.forward = forward  # type: ignore[method-assign]
        plain_step.features_of = features
        for space, name, value in changed:
            setattr(space, name, value)


def _tolist(tensor: torch.Tensor) -> Any:
    """On a CPU it calls no operator that the profiler would see."""
    with record_function("tolist"):
        return torch._C.TensorBase.tolist(tensor)


def _part_of_function(value: object) -> str:
    """The part that a function makes up, or nothing."""
    if not isinstance(value, FunctionType):
        return ""
    return _BY_NAME.get(value.__name__) or _BY_MODULE.get(value.__module__, "")


def _marking(function: Callable[..., Any], part: str) -> Callable[..., Any]:
    @wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        with record_function(_MARK + part):
            return function(*args, **kwargs)

    return wrapper


def _marking_branch(function: Callable[..., Any], model: SlotCon) -> Callable[..., Any]:
    """For functions whose first argument is a branch."""

    @wraps(function)
    def wrapper(branch: Branch, *args: Any) -> Any:
        with record_function(_MARK + ("teacher" if branch is model.teacher else "student")):
            return function(branch, *args)

    return wrapper
