"""The project as a whole: its versions, its imports, its commands, its set-up without root."""

import ast
import os
import re
import runpy
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from pipeline import commands as names
from pipeline import ffcv_format
from tests import ROOT
from train.run.text import configuration_file

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
RUNTIME = [Requirement(text) for text in PROJECT["dependencies"]]
EXTRAS = [
    Requirement(text) for extra in PROJECT["optional-dependencies"].values() for text in extra
]

PACKAGES = ("slotstream", "pipeline", "model", "train", "tools", "evaluation", "transfer")

# Dependencies that only another package imports.
LOADED_INDIRECTLY = {
    "tensorboard",  # torch.utils.tensorboard, through Accelerate's tracker
    "turbojpeg",  # its native library
}

OPTIONAL = {
    "aiohttp", "fsspec", "huggingface_hub", "nvidia", "onnxruntime", "pyarrow", "pydensecrf",
    "pynvml", "timm",
}  # fmt: skip
"""Of the extras (nvidia: DALI), imported when used."""

# Paths and hosts of one machine or network. The brackets keep this file from matching itself.
LOCAL_NAMES = re.compile(
    r"[/]root/|[/]home/\w+|[/]Users/\w+|https?[:]//\S+/simple\b"
    r"|--[ei][\w-]*index-url|--find[-]links|--trusted[-]host"
)


def tracked_files() -> list[Path]:
    """The files of the project; not those that users keep beside them."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.decode().split("\0") if (ROOT / name).is_file()]


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imported_modules(source: Path) -> set[str]:
    """Top-level names of everything that a file imports, also inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
    return names


def pins() -> dict[str, Version]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = (line.split("==") for line in lines if not line.startswith("#"))
    return {canonicalize_name(name): Version(version) for name, version in pairs}


def commands() -> list[str]:
    """The modules that `python -m` runs."""
    modules = []
    for package in PACKAGES:
        for source in sources(package):
            if re.search(r'^if __name__ == "__main__":', source.read_text(), re.MULTILINE):
                name = ".".join(source.relative_to(ROOT).with_suffix("").parts)
                modules.append(name.removesuffix(".__main__"))
    return modules


def test_no_file_names_a_path_or_host_of_one_machine() -> None:
    """Without it a file that works on its author's machine fails on every other one."""
    hits = []
    for path in tracked_files():
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue  # a recorded array or an image
        hits += [
            f"{path.relative_to(ROOT)}: {match.group()}" for match in LOCAL_NAMES.finditer(text)
        ]
    assert not hits


def test_configurations_that_the_docs_name_are_there() -> None:
    """Without it a renamed configuration stops whoever follows the docs."""
    named = re.compile(r"--config[ =]([A-Za-z]\w[\w./]*)|\b(configs/[\w/]+\.yaml)")
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for match in named.finditer(page.read_text()):
            name = match[1] or match[2]
            assert Path(configuration_file(name)).is_file(), f"{page.name}: {name}"


def test_constraints_are_plain_pins() -> None:
    """Without it a URL, a hash or a local build gets in, which installs on one machine only."""
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        assert re.fullmatch(r"#.*|[A-Za-z0-9][\w.-]*==[0-9][\w.]*", line), line


@pytest.mark.parametrize("requirement", RUNTIME + EXTRAS, ids=lambda requirement: requirement.name)
def test_dependency_is_bounded_and_pinned_within_its_bounds(requirement: Requirement) -> None:
    """Without it the next major release of a library can break every new clone."""
    operators = {specifier.operator for specifier in requirement.specifier}
    assert operators == {">=", "<"}
    pin = pins().get(canonicalize_name(requirement.name))
    assert pin is not None, "run `make constraints`"
    assert pin in requirement.specifier


def test_dependencies_are_exactly_what_the_code_imports() -> None:
    """Without it users install unused packages, or miss one that another package brings."""
    imported = set().union(*(imported_modules(path) for name in PACKAGES for path in sources(name)))
    foreign = imported - set(PACKAGES) - sys.stdlib_module_names
    by_module = packages_distributions()
    used = {canonicalize_name(by_module.get(module, [module])[0]) for module in foreign - OPTIONAL}
    declared = {canonicalize_name(requirement.name) for requirement in RUNTIME}
    assert used | LOADED_INDIRECTLY == declared


def test_conda_environment_has_every_dependency_with_the_same_bounds() -> None:
    """Without it the conda environment falls behind pyproject.toml."""
    entries = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    by_pip = next(entry["pip"] for entry in entries if isinstance(entry, dict))
    texts = [entry for entry in entries if isinstance(entry, str)] + by_pip
    listed = {requirement.name: requirement for requirement in map(Requirement, texts)}
    for here, there in (("torch", "pytorch"), ("zlib-ng", "python-zlib-ng")):
        listed[here] = listed.pop(there)
    for requirement in RUNTIME:
        assert listed[requirement.name].specifier == requirement.specifier, requirement.name


