"""The GPU scripts, tried without a GPU: they must be right on the day when there is one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT
from tests.gpu import checks
from tests.helpers.betons import varied, write_beton


def run(folder: Path, *parts: str) -> subprocess.CompletedProcess:
    """run.sh with DEVICE=cpu; its beton, results and caches are in `folder`."""
    places = {"OUT": folder / "out", "WORK": folder / "work", "DATA": folder, "WHEELS": folder}
    return subprocess.run(
        ["bash", ROOT / "tests/gpu/run.sh", *parts],
        env=os.environ
        | {name: str(path) for name, path in places.items()}
        | {"DEVICE": "cpu", "PYTHON": sys.executable, "PATIENCE": "4", "BUDGET": "2000"},
        cwd=folder,
        check=False,
        capture_output=True,
        text=True,
    )


PARTS = ("checks", "fidelity", "all", "bf16", "side64", "curve_fast", "curve_plain")
"""All but fp16, largest and pytest, which need a GPU, compile, which takes minutes on a CPU, and
step, which is side64 with other options."""


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder and the output of a run of PARTS."""
    folder = tmp_path_factory.mktemp("gpu")
    write_beton(folder / "coco.beton", varied(8))
    result = run(folder, *PARTS)
    assert result.returncode == 0, result.stderr
    return folder, result.stdout


@pytest.mark.timeout(900)
def test_every_part_ends_well(done: tuple[Path, str]) -> None:
    """Without it a renamed function costs a whole part, on the one day when there is a GPU."""
    folder, output = done
    lines = (folder / "work" / "parts").read_text().splitlines()
    assert [line.split(" rc=")[0] for line in lines] == list(PARTS), output
    assert all(" rc=0 " in line for line in lines), output
    failed = [line.partition(":")[0] for line in output.splitlines() if ": FAILED" in line]
    assert not failed


@pytest.mark.timeout(900)
def test_all_results_are_in_one_file(done: tuple[Path, str]) -> None:
    """Without it a figure that was measured does not come back from the machine."""
    out = done[0] / "out"
    assert {file.name for file in out.iterdir()} == {"results.json", "logs.tar.gz"}
    results = json.loads((out / "results.json").read_text())
    assert results["machine"]["failed imports"] == {}
    assert {row["stage"] for row in results["all"]["results"]} >= {"decode", "augment", "step"}
    assert results["fidelity"]["results"]
    assert [row["step"] for row in results["bf16"]] == [1, 2, 3, 4]
    assert [row["operation"] for row in results["side64"]["results"]] == [None]
    for name in ("curve_fast", "curve_plain"):
        assert [row["step"] for row in results[name]] == [2, 4]
    for heading in ("machine", "checks", "fidelity", "benchmark", "training", "loss by images"):
        assert f"\n==== {heading}" in done[1]


def test_without_data_it_says_how_to_make_them(tmp_path: Path) -> None:
    """Without it a run without data wastes its minutes, part by part."""
    result = run(tmp_path)
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: {tmp_path}/coco.beton: no such file")


def test_largest_batch_is_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it this part, which needs a GPU's memory, is first tried on the day."""
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr("tools.benchmark.step._fits", lambda *setting: setting[-1] <= 9)
    checks.find_largest_batch(2)
    rows = json.loads((tmp_path / "largest.json").read_text())
    assert rows.keys() == {"fast", "checkpointing"}
    for row in rows.values():
        assert row["largest"] == 9
        assert [batch for batch, *_ in row["tries"]] == [2, 4, 8, 16, 12, 10, 9]
