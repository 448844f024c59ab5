"""Pre-trains on the images of a beton, repeated: `python -m tests.gpu.pretrain COUNT [options]`.

A small beton has short epochs, and a run would wait at their ends. COUNT images make them long.
The options are those of train.pretrain.
"""

import sys

from tools.benchmark.stages import repeated
from train import trainer
from train.pretrain import main


def train_on_repeated_images() -> None:
    """Open every beton as one of at least COUNT images, and train."""
    count, open_beton = int(sys.argv.pop(1)), trainer.open_beton
    trainer.open_beton = lambda path: repeated(open_beton(path), count)
    main()


if __name__ == "__main__":
    train_on_repeated_images()
