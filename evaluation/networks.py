"""The networks of a run: as trained, and before training."""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from evaluation.datasets.images import spread
from evaluation.datasets.squares import SquareImages
from evaluation.features import dilated
from model import ModelConfig, SlotCon
from model.branch import Branch
from pipeline.errors import UserError, printable
from train.config import RunConfig, from_dict
from train.init_config import LIBRARIES, InitConfig
from train.pretrained import load_model, read_record
from train.run.checkpoint import find
from train.start import digest, start_from

CALIBRATION_IMAGES, CALIBRATION_BATCH = 256, 8
SEED = 0
"""Of the weights of an untrained network that is no run's."""
_NEW = InitConfig()


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


def start_of(checkpoint: Path) -> InitConfig:
    """The weights that a run started from: new ones too if theirs are no longer there, which is
    said. Raises UserError.
    """
    record = read_record(find(checkpoint))
    init, about = from_dict(record.config).init, record.provenance.get("init", {})
    if init.weights == "random":
        return init
    if init.weights in LIBRARIES:
        return init
    path = Path(about.get("weights", init.weights))
    try:
        there = digest(path) == about.get("sha256")
    except UserError:
        there = False
    if there:
        return replace(init, weights=str(path))
    print(
        f"note: {checkpoint} started from {printable(str(path))}, which is not there as it was: "
        "the row untrained has new weights",
        file=sys.stderr,
    )
    return InitConfig()


def untrained_network(
    config: ModelConfig,
    seed: int,
    squares: SquareImages,
    output_stride: int | None = None,
    init: InitConfig = _NEW,
    heads: bool = True,
) -> SlotCon:
    """The network that a run with this `seed` and `init` starts from, what is new in it calibrated,
    and dilated if `output_stride` is given. Without `heads` the encoder alone is calibrated: if it
    came with statistics, no image is read. Raises UserError.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = SlotCon(config)
    start_from(init, model)
    model = model.to(squares.device)
    model.teacher.encoder = dilated(model.teacher.encoder, output_stride)
    calibrate_branch(model.teacher, squares, heads)
    return model.eval()


def calibrate_branch(branch: Branch, squares: SquareImages, heads: bool) -> None:
    """`calibrate` an encoder with its heads, or alone."""
    if heads:
        calibrate(branch, branch.stages, squares)
    else:
        calibrate(branch.encoder, branch.encoder, squares)


def new_norms(network: nn.Module) -> list[nn.BatchNorm2d]:
    """The BatchNorms that have seen no image. Their counts do not say it, since many files of
    weights have statistics without counts.
    """
    norms = (each for each in network.modules() if isinstance(each, nn.BatchNorm2d))
    return [norm for norm in norms if not bool(norm.get_buffer("running_mean").any())]


def calibrate(network: nn.Module, run: Callable[[Tensor], object], squares: SquareImages) -> None:
    """Give the BatchNorms of a network that have seen no image the statistics of up to 256 of the
    images, and leave it in eval mode. `run` sends normalised images [B, 3, R, R] through it.

    Initial running statistics are 0 and 1, whatever the input. With measured statistics the
    baseline has normalised activations as a trained network has, and only the weights differ.
    Those that came with weights stay. Raises UserError for a single image of a single cell.
    """
    network.eval()
    norms = new_norms(network)
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
