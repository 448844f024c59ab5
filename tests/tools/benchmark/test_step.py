"""The step's profile, the search for the largest batch, and the cost of a recipe."""

import copy
import json
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipeline.errors import UserError
from tests.helpers.tiny_slotcon import tiny_model
from tools.benchmark import __main__ as benchmark
from tools.benchmark import cost as benchmark_cost
from tools.benchmark.cost import Recipe, Size, costs, peak_of, recipe_of
from tools.benchmark.options import VARIANTS
from tools.benchmark.plain_step import PlainStep
from tools.benchmark.profile import NETWORKS, PARTS, _part, beside_networks, by_part, profile_step
from tools.benchmark.step import (
    _fits,
    gflop_of,
    largest_batch,
    make_step,
    spread_prototypes,
    step_views,
    take_a_step,
    varied,
)
from train.config import RunConfig, load_config

CPU = torch.device("cpu")


def configured(*arguments: str) -> RunConfig:
    return load_config(["--name", "tiny", "--data.path", "none", *arguments])[0]


# ---- Profile ----


@pytest.mark.parametrize("backend", ["plain", "fast"])
def test_every_part_of_a_step_is_measured(backend: str) -> None:
    """The time of a part whose mark is missing or renamed would count as another part's."""
    model = tiny_model()
    data = step_views(2, 64)
    spread_prototypes(model, data[0])
    call = partial(make_step(model, configured(), backend, torch.float32), *data)
    call()
    profile = profile_step(call, CPU)
    assert set(profile.parts) == set(PARTS) - {"image level", "cells"}
    assert profile.parts["student backward"] > profile.parts["geometry"]
    assert 0 < beside_networks(profile.parts) < 1
    assert profile.launches is None
    assert profile.operators > 500


def marks_of(backend: str, **model_settings: Any) -> dict[str, set[str]]:
    """The innermost marks around each kind of operator in the forward pass of a loss."""
    model = tiny_model(**model_settings)
    data = step_views(2, 64)
    spread_prototypes(model, data[0])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as recorded:
        if backend == "plain":
            PlainStep(model).loss(*data, 0.99)
        else:
            model.update_teacher(0.99)
            model(*data)
    marks = defaultdict(set)
    for event in recorded.events():
        marks[event.name].add(_part(event, {})[0])
    return marks


FAST_VARIANTS: tuple[dict[str, Any], ...] = ({}, {"align": "projections", "image_loss_weight": 1.0})


@pytest.mark.parametrize(
    ("backend", "settings"), [("plain", {}), *(("fast", more) for more in FAST_VARIANTS)]
)
def test_each_mark_is_around_its_operators(backend: str, settings: dict[str, Any]) -> None:
    """A mark around the wrong lines would give the time of a part to another part."""
    marks = marks_of(backend, **settings)
    assert marks["aten::conv2d"] == {"student", "teacher"}
    assert marks["aten::einsum"] == {"grouping"}
    aligning = "torchvision::roi_align" if backend == "plain" else "aten::flip"
    assert marks[aligning] == {"geometry"}
    assert marks["aten::log_softmax"] >= {"losses"}
    assert marks["aten::argmax"] == {"slots"}
    assert marks["aten::cross_entropy_loss"] == {"slots"} | ({"image level"} if settings else set())
    update = "aten::mul" if backend == "plain" else "aten::_foreach_lerp_"
    assert "teacher update" in marks[update]


def test_the_plain_step_waits_and_a_static_one_does_not() -> None:
    """The fast step exists to avoid host synchronisations."""
    start, data = tiny_model(), step_views(2, 64)
    spread_prototypes(start, data[0])
    waits = {}
    for backend, variant in (("plain", None), ("fast", "exact"), ("fast", "static")):
        model = copy.deepcopy(start)
        config = varied(configured(), variant)
        call = partial(make_step(model, config, backend, torch.float32), *data)
        call()
        waits[variant] = profile_step(call, CPU).host_waits
    assert "tolist" not in vars(torch.Tensor)  # the patch is gone
    assert waits["static"] == 0
    assert waits["exact"] == 1
    assert waits[None] >= 2 * 4 + 2 + 1  # flips, nonzero, the loss


