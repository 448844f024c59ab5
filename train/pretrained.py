"""Load a pre-trained SlotCon, the configuration of its run, and the record of a checkpoint."""

from pathlib import Path

from model import SlotCon
from train.config import SETTINGS, RunConfig
from train.run import checkpoint
from train.run.checkpoint import Record, find, load_weights


def read_record(folder: Path) -> Record:
    """run.json of a checkpoint of pre-training. Raises Damaged."""
    return checkpoint.read_record(folder, SETTINGS)


def load_model(path: Path | str) -> tuple[SlotCon, RunConfig]:
    """The trained model, on the CPU in eval mode, and the configuration of its run.

    `path` is a checkpoint (step_N or `latest`) or a run's folder. Raises UserError if anything is
    missing or damaged, or if weights and configuration do not fit together.
    """
    folder = find(Path(path))
    record = read_record(folder)
    config = SETTINGS.from_dict(record.config)
    model = SlotCon(config.model)
    load_weights(folder, record, model)
    return model.eval(), config
