"""What no other test looks at on a GPU, a line a check; the others run when one fails.

    python -m tests.gpu.checks BETON      checks and kernel times, to $OUT/checks.json
    python -m tests.gpu.checks largest B  largest batch of the step from B up, to $OUT/largest.json

DEVICE=cpu runs the checks on small sizes without a GPU.
"""

import itertools
import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model import ModelConfig, SlotCon, prepare
from pipeline.augment import get_backend
from pipeline.beton import Beton
from pipeline.loader import make_loader
from pipeline.views import ViewConfig, sample_views
from tools.benchmark import measure as benchmark
from tools.benchmark import options as benchmark_options
from tools.benchmark import step as benchmark_step
from tools.benchmark.stages import least_bytes, repeated
from tools.benchmark.step import FastStep, spread_prototypes, step_views
from tools.benchmark.timing import generated
from train.config import EfficiencyConfig
from train.lars import LARS

DEVICE = torch.device(os.environ.get("DEVICE", "cuda"))
GPU = DEVICE.type == "cuda"
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "no": torch.float32}


class HostMustNotWait:
    """Inside its `with`, an operation that makes the host wait for the GPU raises RuntimeError."""

    def __enter__(self) -> None:
        if GPU:
            torch.cuda.set_sync_debug_mode("error")

    def __exit__(self, *_: object) -> None:
        if GPU:
            torch.cuda.set_sync_debug_mode("default")


