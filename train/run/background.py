"""Work that must neither hold up training nor hang it."""

import threading
import time
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue

from pipeline.errors import UserError
from train.metrics import duration


class Background:
    """A thread that does one job after the other. What goes wrong in it, or is not done `timeout_s`
    seconds after it was asked for, surfaces in `problem` and `wait`; jobs
    after one that failed are dropped.

    The thread is a daemon: one that hangs does not keep the process alive.
    """

    def __init__(self, name: str, timeout_s: float) -> None:
        self._name, self._timeout_s = name, timeout_s
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._asked: deque[float] = deque()  # when, for each job that is not done
        self._error: Exception | None = None
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def submit(self, job: Callable[[], None]) -> None:
        """Have `job` done after those before it."""
        with self._changed:
            self._asked.append(time.monotonic())
        self._jobs.put(job)

    def problem(self) -> Exception | None:
        """What went wrong so far: an exception of a job's, or UserError if one takes too long."""
        with self._changed:
            late = self._asked and time.monotonic() - self._asked[0] > self._timeout_s
        if late and not self._error:
            return UserError(f"{self._name}: no answer for {duration(self._timeout_s)}")
        return self._error

    def wait(self) -> None:
        """Until all jobs are done. Raises what went wrong."""
        while not (problem := self.problem()) and self._asked:
            with self._changed:
                self._changed.wait(min(1.0, self._timeout_s / 10))
        if problem:
            raise problem

    def close(self) -> None:
        """End the thread after the jobs that it has. Waits for that, but not for one that hangs:
        a thread that outlives the main one may end the process with an abort.
        """
        self._jobs.put(None)
        self._thread.join(0 if self.problem() else self._timeout_s)

    def _work(self) -> None:
        while self._do_next():
            pass

    def _do_next(self) -> bool:
        """Whether there was a job. Nothing of it is kept: it may hold the whole run."""
        job = self._jobs.get()
        if job is None:
            return False
        try:
            if not self._error:
                job()
        except Exception as error:
            self._error = error
        with self._changed:
            self._asked.popleft()
            self._changed.notify_all()
        return True
