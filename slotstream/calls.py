"""Commands as functions: packing, pre-training, evaluation. Their options are those of the commands
`slotstream pack`, `train` and `evaluate`, read by the same parsers.
"""

import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from train.run.cli import as_function


def pack(source: Path | str, out: Path | str, kind: str = "folder", **options: Any) -> Path:
    """Pack the images of `source` into the beton `out`. Returns its path.

    Args:
        source: a folder with images; of another `kind`, that data set's folder.
        out: the file to write. It appears when it is complete; a call that was interrupted
            continues.
        kind: a SOURCE of `slotstream pack --help`: coco, imagenet, …; "sample" writes generated
            scenes with label maps into `source`, and packs them.
        options: those of the command: max_side=500, tiles=True, on_error="skip".

    Raises:
        UserError: for bad images, a bad option, a file that exists (force=True replaces it).

    >>> import slotstream
    >>> slotstream.pack("scenes", "sample.beton", kind="sample", count=8, val_count=2, workers=1)
    wrote sample.beton: 23 images...
    PosixPath('sample.beton')
    """
    from tools import build_dataset

    with as_function():
        where = {"root": source, "out": out}
        build_dataset.main([kind, *_words({**where, **options})])
    return Path(out)


def pretrain(
    data: Path | str,
    out: Path | str,
    config: Path | str = "coco_r50_800ep",
    resume: str | None = None,
    **overrides: Any,
) -> Path:
    """Pre-train SlotCon in this process. Returns `out`, which `load` and `evaluate` take.

    Args:
        data: a beton, or a folder of images.
        out: the run's folder, runs/NAME.
        config: a YAML file, or the name of one that comes with slotstream.
        resume: "auto" continues the run in `out` if there is one; or a checkpoint.
        overrides: values of the configuration, by section: train={"epochs": 2}.

    Raises:
        UserError: for bad input, a bad image, a full disk.
        train.run.ends.EarlyEnd: the run diverged, or was stopped by a signal.

    >>> import slotstream
    >>> short = {"max_steps": 1, "batch_size": 4}
    >>> run = slotstream.pretrain("sample.beton", "runs/one", "scenes_cpu", train=short)
    runs/one: ...
    >>> run.joinpath("checkpoints/latest").exists()
    True
    """
    from train.config import load_config
    from train.pretrain import open_evaluation
    from train.run.ends import Plateau, naming
    from train.run.settings import flatten
    from train.run.signals import StopSignals
    from train.trainer import Trainer

    out = Path(out)
    own = {"name": out.name, "log.dir": out.parent, "data.path": data}
    values = flatten(overrides) | own | ({"resume": resume} if resume else {})
    pairs = [word for name, value in values.items() for word in (f"--{name}", _yaml(value))]
    settings, resumed = load_config(["--config", str(config), *pairs])
    with StopSignals() as signals, naming(settings.name):
        try:
            Trainer(settings, resumed, signals, open_evaluation).train()
        except Plateau as end:  # as it was told to
            print(end)
    return out


def evaluate(checkpoint: Path | str, **options: Any) -> list[dict[str, Any]]:
    """Score a run's prototypes against label maps, as `slotstream evaluate`. Returns the rows of
    its --json file: each has a metric, its value in 0..1, and what was scored how.

    Args:
        checkpoint: a run's folder, or a checkpoint.
        options: those of the command: images="images", labels="labels"; or dataset="coco-stuff",
            root="data/coco"; features=["teacher"], size=320, …

    Raises:
        UserError: for bad input.

    >>> import slotstream
    >>> val = {"images": "scenes/val/images", "labels": "scenes/val/labels", "size": 64}
    >>> rows = slotstream.evaluate("runs/one", **val)
    trained ... mIoU ...
    >>> {row["metric"] for row in rows} >= {"miou", "pixel_accuracy"}
    True
    """
    from evaluation import unsupervised_segmentation

    with tempfile.TemporaryDirectory() as folder, as_function():
        values = {"checkpoint": checkpoint, "json": Path(folder, "eval.json"), **options}
        unsupervised_segmentation.main([*_words(values)])
        rows: list[dict[str, Any]] = json.loads(Path(values["json"]).read_text())["results"]
    return rows


def _words(options: Mapping[str, Any]) -> Iterator[str]:
    """Options of a command line: max_side=500 as --max-side=500; True as the option alone."""
    for name, value in options.items():
        option = f"--{name.replace('_', '-')}"
        if value is True:
            yield option
        elif isinstance(value, list | tuple):
            yield from (option, *map(str, value))
        elif value is not None and value is not False:
            yield f"{option}={value}"


def _yaml(value: Any) -> str:
    return str(value) if isinstance(value, str | Path) else json.dumps(value)
