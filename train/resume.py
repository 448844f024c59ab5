"""Which checkpoints a run may go on from."""

from pathlib import Path

from pipeline.errors import UserError
from train import checkpoint
from train.config import RunConfig, flatten, from_dict, to_dict

# What a resumed run may not change, for it would be another run; nor may its data.
_FIXED = ("data.order", "data.window_gb", "views.", "model.", "train.")
_FREE = ("train.max_steps",)


def origins(config: RunConfig, run_dir: Path, resume: str | None) -> list[Path]:
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
            record = checkpoint.read_record(origin)
        except checkpoint.Damaged:
            continue
        _check_same_science(config, origin, record)
        break
    return found


def _check_same_science(config: RunConfig, origin: Path, record: checkpoint.Record) -> None:
    """Refuse settings that would make a curve of two recipes."""
    before = flatten(to_dict(from_dict(record.config)))
    for key, value in flatten(to_dict(config)).items():
        fixed = key.startswith(_FIXED) and key not in _FREE
        if fixed and value != before[key]:
            raise UserError(
                f"{key} was {before[key]} in {origin} and is now {value}: a resumed run keeps its "
                "views, model and train settings; give the new run another --name"
            )
