"""The installed package: what a wheel holds, and that it works without the source tree."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from setup import ROOMS, within_package
from tests import ROOT
from tests.test_project import imported_modules

SOURCES = ("slotstream", *ROOMS, "configs")
"""The folders of which the package is made."""


def pip(*arguments: str | Path) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*command, *arguments], check=True, capture_output=True)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of a copy of the source tree, which building would fill with files."""
    folder = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    stale = folder / "build" / "lib" / "train"
    stale.mkdir(parents=True)
    (stale / "old.py").write_text("")
    out = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", out, folder)
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which pip has installed the wheel, alone."""
    folder = tmp_path_factory.mktemp("installed")
    pip("install", "--no-deps", "--target", folder, wheel)
    return folder


def python(installed: Path, cwd: Path, arguments: Sequence[str]) -> str:
    """What Python prints with the installed package and its dependencies, but without the source
    tree: -S leaves out the link to it that an editable installation has. Numba compiles everything
    for the new place, which it does faster without its optimiser.
    """
    path = os.pathsep.join([str(installed), sysconfig.get_path("purelib")])
    process = subprocess.run(
        [sys.executable, "-S", *arguments],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": path, "NUMBA_OPT": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_everything_lies_in_one_package(wheel: Path) -> None:
    """Without it `import train` or `import tools` of somebody else's project finds ours."""
    tops = {name.partition("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"slotstream"}


def test_the_package_has_every_module_and_configuration(wheel: Path) -> None:
    """Without it a command, a template or a configuration is missing, or an old file stays."""
    names = set(zipfile.ZipFile(wheel).namelist())
    here = [path for name in SOURCES for path in (ROOT / name).rglob("*") if path.is_file()]
    expected = {
        f"slotstream/{path.relative_to(ROOT).as_posix().removeprefix('slotstream/')}"
        for path in here
        if "__pycache__" not in path.parts and path.suffix != ".sh"
    }  # fmt: skip
    assert {name for name in names if ".dist-info/" not in name} == expected


COMMANDS = f"""
import importlib.util
import sys
from slotstream import load
from slotstream.__main__ import main

assert not any(map(importlib.util.find_spec, {ROOMS!r}))
beton = ["--data.path", "s.beton", "--data.backend", "reference", "--data.crops", "device"]
size = ["--train.batch_size", "4", "--train.max_steps", "2", "--name", "two"]
for command in (
    ["pack", "sample", "--out", "s.beton", "--count", "4", "--val-count", "1"],
    ["train", "--config", "scenes_cpu", *beton, *size],
    ["report", "runs/two"],
):
    sys.argv = ["slotstream", *command]
    main()
print(load("runs/two").config.name)
"""
"""One after the other in one process, which imports and compiles once."""


@pytest.mark.timeout(900)
def test_the_package_works_without_the_source_tree(installed: Path, tmp_path: Path) -> None:
    """Without it an import that was missed ends the first command of a user.

    It takes long, since most of the data path is compiled for the new place.
    """
    assert python(installed, tmp_path, ["-c", COMMANDS]).endswith("\ntwo\n")
    assert "JPEG" in python(installed, tmp_path, ["-m", "slotstream", "inspect", "s.beton"])
    page = (tmp_path / "runs/two/report.html").read_text()
    assert "slotstream probe knn --checkpoint" in page and "python -m" not in page


def test_no_installed_module_imports_a_room_by_its_name_in_the_source_tree(installed: Path) -> None:
    """Without it an import that only one option reaches ends in a traceback."""
    files = list((installed / "slotstream").rglob("*.py"))
    assert files and not {name for file in files for name in imported_modules(file)} & {*ROOMS}


@pytest.mark.parametrize(
    ("text", "within"),
    [
        ("from pipeline.errors import A", "from slotstream.pipeline.errors import A"),
        ("from model import (\n    A,\n)", "from slotstream.model import (\n    A,\n)"),
        ("if a:\n    from train import b", "if a:\n    from slotstream.train import b"),
        (
            "'é'; from tools import a; from tools import b",
            "'é'; from slotstream.tools import a; from slotstream.tools import b",
        ),
        ("from pipelines import a", "from pipelines import a"),
        ("from torch.train import a", "from torch.train import a"),
        ("text = 'from train import a'", "text = 'from train import a'"),
    ],
)  # fmt: skip
def test_only_imports_of_ours_change(text: str, within: str) -> None:
    """Without it a text, or a module of others with a similar name, is changed too."""
    assert within_package(text) == within


def test_an_import_that_binds_the_name_of_a_room_is_refused() -> None:
    """Without it the installed module has no name `pipeline`, and fails where it uses it."""
    with pytest.raises(ValueError, match="line 2"):
        within_package("import os\nimport pipeline.errors")