def test_our_types_are_those_of_ffcv() -> None:
    """Without it our betons are readable by slotstream only."""
    types = pytest.importorskip("ffcv.types", reason="needs ffcv")

    assert types.HeaderType == ffcv_format.HEADER
    assert types.FieldDescType == ffcv_format.DESCRIPTOR
    assert ffcv_format.ALLOCATION == types.ALLOC_TABLE_TYPE
    assert ffcv_format.VERSION == types.CURRENT_VERSION
    for name, type_id in ffcv_format.TYPE_ID.items():
        handler = types.TYPE_ID_HANDLER[type_id]()
        assert ffcv_format.metadata_type([name]) == types.get_metadata_type([handler])
    three = [types.TYPE_ID_HANDLER[type_id]() for type_id in ffcv_format.TYPE_ID.values()]
    assert ffcv_format.metadata_type(list(ffcv_format.TYPE_ID)) == types.get_metadata_type(three)


def test_the_data_path_does_not_import_ffcv() -> None:
    """ffcv sets PyTorch and Numba to one thread on import, and training slows down silently."""
    code = (
        "import sys, torch; torch.set_num_threads(2); import pipeline.loader;"
        "assert 'ffcv' not in sys.modules and torch.get_num_threads() == 2"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_tests_are_collected_without_ffcv() -> None:
    """Without it `pytest -m cuda` runs nothing on a GPU machine without ffcv, which has to be
    compiled, and without OpenCV, which comes with it.
    """
    for source in [*sources("tests/helpers"), *(ROOT / "tests").rglob("test_*.py")]:
        for node in ast.parse(source.read_text()).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                text = ast.unparse(node)
                assert not re.search(r"(import|from) (ffcv|cv2)\b", text), f"{source}: {text}"


@pytest.mark.parametrize("module", commands())
def test_command_explains_itself(
    module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without it users are the first to see an import error or a broken parser.

    All commands run in this process: fresh ones would spend a minute importing torch.
    """
    monkeypatch.setattr(sys, "argv", [module, "--help"])
    monkeypatch.setitem(names._called, "by name", False)  # put back: `slotstream` changes it
    # As in a fresh process; a package itself must stay, or it would lose its modules.
    executed = f"{module}.__main__" if (ROOT / module.replace(".", "/")).is_dir() else module
    monkeypatch.delitem(sys.modules, executed, raising=False)
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    assert ended.value.code == 0
    assert "usage:" in capsys.readouterr().out


def set_up(folder: Path, **stubs: str) -> subprocess.CompletedProcess[str]:
    """tools/setup.sh for `folder`/venv as a user without root, on a machine without ffcv's needs;
    `stubs` are bodies of further commands, with - for _.
    """
    stubs = {
        "id": "echo 1000",
        "sudo": "exit 1",
        "pkg_config": "exit 1",
        "apt_get": "exit 99",
    } | stubs
    for name, body in stubs.items():
        stub = folder / name.replace("_", "-")
        stub.write_text(f"#!/bin/sh\n{body}\n")
        stub.chmod(0o755)
    return subprocess.run(
        [ROOT / "tools/setup.sh", folder / "venv"],
        env=os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"},
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
    )


def test_setup_without_root_names_the_missing_packages(tmp_path: Path) -> None:
    """Without it a user without root, and without Python, gets an error from the middle of it."""
    pythons = {f"python3{minor}": "exit 1" for minor in ("", ".11", ".12", ".13", ".14")}
    setup = set_up(tmp_path, **pythons)
    assert setup.returncode == 2
    assert setup.stdout == ""
    assert setup.stderr.startswith("error: ")
    assert setup.stderr.count("\n") == 1
    assert re.search(r"apt-get install python3.*libopencv-dev.*libturbojpeg", setup.stderr)
    assert not (tmp_path / "venv").exists()


def test_setup_without_root_goes_on_without_ffcv(tmp_path: Path) -> None:
    """Without it a user without root, or without a compiler, cannot use slotstream at all."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n')
    python.chmod(0o755)
    venv = f"mkdir -p {tmp_path}/venv/bin && cp {python} {tmp_path}/venv/bin/"
    setup = set_up(tmp_path, python3=f'[ "$1" != -m ] || {{ {venv}; }}')
    assert setup.returncode == 0, setup.stderr
    assert "without ffcv" in setup.stdout and "libopencv-dev" in setup.stdout
    calls = (tmp_path / "calls").read_text()
    assert re.search(r"--editable \.\[dali,dev,onnx,parquet,power,remote,timm\]", calls)
    assert "import cv2" not in calls and "tools.warm_up" in calls


def test_setup_installs_every_extra_but_those_that_are_built_apart() -> None:
    """Without it a new extra is missing from `make setup`, and its tests are skipped everywhere."""
    extras = re.search(r"^extras=(\S+)$", (ROOT / "tools/setup.sh").read_text(), re.MULTILINE)
    assert extras and {*extras[1].split(",")} == {*PROJECT["optional-dependencies"]} - {"crf"}
