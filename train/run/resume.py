"""The checkpoints that a run may resume from."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
from accelerate import Accelerator
from accelerate.utils import gather_object

from pipeline.errors import UserError
from train.run import checkpoint
from train.run.settings import Config, Settings


def candidates(
    config: Config, settings: Settings[Config], run_dir: Path, resume: str | None
) -> list[Path]:
    """The checkpoints to resume from: the first one, or the next if it is damaged, and so on.
    Empty for a new run. torchrun's restart of a run goes on with it, whatever `resume` is.

    Raises UserError instead of overwriting a run or mixing two.
    """
    newest = checkpoint.latest(run_dir)
    if newest and _is_restart(newest):
        resume = "auto"
    if resume is None and newest:
        raise UserError(
            f"{run_dir} already holds checkpoints, up to {newest.name}: "
            "continue with --resume auto, or give the new run another --name"
        )
    if resume is None:
        return []
    if resume == "auto":
        origins = checkpoint.all_of(run_dir)[::-1]
    else:
        origins = [checkpoint.find(Path(resume))]
        if newest and newest.resolve() != origins[0].resolve():
            raise UserError(
                f"{run_dir} holds {newest.name}, which is not the checkpoint to resume from "
                f"({origins[0]}): give the new run another --name, or delete the newer checkpoints"
            )
    for origin in origins:
        try:
            record = checkpoint.read_record(origin, settings)
        except checkpoint.Damaged:
            continue
        _check_same_science(config, settings, origin, record)
        break
    return origins


def _is_restart(newest: Path) -> bool:
    """Whether torchrun restarted its processes, and those before wrote the checkpoint `newest`: it
    is younger than torchrun itself. Older ones are of another launch, which was to be kept.
    """
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        return False
    launched = psutil.Process(os.getppid()).create_time()
    return newest.stat().st_mtime > launched


def restore_first_whole(
    origins: list[Path], restore: Callable[[Path], None], accelerator: Accelerator
) -> None:
    """Restore the first of `origins` that is whole on all processes. Renames the damaged ones
    before it, with a warning.

    `restore` loads one checkpoint. It raises UserError, or Damaged, and then has changed nothing.
    Raises UserError.
    """
    damaged: dict[Path, str] = {}
    for origin in origins:
        problem = ""
        try:
            restore(origin)
        except checkpoint.Damaged as error:
            problem = str(error)
        if not (problems := list(filter(None, gather_object([problem])))):
            break
        damaged[origin] = problems[0]
    else:
        raise UserError(next(iter(damaged.values())))
    for path, problem in damaged.items():
        if accelerator.is_main_process:
            aside = checkpoint.set_aside(path)
            message = f"warning: {problem}; it is now {aside.name}, resuming from {origin}"
            print(message, file=sys.stderr, flush=True)


def _check_same_science(
    config: Config, settings: Settings[Config], origin: Path, record: checkpoint.Record
) -> None:
    """Refuse settings that would mix two recipes in one curve."""
    for key, before, now in settings.changed(settings.from_dict(record.config), config):
        raise UserError(
            f"{key} was {before} in {origin} and is now {now}: a resumed run keeps every setting "
            "that changes its result; give the new run another --name"
        )
