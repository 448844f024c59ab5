"""Runs of a command in other processes, and of several trainers in this one."""

import os
import subprocess
import sys
from collections.abc import Callable
from typing import TypeVar

from accelerate.state import AcceleratorState, GradientState

from tests import ROOT

Made = TypeVar("Made")


def in_this_process(start: Callable[[], Made]) -> Made:
    """start(), without the state that Accelerate keeps from one run to the next."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return start()


def launch_module(
    module: str, *arguments: str, processes: int, timeout: float, **environment: str
) -> subprocess.CompletedProcess[str]:
    """`python -m module …`; with torchrun for several processes."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    line = [sys.executable, *(torchrun if processes > 1 else []), "-m", module, *arguments]
    return subprocess.run(
        line,
        check=False,
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=timeout,
        env=os.environ | environment,
    )
