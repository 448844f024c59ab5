"""The networks of a run: as trained, and before training."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from evaluation.datasets.images import spread
from evaluation.datasets.squares import SquareImages
from model import ModelConfig, SlotCon
from model.config import cells_of
from pipeline.errors import UserError
from train.config import RunConfig, from_dict
from train.pretrained import load_model, read_record
from train.run.checkpoint import find

CALIBRATION_IMAGES, CALIBRATION_BATCH = 256, 8


def default_device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_network(checkpoint: Path, device: torch.device) -> tuple[SlotCon, RunConfig]:
    """The model of a checkpoint, or of the newest one of a run, in eval mode. Raises UserError."""
    model, config = load_model(checkpoint)
    return model.to(device).eval(), config


def run_config(checkpoint: Path) -> RunConfig:
    """The configuration of a run, given its folder or a checkpoint of it. Raises UserError."""
    return from_dict(read_record(find(checkpoint)).config)


def untrained_network(config: ModelConfig, seed: int, squares: SquareImages) -> SlotCon:
    """The network that a run with this `seed` starts from. Its BatchNorm statistics are those of up
    to 256 of the images.

    Initial running statistics are 0 and 1, whatever the input. With measured statistics the
    baseline has normalised activations as a trained network has, and only the weights differ.
    Raises UserError for a single image of a single cell.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = SlotCon(config).to(squares.device)
    for norm in model.teacher.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = None  # average over all batches
    sample = spread(len(squares.images), CALIBRATION_IMAGES)
    if len(sample) > CALIBRATION_BATCH:  # only whole batches, since all have the same weight
        sample = sample[: len(sample) // CALIBRATION_BATCH * CALIBRATION_BATCH]
    elif len(sample) * cells_of(squares.size, config.stages) < 2:
        raise UserError(
            f"one image of {squares.size} pixels has no variance to calibrate BatchNorm with"
        )
    with torch.inference_mode():
        for batch in replace(squares, batch_size=CALIBRATION_BATCH).batches(indices=sample):
            model.teacher.train()(batch.normalised(squares.device))
    return model.eval()
