"""The training step on views that are already on the device: the plain recipe and the trainer's
step by turns, with the time of its parts, its operators, launches and memory.
"""

import gc
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from model import ModelOutput, SlotCon, prepare
from pipeline.errors import UserError
from pipeline.views import ViewConfig, sample_views
from tools.benchmark.options import VARIANTS
from tools.benchmark.plain_step import PlainStep, is_plain
from tools.benchmark.profile import beside_networks, profile_step
from tools.benchmark.timing import Bench, Result, StepDetail, Work
from train.config import EfficiencyConfig, RunConfig, TrainConfig
from train.metrics import Meter
from train.optimizer import build_optimizer, clip_each, set_rate
from train.pretrained import build_model

LOG_EVERY = 10
"""Steps between two log lines, at which the trainer adapts the slots' buffers."""
SMALL = 1e-6
"""Learning rate of the timed steps. The weights hardly change, so that as many slots are active in
the last step as in the first."""
MOST_OVERFLOWS = 40
"""The loss scale begins at 2^16 and is halved at each: far below 1 it cannot be the cause."""
_TRAIN, _VIEWS = TrainConfig(), ViewConfig()
Way = tuple[str, str | None]
"""A backend, "plain" or "fast", and one of `VARIANTS` or None."""


Step = Callable[..., object]
"""One training step on views, overlap, flipped and, with hidden patches, masks."""


