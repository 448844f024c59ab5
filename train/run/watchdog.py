"""Ends a process that hangs without a timeout."""

import os
import sys
import threading
import time

from train.run.log import duration

_MARGIN = 1.1  # other timeouts come first: their messages say more


class Watchdog:
    """Inside its `with`, ends the process with one line and exit code 1 if nothing calls `beat` for
    a little longer than `timeout_s` seconds. On GPUs, for example, a collective waits for ever for
    a dead process.

    Time in which this process itself was stopped (SIGSTOP, a suspended job) does not count.
    """

    def __init__(self, timeout_s: float, name: str) -> None:
        self._patience_s, self._name = _MARGIN * timeout_s, name
        self._waited = 0.0
        self._off = threading.Event()

    def beat(self) -> None:
        """Report progress."""
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
                    f"error: {self._name}: no step for {duration(self._patience_s)}: another "
                    "process, the device or the disk does not answer",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(1)
