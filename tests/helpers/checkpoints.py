"""Checkpoints without a run."""

import json
from dataclasses import asdict
from pathlib import Path

from safetensors.torch import save_file

from model import ModelConfig, SlotCon
from train.config import DataConfig, RunConfig
from train.run.checkpoint import Record
from train.run.settings import to_dict


def write_checkpoint(folder: Path, model: SlotCon, config: ModelConfig) -> Path:
    """Write a checkpoint of `model` whose record says that its configuration is `config`."""
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors")
    run = to_dict(RunConfig(name="x", data=DataConfig("x"), model=config))
    data = {"images": 1, "fingerprint": ""}
    record = Record(step=1, config=run, data=data, seconds=0, meter=[], provenance={})
    (folder / "run.json").write_text(json.dumps(asdict(record)))
    return folder