def test_the_counts_of_adamw_are_no_waits() -> None:
    """On a CPU it reads one for each weight, on a GPU none. Without it a step of SlotMIM would
    seem to wait a hundred times, and to have LARS."""
    config = varied(configured("--train.optimizer", "adamw", "--train.base_lr", "0.01"), "static")
    model, data = tiny_model(), step_views(2, 64)
    call = partial(make_step(model, config, "fast", torch.float32), *data)
    call()
    profiled = profile_step(call, CPU)
    assert profiled.host_waits == 0 and profiled.parts["optimiser"] > 0


def event(name: str, start: int, ms: float = 0.0, **more: Any) -> Any:
    known = {"cpu_parent": None, "sequence_nr": -1, "kernels": []} | more
    time = {"time_range": SimpleNamespace(start=start), "self_cpu_time_total": 1e3 * ms}
    return SimpleNamespace(name=name, **time, **known)


def kernel(ms: float) -> Any:
    return SimpleNamespace(name="kernel", duration=1e3 * ms)


def test_backward_operators_belong_to_the_part_of_their_forward() -> None:
    """The autograd engine runs them on another thread, outside every mark."""
    student, geometry = event("slotcon.student", 0), event("slotcon.geometry", 4)
    events = [
        student,
        event("aten::conv2d", 1, 1, cpu_parent=student, sequence_nr=7, kernels=[kernel(10)]),
        event(
            "aten::view", 2, 0, cpu_parent=student, sequence_nr=8
        ),  # makes no node of that number
        geometry,
        event("torchvision::roi_align", 5, 2, cpu_parent=geometry, sequence_nr=8),
        (engine := event("autograd::engine::evaluate_function: Roi", 9, sequence_nr=8)),
        event("aten::zeros", 10, 4, cpu_parent=engine, kernels=[kernel(20), kernel(20)]),
        (engine := event("autograd::engine::evaluate_function: Conv", 11, sequence_nr=7)),
        event("aten::convolution_backward", 12, 8, cpu_parent=engine),
        (lars := event("Optimizer.step#LARS.step", 20)),
        event("aten::_foreach_mul_", 21, 16, cpu_parent=lars),
    ]
    assert by_part(events[::-1], on_gpu=False) == {
        "student forward": 1, "student backward": 8, "geometry": 6, "optimiser": 16,
    }  # fmt: skip
    on_gpu = by_part(events, on_gpu=True)
    assert on_gpu == {"student forward": 10, "geometry": 40}
    assert beside_networks(on_gpu) == 0.8
    assert beside_networks(on_gpu, step_ms=100) == 0.9  # idle between kernels


def test_the_networks_are_parts() -> None:
    assert set(NETWORKS) < set(PARTS)


# ---- The largest batch ----


@pytest.mark.parametrize("room", [0, 1, 7, 64, 100, 1000])
@pytest.mark.parametrize("start", [1, 64])
def test_the_largest_batch_is_found_to_an_eighth(room: int, start: int) -> None:
    """A try takes minutes on a large GPU, so few are allowed, and a failed one ends nothing."""
    tried: list[int] = []

    def fits(batch: int) -> bool:
        tried.append(batch)
        return batch <= room

    found = largest_batch(fits, start)
    assert found <= room <= found * 1.125 + 1
    assert len(tried) < 20


# ---- Cost ----

RECIPE = Recipe("tiny", 1000, "the beton's", {160: 1, 224: 3})


def size(side: int, epochs: int, **more: Any) -> Size:
    known: dict[str, Any] = {
        "gflop": 100.0, "images_per_s": {"plain": 50.0, "fast": 100.0}, "loader": None, "watts": {},
    }  # fmt: skip
    return Size(side, epochs, **known | more)


