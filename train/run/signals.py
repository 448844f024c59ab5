"""Signals to stop: SIGTERM and SIGUSR1, which schedulers send before they take a machine away."""

import os
import signal
import socket
import threading
import time

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_ECHO_S = 2.0  # a launcher may repeat a signal that the scheduler sends to every process


class StopSignals:
    """Inside its `with`, the first SIGTERM or SIGUSR1 is only stored in `received`. A second one
    ends the process at once if it comes more than two seconds later: an earlier one is an echo of
    the first.

    Enter it in the main thread. A second thread waits for the signals: Python runs signal handlers
    in the main thread, which may hang in a collective.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    def __enter__(self) -> "StopSignals":
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)  # set_wakeup_fd requires it
        # The thread hears of a signal only if Python has a handler for it.
        self._before = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
        self._wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._writer.close()  # the thread reads to the end of the stream, then ends
        self._thread.join()

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
