"""The rooms of the code: which room imports which, no circles, no long files or functions."""

import ast
import functools
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests import ROOT

MAY_IMPORT: dict[str, set[str]] = {
    "pipeline": set(),
    "model": set(),
    "train.run": {"pipeline"},
    "evaluation.datasets": {"train.run", "pipeline"},
    "train": {"evaluation.datasets", "train.run", "model", "pipeline"},
    "evaluation": {"evaluation.datasets", "train", "train.run", "model", "pipeline"},
    "train.pretrain": {"evaluation", "train", "train.run"},
    "transfer": {
        "evaluation", "evaluation.datasets", "train", "train.run", "model", "pipeline",
    },
    "tools.report": {"train", "train.run", "pipeline"},
    "tools.packing": {"tools.report", "train.run", "pipeline"},
    "tools.benchmark": {"tools.report", "train", "train.run", "model", "pipeline"},
    "tools.weights": {"evaluation.datasets", "train", "train.run", "model", "pipeline"},
    "tools": {
        "tools.packing", "tools.report", "tools.weights", "train", "train.run", "model", "pipeline",
    },
    "slotstream": {
        "tools", "evaluation", "evaluation.datasets", "train", "train.pretrain", "train.run",
        "model", "pipeline",
    },
}  # fmt: skip
"""The other rooms that the modules of each room may import. A module belongs to the longest name
that its own name begins with."""

LONGEST_FILE, LONGEST_FUNCTION = 450, 60


@functools.cache
def modules() -> dict[str, Path]:
    """File by name of each module of ours, tests excluded."""
    tops = sorted({room.partition(".")[0] for room in MAY_IMPORT})
    files = [file for top in tops for file in sorted((ROOT / top).rglob("*.py"))]
    return {name_of(file): file for file in files}


def name_of(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def room_of(module: str) -> str:
    return max((room for room in MAY_IMPORT if f"{module}.".startswith(f"{room}.")), key=len)


@functools.cache
def syntax_of(module: str) -> ast.Module:
    """The module's syntax tree, tried twice.

    Python 3.11 before .8 fails when a finaliser or a thread parses meanwhile, as a printed
    traceback does (python/cpython#106905); that is no fault of the module's.
    """
    text = modules()[module].read_text()
    try:
        return ast.parse(text)
    except SystemError:
        return ast.parse(text)


@functools.cache
def imports_of(module: str) -> set[str]:
    """The modules of ours that `module` imports, wherever in the file it does so."""
    imported: set[str] = set()
    for node in ast.walk(syntax_of(module)):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}: relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            # `from package import module` imports the module; `from module import name`, the module
            imported |= {name if name in modules() else str(node.module) for name in names}
    return imported & modules().keys() - {module}


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_imports_run_one_way(room: str) -> None:
    """Without it rooms grow into each other, and none can be read or used alone."""
    members = [module for module in modules() if room_of(module) == room]
    assert members
    imported = {room_of(other) for module in members for other in imports_of(module)} - {room}
    assert imported == MAY_IMPORT[room], f"not in this table, or no longer needed: {room}"


def test_no_circle_of_rooms() -> None:
    """Without it the table itself may let two rooms import each other."""
    TopologicalSorter(MAY_IMPORT).prepare()


def test_no_circle_of_imports() -> None:
    """Without it whether an import works depends on which module is imported first.

    Imports inside functions count too: a circle hidden there is still one.
    """
    graph = {module: imports_of(module) for module in modules()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"circle of imports: {' > '.join(error.args[1])}")


def test_files_and_functions_are_short() -> None:
    """Without it they grow beyond what one can read from top to bottom."""
    long = []
    for module, file in modules().items():
        if file.read_text().count("\n") > LONGEST_FILE:
            long.append(module)
        for node in ast.walk(syntax_of(module)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                if node.end_lineno - node.lineno >= LONGEST_FUNCTION:
                    long.append(f"{module}.{node.name}")
    assert not long
