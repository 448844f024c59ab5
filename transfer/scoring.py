"""Scores a model: while it trains, at the end, or from a checkpoint."""

from collections.abc import Callable, Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from pipeline.errors import UserError
from train.run import checkpoint
from train.run.cli import check_writable
from train.run.ends import naming
from train.run.launch import launch
from train.run.provenance import write_json
from train.run.settings import Settings
from train.run.watchdog import Watchdog
from transfer import statistics
from transfer.config import Config, TransferConfig, without_weights
from transfer.examples import Order, batches
from transfer.predictions import FOLDER, new_predictions
from transfer.result import RESULT, result, summary
from transfer.step import beat_in_forward, place, seed_step
from transfer.task import Row, Task

TIMEOUT_MINUTES = 60.0
"""How long a process waits for the others, which may evaluate, and for the disk."""


def score(
    task: Task,
    config: TransferConfig,
    accelerator: Accelerator,
    order: Order,
    step: int,
    predictions: Path | None = None,
) -> list[Row]:
    """Evaluate the task's model after `step` steps. With `optim.precise_bn`, BatchNorm uses the
    statistics of that many next batches. `predictions` becomes a folder with what the model says.
    Raises UserError.
    """
    model = task.model
    statistics.share(model)
    count, workers = config.optim.precise_bn, config.efficiency.workers

    def forwards() -> Iterator[Any]:
        with batches(task, order, step, step + count, workers, accelerator) as ahead:
            for number, batch in enumerate(ahead, start=step):
                seed_step(config.optim.seed, number, accelerator.process_index)
                yield model(batch)

    def evaluated() -> list[Row]:
        model.eval()
        try:
            with (
                torch.no_grad(),
                accelerator.autocast(),
                new_predictions(predictions, accelerator) as folder,
            ):
                return task.evaluate(model, accelerator, folder)
        finally:
            model.train()

    if not count:
        return evaluated()
    with statistics.measured(model, forwards()):
        statistics.share(model)
        return evaluated()


def evaluation(
    config: Config,
    build_task: Callable[[Config], Task],
    settings: Settings[Config],
    origin: Path,
    out: Path | None = None,
) -> Callable[[], None]:
    """Load and check everything; return a function that scores the checkpoint `origin`.

    This function writes nothing but `out`, result.json without the cost, and with
    log.predictions the run's folder of predictions. Both raise UserError, and the function also
    LostProcess.
    """
    predictions = origin.parents[1] / FOLDER if config.log.predictions else None
    if predictions:
        check_writable("--log.predictions", predictions / "1")
    if out:
        check_writable("--json", out, origin.parents[1] / RESULT)
    record = checkpoint.read_record(origin, settings)
    accelerator = launch(origin, config.efficiency.precision, (), TIMEOUT_MINUTES)
    torch.manual_seed(config.optim.seed)
    task = build_task(without_weights(config))
    check_data(origin, record.data, task, classes_alone=not config.optim.precise_bn)
    checkpoint.load_weights(origin, record, task.model)
    accelerator.prepare(place(task.model, config, accelerator).train())
    watchdog = Watchdog(60 * TIMEOUT_MINUTES, str(origin))
    beat_in_forward(task.model, watchdog)
    rank, world = accelerator.process_index, accelerator.num_processes
    order = Order(len(task), config.optim, rank, world)

    def evaluate() -> None:
        with watchdog, naming(str(origin)):
            rows = score(task, config, accelerator, order, record.step, predictions)
        content = result(task, config, record.provenance["init"], record.step, rows)
        if accelerator.is_main_process:
            print(f"{origin}: {summary(rows)}")
            if out:
                write_json(out, {**content, "checkpoint": str(origin)})

    return evaluate


def check_data(
    origin: Path, trained_on: dict[str, Any], task: Task, *, classes_alone: bool = False
) -> None:
    """Raises UserError unless the task has the training set that the checkpoint `origin` was
    `trained_on`; with `classes_alone`, unless it has the same classes.
    """
    before, now = (data.get("classes", []) for data in (trained_on, task.data))
    if before != now:
        pairs = zip_longest(before, now, fillvalue="none")
        number, (old, new) = next((n, p) for n, p in enumerate(pairs, 1) if p[0] != p[1])
        raise UserError(
            f"data: {len(now)} classes, but {origin} was trained on {len(before)} others (the first"
            f" that differs is number {number}: {new}; it was {old})"
        )
    if not classes_alone and trained_on != task.data:
        raise UserError(
            f"data: the training set is not what {origin} was trained on"
            f" ({_describe(task.data)}; it was {_describe(trained_on)})"
        )


def _describe(data: dict[str, Any]) -> str:
    return f"{data['dataset']}, {data['images']} images, fingerprint {data['fingerprint'][:12]}"
