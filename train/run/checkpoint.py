"""Checkpoints: folders that are either whole or not there.

runs/NAME/checkpoints/step_N/ holds model.safetensors, optimizer.bin, scaler.pt (with fp16) and
run.json: the step, the configuration, the data's identity, the machine, the checksums of the other
files, and a checksum of all this. A checkpoint is written as step_N.partial, flushed to the disk,
then renamed. `latest` is a symbolic link to the newest, `best` to the one with the highest score in
an evaluation.
"""

import hashlib
import json
import math
import os
import pickle
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer
from torch.utils import _pytree

from pipeline.errors import UserError, printable
from train.run.background import Background
from train.run.settings import Settings
from train.run.sound import check_weights
from train.run.text import read_text

_MODEL, _OPTIMIZER, _SCALER, _RECORD = "model.safetensors", "optimizer.bin", "scaler.pt", "run.json"
LARGEST_RECORD = 64 << 20
"""Bytes of run.json. Its longest part is the meter: 20 bytes for each prototype and process, so
2048 prototypes on 1024 processes take 42 MB."""


class Damaged(UserError):
    """No run can resume from this checkpoint, but perhaps from the one before it."""


@dataclass(frozen=True)
class Record:
    """What run.json says about a checkpoint."""

    step: int
    """Optimiser steps done. The position in the data and in the schedules follows from it."""
    config: dict[str, Any]
    """The run's configuration, see train.run.settings."""
    data: dict[str, Any]
    """The data's identity: the number of `images`, and their `fingerprint`."""
    seconds: float
    """Training time so far, over all resumes."""
    meter: list[list[float]]
    """For each process the sums for the next log line; [] if the trainer does not save them."""
    provenance: dict[str, Any]
    """Hardware, versions and command of the run that wrote it."""
    sha256: dict[str, str] = field(default_factory=dict)
    """Checksums of the other files by name. `write_record` fills them in."""
    checksum: str = ""
    """Of all the fields above. `write_record` fills it in."""


