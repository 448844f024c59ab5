"""Runs a reader on altered inputs in a child process, and watches it from outside.

A reader is a module of tests.fuzz.readers with a class `Target`:

    Target(folder)            writes whole inputs into an empty folder
    .try_one(random) -> str   alters one, reads it as a command would, and returns the outcome in a
                              word: "refused" (by UserError), "read", "found" (by a later check) …

Whatever else `try_one` raises is a failure: an AssertionError of its own (a wrong content was
accepted), or any exception but UserError. A signal, an input that takes longer than `HANG_S`, and
memory beyond `MEMORY` or that keeps growing are failures too. The same seed makes the same input.
"""

import faulthandler
import os
import pkgutil
import resource
import select
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

import numpy as np

from tests import ROOT
from tests.fuzz import readers

READERS = sorted(module.name for module in pkgutil.iter_modules(readers.__path__))

HANG_S = 30
MEMORY = 6 << 30
"""Bytes of address space of the child. An allocation by a damaged size becomes a MemoryError."""
GROWTH = 200 << 20
"""Bytes by which the child may grow after its first `_WARM` inputs."""
_WARM = 200
_MOST_FAILURES = 20
_REPORT_S, _WORDS = 10, 3000


@dataclass
class Result:
    """What became of the inputs."""

    inputs: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    failures: dict[int, str] = field(default_factory=dict)
    """The reason of each failure, by seed."""

    def __str__(self) -> str:
        words = ", ".join(f"{count:,} {word}" for word, count in sorted(self.outcomes.items()))
        failed = "".join(f"\nseed {seed}: {why}" for seed, why in self.failures.items())
        return f"{self.inputs:,} inputs: {words or 'none'}; {len(self.failures)} failures{failed}"


def fuzz(
    reader: str,
    first: int,
    inputs: int | None,
    seconds: float | None,
    report: Callable[[str], None] = lambda line: None,
) -> Result:
    """Try inputs from seed `first` on, until `inputs` are tried or `seconds` are over."""
    result, seed = Result(), float(first)
    end = float("inf") if inputs is None else first + inputs
    deadline = float("inf") if seconds is None else time.monotonic() + seconds
    while seed < end and time.monotonic() < deadline and len(result.failures) < _MOST_FAILURES:
        with tempfile.TemporaryDirectory() as folder:
            child = subprocess.Popen(
                [
                    sys.executable, "-m", "tests.fuzz.driver",
                    reader, folder, f"{seed:.0f}", f"{end}",
                ],
                cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )  # fmt: skip
            watch = _Watch(child, result)
            try:
                watch.follow(deadline, report)
            finally:
                child.kill()
                child.wait()
            seed = end if watch.trying is None else watch.trying + 1
    return result


class _Watch:
    """Follows the lines of one child."""

    def __init__(self, child: "subprocess.Popen[bytes]", result: Result) -> None:
        self.child, self.result = child, result
        self.trying: int | None = None
        """The seed that the child tries now; None until its first."""
        self._words = ""  # what it has printed besides, for a crash
        self._rest = b""

    def follow(self, deadline: float, report: Callable[[str], None]) -> None:
        """Until the child ends, hangs, or the time is over."""
        assert self.child.stdout
        os.set_blocking(self.child.stdout.fileno(), False)
        heard = shown = time.monotonic()
        while (now := time.monotonic()) < deadline:
            if now - shown > _REPORT_S:
                shown = now
                report(str(self.result).partition("\n")[0])
            if select.select([self.child.stdout], [], [], 1)[0]:
                heard = now
                if not (chunk := self.child.stdout.read()):
                    break
                self._take(chunk)
                if len(self.result.failures) >= _MOST_FAILURES:
                    return
            elif self.trying is not None and now - heard > HANG_S:
                self._fail(f"still runs after {HANG_S} s")
                return
        else:
            return
        if code := self.child.wait():
            self._fail(f"exit code {code}: {self._words[-_WORDS:]}")

    def _take(self, chunk: bytes) -> None:
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        for line in lines:
            word, _, about = line.decode(errors="replace").partition(" ")
            if word == "BEGIN":
                self.trying, self._words = int(about), ""
            elif word == "DONE":
                self.result.inputs += 1
                self.result.outcomes[about] += 1
            elif word == "FAILED":
                self._fail(about)
            else:
                self._words += f"{word} {about}\n"

    def _fail(self, why: str) -> None:
        if self.trying is None:
            raise RuntimeError(f"the reader cannot start: {why}")
        self.result.inputs += 1
        self.result.failures[self.trying] = why


def child(reader: str, folder: str, first: str, end: str) -> None:
    """Try inputs one after another, and print what became of each."""
    faulthandler.enable()
    target = import_module(f"tests.fuzz.readers.{reader}").Target(Path(folder))
    limit = _size("VmSize") + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    seed, settled = int(first), 0
    while seed < float(end):
        print("BEGIN", seed, flush=True)
        try:
            print("DONE", target.try_one(np.random.default_rng(seed)), flush=True)
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            why = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            print(f"FAILED {why} ({where.filename}:{where.lineno})", flush=True)
        seed += 1
        if seed - int(first) == _WARM:
            settled = _size("VmRSS")
        elif settled and seed % 100 == 0 and _size("VmRSS") > settled + GROWTH:
            sys.exit(f"grew from {settled >> 20} to {_size('VmRSS') >> 20} MiB")


def _size(name: str) -> int:
    """A size of this process in bytes, from /proc."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


if __name__ == "__main__":
    child(*sys.argv[1:])
