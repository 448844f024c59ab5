"""Runs that end by SIGKILL, each in a process of its own, and their curves."""

import json
import os
import signal
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

from tests.helpers.forked import forkserver
from tests.helpers.training import TIMES
from train.run import checkpoint
from train.run.log import Journal
from train.run.run import Run

EVENTS: tuple[tuple[Any, str], ...] = (
    (Run, "advance"), (Run, "save"), (Journal, "write"), (checkpoint, "write"),
)  # fmt: skip


def killed(at: int, train: Callable[..., object], *arguments: Any) -> bool:
    """Call train(*arguments) in a process that kills itself at its event number `at`, counted from
    0: the begin or the end of a call in `EVENTS`. Returns whether the run came so far.
    """
    process = forkserver().Process(target=_train, args=(at, train, arguments))
    process.start()
    process.join(240)
    assert process.exitcode in (0, -signal.SIGKILL), process.exitcode
    return process.exitcode != 0


def _train(at: int, train: Callable[..., object], arguments: tuple[Any, ...]) -> None:
    numbers = count()

    def event() -> None:
        if next(numbers) == at:
            os.kill(os.getpid(), signal.SIGKILL)

    def noted(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            event()
            result = method(*args, **options)
            if isinstance(args[0], Run) and method.__name__ == "save":
                args[0].wait_for_disk()  # or the thread that writes would count at random
            event()
            return result

        return call

    for owner, name in EVENTS:
        setattr(owner, name, noted(getattr(owner, name)))
    train(*arguments)


def curve(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl of the run in this folder, without times."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]
