"""Rounds of turns: which peer runs when, each in a process that ends with all its workers."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace

from pipeline.errors import printable
from tests import ROOT
from tests.benchmark_peers.peers import Job
from tests.benchmark_peers.turn import Turn

LONGEST = 180.0
"""Seconds of a turn besides its timed part; a first run compiles."""


def run_rounds(
    job: Job, peers: Sequence[str], rounds: int, reasons: dict[str, str]
) -> Iterator[dict[str, list[Turn]]]:
    """After each round, the turns of each peer so far. A peer in `reasons` has none; one that fails
    is added to `reasons` and has no later turn.
    """
    turns: dict[str, list[Turn]] = {name: [] for name in peers}
    for number in range(rounds):
        for name in peers if number % 2 == 0 else reversed(peers):
            if name in reasons:
                continue
            try:
                turn = run_turn(replace(job, peer=name))
            except TurnFailed as failed:
                reasons[name] = str(failed)
                shown = reasons[name]
            else:
                turns[name].append(turn)
                shown = describe(turn)
            line = f"round {number + 1} of {rounds}: {name}: {shown}"
            print(line, file=sys.stderr, flush=True)
        yield turns


def describe(turn: Turn) -> str:
    first = f"first batch after {turn.first_batch_s:.1f} s"
    if not turn.images_per_s:
        return first
    return f"{turn.images_per_s:.0f} images/s, {turn.cpu_ms:.1f} ms of CPU an image, {first}"


class TurnFailed(Exception):
    """Why a peer could not be measured, in a line."""


def run_turn(job: Job) -> Turn:
    """Measure one peer in a new process. Raises TurnFailed."""
    command = [sys.executable, "-m", "tests.benchmark_peers.turn", json.dumps(asdict(job))]
    process = subprocess.Popen(
        [*command, str(time.monotonic())],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=LONGEST + job.seconds)
    except subprocess.TimeoutExpired:
        raise TurnFailed(f"did not end within {LONGEST + job.seconds:.0f} s") from None
    finally:  # its workers too, which would otherwise wait for a parent that has ended
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if process.returncode:
        raise TurnFailed(reason_of(err) or f"ended with code {process.returncode}")
    return Turn(**json.loads(out.splitlines()[-1]))


def reason_of(stderr: str) -> str:
    """The error at the end of a traceback, in one line."""
    lines = [line for line in stderr.splitlines() if line[:1].strip()]
    last = lines[-1] if lines else ""
    missing = last.partition("No module named ")[2]
    return printable(f"not installed: {missing}" if missing else last)
