"""Checkpoints without a run."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from model import ModelConfig, SlotCon
from train.config import DataConfig, RunConfig
from train.run.checkpoint import Record, write_record
from train.run.settings import to_dict


def write_checkpoint(folder: Path, model: SlotCon, config: ModelConfig) -> Path:
    """Write a checkpoint of `model` whose record says that its configuration is `config`."""
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors")
    run = to_dict(RunConfig(name="x", data=DataConfig("x"), model=config))
    data = {"images": 1, "fingerprint": ""}
    record = Record(step=1, config=run, data=data, seconds=0, meter=[], provenance={})
    write_record(folder, record)
    return folder


def rewrite_record(checkpoint: Path, **changes: Any) -> None:
    """Change values of run.json as one who also corrects its checksums."""
    content = json.loads((checkpoint / "run.json").read_text())
    (checkpoint / "run.json").unlink()  # it may be a link to another run's
    write_record(checkpoint, Record(**(content | changes)))
