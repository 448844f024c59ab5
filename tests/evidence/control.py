"""The control: the stages that a run has trained, and random ones on top of them.

    python -m tests.evidence.control RUN FOLDER BETON SIZE

RUN ended at stage 2. FOLDER becomes a run of four stages with its weights. Stages 3 and 4 are those
that RUN's seed draws, with BatchNorm statistics of the images of BETON at SIZE pixels. Whatever
FOLDER scores at stages 3 and 4 takes no training of stages 3 and 4.
"""

import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import nn

from evaluation.datasets.images import BetonImages
from evaluation.datasets.squares import SquareImages
from evaluation.networks import calibrate, default_device
from model import SlotCon
from model.encoder import Encoder
from train.pretrained import load_model, read_record
from train.run.checkpoint import find, write_model


def put_on(trunk: Encoder, model: SlotCon, images: SquareImages) -> None:
    """Give the teacher and the student of `model` the stages of `trunk`. Their later stages keep
    their weights and get the BatchNorm statistics that `images` have on these stages.
    """
    device, stages = images.device, [f"layer{n}" for n in range(trunk.stages + 1, 5)]
    for encoder in (model.teacher.encoder, model.student.encoder):
        encoder.load_state_dict(encoder.state_dict() | trunk.state_dict())
        encoder.to(device).eval()
        calibrate(nn.ModuleList(encoder.get_submodule(name) for name in stages), encoder, images)


def main() -> None:
    run, folder, beton, size = sys.argv[1:]
    trained, config = load_model(run)
    whole = replace(config.model, stages=4, cell_loss_weight=0)
    with torch.random.fork_rng():
        torch.manual_seed(config.train.seed)
        model = SlotCon(whole)
    images = SquareImages(BetonImages(Path(beton)), int(size), default_device())
    put_on(trained.teacher.encoder, model, images)
    record = replace(read_record(find(Path(run))), config=asdict(replace(config, model=whole)))
    Path(folder).mkdir(exist_ok=True)
    write_model(Path(folder), record, model.cpu())


if __name__ == "__main__":
    main()
