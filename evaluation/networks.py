"""The networks that evaluation compares: a run's teacher, and the same architecture before
training.
"""

from pathlib import Path

import torch
from torch import nn

from evaluation.datasets.images import EVALUATION_SIDE, ImageSource, evaluation_size, spread
from evaluation.segment import square_batches
from model import ModelConfig, SlotCon
from model.encoder import cells_of
from pipeline.errors import UserError
from train.config import RunConfig, from_dict
from train.pretrained import load_model, read_record
from train.run.checkpoint import find

CALIBRATION_IMAGES, CALIBRATION_BATCH = 256, 8


def default_device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_network(checkpoint: Path, device: torch.device) -> tuple[SlotCon, RunConfig]:
    """The model of a checkpoint, or of a run's newest, in eval mode. Raises UserError."""
    model, config = load_model(checkpoint)
    return model.to(device).eval(), config


def run_config(checkpoint: Path) -> RunConfig:
    """The configuration of a checkpoint's run, or of a run. Raises UserError."""
    return from_dict(read_record(find(checkpoint)).config)


def evaluated_side(size: int | None, checkpoint: Path | None) -> int:
    """R in pixels: `size` if given, else what the checkpoint's views ask for, else 320. Raises
    UserError.
    """
    if size is not None:
        return size
    return evaluation_size(run_config(checkpoint).views.size) if checkpoint else EVALUATION_SIDE


def untrained_network(
    config: ModelConfig, seed: int, images: ImageSource, size: int, device: torch.device
) -> SlotCon:
    """The network that a run of this `seed` starts from, with BatchNorm statistics of up to 256 of
    `images`.

    A new layer's running statistics, 0 and 1, are those of no input. Measured ones give the
    baseline the scale that training would have given it on the way, so that only the weights
    differ. Raises UserError for a single image of a single cell.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = SlotCon(config).to(device)
    for norm in model.teacher.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = None  # the plain average over the batches
    sample = spread(len(images), CALIBRATION_IMAGES)
    if len(sample) > CALIBRATION_BATCH:  # whole batches only: all of them weigh the same
        sample = sample[: len(sample) // CALIBRATION_BATCH * CALIBRATION_BATCH]
    elif len(sample) * cells_of(size) < 2:
        raise UserError(f"one image of {size} pixels has no variance to calibrate BatchNorm with")
    with torch.inference_mode():
        for squares in square_batches(images, size, indices=sample, batch_size=CALIBRATION_BATCH):
            model.teacher.train()(squares.normalised(device))
    return model.eval()
