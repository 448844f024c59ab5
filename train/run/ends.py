"""The ways a run ends before its last step: the reason, the exit code, and who prints the line."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import IntEnum

REQUEUE = os.EX_TEMPFAIL
"""75: start the same command again, with --resume auto."""


class Reason(IntEnum):
    """Why a process wants to end the run early. All processes agree on the largest one."""

    NONE = 0
    SIGNAL = 1
    DISK = 2


class EarlyEnd(RuntimeError):
    """A run ends before its last step; the message says why.

    Usually all processes know the reason, and the first one of each machine prints it.
    """

    exit_code, prefix, all_print = 1, "error: ", False

    def line(self, first: bool) -> str:
        """What this process prints. `first`: it is the first one of its machine."""
        return f"{self.prefix}{self}" if first or self.all_print else ""


class Diverged(EarlyEnd):
    """The loss or a weight is no longer finite, or fp16 skips every step."""

    checkpoint = "last good checkpoint"


class Collapsed(EarlyEnd):
    """The grouping has collapsed, and the configuration says that the run stops then."""

    checkpoint = "last checkpoint"  # it may be of the collapsed model


class Stopped(EarlyEnd):
    """The run has received a signal to stop, and its checkpoint is written."""

    exit_code, prefix = REQUEUE, ""


class Plateau(EarlyEnd):
    """The score no longer rises, and the configuration says that the run is done then."""

    exit_code, prefix = 0, ""


class LostProcess(EarlyEnd):
    """Another process of the run has ended, or does not answer."""

    all_print = True


class EndedElsewhere(EarlyEnd):
    """A disk has failed on another process, which prints the reason."""

    exit_code = 2

    def line(self, first: bool) -> str:
        return ""


@contextmanager
def naming(run: str, details: Callable[[], str] = str) -> Iterator[None]:
    """Inside its `with`, a collective that fails because of another process raises a LostProcess.

    The message names `run` and ends with `details()`.
    """
    try:
        yield
    except EarlyEnd:
        raise
    except RuntimeError as error:
        if not (cause := _lost(error)):
            raise
        raise LostProcess(
            f"{run}: another process has ended or does not answer ({cause}){details()}"
        ) from error


def _lost(error: RuntimeError) -> str:
    """The message of a collective, in one line, if it failed because of another process; else "".

    gloo raises plain RuntimeErrors.
    """
    import torch.distributed as dist  # takes seconds, which --help does not wait for

    known = isinstance(error, dist.DistError) or "gloo" in str(error)
    return " ".join(str(error).split())[:200] if known else ""
