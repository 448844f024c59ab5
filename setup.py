"""Builds the package. In the source tree the rooms are top folders, and import each other by these
names. Installed, names like `train` and `tools` would collide with those of others, so each room
becomes a part of slotstream: `train/config.py` is installed as `slotstream/train/config.py`, and
`from pipeline.errors import …` in it reads `from slotstream.pipeline.errors import …`. Nothing else
in a file changes. An editable installation (`pip install -e`) uses the source tree as it is.
"""

import ast
import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOMS = ("pipeline", "model", "train", "evaluation", "transfer", "tools")


class BuildPackage(build_py):
    """Copies the rooms and `configs/` to `slotstream/`."""

    def run(self) -> None:
        if self.editable_mode:
            super().run()
            return
        shutil.rmtree(self.build_lib, ignore_errors=True)  # what stands there would be packed too
        super().run()
        package = Path(self.build_lib, "slotstream")
        for room in ROOMS:
            Path(self.build_lib, room).rename(package / room)
        for file in package.rglob("*.py"):
            file.write_text(within_package(file.read_text()))
        shutil.copytree("configs", package / "configs")

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        """The files as they are after `run`; distutils lists those of the source tree."""
        if self.editable_mode:
            return super().get_outputs(include_bytecode)
        return [str(file) for file in Path(self.build_lib).rglob("*") if file.is_file()]


def within_package(text: str) -> str:
    """The text of a module, whose imports of the rooms name them as parts of slotstream.

    Raises:
        ValueError: for `import room.module`, which binds the name of the room.
    """
    lines = text.encode().splitlines(keepends=True)
    places = []  # (line, column in bytes) of each name to extend
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and not node.level and _is_ours(node.module or ""):
            places.append((node.lineno - 1, node.col_offset + len("from ")))
        elif isinstance(node, ast.Import) and any(_is_ours(alias.name) for alias in node.names):
            raise ValueError(f"line {node.lineno}: write `from … import …` for our own modules")
    for line, column in sorted(places, reverse=True):
        assert lines[line][column:].startswith(tuple(room.encode() for room in ROOMS))
        lines[line] = lines[line][:column] + b"slotstream." + lines[line][column:]
    return b"".join(lines).decode()


def _is_ours(module: str) -> bool:
    return module.partition(".")[0] in ROOMS


if __name__ == "__main__":
    setup(cmdclass={"build_py": BuildPackage})