class FastStep:
    """The trainer's step in one process, by the same functions. Changes `model` in place.

    Teacher, forward, metrics, backward, optimiser, and at log lines the size of the slots' buffers.
    """

    def __init__(
        self,
        model: SlotCon,
        *,
        efficiency: EfficiencyConfig,
        dtype: torch.dtype = torch.float32,
        train: TrainConfig = _TRAIN,
    ) -> None:
        self.own_teacher = train.teacher in ("student", "frozen")
        device = model.center.device
        prepare(
            model,
            channels_last=efficiency.channels_last,
            checkpointing=efficiency.checkpointing,
            compile=efficiency.compile,
            warn=_warn,
        )
        self.model, self.device, self.dtype = model, device, dtype
        model.train_stages(train.trainable_stages)
        self.optimizer, self.clip_grad = build_optimizer(model, train), train.clip_grad
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        accelerator = cast(Accelerator, SimpleNamespace(device=device))  # all that `add` needs
        self.meter = Meter(accelerator, model.term_names, sum(model.prototype_counts.values()))
        self.adapts = efficiency.selects_statically(device.type)
        self.steps = 0

    def __call__(
        self,
        views: Tensor,
        overlap: Tensor,
        flipped: Tensor,
        masks: Tensor | None = None,
        *,
        lr: float = SMALL,
        teacher_momentum: float = 0.99,
    ) -> ModelOutput:
        set_rate(self.optimizer, lr)
        if not self.own_teacher:
            self.model.update_teacher(teacher_momentum)
        mixed = self.dtype != torch.float32
        with torch.autocast(self.device.type, self.dtype if mixed else None, enabled=mixed):
            output: ModelOutput = self.model(
                views, overlap, flipped, masks, draw=(0, self.steps), own_teacher=self.own_teacher
            )
        self.scaler.scale(output.loss).backward()
        self.meter.add(output)
        if self.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            clip_each(self.model.parameters(), self.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.steps += 1
        if self.adapts and (self.steps == 1 or self.steps % LOG_EVERY == 0):
            self.model.adapt_capacity()
        return output


def _warn(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def varied(config: RunConfig, variant: str | None) -> RunConfig:
    """The configuration with the settings of one of `VARIANTS`. Raises UserError if they do not fit
    the others.
    """
    sections = VARIANTS[variant] if variant else {}
    try:
        parts = {name: replace(getattr(config, name), **sections[name]) for name in sections}
        return replace(config, **parts)
    except ValueError as error:
        raise UserError(f"--also {variant}: {error}") from None


def make_step(model: SlotCon, config: RunConfig, backend: str, dtype: torch.dtype) -> Step:
    """The step of a backend, "plain" or "fast". It changes `model`. With train.teacher "switch" it
    is a step with an average, which costs more, and with train.freeze_encoder_epochs one after
    these.
    """
    train = config.train
    if backend == "fast":
        return FastStep(model, efficiency=config.efficiency, dtype=dtype, train=train)
    return PlainStep(
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
    like: ViewConfig = _VIEWS,
    seed: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, ...]:
    """Views of noise, similar within a pair, with overlaps and flips as training draws them, and
    masks as those of `like`.

    Returns views [2, B, 3, S, S], overlap [2, B, 4], flipped bool [2, B], and masks bool
    [2, B, H, W] if `like` has any.
    """
    sides = np.full(images, 480)
    config = replace(_VIEWS, size=side)
    if like.mask_ratio:
        names = ("mask_ratio", "mask_ratio_spread", "mask_cell")
        config = replace(config, **{name: getattr(like, name) for name in names})
    drawn = sample_views(seed, 0, np.arange(images), sides, sides, config)
    generator = torch.Generator(device).manual_seed(seed)
    noise = torch.randn(3, images, 3, side, side, generator=generator, device=device, dtype=dtype)
    views = 0.95 * noise[2] + 0.3 * noise[:2]
    overlap = torch.from_numpy(drawn.overlap).to(device)
    others = [drawn.flipped] + ([] if drawn.masks is None else [drawn.masks])
    return views, overlap, *(torch.from_numpy(each).to(device) for each in others)


@torch.no_grad()
def spread_prototypes(model: SlotCon, views: Tensor) -> None:
    """Take the prototypes of both networks from features of cells of `views` [2, B, 3, S, S].

    The features of an untrained network are similar, so one random prototype wins all cells. The
    loss would then contrast one slot an image, but training contrasts several.
    """
    views = views if model.guide is None else model.guide.shrunk(views[0])[None]
    features = model.student(views[0]).features
    cells = features.permute(0, 2, 3, 1).flatten(0, 2)
    number = torch.arange(len(model.student.grouping.prototypes), device=cells.device)
    chosen = cells[(number * len(cells)) // len(number)]
    for branch in (model.student, model.teacher):
        branch.grouping.prototypes.copy_(chosen + 0.01 * chosen.std() * torch.randn_like(chosen))


def ways_of(config: RunConfig) -> list[Way]:
    """Plain and fast; a variant of the method has no plain step."""
    standard = ("teacher", "optimizer", "encoder_lr_scale", "trainable_stages")
    plain = is_plain(config.model) and all(
        getattr(config.train, name) == getattr(TrainConfig, name) for name in standard
    )
    return [("plain", None), ("fast", None)] if plain else [("fast", None)]


def gflop_of(config: RunConfig, side: int) -> float:
    """Of one image in a step, counted operator by operator; a multiplication and an addition are
    two. With train.teacher "switch" it is the mean over the run.
    """
    teacher, share = config.train.teacher, config.train.teacher_from
    shares = {"ema": 0.0, "student": 1.0, "switch": share, "frozen": 1.0}[teacher]
    with torch.random.fork_rng():
        torch.manual_seed(0)  # the active slots follow from the weights
        model, total = build_model(config), 0.0
    side *= config.train.teacher_resolution
    model.train_stages(config.train.trainable_stages)
    for own, part in ((False, 1 - shares), (True, shares)):
        if part:
            with FlopCounterMode(display=False, custom_mapping=_COUNTED) as counter:
                views = step_views(2, side, like=config.loaded(config.views))
                model(*views, own_teacher=own).loss.backward()
            total += part * counter.get_total_flops() / 2 / 1e9
    return total


def _conv_backward_flop(*shapes: Any, out_shape: Any) -> int:
    """Each of the two gradients of a convolution costs what its forward pass costs.

    torch counts the weights' gradient as if each output saw every input, so too many operations by
    the number of groups: 11 times as many for a step of a depthwise convolution of 32 channels.
    """
    grad_out, images, weight, *_, mask = shapes
    transposed = shapes[7]
    forward: int = conv_flop_count(images, weight, grad_out, transposed)
    return forward * (mask[0] + mask[1])


_COUNTED = {torch.ops.aten.convolution_backward: _conv_backward_flop}


def start_of(bench: Bench, variant: str | None = None) -> SlotCon:
    """A model with several active slots an image, on the CPU; the same for each setting that
    changes no network.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build_model(varied(bench.config, variant))
        spread_prototypes(model, _few_views(bench, variant)[0])
    return model


def step_works(bench: Bench, ways: Sequence[Way]) -> Iterator[Work]:
    """The step of each way, on a model and a batch that are on the device already."""
    for backend, variant in ways:
        config = varied(bench.config, variant)
        model = start_of(bench, variant).to(bench.device)
        data = step_data(bench, config, bench.batch, backend)
        train = make_step(model, config, backend, bench.dtype)
        yield _work(bench, backend, variant, partial(train, *data))


def step(bench: Bench) -> None:
    """See `options.STAGES`."""
    ways = ways_of(bench.config)
    if len(ways) == 1:
        bench.skip("step, plain", "this configuration is a variant of the method")
    ways += [("fast", variant) for variant in bench.also]
    for _, variant in ways:  # refused before the first is measured
        varied(bench.config, variant)
    works, details, before = [], [], _allocated(bench.device)
    for work in step_works(bench, ways):
        works.append(work)
        details.append(_warm_up(bench, work.call, before))
        before = _allocated(bench.device)
    results = bench.measure(works, ratio_to="plain")
    for number, (work, result, detail) in enumerate(zip(works, results, details, strict=True)):
        known = _counted(bench, work.operation, detail)
        if work.operation != "compile":  # the profiler would see one call
            known = _profiled(bench, work, result, known)
        bench.results[number - len(works)] = replace(result, detail=known)
    del works, work  # they hold the GPU's memory
    if bench.largest:
        _find_largest(bench, ways)


def _counted(bench: Bench, variant: str | None, detail: StepDetail) -> StepDetail:
    """With what a step of one image takes, whatever the machine."""
    config = varied(bench.config, variant)
    with torch.no_grad():
        views = _few_views(bench, variant)
        pairs = float(start_of(bench, variant)(*views).stats["active_pairs"])
    gflop = gflop_of(config, config.views.size)
    return replace(detail, gflop=gflop, active_pairs=pairs)


def _few_views(bench: Bench, variant: str | None) -> tuple[Tensor, ...]:
    config = varied(bench.config, variant)
    views = config.loaded(config.views)
    return step_views(min(bench.batch, 8), views.size, like=views)


def _profiled(bench: Bench, work: Work, result: Result, detail: StepDetail) -> StepDetail:
    profile = profile_step(work.call, bench.device)
    beside = beside_networks(profile.parts, profile.launches and result.ms)
    return replace(detail, **vars(profile), beside=beside)


def _work(bench: Bench, backend: str, variant: str | None, call: Callable[[], object]) -> Work:
    threads = torch.get_num_threads()
    return Work("step", backend, call, bench.batch, bench.batch, threads, operation=variant)


def step_data(bench: Bench, config: RunConfig, batch: int, backend: str) -> tuple[Tensor, ...]:
    """A batch in the layout that a backend gets in training. Raises UserError."""
    side = config.views.size
    if batch * config.model.cells_of(side) < 2:
        raise UserError(f"--batch {batch}: one cell of {side} pixels has no variance")
    like = config.loaded(config.views)
    views, *others = step_views(batch, like.size, like=like, device=bench.device, dtype=bench.dtype)
    if backend == "fast":
        views = views.flatten(0, 1).contiguous(memory_format=torch.channels_last)
        views = views.unflatten(0, (2, batch))
    return views, *others


def _warm_up(bench: Bench, call: Callable[[], object], before: int) -> StepDetail:
    """At least two calls, the last of which changes the weights. `before`: bytes on the GPU before
    the step's model was built.
    """
    began = time.perf_counter()
    call()
    if bench.device.type != "cuda":
        return StepDetail(first_s=time.perf_counter() - began, peak_bytes=None)
    torch.cuda.synchronize(bench.device)
    seconds = time.perf_counter() - began
    torch.cuda.reset_peak_memory_stats(bench.device)
    take_a_step(call)
    torch.cuda.synchronize(bench.device)
    return StepDetail(seconds, torch.cuda.max_memory_allocated(bench.device) - before)


def take_a_step(call: Callable[[], object]) -> None:
    """Call a work of `step_works` until the optimiser has taken a step.

    In fp16 the first steps overflow: they lower the loss scale and change no weight, so their time
    is not that of a step.
    """
    scaler: torch.amp.GradScaler = cast(Any, call).func.scaler
    for _ in range(MOST_OVERFLOWS):
        scale = scaler.get_scale()
        call()
        if scaler.get_scale() >= scale:
            return
    raise UserError(f"step: {MOST_OVERFLOWS} steps in a row overflow in fp16: nothing to measure")


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


# ---- The largest batch ----


def largest_batch(fits: Callable[[int], bool], start: int) -> int:
    """The largest batch that fits, to an eighth; 0 if none does.

    Doubles the batch until it does not fit, then bisects.
    """
    low, high = 0, start
    while fits(high):
        low, high = high, 2 * high
    while high - low > max(1, low // 8):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _find_largest(bench: Bench, ways: Sequence[Way]) -> None:
    """Add the largest batch to the last results, which are those of `ways`."""
    for number, (backend, variant) in enumerate(ways, len(bench.results) - len(ways)):
        largest = largest_batch(partial(_fits, bench, backend, variant), bench.batch)
        row = bench.results[number]
        assert row.detail is not None
        bench.results[number] = replace(row, detail=replace(row.detail, largest_batch=largest))


def _fits(bench: Bench, backend: str, variant: str | None, batch: int) -> bool:
    """Whether two steps fit the GPU's memory when nothing else uses it."""
    bench.progress(_work(bench, backend, variant or f"batch {batch}", lambda: None))
    gc.collect()
    torch.cuda.empty_cache()
    try:
        config = varied(bench.config, variant)
        data = step_data(bench, config, batch, backend)
        model = build_model(config).to(bench.device)
        train = make_step(model, config, backend, bench.dtype)
        for _ in range(2):
            train(*data)
        torch.cuda.synchronize(bench.device)
    except torch.OutOfMemoryError:
        return False
    except RuntimeError as error:  # cuBLAS and cuDNN have words of their own for it
        reason = " ".join(str(error).split())[:200]
        _warn(f"batch {batch} fails, and counts as too large: {reason}")
        return False
    return True