def test_the_cost_follows_from_what_was_measured() -> None:
    """A bill that is wrong by the number of views, of GPUs or by a thousand is worse than none."""
    faster = {"plain": 100.0, "fast": 200.0}
    watts = {"plain": 360.0, "fast": 720.0}
    sizes = [size(160, 1, images_per_s=faster, watts=watts), size(224, 3, watts=watts)]
    rows = {(row["backend"], row["gpus"]): row for row in costs(RECIPE, sizes, 200.0, 500.0)}
    one, eight = rows["fast", 1], rows["fast", 8]
    assert one["hours"] * 3600 == pytest.approx(1000 / 200 + 3000 / 100)
    assert one["images_per_s"] == pytest.approx(4000 / 35)
    assert one["share_of_peak"] == pytest.approx(4000 * 100e9 / 35 / 200e12)
    assert one["kwh"] == pytest.approx(35 * 720 / 3.6e6)
    assert one["co2_kg"] == pytest.approx(35 * 720 / 3.6e6 * 0.5)
    assert eight["hours"] == one["hours"] / 8
    assert (eight["gpu_hours"], eight["kwh"]) == (one["gpu_hours"], one["kwh"])
    assert one["measured"]
    assert not eight["measured"]
    assert rows["plain", 1]["hours"] == pytest.approx(2 * one["hours"])


def test_a_slow_loader_holds_the_step_back() -> None:
    """GPU-hours are paid while a step waits."""
    sizes = [size(224, 4, loader=160.0)]
    plain, fast = (
        next(row for row in costs(RECIPE, sizes, None, 500.0, 2) if row["backend"] == backend)
        for backend in ("plain", "fast")
    )
    assert plain["images_per_s"] == 50
    assert fast["images_per_s"] == 80  # half of a loader that two GPUs share
    assert fast["share_of_peak"] is None
    assert fast["kwh"] is None


def test_the_recipe_s_images_and_sizes() -> None:
    """Dropped images and smaller views in early epochs make a run cheaper."""
    sizes = ["--train.view_sizes", "[[0, 160], [0.5, 224]]", "--train.epochs", "8"]
    recipe = recipe_of(configured(*sizes, "--train.batch_size", "100"), 1234)
    assert (recipe.images, recipe.epochs) == (1200, {160: 4, 224: 4})
    coco = recipe_of(configured("--data.path", "data/coco.beton"), None)
    assert coco.images == 231 * 512
    with pytest.raises(UserError, match="how many images"):
        recipe_of(configured(), None)


def test_depthwise_convolutions_are_counted_by_their_groups() -> None:
    """Without it networks of depthwise convolutions seem to take several times their operations."""
    model = ["--model.arch", "timm:tf_efficientnet_lite0", "--model.dim_hidden", "8"]
    model += ["--model.dim_out", "8", "--model.num_prototypes", "4"]
    lite0 = 0.768 - 0.040  # GFLOP of timm's forward_features at 224 pixels, without conv_head
    student_and_teacher = (1 + 2 + 1) * 2 * lite0
    assert gflop_of(configured(*model), 224) == pytest.approx(student_and_teacher, rel=0.01)


def test_operations_are_counted() -> None:
    """The share of peak follows from them: two forwards and a backward of both views."""
    model = ["--model.arch", "resnet18", "--model.dim_hidden", "8", "--model.dim_out", "8"]
    model += ["--model.num_prototypes", "4"]
    resnet18 = 2 * 1.81  # GFLOP of a forward at 224 pixels, as torchvision's documentation has it
    student_and_teacher = (1 + 2 + 1) * 2 * resnet18
    whole = gflop_of(configured(*model), 224)
    assert whole == pytest.approx(student_and_teacher, rel=0.03)
    own = gflop_of(
        configured(*model, "--train.teacher", "student", "--train.teacher_momentum", "0"), 224
    )
    assert own == pytest.approx(0.75 * whole, rel=0.01)
    switch = gflop_of(
        configured(*model, "--train.teacher", "switch", "--train.teacher_from", "0.8"), 224
    )
    assert switch == pytest.approx(0.8 * own + 0.2 * whole, rel=0.01)


