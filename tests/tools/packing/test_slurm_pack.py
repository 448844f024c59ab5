"""The SLURM script, in the environment that sbatch sets."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT
from tests.tools.packing.test_build_dataset import fill, run
from tests.tools.packing.test_run import same

SCRIPT = ROOT / "tools" / "slurm_pack.sh"


def submit(*arguments: str, task: str = "") -> "subprocess.CompletedProcess[str]":
    """Run the script as array task `task`, or as a job without an array."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    # The task count is 1, as if only a failed task is submitted again.
    array = {"SLURM_ARRAY_TASK_ID": task, "SLURM_ARRAY_TASK_COUNT": "1"} if task else {}
    return subprocess.run(
        ["bash", "-u", SCRIPT, *arguments],
        env=kept | {"PYTHON": sys.executable} | array,
        capture_output=True,
        text=True,
        check=False,
    )


def test_shards_are_packed_and_merged(tmp_path: Path) -> None:
    """A mistake in the script would show only after hours in a cluster's queue.

    Paths have spaces, a single shard is packed, a finished shard runs again, a merge is too early.
    """
    root = fill(tmp_path / "in put", *(f"{i}.jpg" for i in range(7)))
    run("folder", root, tmp_path / "a.beton")
    (tmp_path / "out put").mkdir()
    out = tmp_path / "out put" / "b.beton"
    pack = ("2", "folder", "--root", str(root), f"--out={out}")
    assert submit(*pack, task="2").returncode == 0
    early = submit("2", "merge", "--out", str(out))
    assert (early.returncode, early.stderr) == (
        2,
        "error: missing shards of 2: submit them again with --array=1\n",
    )
    assert submit(*pack, task="1").returncode == 0
    assert submit(*pack, task="2").stdout == "shard 2 of 2 is complete\n"
    merged = submit("2", "merge", "--out", str(out))
    assert merged.returncode == 0, merged.stderr
    assert same(tmp_path, "a.beton", "out put/b.beton")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "expected SHARDS SOURCE"),
        (("imagenet", "--root", "in", "--out", "o.beton"), "expected SHARDS SOURCE"),
        (("16",), "expected SHARDS SOURCE"),
        (("16", "imagenet", "--root", "in", "--out"), "--out FILE is missing"),
        (("16", "imagenet", "--out", "o.beton"), "submit with sbatch --array=1-16"),
    ],
)
def test_mistakes_are_one_line(arguments: tuple[str, ...], message: str) -> None:
    """A job that waited for hours must say how to repair the command."""
    result = submit(*arguments)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_help_shows_both_commands() -> None:
    """They are in the script's first comment, so every copy has them."""
    result = submit("--help")
    assert result.returncode == 0
    assert "slurm_pack.sh 16 merge --out" in result.stdout
    assert "#" not in result.stdout
