"""The training step on views that are already there: the plain recipe and what the trainer runs, by
turns; where the time goes, how many operators and launches it takes, how much memory.
"""

import copy
import gc
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol, cast

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from model import ModelOutput, SlotCon, prepare
from model.encoder import cells_of
from pipeline.errors import UserError
from pipeline.views import ViewConfig, sample_views
from tools.benchmark.plain_step import PlainStep, is_plain
from tools.benchmark.profile import beside_networks, profile_step
from tools.benchmark.timing import Bench, Result, StepDetail, Work
from train.config import EfficiencyConfig, RunConfig
from train.lars import LARS
from train.metrics import Meter

LOG_EVERY = 10
"""Steps between two log lines, where the trainer adapts the slots' buffers."""
SMALL = 1e-6
"""Learning rate of the steps that are timed: they cost the same, and the weights stay as they are,
with as many active slots in the last step as in the first."""
VARIANTS: dict[str, dict[str, Any]] = {
    "compile": {"compile": True, "checkpointing": False},
    "checkpointing": {"checkpointing": True, "compile": False},
    "exact": {"slot_selection": "exact"},
    "static": {"slot_selection": "static"},
    "nchw": {"channels_last": False},
}
"""Settings of `efficiency` that can be measured beside the configuration's own."""


class Step(Protocol):
    """One training step."""

    def __call__(self, views: Tensor, overlap: Tensor, flipped: Tensor) -> object: ...


