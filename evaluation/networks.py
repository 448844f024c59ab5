"""The networks of a run: as trained, and before training."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from evaluation.datasets.images import spread
from evaluation.datasets.squares import SquareImages
from evaluation.features import dilated
from model import ModelConfig, SlotCon
from pipeline.errors import UserError
from train.config import RunConfig, from_dict
from train.pretrained import load_model, read_record
from train.run.checkpoint import find

CALIBRATION_IMAGES, CALIBRATION_BATCH = 256, 8
SEED = 0
"""Of the weights of an untrained network that is no run's."""


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


def untrained_network(
    config: ModelConfig, seed: int, squares: SquareImages, output_stride: int | None = None
) -> SlotCon:
    """The network that a run with this `seed` and new weights starts from, calibrated, and dilated
    if `output_stride` is given. Raises UserError.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = SlotCon(config).to(squares.device)
    model.teacher.encoder = dilated(model.teacher.encoder, output_stride)
    calibrate(model.teacher, model.teacher.stages, squares)
    return model.eval()


def calibrate(network: nn.Module, run: Callable[[Tensor], object], squares: SquareImages) -> None:
    """Give an untrained network the BatchNorm statistics of up to 256 of the images, and leave it
    in eval mode. `run` sends normalised images [B, 3, R, R] through it.

    Initial running statistics are 0 and 1, whatever the input. With measured statistics the
    baseline has normalised activations as a trained network has, and only the weights differ.
    Raises UserError for a single image of a single cell.
    """
    network.eval()
    norms = [norm for norm in network.modules() if isinstance(norm, nn.BatchNorm2d)]
    if not norms:
        return
    for norm in norms:
        norm.train().momentum = None  # average over all batches
    sample = spread(len(squares.images), CALIBRATION_IMAGES)
    if len(sample) > CALIBRATION_BATCH:  # only whole batches, since all have the same weight
        sample = sample[: len(sample) // CALIBRATION_BATCH * CALIBRATION_BATCH]
    eights = replace(squares, batch_size=CALIBRATION_BATCH)
    batches = eights.batches("untrained network: statistics of BatchNorm", sample)
    with torch.inference_mode():
        for batch in batches:
            try:
                run(batch.normalised(squares.device))
            except UserError:
                raise
            except ValueError:  # of torch's, for a single value of a channel
                raise UserError(
                    f"one image of {squares.size} pixels has no variance to calibrate BatchNorm"
                    " with"
                ) from None
    network.eval()
