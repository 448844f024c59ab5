"""Checkpoints: directories that are either whole or not there.

runs/NAME/checkpoints/step_N/ holds what Accelerate saves (model.safetensors, optimizer.bin,
scaler.pt with fp16, random states) and run.json: the step, the configuration, the data's identity,
the machine. It is written as step_N.partial, flushed to the disk, then renamed; `latest` is a
symbolic link to the newest.
"""

import json
import os
import pickle
import shutil
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from model import SlotCon
from pipeline.errors import UserError
from train.config import RunConfig, from_dict

_MODEL, _OPTIMIZER, _SCALER, _RECORD = "model.safetensors", "optimizer.bin", "scaler.pt", "run.json"
_UNREADABLE = (
    OSError,
    RuntimeError,
    ValueError,
    KeyError,
    EOFError,
    TypeError,
    SafetensorError,
    pickle.UnpicklingError,
)


@dataclass(frozen=True)
class Record:
    """What run.json says beside the tensors."""

    step: int
    """Optimiser steps done; the position in the data and in the schedules follows from it."""
    config: dict[str, Any]
    """The run's configuration, see train.config.from_dict."""
    data: dict[str, Any]
    """The beton's identity: how many `images`, and its `fingerprint`."""
    seconds: float
    """Training time so far, over all resumes."""
    meter: list[list[float]]
    """For each process, the sums of the log line that is being averaged, see train.metrics.Meter.
    """
    provenance: dict[str, Any]
    """What wrote it: hardware, versions, command."""


def latest(run_dir: Path) -> Path | None:
    """The newest whole checkpoint of a run, or None."""
    steps = _steps(run_dir)
    return steps[-1] if steps else None


def find(path: Path) -> Path:
    """The checkpoint that `path` means: itself, a link to one, or a run's newest.

    Raises UserError.
    """
    if (path / _RECORD).is_file():
        return path.resolve()
    if found := latest(path):
        return found.resolve()
    reason = "holds no whole checkpoint" if path.is_dir() else "no such checkpoint or run folder"
    raise UserError(f"{path}: {reason}")


def step_of(checkpoint: Path) -> int:
    """The N of step_N."""
    return int(checkpoint.name.removeprefix("step_"))


def register(accelerator: Accelerator) -> None:
    """Let `accelerator` save the bare model: the same names for any number of processes."""

    def before_saving(models: list[nn.Module], weights: list[Any], folder: str) -> None:
        weights[:] = [OrderedDict(accelerator.unwrap_model(model).state_dict()) for model in models]

    def before_loading(models: list[nn.Module], folder: str) -> None:
        models[:] = [accelerator.unwrap_model(model) for model in models]

    accelerator.register_save_state_pre_hook(before_saving)
    accelerator.register_load_state_pre_hook(before_loading)


def save(accelerator: Accelerator, run_dir: Path, record: Record, keep: int) -> Path:
    """Write checkpoints/step_N, point `latest` to it and delete all but the newest `keep`.

    All processes call it. Killed at any moment, it leaves the checkpoints from before, and at most
    a step_N.partial that nobody reads. Raises UserError if it cannot be written.
    """
    folder = run_dir / "checkpoints"
    partial, whole = folder / f"step_{record.step}.partial", folder / f"step_{record.step}"
    with _writing(partial, run_dir):
        if accelerator.is_main_process:
            for leftover in folder.glob("*.partial"):
                shutil.rmtree(leftover)
            partial.mkdir(parents=True)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(partial))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            (partial / _RECORD).write_text(json.dumps(asdict(record), indent=1) + "\n")
            for file in partial.iterdir():
                _flush(file)
            _flush(partial)
            if whole.exists():  # a damaged one, or it would not have been made again
                _discard(whole)
            partial.replace(whole)
            _link(folder / "latest", whole.name)
            _flush(folder)
            for old in _steps(run_dir)[:-keep]:
                _discard(old)
    accelerator.wait_for_everyone()
    return whole


def restore(accelerator: Accelerator, checkpoint: Path) -> None:
    """Load model, optimiser, loss scale and random states.

    All processes call it. Raises UserError.
    """
    names = [_MODEL, _OPTIMIZER] + ([_SCALER] if accelerator.scaler is not None else [])
    for name in names:
        if not (checkpoint / name).is_file():
            raise UserError(f"{checkpoint}: {name} is missing, so the run cannot go on from it")
    with _reading(checkpoint):
        accelerator.load_state(str(checkpoint))


def read_record(checkpoint: Path) -> Record:
    """run.json of a checkpoint. Raises UserError."""
    with _reading(checkpoint / _RECORD):
        return Record(**json.loads((checkpoint / _RECORD).read_text()))


def load_model(path: Path | str) -> tuple[SlotCon, RunConfig]:
    """The trained model, on the CPU in eval mode, and the configuration of its run.

    `path` is a checkpoint (step_N or `latest`) or a run's folder. Raises UserError if anything is
    missing, damaged, or does not fit together.
    """
    checkpoint = find(Path(path))
    record = read_record(checkpoint)
    try:
        config = from_dict(record.config)
    except UserError as error:
        raise UserError(f"{checkpoint / _RECORD}: {error}") from None
    model = SlotCon(config.model)
    with _reading(checkpoint / _MODEL):
        model.load_state_dict(load_file(checkpoint / _MODEL))
    return model.eval(), config


@contextmanager
def _writing(partial: Path, run_dir: Path) -> Iterator[None]:
    """A full disk, say, leaves the checkpoints from before, room to go on, and one line."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        reason = " ".join(str(error).split())[:200]
        last = latest(run_dir) or "none"
        raise UserError(
            f"{partial}: cannot be written ({reason}); last good checkpoint: {last}"
        ) from error


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn whatever a missing, damaged or ill-fitting file raises into one line that names it."""
    try:
        yield
    except UserError:
        raise
    except _UNREADABLE as error:
        if isinstance(error, FileNotFoundError):
            raise UserError(f"{path}: no such file") from None
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{path}: damaged, or of another model ({reason}); "
            "delete that checkpoint to go on from the one before"
        ) from None


def _steps(run_dir: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    found = (run_dir / "checkpoints").glob("step_*")
    whole = [path for path in found if path.name.removeprefix("step_").isdecimal()]
    return sorted((path for path in whole if (path / _RECORD).is_file()), key=step_of)


def _discard(whole: Path) -> None:
    """Delete a checkpoint; half-deleted, it does not look whole."""
    gone = whole.with_name(f"{whole.name}.old.partial")
    whole.replace(gone)
    shutil.rmtree(gone)


def _link(link: Path, target: str) -> None:
    """Point `link` to `target` in one step."""
    beside = link.with_name(f"{link.name}.partial_link")
    beside.unlink(missing_ok=True)
    beside.symlink_to(target)
    beside.replace(link)


def _flush(path: Path) -> None:
    """Bring a file or a folder's entries to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
