"""The networks that evaluation compares: a run's teacher, and the same architecture before
training.
"""

from pathlib import Path

import torch
from torch import nn

from evaluation.images import ImageSource, spread
from evaluation.segment import square_batches
from model import ModelConfig, SlotCon
from train.checkpoint import load_model
from train.config import RunConfig

CALIBRATION_IMAGES = 256


def default_device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_network(checkpoint: Path, device: torch.device) -> tuple[SlotCon, RunConfig]:
    """The model of a checkpoint, or of a run's newest, in eval mode. Raises UserError."""
    model, config = load_model(checkpoint)
    return model.to(device).eval(), config


def untrained_network(
    config: ModelConfig, seed: int, images: ImageSource, size: int, device: torch.device
) -> SlotCon:
    """The network that a run of this `seed` starts from, with BatchNorm statistics of up to 256 of
    `images`.

    A new layer's running statistics, 0 and 1, are those of no input. Measured ones give the
    baseline the scale that training would have given it on the way, so that only the weights
    differ.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = SlotCon(config).to(device)
    for norm in model.teacher.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = None  # the plain average over the batches
    sample = spread(len(images), CALIBRATION_IMAGES)
    with torch.inference_mode():
        for squares in square_batches(images, size, indices=sample):
            model.teacher.train()(squares.normalised(device))
    return model.eval()
