"""How a training command ends: with its exit code, and one line that says why."""

import os
import sys
from collections.abc import Callable
from typing import NoReturn

from pipeline.errors import UserError, one_line
from train.run.cli import escape_output, print_error
from train.run.ends import EarlyEnd
from train.run.environment import check_before_import, is_first
from train.run.signals import StopSignals

EXIT_CODES = """exit codes:
  0    done
  1    the training diverged or collapsed, or another of its processes is lost
  2    bad input, or a disk or an image fails
  75   stopped by SIGTERM or SIGUSR1, with a checkpoint: start the same command again with
       --resume auto (a second signal ends the run at once, without a checkpoint)
  130  interrupted from the keyboard, without a checkpoint
torchrun and accelerate launch turn every code but 0 into 1."""


def run_training(prepare: Callable[[StopSignals], Callable[[], None]]) -> None:
    """Call `prepare`, which builds a run and returns the function that trains it; call this
    function. If either fails, end the process with one line and an exit code.
    """
    escape_output()
    with StopSignals() as signals:
        try:
            _prepared(prepare, signals)()
        except UserError as error:  # a damaged image, for example: other processes do not see it
            print_error(error)
            _end("", 2)
        except EarlyEnd as end:
            _end(end.line(is_first()), end.exit_code)
        except KeyboardInterrupt:
            _end("error: interrupted" if is_first() else "", 130)


def _prepared(
    prepare: Callable[[StopSignals], Callable[[], None]], signals: StopSignals
) -> Callable[[], None]:
    try:
        check_before_import()
        return prepare(signals)
    except UserError as error:  # all processes fail alike: one of them prints the reason
        if is_first():
            print_error(error)
        sys.exit(2)


def _end(message: str, code: int) -> NoReturn:
    """Print `message` and end at once: Python's own exit may wait for a process that hangs."""
    if message:
        print(one_line(message), file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
