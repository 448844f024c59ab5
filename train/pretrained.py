"""Load a pre-trained SlotCon, the configuration of its run, and the record of a checkpoint."""

from pathlib import Path

import torch

from model import SlotCon
from model.guide import Guide
from pipeline.errors import UserError
from train.config import SETTINGS, RunConfig
from train.run import checkpoint
from train.run.checkpoint import Record, find, load_weights


def read_record(folder: Path) -> Record:
    """run.json of a checkpoint of pre-training. Raises Damaged."""
    return checkpoint.read_record(folder, SETTINGS)


def build_model(config: RunConfig) -> SlotCon:
    """The model of a run, with new weights. Raises UserError for sizes that do not fit."""
    model, train, guide = config.model, config.train, None
    try:
        if train.teacher == "frozen":
            stages = train.teacher_stages or (model.stages,)
            arch = train.teacher_arch or model.arch
            seen = None if train.teacher_arch else model.image_stats  # those of the start itself
            with torch.random.fork_rng(devices=[]):  # its draws do not change the other weights
                factor = train.teacher_resolution
                guide = Guide(arch, stages, model.num_prototypes, factor, seen)
        return SlotCon(model, guide)
    except ValueError as error:
        raise UserError(f"model.{error}") from None


def load_model(path: Path | str) -> tuple[SlotCon, RunConfig]:
    """The trained model, on the CPU in eval mode, and the configuration of its run.

    `path` is a checkpoint (step_N or `latest`) or a run's folder. Raises UserError if anything is
    missing or damaged, or if weights and configuration do not fit together.
    """
    folder = find(Path(path))
    record = read_record(folder)
    config = SETTINGS.from_dict(record.config)
    model = build_model(config)
    load_weights(folder, record, model)
    return model.eval(), config
