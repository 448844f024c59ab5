"""How a training command ends: its exit codes, and one line that says why."""

import os
import sys
from collections.abc import Callable
from typing import NoReturn

from pipeline.errors import UserError
from train.run.signals import Stopped, StopSignals

REQUEUE = os.EX_TEMPFAIL  # 75: start the same command again, with --resume auto
EXIT_CODES = """exit codes:
  0    done
  1    the training diverged or collapsed, or another of its processes is lost
  2    bad input; a disk, a tracker or an image that fails
  75   told to stop by SIGTERM or SIGUSR1: a checkpoint is written, start the same command again
       with --resume auto (a second signal ends the run at once, without one)
  130  interrupted from the keyboard, without a checkpoint
torchrun and accelerate launch make 1 of all but 0."""
_FIRST = os.environ.get("LOCAL_RANK", "0") == "0"  # what all processes find, one says


def run_training(prepare: Callable[[StopSignals], Callable[[], None]]) -> None:
    """Call `prepare`, which builds a run that heeds the signals, then what it returns, which does
    the steps; end the process, in a line and with an exit code, where either fails.
    """
    with StopSignals() as signals:
        try:
            train = prepare(signals)
        except UserError as error:
            if _FIRST:
                print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            _interrupted()
        except RuntimeError as error:
            from train.run.watchdog import LostProcess, lost

            if isinstance(error, LostProcess):
                _end(f"error: {error}", 1)
            if not lost(error):
                raise
            _end(f"error: {LostProcess.REASON} ({lost(error)})", 1)
        _run(train)


def _run(train: Callable[[], None]) -> None:
    from train.health import Collapsed
    from train.metrics import Diverged
    from train.run.watchdog import LostProcess

    try:
        train()
    except UserError as error:  # a damaged image, say, which one process alone meets
        _end(f"error: {error}" if str(error) else "", 2)
    except LostProcess as error:
        _end(f"error: {error}", 1)
    except (Diverged, Collapsed) as error:
        _end(f"error: {error}" if _FIRST else "", 1)
    except Stopped as error:
        _end(str(error) if _FIRST else "", REQUEUE)
    except KeyboardInterrupt:
        _interrupted()


def _interrupted() -> NoReturn:
    _end("error: interrupted" if _FIRST else "", 130)


def _end(message: str, code: int) -> NoReturn:
    """Say why, and end at once: what Python does at its end may wait for what does not answer."""
    if message:
        print(message, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
