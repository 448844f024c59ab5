"""`benchmark tune`: it finds the fastest setting, says how to give it, and survives failures."""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.errors import UserError
from tests.helpers.betons import varied, write_beton
from tests.helpers.exported import call
from tools.benchmark import tune
from tools.benchmark.__main__ import main
from tools.benchmark.tune import Setting, _child
from train.config import load_config


@pytest.fixture
def beton(tmp_path: Path) -> Path:
    return write_beton(tmp_path / "small.beton", varied(12))


def run_tune(beton: Path, out: Path, *more: str) -> dict[str, Any]:
    words = ["tune", "--config", "scenes_cpu", "--data", str(beton), "--device", "cpu"]
    call(main, *words, "--json", out, *more)
    content: dict[str, Any] = json.loads(out.read_text())
    return content


def test_the_fastest_setting_is_found_and_failures_are_told(
    beton: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without it the advice is a slow setting, one that fails, or cannot be given to a run."""
    seen = []

    def batches_of(_: Any, setting: Setting) -> Iterator[tuple[Any, ...]]:
        seen.append(setting)
        if setting.backend == "kornia" and setting.crops == "host":
            raise RuntimeError("out of memory\nand a long report")
        pace = {("compiled", "host"): 8, ("compiled", "device"): 2, ("kornia", "device"): 6}
        wait = pace[setting.backend, setting.crops] * (1 if setting.threads != 1 else 2)

        def endless() -> Iterator[tuple[Any, ...]]:
            while True:
                time.sleep(wait / 1e3 / setting.micro_batches)
                yield (None, None, None)

        return endless()

    monkeypatch.setattr(tune, "batches_of", batches_of)
    monkeypatch.setattr(tune, "_step", lambda _: lambda *_: None)
    monkeypatch.setattr(tune, "has_dali", lambda *_: False)
    monkeypatch.setattr(tune, "try_compile", lambda *_: True)
    content = run_tune(beton, tmp_path / "a.json", "--threads", "2", "--minutes", "0.02")
    best = content["best"]
    assert best["data"] == {"backend": "compiled", "crops": "device", "threads": 2}
    assert best["efficiency"] == {"accumulation": 1, "compile": True}
    assert all(setting.micro_batches == 1 for setting in seen), "not asked for"
    shown = capsys.readouterr()
    assert "skipped tune kornia, crops host, 2 threads: out of memory\n" in shown.err
    rows = {(row["backend"], row["crops"], row["threads"]): row for row in content["results"]}
    assert rows["compiled", "host", 2]["operation"] == "configured"
    assert 2 < rows["compiled", "device", 2]["ratio"] < 6
    assert rows["compiled", "device", 1]["ratio"] < rows["compiled", "device", 2]["ratio"]
    options, text = shown.out.strip().split("\n\n")[-2:]
    assert yaml.safe_load(text) == best
    config, _ = load_config(["--config", "scenes_cpu", "--data.path", str(beton), *options.split()])
    assert config.data.crops == "device" and config.efficiency.compile
    plain, _ = load_config(["--config", "scenes_cpu", "--data.path", str(beton)])
    assert (config.views, config.train, config.model) == (plain.views, plain.train, plain.model)

    again = run_tune(
        beton, tmp_path / "b.json", "--threads", "2", "--minutes", "0.02", "--micro-batches", "2",
        "3",
    )  # fmt: skip
    asked = {setting.micro_batches for setting in seen}
    assert asked == {1, 2}, "three do not divide a batch of four"
    assert again["best"]["efficiency"]["accumulation"] in asked


MASKED = """
views: {size: 32, mask_ratio: 0.5}
model: {objective: slotmim, arch: 'timm:test_vit', dim_hidden: 8, dim_out: 8}
"""


@pytest.mark.parametrize(
    "config", ["views: {size: 32}\nmodel: {dim_hidden: 8, dim_out: 8}\n", MASKED]
)
def test_real_tries_on_a_beton(
    config: str, beton: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without it the command may never have trained a step, or not one with hidden patches."""
    if config is MASKED:
        pytest.importorskip("timm")
    monkeypatch.setattr(tune, "has_dali", lambda *_: False)
    monkeypatch.setattr(tune, "try_compile", lambda *_: False)
    small = tmp_path / "small.yaml"
    small.write_text(config)
    more = ("--backends", "compiled", "--threads", "1", "--minutes", "0.001", "--batch", "2")
    content = run_tune(beton, tmp_path / "a.json", "--config", str(small), *more)
    kinds = {(row["crops"], row["threads"]) for row in content["results"]}
    assert len(kinds) >= 2 and all(row["images_per_s"] > 0 for row in content["results"])


def test_a_compilation_that_hangs_or_fails_is_told() -> None:
    """Without it tune never ends, or a compiler's traceback is its last word."""
    hanging = [sys.executable, "-c", "import time; time.sleep(60)"]
    began = time.perf_counter()
    assert _child(hanging, 0.5) == "not finished in 0 s: more --minutes would try it"
    assert time.perf_counter() - began < 20
    failing = [sys.executable, "-c", "import sys; sys.exit('x\\nerror: no compiler')"]
    assert _child(failing, 60) == "no compiler"
    assert _child([sys.executable, "-c", ""], 60) == ""


def test_what_cannot_be_tuned_is_refused(beton: Path, tmp_path: Path) -> None:
    """Without it tune measures something else than was asked, or ends in a traceback."""
    for words, message in [
        (["tune"], "tune needs --data"),
        (["tune", "step", "--data", str(beton)], "tune cannot be combined"),
        (["tune", "--data", str(beton), "--seconds", "3"], "--seconds has no effect here"),
        (["tune", "--data", str(beton), "--micro-batches", "0"], "--micro-batches is for tune"),
        (["step", "--synthetic", "--micro-batches", "2"], "--micro-batches is for tune"),
        (["tune", "--data", str(tmp_path / "none.beton")], "No such file"),
    ]:
        with pytest.raises(UserError, match=message):
            call(main, *words, "--config", "scenes_cpu", "--device", "cpu")
