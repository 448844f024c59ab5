"""Work that must neither delay training nor make it hang."""

import threading
import time
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue

from pipeline.errors import UserError
from train.run.log import duration


class Background:
    """A thread that does one job after the other. `problem` and `wait` report a job that fails, or
    that is not done `timeout_s` seconds after `submit`. Later jobs are then dropped.

    The thread is a daemon: it does not keep the process alive if it hangs.
    """

    def __init__(self, name: str, timeout_s: float) -> None:
        self._name, self._timeout_s = name, timeout_s
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._submitted: deque[float] = deque()  # the time, for each job that is not done
        self._error: Exception | None = None
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def submit(self, job: Callable[[], None]) -> None:
        """Queue `job` behind the earlier jobs."""
        with self._changed:
            self._submitted.append(time.monotonic())
        self._jobs.put(job)

    def problem(self) -> Exception | None:
        """The exception of a job so far, or a UserError if a job takes too long."""
        with self._changed:
            late = self._submitted and time.monotonic() - self._submitted[0] > self._timeout_s
        if late and not self._error:
            return UserError(f"{self._name}: no answer for {duration(self._timeout_s)}")
        return self._error

    def wait(self) -> None:
        """Return when all jobs are done. Raises the problem, if there is one."""
        while not (problem := self.problem()) and self._submitted:
            with self._changed:
                self._changed.wait(min(1.0, self._timeout_s / 10))
        if problem:
            raise problem

    def close(self) -> None:
        """End the thread after its last job. Waits for that, unless the thread hangs: a thread that
        outlives the main one may abort the process.
        """
        self._jobs.put(None)
        self._thread.join(0 if self.problem() else self._timeout_s)

    def _work(self) -> None:
        while self._do_next():
            pass

    def _do_next(self) -> bool:
        """Returns False at the end. Drops the reference to the job: it may keep the whole run
        alive.
        """
        job = self._jobs.get()
        if job is None:
            return False
        try:
            if not self._error:
                job()
        except Exception as error:
            self._error = error
        with self._changed:
            self._submitted.popleft()
            self._changed.notify_all()
        return True
