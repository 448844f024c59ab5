"""The SLURM script, in an environment as sbatch makes it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT
from tests.tools.packing.test_build_dataset import fill, run
from tests.tools.packing.test_run import same

SCRIPT = ROOT / "tools" / "slurm_pack.sh"


def submit(*arguments: str, part: str = "") -> "subprocess.CompletedProcess[str]":
    """Run the script as the array task `part`, or as a job of its own."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    # The count of an array of one, as when a failed task alone is submitted again.
    task = {"SLURM_ARRAY_TASK_ID": part, "SLURM_ARRAY_TASK_COUNT": "1"} if part else {}
    return subprocess.run(
        ["bash", "-u", SCRIPT, *arguments],
        env=kept | {"PYTHON": sys.executable} | task,
        capture_output=True,
        text=True,
        check=False,
    )


def test_parts_are_packed_and_merged(tmp_path: Path) -> None:
    """A cluster's queue is no place to find a mistake in a shell script.

    Paths have spaces, a part is packed alone, a finished one comes again, a merge is too early.
    """
    root = fill(tmp_path / "in put", *(f"{i}.jpg" for i in range(7)))
    run("folder", root, tmp_path / "a.beton")
    (tmp_path / "out put").mkdir()
    out = tmp_path / "out put" / "b.beton"
    pack = ("2", "folder", "--root", str(root), f"--out={out}")
    assert submit(*pack, part="2").returncode == 0
    early = submit("2", "merge", "--out", str(out))
    assert (early.returncode, early.stderr) == (
        2,
        "error: missing shards of 2: submit them again with --array=1\n",
    )
    assert submit(*pack, part="1").returncode == 0
    assert submit(*pack, part="2").stdout == "shard 2 of 2 is complete\n"
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
    """What a job that waited for hours in a queue leaves must say what to mend."""
    result = submit(*arguments)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_help_shows_both_commands() -> None:
    """They are in the comment at its head, which a cluster's copy has as well."""
    result = submit("--help")
    assert result.returncode == 0
    assert "slurm_pack.sh 16 merge --out" in result.stdout
    assert "#" not in result.stdout
