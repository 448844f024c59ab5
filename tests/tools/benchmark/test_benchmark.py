"""The benchmark: its measurements, its files, and its conclusions from given figures."""

import json
import math
import os
import subprocess
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.beton import Beton
from pipeline.errors import UserError
from pipeline.views import ViewConfig, sample_views
from tests.helpers.betons import varied, write_beton
from tools.benchmark import __main__ as benchmark
from tools.benchmark import measure, options
from tools.benchmark.stages import COPY, STAGES, least_bytes, operations, repeated
from tools.benchmark.timing import Bench, Result, Work
from tools.benchmark.verdict import FINISHED, compare, verdict
from tools.report.schema import Rates
from train.config import load_config
from train.run.log import Stopwatch

CONFIG = """
name: tiny
data: {path: none}
views: {size: 32}
model: {arch: resnet18, dim_hidden: 8, dim_out: 8, num_prototypes: 4}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A beton of seven JPEGs and a small model's configuration."""
    folder = tmp_path_factory.mktemp("benchmark")
    write_beton(folder / "small.beton", varied(7))
    (folder / "tiny.yaml").write_text(CONFIG)
    return folder


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr("sys.argv", ["benchmark", *map(str, arguments)])
    benchmark.main()


def result(stage: str, backend: str, rate: float, **more: Any) -> Result:
    """A measurement; its other figures do not matter."""
    known = {"ms": 1.0, "host_ms": 1.0, "batch": 64, "threads": 2, "repeats": 3} | more
    return Result(stage, backend, rate, rate * 0.9, rate * 1.1, **known)


# ---- Measuring ----


