"""Pre-train SlotCon: `accelerate launch -m train.pretrain --config configs/NAME.yaml
[--section.field value …]`."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from train.config import RunConfig, load_config
from train.run.command import run_training
from train.run.ends import naming
from train.run.signals import StopSignals

if TYPE_CHECKING:
    from accelerate import Accelerator

    from train.evaluations import Evaluation


def main() -> None:
    """Read the command line, build the run, train. --help lists the exit codes."""
    run_training(_prepare)


def _prepare(signals: StopSignals) -> Callable[[], None]:
    config, resume = load_config()
    from train.trainer import Trainer  # takes seconds, which --help does not wait for

    with naming(config.name):
        return Trainer(config, resume, signals, open_evaluation).train


def open_evaluation(config: RunConfig, accelerator: "Accelerator") -> "Evaluation":
    """What the trainer evaluates with. It cannot import this itself: evaluation imports the
    trainer's room.
    """
    from evaluation.online import OnlineEvaluation

    return OnlineEvaluation(config, accelerator)


if __name__ == "__main__":
    main()
