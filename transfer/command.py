"""What both transfer commands share."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from train.run.cli import CommandParser
from train.run.command import EXIT_CODES, run_training
from train.run.ends import naming
from train.run.settings import RESUME, Settings
from train.run.signals import StopSignals
from transfer.config import Config
from transfer.task import Task

_OPTIONS = {
    "resume": RESUME,
    "evaluate": (
        "PATH",
        "Score this checkpoint, or the newest of this run, instead of training. It brings its "
        "configuration; --config and the values below change it.",
    ),
    "json": ("FILE", "With --evaluate: write the scores to this file."),
}
_MOVABLE = (
    "data.root",
    "data.train_images",
    "data.train_labels",
    "data.val_images",
    "data.val_labels",
)
"""The paths of the data. They may change, because a fingerprint identifies the data."""


def settings_of(
    kind: type[Config], prog: str = "", description: str = "", examples: str = ""
) -> Settings[Config]:
    """How to read a task's configurations, and which of its settings a resumed run keeps."""
    return Settings(
        kind,
        prog=f"python -m {prog}",
        description=description,
        epilog=f"{examples}\n\n{EXIT_CODES}",
        options=_OPTIONS,
        fixed=("data.", "init.", "model.", "augment.", "optim."),
        free=("optim.max_steps", *_MOVABLE),
    )


def run_task(
    config_class: type[Config],
    build_task: Callable[[Config], Task],
    prog: str,
    description: str,
    examples: str,
    argv: list[str] | None = None,
) -> None:
    """Read the command line, build the task, train or evaluate. Bad input and every other early end
    of a run end the process, see --help.

    Each process calls `build_task` once, after seeding torch's generators with optim.seed.
    """
    settings = settings_of(config_class, prog, description, examples)

    def prepare(signals: StopSignals) -> Callable[[], None]:
        arguments = sys.argv[1:] if argv is None else argv
        evaluated, trained_with = _evaluated(arguments, settings)
        if evaluated:  # writes into a run only if asked to
            trained_with = {**trained_with, "log": {**trained_with["log"], "predictions": False}}
        config, options = settings.load(arguments, trained_with)
        out = Path(options["json"]) if options["json"] else None
        if options["evaluate"] and not evaluated:
            raise UserError("evaluate: belongs on the command line, not in a --config file")
        if evaluated and options["resume"]:
            raise UserError("--resume is for training, --evaluate for scoring: give one of them")
        if out and not evaluated:
            raise UserError("--json is for --evaluate: a run writes result.json to its folder")
        from transfer.scoring import evaluation  # takes seconds, which --help does not wait for
        from transfer.trainer import Trainer

        with naming(config.name):
            if evaluated:
                return evaluation(config, build_task, settings, evaluated, out)
            return Trainer(config, build_task, settings, options["resume"], signals).train

    run_training(prepare)


def _evaluated(argv: list[str], settings: Settings[Any]) -> tuple[Path | None, dict[str, Any]]:
    """The checkpoint that --evaluate names, and its configuration; None without it. Raises
    UserError.
    """
    parser = CommandParser(add_help=False)
    parser.add_argument("--evaluate", type=Path)
    path: Path | None = parser.parse_known_args(argv)[0].evaluate
    if path is None:
        return None, {}
    from train.run import checkpoint

    found = checkpoint.find(path)
    return found, checkpoint.read_record(found, settings).config
