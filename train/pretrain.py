"""Pre-train SlotCon: `accelerate launch -m train.pretrain --config configs/NAME.yaml
[--section.field value …]`."""

from collections.abc import Callable

from train.config import load_config
from train.run.command import run_training
from train.run.signals import StopSignals


def main() -> None:
    """Read the command line, build the run, train. For the exit codes see --help."""
    run_training(_prepare)


def _prepare(signals: StopSignals) -> Callable[[], None]:
    config, resume = load_config()
    from train.run.watchdog import naming
    from train.trainer import Trainer  # takes seconds, which --help need not wait for

    with naming(config.name):
        return Trainer(config, resume, signals).train


if __name__ == "__main__":
    main()
