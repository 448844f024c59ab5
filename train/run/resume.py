"""Which checkpoints a run may go on from."""

import sys
from collections.abc import Callable
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import gather_object

from pipeline.errors import UserError
from train.run import checkpoint
from train.run.settings import Config, Settings


def origins(
    config: Config, settings: Settings[Config], run_dir: Path, resume: str | None
) -> list[Path]:
    """The checkpoints to go on from: the first, or the next one if that is damaged, and so on.
    Empty for a new run.

    Raises UserError rather than overwrite a run or mix two.
    """
    newest = checkpoint.latest(run_dir)
    if resume is None and newest:
        raise UserError(
            f"{run_dir} already holds checkpoints, up to {newest.name}: "
            "go on with --resume auto, or give the new run another --name"
        )
    if resume is None:
        return []
    if resume == "auto":
        found = checkpoint.all_of(run_dir)[::-1]
    else:
        found = [checkpoint.find(Path(resume))]
        if newest and newest.resolve() != found[0].resolve():
            raise UserError(
                f"{run_dir} holds {newest.name}, which is not the checkpoint to resume from "
                f"({found[0]}): give the new run another --name, or delete the newer checkpoints"
            )
    for origin in found:
        try:
            record = checkpoint.read_record(origin, settings)
        except checkpoint.Damaged:
            continue
        _check_same_science(config, settings, origin, record)
        break
    return found


def go_on(
    candidates: list[Path], restore: Callable[[Path], None], accelerator: Accelerator
) -> None:
    """Go on from the first of `candidates` that is whole on all processes; those before it are set
    aside. `restore` loads one; it raises Damaged and then has changed nothing, or UserError.

    Raises UserError.
    """
    damaged: dict[Path, str] = {}
    for origin in candidates:
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
            message = f"warning: {problem}; it is now {aside.name}, going on from {origin}"
            print(message, file=sys.stderr, flush=True)


def _check_same_science(
    config: Config, settings: Settings[Config], origin: Path, record: checkpoint.Record
) -> None:
    """Refuse settings that would make a curve of two recipes."""
    for key, before, now in settings.changed(settings.from_dict(record.config), config):
        raise UserError(
            f"{key} was {before} in {origin} and is now {now}: a resumed run keeps what decides its"
            " result; give the new run another --name"
        )
