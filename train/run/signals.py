"""Being told to stop: SIGTERM and SIGUSR1, as schedulers send them before they take a machine."""

import os
import signal
import socket
import threading
import time
from pathlib import Path
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_ECHO_S = 2.0  # launchers pass on what the scheduler also sends to every process itself


class Stopped(RuntimeError):
    """The run was told to stop, and its checkpoint is written."""


class StopSignals:
    """Inside its `with`, the first SIGTERM or SIGUSR1 is only remembered, in `received`; a second
    one, later than an echo of the first would be, ends the process at once, whatever it does.

    To be entered in the main thread. A thread of its own waits for the signals, since Python's
    handlers wait for the main thread, which may hang in a collective.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    def __enter__(self) -> "StopSignals":
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)  # as set_wakeup_fd asks for
        self._before = {number: signal.signal(number, _nothing) for number in SIGNALS}
        self._wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._writer.close()  # the thread reads to the end, and ends
        self._thread.join()

    def stopped(self, run_dir: Path, step: int) -> Stopped:
        """How a run ends that has heeded the signal; another process may have received it."""
        name = self.received.name if self.received else "a signal"
        return Stopped(
            f"{run_dir}: stopped by {name} at step {step}, which has a checkpoint; go on with"
            " --resume auto"
        )

    def _listen(self) -> None:
        with self._reader as reader:
            first = 0.0
            while number := reader.recv(1):
                if number[0] not in SIGNALS:
                    continue
                if self.received is None:
                    self.received, first = signal.Signals(number[0]), time.monotonic()
                elif time.monotonic() - first > _ECHO_S:
                    os._exit(128 + number[0])


def _nothing(number: int, frame: FrameType | None) -> None:
    """Without a handler of Python's, the signal would not reach the thread."""
