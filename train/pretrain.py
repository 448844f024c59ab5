"""Pre-train SlotCon: `accelerate launch -m train.pretrain --config configs/NAME.yaml
[--section.field value …]`."""

import os
import sys
from typing import TYPE_CHECKING, NoReturn

from pipeline.errors import UserError
from train.config import load_config
from train.signals import Stopped, StopSignals

if TYPE_CHECKING:
    from train.trainer import Trainer

REQUEUE = os.EX_TEMPFAIL  # 75: start the same command again, with --resume auto
_FIRST = os.environ.get("LOCAL_RANK", "0") == "0"  # what all processes find, one says


def main() -> None:
    """Read the command line, build the run, train. For the exit codes see --help."""
    with StopSignals() as signals:
        try:
            config, resume = load_config()
            from train.trainer import Trainer  # takes seconds, which --help need not wait for

            trainer = Trainer(config, resume, signals)
        except UserError as error:
            if _FIRST:
                print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            _interrupted()
        except RuntimeError as error:
            from train.watchdog import LostProcess, lost

            if not lost(error):
                raise
            _end(f"error: {config.name}: {LostProcess.REASON} ({lost(error)})", 1)
        _train(trainer)


def _train(trainer: "Trainer") -> None:
    from train.health import Collapsed
    from train.metrics import Diverged
    from train.watchdog import LostProcess

    try:
        trainer.train()
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


if __name__ == "__main__":
    main()
