"""Pre-train SlotCon: `accelerate launch -m train.pretrain --config configs/NAME.yaml
[--section.field value …]`."""

from collections.abc import Callable

from train.config import load_config
from train.run.command import run_training
from train.run.ends import naming
from train.run.signals import StopSignals


def main() -> None:
    """Read the command line, build the run, train. --help lists the exit codes."""
    run_training(_prepare)


def _prepare(signals: StopSignals) -> Callable[[], None]:
    config, resume = load_config()
    from train.trainer import Trainer  # takes seconds, which --help does not wait for

    with naming(config.name):
        return Trainer(config, resume, signals).train


if __name__ == "__main__":
    main()