def seconds_of(call: Callable[[], object], repeats: int = 5) -> float:
    """Median seconds of `call`, after one call to warm up; on a GPU, the device's."""
    call()
    seconds = []
    for _ in range(repeats):
        if GPU:
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            call()
            last.record()
            last.synchronize()
            seconds.append(first.elapsed_time(last) / 1e3)
        else:
            began = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - began)
    return sorted(seconds)[repeats // 2]


def copy_rates() -> dict[str, float]:
    """GB/s of a copy on the device (read and written), and of a copy from pinned memory to it."""
    size = 1 << 30 if GPU else 1 << 24
    source, target = (torch.empty(size, dtype=torch.uint8, device=DEVICE) for _ in range(2))
    host, half = torch.empty(size // 2, dtype=torch.uint8, pin_memory=GPU), target[: size // 2]
    on_device = seconds_of(lambda: target.copy_(source))
    to_device = seconds_of(lambda: half.copy_(host, non_blocking=True))
    return {
        "copy GB/s": round(2 * size / on_device / 1e9, 1),
        "host to device GB/s": round(size / 2 / to_device / 1e9, 1),
    }


def kernel_times() -> dict[str, float]:
    """Milliseconds of two views of 512 images of COCO's sizes, 224 pixels, fp16: all of it and each
    Triton kernel; seconds of the first call, which compiles; GB that have to be moved.
    """
    batch, size, dtype = (512, 224, torch.float16) if GPU else (2, 32, torch.float32)
    index, canvas, height, width = generated(batch)
    params = sample_views(0, 0, index, height, width, ViewConfig(size=size))
    canvas, backend = canvas.to(DEVICE), get_backend("triton" if GPU else "kornia")
    sizes = torch.from_numpy(np.stack([height, width], axis=1))
    call = partial(backend.apply, canvas, sizes, params, size, DEVICE, dtype)
    began = time.perf_counter()
    call()
    if GPU:
        torch.cuda.synchronize()
    rows = {
        "first call s": round(time.perf_counter() - began, 1),
        "all ms": round(1e3 * seconds_of(call), 3),
        "least GB": round(least_bytes(params, size, dtype) / 1e9, 3),
    }
    return rows | (profiled_kernels(call, calls=5) if GPU else {})


def profiled_kernels(call: Callable[[], object], calls: int) -> dict[str, float]:
    """Milliseconds of each Triton kernel in one `call`."""
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
    kernels = ("weigh", "resize_across", "resize_down", "colour", "blur")
    return {
        f"{event.key} ms": round(event.device_time_total / calls / 1e3, 3)
        for event in profile.key_averages()
        if event.key in kernels
    }


def loader_under_load(beton: Beton) -> str:
    """A busy device and a host that runs ahead give the same batches as a host that waits."""
    side, batch, batches = (224, 64, 12) if GPU else (32, 4, 2)
    dtype, bits = (torch.float16, torch.int16) if GPU else (torch.float32, torch.int32)
    matrix = torch.randn(4096 if GPU else 64, 4096 if GPU else 64, device=DEVICE, dtype=dtype)

    def digests(busy: bool) -> list[int]:
        loader = make_loader(
            beton,
            ViewConfig(size=side),
            batch,
            crops="device",
            backend="auto",
            device=DEVICE,
            dtype=dtype,
            seed=0,
            threads=8 if GPU else 1,
        )
        sums = []
        for each in itertools.islice(loader.epoch(0), batches):
            for _ in range(30 if busy else 0):
                matrix @ matrix
            values = each.views.flatten().view(bits).long()
            weights = torch.arange(len(values), device=DEVICE) % 8191
            sums.append((values * weights).sum() + each.index.sum())
            if not busy and GPU:
                torch.cuda.synchronize()
        return torch.stack(sums).tolist()

    expected = digests(busy=False)
    equal = all(digests(busy=True) == expected for _ in range(3 if GPU else 1))
    return "same batches" if equal else "FAILED: other batches"


def lars_under_a_scaler() -> dict[str, Any]:
    """An infinite gradient changes no weight, counts, halves the scale; the host never waits."""
    shapes = ((8, 4, 3, 3), (16,), (32, 8))
    weights = [torch.nn.Parameter(torch.randn(*shape, device=DEVICE)) for shape in shapes]
    optimizer = LARS(weights, lr=0.1)
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=1024.0)

    def step(gradient: float) -> None:
        for weight in weights:
            weight.grad = torch.full_like(weight, gradient * 1024)
        scaler.scale(torch.ones((), device=DEVICE))  # creates the tensor that holds the scale
        scaler.step(optimizer)
        scaler.update()

    step(1.0)
    before = [weight.clone() for weight in weights]
    with HostMustNotWait():
        step(float("inf"))
    unchanged = all(torch.equal(a, b) for a, b in zip(before, weights, strict=True))
    skipped, scale = int(optimizer.skipped), scaler.get_scale()
    step(1.0)
    trains = not torch.equal(before[0], weights[0])
    return {"unchanged": unchanged, "skipped": skipped, "scale": scale, "trains after it": trains}


def small_step(precision: str, **efficiency: Any) -> tuple[FastStep, tuple[Tensor, Tensor, Tensor]]:
    """The fast step of a ResNet-18, and a batch for it: views, overlap, flipped."""
    dtype, (images, side) = DTYPES[precision], (16, 224) if GPU else (2, 64)
    torch.manual_seed(0)
    sizes = (4096, 256, 256) if GPU else (64, 32, 16)
    model = SlotCon(ModelConfig("resnet18", *sizes))
    views, *geometry = step_views(images, side, device=DEVICE, dtype=dtype)
    spread_prototypes(model, views.float().cpu()[:, :4])
    step = FastStep(model.to(DEVICE), efficiency=EfficiencyConfig(**efficiency), dtype=dtype)
    channels_last = views.flatten(0, 1).contiguous(memory_format=torch.channels_last)
    return step, (channels_last.unflatten(0, (2, -1)), *geometry)


def steps_in_every_precision() -> dict[str, dict[str, Any]]:
    """Loss after three steps, and the operation that makes the host wait in a fourth, by CUDA."""
    rows = {}
    for precision in ("no", "bf16", "fp16") if GPU else ("no", "bf16"):
        step, data = small_step(precision)
        for _ in range(3):
            output = step(*data)
        waits = "never"
        try:
            with HostMustNotWait():
                step(*data)
        except RuntimeError as error:
            waits = str(error).splitlines()[0][:120]
        loss, skipped = round(float(output.loss.detach()), 4), int(step.optimizer.skipped)
        rows[precision] = {"loss": loss, "host waits": waits, "skipped": skipped}
    return rows


def overflow_at_the_start() -> dict[str, Any] | str:
    """A loss scale that is far too large skips the step and changes no weight."""
    if not GPU:
        return "needs a GPU"
    step, data = small_step("fp16")
    step(*data)
    before = [weight.clone() for weight in step.model.parameters()]
    step.scaler.update(2.0**40)
    step(*data, teacher_momentum=1.0)
    weights = list(step.model.parameters())
    unchanged = all(torch.equal(a, b) for a, b in zip(before, weights, strict=True))
    return {"unchanged": unchanged, "scale": step.scaler.get_scale()}


def checkpointing_with_sync_batch_norm() -> str:
    """As on several GPUs: SyncBatchNorm needs num_batches_tracked in the recomputed forward too."""
    model = SlotCon(ModelConfig("resnet18", 16, 8, 8))
    model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model).to(DEVICE).train()
    prepare(model, checkpointing=True)
    model(*step_views(4, 64, device=DEVICE)).loss.backward()
    return "works"