class FastStep:
    """What the trainer does in a step of one process, by the same functions: teacher, forward,
    metrics, backward, LARS, and at log lines the size of the slots' buffers. `model` is changed in
    place.
    """

    def __init__(
        self,
        model: SlotCon,
        *,
        efficiency: EfficiencyConfig,
        dtype: torch.dtype = torch.float32,
        momentum: float = 0.9,
        weight_decay: float = 1e-5,
        eta: float = 0.001,
    ) -> None:
        device = model.center.device
        prepare(
            model,
            channels_last=efficiency.channels_last,
            checkpointing=efficiency.checkpointing,
            compile=efficiency.compile,
            warn=_warn,
        )
        self.model, self.device, self.dtype = model, device, dtype
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        self.optimizer = LARS(
            weights, lr=0.0, momentum=momentum, weight_decay=weight_decay, eta=eta
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        accelerator = cast(Accelerator, _OneProcess(device))
        self.meter = Meter(accelerator, model.term_names, model.config.num_prototypes)
        self.adapts = efficiency.selects_statically(device.type)
        self.steps = 0

    def __call__(
        self,
        views: Tensor,
        overlap: Tensor,
        flipped: Tensor,
        *,
        lr: float = SMALL,
        teacher_momentum: float = 0.99,
    ) -> ModelOutput:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.model.update_teacher(teacher_momentum)
        mixed = self.dtype != torch.float32
        with torch.autocast(self.device.type, self.dtype if mixed else None, enabled=mixed):
            output: ModelOutput = self.model(views, overlap, flipped)
        self.scaler.scale(output.loss).backward()
        self.meter.add(output)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.steps += 1
        if self.adapts and (self.steps == 1 or self.steps % LOG_EVERY == 0):
            self.model.adapt_capacity()
        return output


def _warn(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class _OneProcess:
    """All that adding to a `Meter` needs of an accelerator."""

    device: torch.device


def make_step(
    model: SlotCon, config: RunConfig, backend: str, dtype: torch.dtype, variant: str | None = None
) -> Step:
    """The step of a backend, "plain" or "fast", on a model that is its own from now on."""
    train = config.train
    efficiency = replace(config.efficiency, **(VARIANTS[variant] if variant else {}))
    make = PlainStep if backend == "plain" else partial(FastStep, efficiency=efficiency)
    return make(
        model,
        dtype=dtype,
        momentum=train.momentum,
        weight_decay=train.weight_decay,
        eta=train.eta,
    )


def step_views(
    images: int,
    side: int,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    """Views of noise, alike within a pair, with overlaps and flips as training draws them: views
    [2, B, 3, S, S], overlap [2, B, 4], flipped [2, B].
    """
    sides = np.full(images, 480)
    drawn = sample_views(seed, 0, np.arange(images), sides, sides, ViewConfig(size=side))
    generator = torch.Generator(device).manual_seed(seed)
    noise = torch.randn(3, images, 3, side, side, generator=generator, device=device, dtype=dtype)
    views = 0.95 * noise[2] + 0.3 * noise[:2]
    overlap = torch.from_numpy(drawn.overlap).to(device)
    return views, overlap, torch.from_numpy(drawn.flipped).to(device)


@torch.no_grad()
def spread_prototypes(model: SlotCon, views: Tensor) -> None:
    """Make prototypes of features of cells of `views` [2, B, 3, S, S], the same for both networks.

    Prototypes drawn at random all lose to one, since the features of an untrained network are much
    alike: the loss would have one slot an image to contrast, where training has several.
    """
    features = model.student(views[0]).features
    cells = features.permute(0, 2, 3, 1).flatten(0, 2)
    number = torch.arange(len(model.student.grouping.prototypes), device=cells.device)
    chosen = cells[(number * len(cells)) // len(number)]
    for branch in (model.student, model.teacher):
        branch.grouping.prototypes.copy_(chosen + 0.01 * chosen.std() * torch.randn_like(chosen))


def step(bench: Bench) -> None:
    """Both backends and what else was asked for, by turns; then a profile of each."""
    config = bench.config
    ways: list[tuple[str, str | None]] = [("plain", None), ("fast", None)]
    if not is_plain(config.model):
        bench.skip("step, plain", "this configuration is a variant of the method")
        ways = ways[1:]
    ways += [("fast", variant) for variant in bench.also]
    start = SlotCon(config.model)
    spread_prototypes(start, step_views(min(bench.batch, 8), config.views.size)[0])
    works, models, details = [], [], []
    for backend, variant in ways:
        before = _allocated(bench.device)
        models.append(copy.deepcopy(start).to(bench.device))
        data = step_data(bench, config.views.size, bench.batch, backend)
        call = partial(make_step(models[-1], config, backend, bench.dtype, variant), *data)
        works.append(_work(bench, backend, variant, call))
        details.append(_warm_up(bench, call, before))
    results = bench.measure(works, ratio_to="plain")
    for place, result in enumerate(results):
        known = details[place]
        if result.operation != "compile":  # of which the profiler would see one call
            known = _profiled(bench, works[place].call, models[place], result, known)
        bench.results[place - len(results)] = replace(result, detail=known)
    del works, models, data, call  # all that holds the GPU's memory
    if bench.largest:
        _find_largest(bench, ways)


def _profiled(
    bench: Bench, call: Callable[[], object], model: SlotCon, result: Result, known: StepDetail
) -> StepDetail:
    images, side = min(bench.batch, 8), bench.config.views.size
    with torch.no_grad():
        seen = model(*step_views(images, side, device=bench.device))
    found = profile_step(call, bench.device)
    whole = None if found.launches is None else result.ms
    return replace(
        known,
        parts=found.parts,
        beside=beside_networks(found.parts, whole),
        operators=found.operators,
        launches=found.launches,
        host_waits=found.host_waits,
        active_pairs=float(seen.stats["active_pairs"]),
    )


def _work(bench: Bench, backend: str, variant: str | None, call: Callable[[], object]) -> Work:
    threads = torch.get_num_threads()
    return Work("step", backend, call, bench.batch, bench.batch, threads, operation=variant)


def step_data(bench: Bench, side: int, batch: int, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """A batch in the layout that a backend is given in training. Raises UserError."""
    if batch * cells_of(side) < 2:
        raise UserError(f"--batch {batch}: one cell of {side} pixels has no variance")
    views, overlap, flipped = step_views(batch, side, device=bench.device, dtype=bench.dtype)
    if backend == "fast":
        views = views.flatten(0, 1).contiguous(memory_format=torch.channels_last)
        views = views.unflatten(0, (2, batch))
    return views, overlap, flipped


def _warm_up(bench: Bench, call: Callable[[], object], before: int) -> StepDetail:
    """Two calls. `before`: bytes on the GPU before what is called was there."""
    began = time.perf_counter()
    call()
    if bench.device.type != "cuda":
        return StepDetail(first_s=time.perf_counter() - began, peak_bytes=None)
    torch.cuda.synchronize(bench.device)
    seconds = time.perf_counter() - began
    torch.cuda.reset_peak_memory_stats(bench.device)
    call()
    torch.cuda.synchronize(bench.device)
    return StepDetail(seconds, torch.cuda.max_memory_allocated(bench.device) - before)


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


# ---- The largest batch ----


def largest_batch(fits: Callable[[int], bool], start: int) -> int:
    """The largest batch that fits, to an eighth: doubled until one does not, then bisected; 0 if
    one image does not.
    """
    low, high = 0, start
    while fits(high):
        low, high = high, 2 * high
    while high - low > max(1, low // 8):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _find_largest(bench: Bench, ways: list[tuple[str, str | None]]) -> None:
    """Two steps of each batch, in memory that nothing else holds."""
    for place, (backend, variant) in enumerate(ways):
        fits = partial(_fits, bench, backend, variant)
        found = largest_batch(fits, bench.batch)
        row = bench.results[place - len(ways)]
        assert row.detail is not None
        detail = replace(row.detail, largest_batch=found)
        bench.results[place - len(ways)] = replace(row, detail=detail)


def _fits(bench: Bench, backend: str, variant: str | None, batch: int) -> bool:
    bench.tell(_work(bench, backend, variant or f"batch {batch}", lambda: None))
    gc.collect()
    torch.cuda.empty_cache()
    try:
        data = step_data(bench, bench.config.views.size, batch, backend)
        model = SlotCon(bench.config.model).to(bench.device)
        train = make_step(model, bench.config, backend, bench.dtype, variant)
        for _ in range(2):
            train(*data)
        torch.cuda.synchronize(bench.device)
    except torch.OutOfMemoryError:
        return False
    return True
