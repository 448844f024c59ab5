"""Times how long commands and a loader take to start: `python -m tests.benchmark_start FILE.beton`.

Each is a process of its own, by turns: --help of the commands, `import torch` alone, and the first
batch of 16 images from the start of the process, with each backend of the CPU. Prints medians and
ranges of CPU and wall seconds. The first round, which may compile, is left out.
"""

import argparse
import os
import statistics
import sys
import time

from tests.test_start import COMMANDS

FIRST_BATCH = """
import sys
import torch
from pipeline.beton import Beton
from pipeline.loader import make_loader
from pipeline.views import ViewConfig
path, backend, crops = sys.argv[1:]
loader = make_loader(Beton(path), ViewConfig(), 16, crops=crops, backend=backend,
                     device=torch.device("cpu"), seed=0, threads=2)
next(iter(loader.epoch(0)))
"""


def timed(arguments: list[str]) -> tuple[float, float]:
    """CPU and wall seconds of a process of Python."""
    began, before = time.perf_counter(), os.times()
    null = [(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)]
    process = os.posix_spawn(
        sys.executable, [sys.executable, *arguments], os.environ, file_actions=null
    )
    if os.waitpid(process, 0)[1]:
        sys.exit(f"failed: {' '.join(arguments)}")
    wall, after = time.perf_counter() - began, os.times()
    cpu = after.children_user + after.children_system
    return cpu - before.children_user - before.children_system, wall


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("beton")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    works = {f"{command} --help": ["-m", command, "--help"] for command in COMMANDS}
    works["import torch"] = ["-c", "import torch"]
    for way in (("compiled", "device"), ("compiled", "host"), ("kornia", "device")):
        works[f"first batch: {' '.join(way)}"] = ["-c", FIRST_BATCH, args.beton, *way]
    rounds = [{name: timed(work) for name, work in works.items()} for _ in range(args.rounds + 1)]
    for name in works:
        both = zip(*(times[name] for times in rounds[1:]), strict=True)
        texts = [f"{statistics.median(t):5.2f} ({min(t):.2f} to {max(t):.2f})" for t in both]
        print(f"{name:46} CPU {texts[0]} s   wall {texts[1]} s")


if __name__ == "__main__":
    main()