def test_the_count_of_operations_is_always_the_same() -> None:
    """Without it weights drawn anew have other active slots: the same budget of `tests.evidence
    curves` made 250 steps or 260. Nor may counting change the weights that are drawn next.
    """
    model = ["--model.arch", "resnet18", "--model.dim_hidden", "8", "--model.dim_out", "8"]
    config = configured(*model, "--model.num_prototypes", "32", "--views.size", "64")
    counts = set()
    for seed in range(4):
        torch.manual_seed(seed)
        counts.add(gflop_of(config, 64))
        after = torch.rand(())
        torch.manual_seed(seed)
        assert after == torch.rand(())
    assert len(counts) == 1


def test_settings_are_measured_beside_the_configuration(
    small: Callable[..., list[dict[str, Any]]],
) -> None:
    """Without it a row of --also may be the step of the configuration itself. Slow: whole steps."""
    names = ["stages-2", "supervise-2-3-4", "student"]
    rows = small("--also", *names)
    assert [row["backend"] for row in rows] == ["plain", *["fast"] * 4]
    assert [row["operation"] for row in rows] == [None, None, *names]
    gflop = [row["detail"]["gflop"] for row in rows]
    ratios = [each / gflop[1] for each in gflop]
    assert ratios[0] == pytest.approx(1, rel=0.01)
    assert 0.3 < ratios[2] < 0.8
    assert 1.002 < ratios[3] < 1.5  # the heads are tiny
    assert ratios[4] == pytest.approx(0.75, rel=0.01)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_setting_changes_its_own_section(variant: str) -> None:
    """Without it a misspelt section or value would show on the day of a measurement."""
    vit = ["--model.arch", "timm:test_vit"] if variant == "slotmim" else []
    plain, other = configured(*vit), varied(configured(*vit), variant)
    changed = {name for name in vars(plain) if getattr(plain, name) != getattr(other, name)}
    assert changed == VARIANTS[variant].keys()


def test_a_setting_that_does_not_fit_is_refused_first(
    small: Callable[..., list[dict[str, Any]]],
) -> None:
    """Without it the step of the last setting fails after minutes of measuring the others."""
    with pytest.raises(UserError, match=r"^--also stages-2: supervise must be"):
        small("--also", "supervise-2-3-4", "stages-2", lines="supervise: [3, 4]")


