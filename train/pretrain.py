"""Pre-train SlotCon: `accelerate launch -m train.pretrain --config configs/NAME.yaml
[--section.field value …]`."""

import os
import sys
from typing import NoReturn

from pipeline.errors import UserError
from train.config import load_config
from train.metrics import Diverged


def main() -> None:
    """Read the command line, build the run, train.

    Exit code 2: bad input; 1: the training diverged.
    """
    first = os.environ.get("LOCAL_RANK", "0") == "0"  # what all processes find wrong, one says
    try:
        config, resume = load_config()
        from train.trainer import Trainer  # takes seconds, which --help need not wait for

        trainer = Trainer(config, resume)
    except UserError as error:
        _fail(str(error) if first else "", 2)
    try:
        trainer.train()
    except UserError as error:  # a damaged image, say, which one process alone meets
        _fail(str(error), 2)
    except Diverged as error:
        _fail(str(error) if first else "", 1)
    except KeyboardInterrupt:
        _fail("interrupted" if first else "", 130)


def _fail(message: str, code: int) -> NoReturn:
    if message:
        print(f"error: {message}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