@dataclass(frozen=True)
class Retention:
    """Which checkpoints of a run to keep: the `newest`, the best, and also `parts` of them spread
    over the run, each the last one of an equal part of its `total_steps`.
    """

    newest: int
    parts: int
    total_steps: int

    def outdated(self, checkpoints: Sequence[Path], best: Path | None = None) -> list[Path]:
        """The `checkpoints` (all of the run, oldest first) that are not kept."""
        last_of = {self._part(step_of(one)): one for one in checkpoints} if self.parts else {}
        kept = {*checkpoints[-self.newest :], *last_of.values(), best}
        return [one for one in checkpoints if one not in kept]

    def _part(self, step: int) -> int:
        """The part of a step, counted from 1. A part includes its last step."""
        return -(-step * self.parts // self.total_steps)


def latest(run_dir: Path) -> Path | None:
    """The newest whole checkpoint of a run, or None."""
    return next(reversed(whole_ones(run_dir)), None)


def best(run_dir: Path) -> Path | None:
    """The one of `whole_ones` that `best` points to, or None."""
    link = run_dir / "checkpoints" / "best"
    return next((c for c in whole_ones(run_dir) if link.exists() and c.samefile(link)), None)


def mark_best(run_dir: Path, step: int | None) -> None:
    """Point `best` to the checkpoint of `step`, if it is whole. A link that leads nowhere is
    removed.
    """
    link = run_dir / "checkpoints" / "best"
    if step is not None and is_checkpoint(link.with_name(f"step_{step}")):
        _link(link, f"step_{step}")
    if link.is_symlink() and not link.exists():
        link.unlink()


def all_of(run_dir: Path) -> list[Path]:
    """The checkpoints of a run, oldest first, also those that lack a file."""
    folders = (run_dir / "checkpoints").glob("step_*")
    return sorted((p for p in folders if p.name.removeprefix("step_").isdecimal()), key=step_of)


def whole_ones(run_dir: Path) -> list[Path]:
    """The checkpoints of a run that look whole, oldest first."""
    return [path for path in all_of(run_dir) if is_checkpoint(path)]


def is_checkpoint(folder: Path) -> bool:
    """Whether `folder` is a checkpoint that was written to the end."""
    return (folder / _RECORD).is_file()


def find(path: Path) -> Path:
    """The checkpoint that `path` means: itself, a link to one, or a run's newest.

    Raises UserError.
    """
    if is_checkpoint(path):
        return path.resolve()
    if newest := latest(path):
        return newest.resolve()
    reason = "holds no whole checkpoint" if path.is_dir() else "no such checkpoint or run folder"
    raise UserError(f"{path}: {reason}")


def step_of(checkpoint: Path) -> int:
    """The N of step_N."""
    return int(checkpoint.name.removeprefix("step_"))


def set_aside(checkpoint: Path) -> Path:
    """Rename a damaged checkpoint, so that no run reads, counts or overwrites it."""
    aside = checkpoint.with_name(f"{checkpoint.name}.damaged")
    if aside.is_dir():
        shutil.rmtree(aside)
    checkpoint.replace(aside)
    if newest := latest(checkpoint.parent.parent):
        _link(checkpoint.parent / "latest", newest.name)
    mark_best(checkpoint.parent.parent, None)
    return aside


class Writer(Background):
    """Writes checkpoints on a thread, from a copy of the tensors, while training continues.

    The copy takes as much host memory as the checkpoint (pinned, for a GPU's tensors), and is
    reused. A failure shows in `problem`, and in the next `save` or `wait`.
    """

    def __init__(self, run_dir: Path, retention: Retention, timeout_s: float) -> None:
        super().__init__(f"{run_dir / 'checkpoints'}: writing", timeout_s)
        self._run_dir, self._retention = run_dir, retention
        self._copies: list[Tensor] = []

    def save(
        self,
        record: Record,
        model: nn.Module,
        optimizer: Optimizer,
        scaler: GradScaler | None,
        is_best: bool = False,
    ) -> None:
        """Begin to write checkpoints/step_N. The tensors may change as soon as this returns.

        Waits for the checkpoint before this one. Raises UserError if that one failed.
        """
        self.wait()
        state = {
            _MODEL: model.state_dict(),
            _OPTIMIZER: optimizer.state_dict(),
            _SCALER: scaler and scaler.state_dict(),
        }
        copy = self._copy(state)
        self.submit(lambda: write(self._run_dir, record, copy, self._retention, is_best))

    def _copy(self, state: dict[str, Any]) -> dict[str, Any]:
        leaves, structure = _pytree.tree_flatten(state)
        positions = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        sources = [leaves[i].detach() for i in positions]
        if [each.shape for each in self._copies] != [each.shape for each in sources]:
            self._copies = [
                torch.empty_like(each, device="cpu", pin_memory=each.is_cuda) for each in sources
            ]
        for copy, source in zip(self._copies, sources, strict=True):
            copy.copy_(source, non_blocking=True)
        if any(each.is_cuda for each in sources):
            torch.cuda.current_stream().synchronize()
        for i, copy in zip(positions, self._copies, strict=True):
            leaves[i] = copy
        return dict(_pytree.tree_unflatten(leaves, structure))


def write(
    run_dir: Path,
    record: Record,
    state: Mapping[str, Any],
    retention: Retention,
    is_best: bool = False,
) -> None:
    """Write checkpoints/step_N, point `latest` to it, also `best` if it is, and delete the outdated
    checkpoints.

    `state` holds the content of each file. If the process is killed at any moment, the earlier
    checkpoints remain, and at most a step_N.partial, which is never read. Raises UserError.
    """
    folder = run_dir / "checkpoints"
    partial, whole = folder / f"step_{record.step}.partial", folder / f"step_{record.step}"
    with _writing(partial, run_dir):
        for leftover in folder.glob("*.partial"):
            shutil.rmtree(leftover)
        folder.mkdir(exist_ok=True)  # without the run's folder, which may have been renamed
        partial.mkdir()
        weights = {name: value.contiguous() for name, value in state[_MODEL].items()}
        save_file(weights, partial / _MODEL, {"format": "pt"})
        for name in (_OPTIMIZER, _SCALER):
            if state[name] is not None:
                torch.save(state[name], partial / name)
        write_record(partial, record)
        for file in partial.iterdir():
            _flush(file)
        _flush(partial)
        curve = run_dir / "metrics.jsonl"
        if curve.exists():  # the curve on the disk must reach as far as the checkpoint
            _flush(curve)
        if whole.exists():  # damaged: the run did not resume from it
            _discard(whole)
        partial.replace(whole)
        _link(folder / "latest", whole.name)
        if is_best:
            mark_best(run_dir, record.step)
        _flush(folder)
        _flush(run_dir)
        for old in retention.outdated(whole_ones(run_dir), best(run_dir)):
            _discard(old)


def write_record(folder: Path, record: Record) -> None:
    """Write run.json beside the other files of a checkpoint, with its checksums."""
    files = [file for file in folder.iterdir() if file.name != _RECORD]
    record = replace(record, sha256={file.name: _sha256(file) for file in files})
    read_back = msgspec.convert(json.loads(json.dumps(asdict(record))), Record)
    record = replace(record, checksum=_checksum(read_back))
    (folder / _RECORD).write_text(json.dumps(asdict(record), indent=1) + "\n")


def write_model(run_dir: Path, record: Record, model: nn.Module) -> None:
    """Write checkpoints/step_N of a trained model; no run can resume from it. Raises UserError."""
    state = {_MODEL: model.state_dict(), _OPTIMIZER: None, _SCALER: None}
    write(run_dir, record, state, Retention(newest=1, parts=0, total_steps=1))


def restore(
    checkpoint: Path,
    record: Record,
    model: nn.Module,
    optimizer: Optimizer,
    scaler: GradScaler | None,
) -> None:
    """Load weights, optimiser and loss scale of a checkpoint with that record.

    Raises Damaged, and then has changed nothing.
    """
    for name in [_MODEL, _OPTIMIZER] + ([_SCALER] if scaler else []):
        if not (checkpoint / name).is_file():
            raise Damaged(f"{checkpoint}: {name} is missing, so the run cannot resume from it")
        _check_content(checkpoint / name, record)
    weights = _read_weights(checkpoint, model)
    with _reading(checkpoint / _OPTIMIZER):
        momenta = torch.load(checkpoint / _OPTIMIZER, map_location="cpu", weights_only=True)
        _check_optimizer(momenta, optimizer)
    if scaler:
        with _reading(checkpoint / _SCALER):
            scale = torch.load(checkpoint / _SCALER, weights_only=True)
            scaler.load_state_dict(scale)
    model.load_state_dict(weights)
    optimizer.load_state_dict(momenta)


def read_record(checkpoint: Path, settings: Settings[Any]) -> Record:
    """run.json of a checkpoint; `settings` reads its configuration. Raises Damaged."""
    path = checkpoint / _RECORD
    with _reading(path):
        if not path.is_file():
            raise FileNotFoundError
        content = json.loads(read_text(path, LARGEST_RECORD))
        if isinstance(content, dict) and not content.get("checksum"):
            raise Damaged(
                f"{path}: no checksum: an earlier version of slotstream wrote it, which can read "
                "it, or it is damaged"
            )
        record = msgspec.convert(content, Record)
        _check_record(record, checkpoint, settings)
        return record


def load_weights(checkpoint: Path, record: Record, model: nn.Module) -> None:
    """Load all weights of a checkpoint with that record. Raises Damaged."""
    _check_content(checkpoint / _MODEL, record)
    model.load_state_dict(_read_weights(checkpoint, model))


def _read_weights(checkpoint: Path, model: nn.Module) -> dict[str, Tensor]:
    with _reading(checkpoint / _MODEL):
        weights = load_file(checkpoint / _MODEL)
        check_weights(weights, model.state_dict())
        return weights


@contextmanager
def _writing(partial: Path, run_dir: Path) -> Iterator[None]:
    """After a failure (a full disk, for example) the earlier checkpoints remain, `partial` is
    deleted, and a UserError names the reason in one line.
    """
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
    """Turn any error of a missing, damaged or unsuitable file into one line that names it."""
    try:
        yield
    except Damaged:
        raise
    except UserError as error:  # it names the file
        raise Damaged(str(error)) from None
    except MemoryError:
        raise
    except Exception as error:  # a damaged file makes unpicklers raise almost anything
        if isinstance(error, FileNotFoundError):
            raise Damaged(f"{path}: no such file") from None
        is_pickle = isinstance(error, pickle.UnpicklingError)  # torch's own text has paragraphs
        reason = "its pickle cannot be read" if is_pickle else " ".join(str(error).split())[:200]
        raise Damaged(f"{path}: damaged, or of another model ({printable(reason)})") from None


def _check_record(record: Record, checkpoint: Path, settings: Settings[Any]) -> None:
    """Raises ValueError."""
    if record.checksum != _checksum(record):
        raise ValueError("its content has changed since it was written")
    step = checkpoint.name.removeprefix("step_")
    if record.step < 0 or (step.isdecimal() and int(step) != record.step):
        raise ValueError(f"it says that its step is {record.step}")
    identity = [type(record.data.get(name)) for name in ("images", "fingerprint")]
    if identity != [int, str]:
        raise ValueError("it does not name its data")
    numbers = [record.seconds, *(value for row in record.meter for value in row)]
    if len({len(row) for row in record.meter}) > 1 or not all(map(math.isfinite, numbers)):
        raise ValueError("its sums are no numbers")
    try:
        settings.from_dict(record.config)
    except UserError as error:
        raise ValueError(str(error)) from None


def _check_content(file: Path, record: Record) -> None:
    """Raises Damaged unless `file` has the checksum in `record`."""
    with _reading(file):
        found = _sha256(file)
        if file.name not in record.sha256:
            raise ValueError(f"{_RECORD} has no checksum of it")
        if found != record.sha256[file.name]:
            raise ValueError("its content has changed since it was written")


def _checksum(record: Record) -> str:
    """Of all fields but the checksum itself, whatever the spaces in the file."""
    content = asdict(replace(record, checksum=""))
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _check_optimizer(saved: Mapping[str, Any], optimizer: Optimizer) -> None:
    """Raises ValueError unless `saved` has as many weights as `optimizer`, and each momentum the
    shape of its weight; KeyError or TypeError if it is no optimiser's state.
    """
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    if len(numbers) != len(weights):
        raise ValueError(f"it holds {len(numbers)} weights, not {len(weights)}")
    for number, weight in zip(numbers, weights, strict=True):
        for value in saved["state"].get(number, {}).values():
            if isinstance(value, Tensor) and value.ndim and value.shape != weight.shape:
                raise ValueError(f"a momentum has shape {list(value.shape)}")


def _discard(whole: Path) -> None:
    """Delete a checkpoint. If the process is killed meanwhile, the rest does not look whole."""
    gone = whole.with_name(f"{whole.name}.old.partial")
    whole.replace(gone)
    shutil.rmtree(gone)


def _link(link: Path, target: str) -> None:
    """Point `link` to `target` in one atomic step."""
    beside = link.with_name(f"{link.name}.partial_link")
    beside.unlink(missing_ok=True)
    beside.symlink_to(target)
    beside.replace(link)


def _flush(path: Path) -> None:
    """Write a file, or the entries of a folder, through to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
