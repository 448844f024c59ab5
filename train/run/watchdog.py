"""Never a hang: what no timeout of its own ends, the watchdog does."""

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from train.metrics import duration


class LostProcess(RuntimeError):
    """Another process of the run has ended, or does not answer."""

    REASON = "another process has ended or does not answer"


@contextmanager
def naming(what: str) -> Iterator[None]:
    """Inside its `with`, a collective that fails because of another process raises a LostProcess
    that names `what`.
    """
    try:
        yield
    except RuntimeError as error:
        if not lost(error):
            raise
        raise LostProcess(f"{what}: {LostProcess.REASON} ({lost(error)})") from error


class Watchdog:
    """Inside its `with`, ends the process with one line and exit code 1 where nobody has called
    `beat` for `patience_s` seconds: on GPUs, say, whose collectives wait for a dead process.

    Time in which this process itself was stopped (SIGSTOP, a suspended job) does not count.
    """

    def __init__(self, patience_s: float, what: str) -> None:
        self._patience_s, self._what = patience_s, what
        self._waited = 0.0
        self._off = threading.Event()

    def beat(self) -> None:
        """Something got done."""
        self._waited = 0.0

    def __enter__(self) -> "Watchdog":
        self.beat()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._off.set()
        self._thread.join()

    def _watch(self) -> None:
        tick = min(1.0, self._patience_s / 10)
        before = time.monotonic()
        while not self._off.wait(tick):
            now = time.monotonic()
            self._waited += min(now - before, 2 * tick)
            before = now
            if self._waited > self._patience_s:
                print(
                    f"error: {self._what}: no step for {duration(self._patience_s)}: another "
                    "process, the device or the disk does not answer",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(1)


def lost(error: RuntimeError) -> str:
    """What a collective says, in one line, if it failed because of another process; or nothing.
    gloo raises no type of its own.
    """
    known = isinstance(error, dist.DistError) or "gloo" in str(error)
    return " ".join(str(error).split())[:200] if known else ""