def checkpointing_keeps_gradients() -> float:
    """Largest relative difference of a weight's gradient norm with activation checkpointing."""
    norms = []
    for checkpointing in (False, True):
        step, data = small_step("fp16" if GPU else "no", checkpointing=checkpointing)
        with torch.autocast(DEVICE.type, step.dtype if GPU else None, enabled=GPU):
            output = step.model(*data)
        (output.loss * 1024).backward()
        weights = [w for w in step.model.parameters() if w.grad is not None and w.ndim > 1]
        norms.append(torch.stack([w.grad.float().norm() for w in weights if w.grad is not None]))
    return float(((norms[0] - norms[1]).abs() / norms[0].clamp_min(1e-9)).max())


def pinned_bytes() -> dict[str, int] | str:
    """Bytes that the host allocator takes for a pinned buffer of 600 MB."""
    if not GPU:
        return "needs a GPU"
    before = torch.cuda.host_memory_stats().get("allocated_bytes.current", 0)
    buffer = torch.empty(600_000_000, dtype=torch.uint8, pin_memory=True)
    after = torch.cuda.host_memory_stats().get("allocated_bytes.current", 0)
    return {"requested": buffer.numel(), "allocated": after - before}


def power() -> float | str:
    """Watts at this moment."""
    return torch.cuda.power_draw(DEVICE) / 1e3 if GPU else "needs a GPU"


def run_checks(beton: Beton) -> None:
    """All checks, one after the other; the file is complete after each of them."""
    rows: dict[str, dict[str, Any]] = {}
    checks: list[Callable[[], object]] = [
        copy_rates,
        kernel_times,
        lars_under_a_scaler,
        steps_in_every_precision,
        overflow_at_the_start,
        checkpointing_with_sync_batch_norm,
        checkpointing_keeps_gradients,
        pinned_bytes,
        power,
        partial(loader_under_load, repeated(beton, 1024 if GPU else 8)),
    ]
    for check in checks:
        began = time.perf_counter()
        name = check.func.__name__ if isinstance(check, partial) else check.__name__
        try:
            value = check()
        except Exception as error:
            reason = (str(error).splitlines() or [""])[0][:220]
            value = f"FAILED {type(error).__name__}: {reason}"
        rows[name] = {"value": value, "s": round(time.perf_counter() - began, 1)}
        print(f"{name}: {value}  [{rows[name]['s']} s]", flush=True)
        write("checks.json", rows)


def find_largest_batch(start: int) -> None:
    """The largest batch of the fast step, with and without activation checkpointing; every try is
    written at once, for the time may end in the middle of one.
    """
    recipe = ["step", "--synthetic", "--config", "coco_r50_800ep", "--batch", str(start)]
    args = benchmark_options.parse(recipe)
    benchmark_options.check(args)
    bench = benchmark.prepare(args)
    rows: dict[str, dict[str, Any]] = {}
    for variant in (None, "checkpointing"):
        row = rows[variant or "fast"] = {"tries": [], "errors": []}

        def fits(batch: int, variant: str | None = variant, row: dict[str, Any] = row) -> bool:
            began = time.perf_counter()
            try:
                good = benchmark_step._fits(bench, "fast", variant, batch)
            except RuntimeError as error:  # of a full GPU, but not OutOfMemoryError
                row["errors"].append(f"{type(error).__name__}: {str(error).splitlines()[0][:100]}")
                good = False
            row["tries"].append((batch, good, round(time.perf_counter() - began, 1)))
            print(variant or "fast", row["tries"][-1], flush=True)
            write("largest.json", rows)
            return good

        row["largest"] = benchmark_step.largest_batch(fits, start)
        write("largest.json", rows)


def write(name: str, content: object) -> None:
    (Path(os.environ["OUT"]) / name).write_text(json.dumps(content, indent=1) + "\n")


def main() -> None:
    if sys.argv[1] == "largest":
        find_largest_batch(int(sys.argv[2]))
    else:
        run_checks(Beton(sys.argv[1]))


if __name__ == "__main__":
    main()
