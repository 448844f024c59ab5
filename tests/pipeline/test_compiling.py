"""Compiled code is kept for the next process, and nothing that is kept can do harm."""

import errno
import importlib.util
import pickle
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numba
import pytest
from numba.core import caching

from pipeline import compiling

INNER = """
from pipeline.compiling import njit

STEP = 1

@njit(cache=True)
def inner(x):
    return x + STEP
"""
OUTER = """
from inner import STEP, inner
from pipeline.compiling import njit

@njit(cache=True)
def outer(x):
    return 10 * inner(x) + STEP
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Two files, the second with a function that calls one of the first."""
    (tmp_path / "inner.py").write_text(INNER)
    (tmp_path / "outer.py").write_text(OUTER)
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path / "cache"))
    yield tmp_path
    sys.modules.pop("inner", None)


def start(folder: Path) -> ModuleType:
    """`outer` as a new process would import it."""
    compiling._text.cache_clear()
    for name in ("inner", "outer"):
        spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        exec(compile((folder / f"{name}.py").read_text(), str(folder / f"{name}.py"), "exec"),
             module.__dict__)  # fmt: skip  # not through .pyc files, whose times are too coarse
    return sys.modules.pop("outer")


def call(folder: Path, x: float) -> tuple[float, bool]:
    """The result in a new process, and whether the code was there already."""
    outer = start(folder).outer
    return outer(x), bool(sum(outer.stats.cache_hits.values()))


def files(folder: Path, kind: str) -> list[Path]:
    return sorted((folder / "cache").rglob(f"outer.outer*.{kind}"))


def test_the_second_process_compiles_nothing(folder: Path) -> None:
    """Without it each process waits seconds for its first batch."""
    assert [call(folder, 2), call(folder, 2), call(folder, 2.5)] == [
        (31, False), (31, True), (36.0, False),
    ]  # fmt: skip


def test_objects_in_a_tuple_are_no_constants(folder: Path) -> None:
    """The text of such a tuple has addresses. Without it every process compiles the file again."""
    (folder / "outer.py").write_text(f"{OUTER}\nFIELDS = (object(),)\nSIZES = (3, (4,))\n")
    assert [call(folder, 2), call(folder, 2)] == [(31, False), (31, True)]
    (folder / "outer.py").write_text(f"{OUTER}\nFIELDS = (object(),)\nSIZES = (3, (5,))\n")
    assert call(folder, 2) == (31, False)


def test_compiling_is_announced_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without it the first run on a machine is silent for half a minute, as if it hung."""
    for printed in (1, 0):
        compiling._say_that_it_takes_time.cache_clear()
        call(folder, 2)
        call(folder, 2)
        assert capsys.readouterr().err.count("tools.warm_up") == printed


def test_a_change_in_another_file_is_noticed(folder: Path) -> None:
    """Numba's own cache looks at one file. Without it an update that changes a function, or a
    constant, goes on with the old code in all functions that call it.
    """
    call(folder, 2)
    (folder / "inner.py").write_text(INNER.replace("x + STEP", "x - STEP"))
    assert call(folder, 2) == (11, False)
    (folder / "inner.py").write_text(INNER.replace("STEP = 1", "STEP = 3"))
    assert call(folder, 2) == (53, False)
    assert call(folder, 2) == (53, True)


@pytest.mark.parametrize("kind", ["nbi", "nbc"])
@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "other"])
def test_damaged_files_are_compiled_again(folder: Path, kind: str, damage: str) -> None:
    """After a power cut files may be empty. Without it every later start ends in a traceback, or
    runs damaged machine code.
    """
    call(folder, 2)
    for path in files(folder, kind):
        content = bytearray(path.read_bytes())
        if damage == "flipped":
            for i in range(20, len(content), 97):
                content[i] ^= 0x10
        cut = {"empty": 0, "cut": len(content) // 2}.get(damage, len(content))
        path.write_bytes(b"something else" if damage == "other" else content[:cut])
    assert call(folder, 2) == (31, False)
    assert call(folder, 2) == (31, True)


class Trap:
    """Pickled as a call that empties a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.file), "w")


@pytest.mark.parametrize("kind", ["nbi", "nbc"])
def test_damaged_files_are_not_unpickled(folder: Path, kind: str) -> None:
    """Without it a flipped bit in a pickle becomes any of its instructions: it takes gigabytes, or
    makes Python complain about its own memory.
    """
    call(folder, 2)
    kept = folder / "kept"
    kept.write_text("text")
    (path,) = files(folder, kind)
    version = pickle.dumps(numba.__version__, protocol=-1) if kind == "nbi" else b""
    path.write_bytes(version + pickle.dumps(Trap(kept)))
    assert call(folder, 2) == (31, False)
    assert kept.read_text() == "text"


def test_code_of_another_signature_is_not_taken(folder: Path) -> None:
    """Two processes that store two signatures at once may give them the same file. Without it one
    of them later runs the code of the other.
    """
    call(folder, 2)
    call(folder, 2.5)
    first, second = files(folder, "nbc")
    first.write_bytes(second.read_bytes())
    assert {call(folder, 2), call(folder, 2.5)} == {(31, False), (36.0, True)}


def test_a_full_disk_is_no_error(folder: Path) -> None:
    """Without it a run ends because its compiled code cannot be stored."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50, limits[1]))
    try:
        assert call(folder, 2) == (31, False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert call(folder, 2) == (31, False)


def read_only(*_: Any, **__: Any) -> None:
    raise OSError(errno.EROFS, "Read-only file system")


def test_without_a_folder_to_write_to(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it nothing can be imported in a container whose file system is read-only, or what was
    compiled when its image was built is compiled again in each process.
    """
    with monkeypatch.context() as patch:
        patch.setattr(caching.tempfile, "TemporaryFile", read_only)
        patch.setattr(compiling._Files, "_open_for_write", read_only)
        assert [call(folder, 2), call(folder, 2)] == [(31, False)] * 2
    assert call(folder, 2) == (31, False)
    monkeypatch.setattr(caching.tempfile, "TemporaryFile", read_only)
    monkeypatch.setattr(compiling._Files, "_open_for_write", read_only)
    assert [call(folder, 2), call(folder, 2.5)] == [(31, True), (36.0, False)]


@pytest.mark.parametrize("setting", compiling._SETTINGS)
def test_code_of_other_settings_is_not_taken(
    folder: Path, setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without it one run with NUMBA_OPT=0, to look for an error, makes all later ones slow."""
    level = type(numba.config.OPT) if setting == "OPT" else int
    for value in (1, 2):
        monkeypatch.setattr(numba.config, setting, level(value))
        assert call(folder, 2) == (31, False)
    assert call(folder, 2) == (31, True)
