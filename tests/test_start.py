"""Starting a command is fast: what --help and a refused command line need does not import torch."""

import subprocess
import sys

import pytest

from tests import ROOT

COMMANDS = sorted(
    ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__")
    for room in ("slotstream", "train", "evaluation", "transfer", "tools")
    for file in (ROOT / room).rglob("*.py")
    if 'if __name__ == "__main__"' in file.read_text()
)
SLOW = (
    "torch", "torchvision", "kornia", "triton", "accelerate", "scipy.optimize", "timm",
    "faster_coco_eval", "nvidia.dali", "safetensors", "tensorboard",
)  # fmt: skip
"""Packages that take from a fifth of a second to seconds to import."""

HELP = """
import runpy
import sys

command, *slow = sys.argv[1:]
sys.argv = [command, "--help"]
try:
    runpy.run_module(command, run_name="__main__", alter_sys=True)
except SystemExit as end:
    assert not end.code, end.code
print("imported:", *(name for name in slow if name in sys.modules))
"""


@pytest.mark.parametrize("command", COMMANDS)
def test_help_imports_no_slow_package(command: str) -> None:
    """Without it --help, and the refusal of a mistyped option, take as long as importing torch,
    torchvision and Accelerate: 4 seconds.
    """
    process = subprocess.run(
        [sys.executable, "-c", HELP, command, *SLOW],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert "usage: " in process.stdout
    assert process.stdout.splitlines()[-1] == "imported:"