def test_what_masks_cost_is_measured(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without it nobody knows what masks add to the draws of a batch."""
    pytest.importorskip("timm")
    words = ("params", "--synthetic", "--repeats", 1, "--seconds", 0.001, "--device", "cpu")
    config = ("--config", folder / "masked.yaml", "--json", tmp_path / "masked.json")
    masked = CONFIG.replace("size: 32", "size: 32, mask_ratio: 0.5")
    masked = masked.replace("arch: resnet18", "objective: slotmim, arch: 'timm:test_vit'")
    (folder / "masked.yaml").write_text(masked)
    run(monkeypatch, *words, *config)
    rows = json.loads((tmp_path / "masked.json").read_text())["results"]
    assert [(row["operation"], row["ratio_to"]) for row in rows] == [
        (None, None), ("without masks", "numba"),
    ]  # fmt: skip


def test_every_stage_is_measured_and_written_down(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Reports and later comparisons read this file: a lost stage would go unnoticed."""
    monkeypatch.setitem(COPY, "cpu", 1 << 16)
    run(
        monkeypatch, "all", "--data", folder / "small.beton", "--config", folder / "tiny.yaml",
        "--batch", 4, "--repeats", 1, "--seconds", 0.001, "--threads", 2, 1, "--device", "cpu",
        "--json", folder / "bench.json", "--plot", folder / "bench.png",
    )  # fmt: skip
    printed = capsys.readouterr()
    content = json.loads((folder / "bench.json").read_text())
    assert {"hardware", "versions", "command", "settings", "results"} <= content.keys()
    rows = content["results"]
    assert all(set(row) == {field.name for field in fields(Result)} for row in rows)
    measured = {(row["stage"], row["backend"], row["crops"], row["operation"]) for row in rows}
    assert measured >= {
        ("read", "page cache", None, None),
        ("read", "disk", None, None),
        ("decode", "libjpeg-turbo", None, None),
        ("decode", "loader", None, None),
        ("decode", "loader", "host", None),
        ("decode", "loader", "host", FINISHED),
        ("params", "numba", None, None),
        ("transfer", "memory copy", None, None),
        ("step", "plain", None, None),
        ("step", "fast", None, None),
        *(("augment", name, None, None) for name in ("reference", "kornia")),
        *(("augment", "kornia", None, operation) for operation in operations(ViewConfig())),
        ("augment", "kornia", None, "normalise"),
        *(
            ("pipeline", name, crops, None)
            for name in ("reference", "compiled", "kornia")
            for crops in ("device", "host")
        ),
        ("pipeline", "compiled", "host", "overlap"),
    }
    assert [row["threads"] for row in rows if row["backend"] == "libjpeg-turbo"] == [1, 2]
    for row in rows:
        assert 0 < row["slowest"] <= row["images_per_s"] <= row["fastest"]
        assert (row["wait_share"] is not None) == (row["operation"] == "overlap")
        assert (row["detail"] is not None) == (row["stage"] == "step")
    waits = [row["wait_share"] for row in rows if row["operation"] == "overlap"]
    assert len(waits) >= 2 and all(0 <= wait < 1 for wait in waits)
    assert any("triton" in line for line in content["skipped"]) and "triton" in printed.err
    assert "teacher update" in printed.out
    table = printed.out.split("\n\n")[0].splitlines()
    assert len(table) == len(rows) + 1
    assert content["verdict"] in printed.out
    assert all(part in printed.out for part in ("student backward", "grouping", "slots"))
    with Image.open(folder / "bench.png") as picture:
        assert picture.format == "PNG" and picture.height > 600


def test_only_the_named_stages_run_and_no_file_is_needed(tmp_path: Path) -> None:
    """A machine without libturbojpeg can still measure its GPU."""
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    code = f"""
import sys
sys.modules["pipeline.turbojpeg"] = None  # so that importing it fails
sys.argv = ["benchmark", "augment", "--synthetic", "--config", {str(tmp_path / "tiny.yaml")!r},
    "--batch", "2", "--repeats", "1", "--seconds", "0.001", "--backends", "reference",
    "--device", "cpu", "--json", {str(tmp_path / "bench.json")!r}]
from tools.benchmark import __main__ as benchmark
benchmark.main()
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    content = json.loads((tmp_path / "bench.json").read_text())
    assert {row["stage"] for row in content["results"]} == {"transfer", "augment"}  # the copy


def test_each_stage_is_explained() -> None:
    """Without it a new stage is missing from --help, or --help names one that there is not."""
    assert list(STAGES) == list(options.STAGES)


def test_a_benchmark_that_fails_keeps_what_it_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without it a failure in the last stage loses the minutes of all others."""

    def fail(bench: Bench) -> None:
        raise RuntimeError("no memory")

    path = tmp_path / "bench.json"
    monkeypatch.setattr(measure, "STAGES", {"params": STAGES["params"], "step": fail})
    options = ["--synthetic", "--device", "cpu", "--batch", "2", "--repeats", "1", "--json", path]
    arguments = ["benchmark", "params", "step", *map(str, options), "--seconds", "0.001"]
    monkeypatch.setattr("sys.argv", arguments)
    with pytest.raises(RuntimeError):
        benchmark.main()
    content = json.loads(path.read_text())
    assert [row["stage"] for row in content["results"]] == ["params"]
    assert content["verdict"].startswith("unfinished")
    assert content["hardware"] and content["settings"]["batch"] == 2


def make_bench(**changes: Any) -> Bench:
    config, _ = load_config(["--name", "tiny", "--data.path", "none"])
    known: dict[str, Any] = {
        "config": config, "beton": None, "batch": 4, "threads": (2,), "repeats": 3, "seconds": 1.0,
        "images": 8, "device": torch.device("cpu"), "backends": ("reference", "kornia"),
    }  # fmt: skip
    return Bench(**known | changes)


def test_medians_ratios_and_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ratios are taken within a round: a disturbance of one round does not change them."""
    bench = make_bench()
    # Warm-up of both, then three rounds of (fast, slow); the second is disturbed.
    seconds = iter([0.5, 2.0, 1.0, 2.0, 10.0, 20.0, 1.0, 2.0])
    calls = []

    def time(self: Bench, work: Work, count: int) -> tuple[float, float]:
        calls.append(count)
        took = next(seconds)
        return took, took / 2

    monkeypatch.setattr(Bench, "_time", time)
    works = [Work("augment", name, lambda: None, 8, 8, 1, 80) for name in ("fast", "slow")]
    fast, slow = bench.measure(works, ratio_to="slow")
    assert calls == [1, 1, 2, 1, 2, 1, 2, 1]  # enough to fill a repeat, at least one
    assert (fast.images_per_s, fast.slowest, fast.fastest) == (16.0, 1.6, 16.0)
    assert (fast.ms, fast.host_ms, fast.bytes_per_s) == (500.0, 250.0, 160.0)
    assert fast.ratio == 4.0 and fast.ratio_to == "slow" and slow.ratio is None


def test_an_operation_alone_is_alone() -> None:
    """Otherwise its time would include that of other operations."""
    sides = np.full(64, 100)
    for name, views in operations(ViewConfig()).items():
        drawn = sample_views(0, 0, np.arange(64), sides, sides, views)
        on = {
            "flip": drawn.flipped.any(),
            "grey": drawn.grey.any(),
            "blur": (drawn.sigma > 0).any(),
            "solarize": drawn.solarized.any(),
        }
        amounts = (drawn.jitter != (1, 1, 1, 0)).any(axis=(0, 1))
        on |= dict(zip(("brightness", "contrast", "saturation", "hue"), amounts, strict=True))
        assert {key for key, value in on.items() if value} == {name} - {"crop + resize"}


def test_the_least_bytes() -> None:
    """The share of the copy bandwidth counts crops of 3 bytes a pixel and views in their type."""
    views = ViewConfig(size=10, min_scale=1, min_aspect=1, max_aspect=1)
    drawn = sample_views(0, 0, [0, 1], [20, 20], [20, 20], views)
    assert least_bytes(drawn, 10, torch.float16) == 2 * 2 * (20 * 20 * 3 + 10 * 10 * 3 * 2)


def test_a_small_beton_is_repeated(folder: Path) -> None:
    """A batch larger than the set can be measured, on the same pixels; no file stays open or is
    closed twice.
    """
    beton = Beton(folder / "small.beton")
    longer = repeated(beton, 20)
    assert len(longer) == 21 and len(np.unique(longer.index)) == 21
    np.testing.assert_array_equal(longer.decode(15), beton.decode(1))
    descriptor = longer.file
    del longer
    with pytest.raises(OSError):
        os.fstat(descriptor)
    assert beton.decode(1).size
    assert repeated(beton, 7) is beton


class _Device:
    """A GPU's clock, and events on it."""

    def __init__(self) -> None:
        self.now = 0.0

    def event(self, enable_timing: bool) -> Any:
        device = self

        class Event:
            def record(self) -> None:
                self.at = device.now

            def synchronize(self) -> None:
                pass

            def elapsed_time(self, end: Any) -> float:
                return float(1e3 * (end.at - self.at))

        assert enable_timing
        return Event()


def test_data_wait_on_a_gpu_is_the_device_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host runs ahead of the device, so its own waiting costs nothing. The trainer and the
    benchmark both show this figure.
    """
    device = _Device()
    monkeypatch.setattr(torch.cuda, "Event", device.event)
    monkeypatch.setattr("time.perf_counter", lambda: device.now)
    stopwatch = Stopwatch(torch.device("cuda"))
    for _ in range(4):
        with stopwatch.waiting():
            device.now += 0.25
        device.now += 0.75  # the step
        stopwatch.steps += 1
    assert stopwatch.read() == (4, 4.0, 0.25)
    assert stopwatch.read() == (4, 4.0, 0.25)  # a checkpoint reads it as well
    stopwatch.restart()
    device.now += 1.0
    assert stopwatch.read() == (0, 1.0, 0.0)


# ---- Concluding ----

DECODE = result("decode", "loader", 1000)
STEP = result("step", "fast", 2000)


def path(rate: float, backend: str = "triton", crops: str = "device", **more: Any) -> Result:
    return result("pipeline", backend, rate, crops=crops, **more)


VERDICTS: dict[str, tuple[list[Result], int, list[str]]] = {
    "nothing to compare": ([DECODE], 2, ["measure step and pipeline"]),
    "no step": ([DECODE, path(900)], 2, ["delivers 900", "decoding (1,000", "more cores"]),
    "the step": (
        [DECODE, STEP, path(6000, wait_share=None)],
        2,
        ["training step limits, at 2,000", "3 times as many", "6,000", "train.view_sizes"],
    ),
    "the step, of which a variant was measured": (
        [DECODE, STEP, result("step", "fast", 3000, operation="compile"), path(6000)],
        2,
        ["at 2,000", "compile helps: 3,000"],
    ),
    "decoding, and there are cores": (
        [DECODE, STEP, path(900)],
        16,
        ["data path limits", "45% of the 2,000", "decoding (1,000", "5 threads, about 2,250"],
    ),
    "decoding, with fewer cores than it wants": (
        [DECODE, STEP, path(900)],
        3,
        ["3 threads, about 1,350"],
    ),
    "decoding, and no core is left": (
        [DECODE, STEP, path(900)],
        2,
        [
            "decoding (1,000",
            "5 cores at this rate per core, or smaller images (pack with --max-side)",
        ],
    ),
    "augmentation": (
        [
            result("decode", "loader", 5000),
            result("augment", "kornia", 600),
            STEP,
            path(580, "kornia"),
        ],
        2,
        ["augmentation (600", "a GPU with data.backend=triton"],
    ),
    "stages that share the cores": (
        [DECODE, STEP, path(500)],
        2,
        ["decoding (1,000 images/s, which takes turns with the other stages)", "8 cores"],
    ),
    "the copy to the device": (
        [
            result("decode", "loader", 5000),
            result("transfer", "host to device", 800),
            STEP,
            path(790),
        ],
        2,
        ["transfer (800", "data.crops=host"],
    ),
    "reading": (
        [result("decode", "loader", 5000), result("read", "page cache", 500), STEP, path(480)],
        2,
        ["reading (500", "smaller records"],
    ),
    "another setting is faster than the first": (
        [DECODE, STEP, path(900), path(1500, "kornia", "host")],
        2,
        ["75% of", "data.backend=kornia, data.crops=host", "decoding (1,500"],
    ),
    "cropping on the host": (
        [DECODE, result("decode", "loader", 700, crops="host"), STEP, path(650, crops="host")],
        8,
        ["decoding (700", "7 threads"],
    ),
    "views finished by the decoding threads": (
        [
            DECODE,
            result("decode", "loader", 800, crops="host"),
            result("decode", "loader", 700, crops="host", operation=FINISHED),
            path(650, "compiled", "host"),
        ],
        2,
        ["data.backend=compiled, data.crops=host", "decoding (700"],
    ),
    "the processor's views leave the GPU to training": (
        [
            STEP,
            path(6000),
            path(4000, "compiled", "host"),
            path(1500, operation="overlap", wait_share=0.0, ratio=0.75),
            path(1800, "compiled", "host", operation="overlap", wait_share=0.0, ratio=0.9),
        ],
        64,
        ["finishes (data.backend=compiled, data.crops=host) are the better choice", "1.2 times"],
    ),
    "the processor is too slow for the GPU": (
        [
            STEP,
            path(6000),
            path(900, "compiled", "host"),
            path(1500, operation="overlap", wait_share=0.0, ratio=0.75),
            path(850, "compiled", "host", operation="overlap", wait_share=0.5, ratio=0.4),
        ],
        2,
        ["no better choice here: with them training ran at 850 images/s, 0.57 times"],
    ),
    "both share a processor": (
        [STEP, path(6000), path(1500, operation="overlap", wait_share=0.01, ratio=0.75)],
        2,
        ["training step limits", "ran at 1,500", "data wait of 1.0%", "shares its processor"],
    ),
}


@pytest.mark.parametrize("case", VERDICTS)
def test_the_verdict_names_the_limit_and_what_would_help(case: str) -> None:
    """Users act on it: a wrong verdict makes them buy cores for a slow network."""
    results, cores, parts = VERDICTS[case]
    text = verdict(results, cores)
    for part in parts:
        assert part in text, text


def file_of(*results: Result, **more: Any) -> Rates:
    machine = {"hardware": {"cores": 2}, "versions": {"torch": "2"}, "settings": {"batch": 64}}
    rows = {"results": [asdict(row) for row in results]}
    return msgspec.convert(machine | more | rows, Rates)


NAMES = (Path("a.json"), Path("runs/b.json"))


def test_two_runs_are_compared_and_differences_are_named() -> None:
    """A ratio between different batches or machines must not look like a gain."""
    before = file_of(DECODE, replace(DECODE, threads=1), STEP, result("params", "numba", 10))
    again = replace(DECODE, images_per_s=1500)
    after = file_of(again, replace(STEP, images_per_s=3000, batch=128), hardware={"cores": 16})
    lines = compare(before, after, NAMES).splitlines()
    assert lines[0] == "warning: cores differs: 2 and 16"
    (decode,) = [line for line in lines if line.startswith("decode · loader")]
    assert decode.split()[-3:] == ["1,000.0", "1,500.0", "1.5"]
    (step,) = [line for line in lines if line.startswith("step")]
    assert "1.5" in step.split() and "differs: batch 64 and 128" in step
    assert lines[-1] == "only in a.json: params · numba"
    wide = compare(before, file_of(replace(again, threads=16)), NAMES)
    assert "differs: threads 2 and 16" in wide  # without equal threads, the most


def test_files_that_cannot_be_compared_are_refused() -> None:
    """One line says why, instead of an empty table or a traceback."""
    with pytest.raises(UserError, match="no measurement in common"):
        compare(file_of(DECODE), file_of(STEP), NAMES)
    with pytest.raises(UserError, match=r"a\.json: a measurement of 0 images/s"):
        compare(file_of(replace(STEP, images_per_s=0)), file_of(STEP), NAMES)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"results": [{"metric": "miou"}]}, "results.0.: object missing required field stage"),
        ({"results": [], "settings": [1]}, "settings: expected object | null, got array"),
        ({"results": 3}, "results is 3: expected array, got int"),
        ({"results": [{"stage": "a", "images_per_s": math.nan}]}, "images_per_s is NaN: expected"),
        ({"results": [{"stage": "a", "images_per_s": 1e300}]}, r"is 1e.300: expected float <"),
        ({"results": [{"stage": "a", "images_per_s": "1"}]}, 'is "1": expected float, got str'),
        ({"results": [{"stage": "a", "images_per_s": 1}] * 1001}, "expected array of length <= 1"),
    ],
)
def test_files_to_compare_are_checked(
    content: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without it each is a traceback, or a ratio of nonsense."""
    (tmp_path / "a.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=message) as caught:
        run(monkeypatch, "--compare", tmp_path / "a.json", tmp_path / "a.json")
    assert str(caught.value).startswith(f"{tmp_path / 'a.json'}: ")


def test_settings_of_a_comparison_stay_on_their_lines() -> None:
    """Without it a file from elsewhere writes control characters to the terminal."""
    first = file_of(replace(DECODE, backend="\x1b[2J\n"), settings={"\nerror:": "a\x1b" * 99})
    text = compare(first, replace_settings(first), NAMES)
    assert all(line.isprintable() and len(line) < 400 for line in text.splitlines())
    assert len(text.splitlines()) == 3


def replace_settings(rates: Rates) -> Rates:
    return msgspec.structs.replace(rates, settings={})


# ---- Refusing ----


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "name a stage: read, decode"),
        ("decod --data x", "unknown stage 'decod': choose from read"),
        ("decode", "either --data FILE.beton or --synthetic"),
        ("decode --data x --synthetic", "either --data"),
        ("decode augment --synthetic", "--synthetic has no file, which decode would measure"),
        ("augment --synthetic --batch 0", "must be at least 1"),
        ("step --synthetic --device cpu --largest-batch", "needs a GPU"),
        ("cost step", "cannot be combined with other stages"),
        ("cost --minutes 0", "must be above 0"),
        ("cost --also compile", "--also has no effect here"),
        ("cost --watts nan", "must be above 0"),
        ("cost --device cpu --config nowhere", "nowhere"),
        ("augment --synthetic --threads 2 0", "must be at least 1"),
        ("augment --synthetic --seconds 0", "--seconds above 0"),
        ("augment --synthetic --device cpu --backends triton", "needs a GPU"),
        ("params --synthetic --plot picture.jpg", "must end in .png"),
        ("augment --synthetic --seconds inf", "--seconds above 0"),
        ("params --synthetic --threads 100000", "--threads: at most"),
        ("params --synthetic --json .", "is a folder"),
        ("params --synthetic --json Makefile/bench.json", "is not a folder"),
        ("params --data nowhere.beton", "No such file"),
        ("params --synthetic --config nowhere.yaml", "nowhere.yaml"),
        ("decode --compare a b", "--compare measures nothing"),
        ("--compare nowhere.json nowhere.json", "No such file"),
    ],
)
def test_bad_input_is_one_clear_line(
    arguments: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the first measurement: minutes later is too late."""
    with pytest.raises(UserError) as caught:
        run(monkeypatch, *arguments.split())
    assert message in str(caught.value) and "\n" not in str(caught.value)