def test_the_peak_is_the_gpu_s_own() -> None:
    """A PCIe card would look slow beside the peak of the larger card."""
    assert peak_of("NVIDIA H200", torch.float16) == 989.4
    assert peak_of("NVIDIA H100 PCIe", torch.bfloat16) == 756.4
    assert peak_of("NVIDIA H100 80GB HBM3", torch.float16) == 989.4
    assert peak_of("NVIDIA H200", torch.float32) is None
    assert peak_of("Some Other GPU", torch.float16) is None


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[dict[str, Any]]]:
    """Runs `step`, not profiled, on a tiny recipe with these options; returns its rows."""
    monkeypatch.setattr("tools.benchmark.step._profiled", lambda *arguments: arguments[-1])

    def run(*options: str, lines: str = "") -> list[dict[str, Any]]:
        (tmp_path / "tiny.yaml").write_text(
            "name: tiny\ndata: {path: none}\nviews: {size: 64}\n"
            "model:\n  {arch: resnet18, dim_hidden: 32, dim_out: 8, num_prototypes: 4}\n"
        )
        if lines:
            (tmp_path / "more.yaml").write_text(f"model: {{{lines}}}\n")
            options = ("--config", str(tmp_path / "more.yaml"), *options)
        argv = ["step", "--synthetic", "--batch", "2", "--repeats", "1", "--seconds", "0.01"]
        argv += ["--config", str(tmp_path / "tiny.yaml"), "--json", str(tmp_path / "step.json")]
        monkeypatch.setattr("sys.argv", ["benchmark", *argv, *options])
        benchmark.main()
        rows: list[dict[str, Any]] = json.loads((tmp_path / "step.json").read_text())["results"]
        return rows

    return run


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Runs `cost` on a tiny recipe without a beton; returns what it wrote."""
    (tmp_path / "coco.yaml").write_text(
        "name: tiny\ndata: {path: nowhere/coco.beton}\nviews: {size: 64}\n"
        "model: {arch: resnet18, dim_hidden: 8, dim_out: 8, num_prototypes: 4}\n"
        "train: {epochs: 4, warmup_epochs: 0, view_sizes: [[0, 32], [0.5, 64]]}\n"
    )

    def run(*arguments: str) -> dict[str, Any]:
        fixed = ["--config", str(tmp_path / "coco.yaml"), "--device", "cpu", "--minutes", "0.001"]
        fixed += ["--json", str(tmp_path / "cost.json")]
        monkeypatch.setattr("sys.argv", ["benchmark", "cost", *fixed, *arguments])
        monkeypatch.setattr(benchmark_cost, "GPUS", (1, 8))
        monkeypatch.setattr(benchmark_cost, "REPEATS", 1)
        benchmark.main()
        content: dict[str, Any] = json.loads((tmp_path / "cost.json").read_text())
        return content

    return run


def test_the_cost_of_a_recipe_is_printed_and_written(
    tiny: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    """Figures that were not measured say so: the loader, the peak, more than one machine."""
    content = tiny("--watts", "100")
    printed = capsys.readouterr().out
    assert [(row["side"], row["epochs"]) for row in content["sizes"]] == [(32, 2), (64, 2)]
    assert {(row["backend"], row["gpus"]) for row in content["cost"]} == {
        (backend, gpus) for backend in ("plain", "fast") for gpus in (1, 8)
    }
    assert all(row["kwh"] > 0 for row in content["cost"])
    for text in ("not measured", "if it scaled perfectly", "share of peak: unknown", "watts given"):
        assert text in printed


@pytest.mark.cuda
def test_a_gpu_s_kernels_are_counted_by_part() -> None:
    """Launches and shares on a GPU come from other fields of the profiler than on a CPU."""
    device = torch.device("cuda")
    start, data = tiny_model(), step_views(4, 64, device=device, dtype=torch.float16)
    spread_prototypes(start, data[0].cpu().float())
    profiles = {}
    for backend in ("plain", "fast"):
        model = copy.deepcopy(start).to(device)
        call = partial(make_step(model, configured(), backend, torch.float16), *data)
        call()
        take_a_step(call)
        profiles[backend] = profile_step(call, device)
        assert set(profiles[backend].parts) >= {*NETWORKS, "geometry", "slots", "optimiser"}
    assert profiles["fast"].host_waits == 0 < profiles["plain"].host_waits
    assert 0 < (profiles["fast"].launches or 0) < (profiles["plain"].launches or 0)


class Scaled:
    """A step whose loss scale falls in its first calls."""

    def __init__(self, overflows: int) -> None:
        self.calls, self.overflows, self.scaler = 0, overflows, self

    def get_scale(self) -> float:
        return 2.0 ** (16 - min(self.calls, self.overflows))

    def __call__(self) -> None:
        self.calls += 1


def test_measuring_begins_after_a_step_was_taken() -> None:
    """In fp16 the first steps overflow; timed, they would be steps without an optimiser."""
    step = Scaled(overflows=4)
    take_a_step(partial(step))
    assert step.calls == 5
    with pytest.raises(UserError, match="overflow"):
        take_a_step(partial(Scaled(overflows=1000)))


def test_a_library_s_own_word_for_full_memory_ends_the_search(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """cuBLAS raises a RuntimeError that is no OutOfMemoryError: the command would end there."""

    def refuse(*_: object) -> None:
        raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED\nwhen calling cublasCreate")

    monkeypatch.setattr("tools.benchmark.step.step_data", refuse)
    monkeypatch.setattr("torch.cuda.empty_cache", lambda: None)
    bench = SimpleNamespace(
        config=configured(), device=CPU, batch=4, progress=lambda work: None, dtype=torch.float32
    )
    assert largest_batch(partial(_fits, bench, "fast", None), 4) == 0
    assert "CUBLAS_STATUS_ALLOC_FAILED when calling" in capsys.readouterr().err
