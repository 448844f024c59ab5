"""Put transfer results beside those that Wen et al. publish: tables 2, 3, 4 and 7 of the paper.

A run has a place there if its configuration is that of the column (configs/transfer), but for
seed, place of the data and weights it starts from; if it has learnt from the whole training set and
was scored on the whole other one; and if its weights were trained on the table's data, which is
told by name and number of images. All others follow in a table of their own, with what differs.
"""

import argparse
import json
import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.errors import UserError, printable
from train.run.cli import CommandParser, check_writable, run
from train.run.provenance import provenance, read_json, write_bytes, write_json
from train.run.settings import Settings, flatten, to_dict
from transfer.command import settings_of
from transfer.detection.config import DetectionConfig
from transfer.published import (
    LABELS,
    PRETRAINING,
    RECIPES,
    TABLES,
    Column,
    Recipe,
    Table,
)
from transfer.scoring import RESULT
from transfer.segmentation.config import SegmentationConfig

EXAMPLES = """examples:
  python -m transfer.table runs/coco_1x_* runs/voc_* runs/city_* runs/ade_* --markdown table.md
  python -m transfer.table runs/camvid_slotcon/result.json --json table.json
  python -m transfer.table                                        # what is published
"""
CONFIGS = Path(__file__).parents[1] / "configs" / "transfer"
FREE = (
    "name", "init.weights", "init.branch", "data.root", "data.annotations", "data.images",
    "data.train_images", "data.train_labels", "data.val_images", "data.val_labels", "optim.seed",
    "optim.max_steps", "efficiency.", "log.",
)  # fmt: skip
"""What the keys begin with of settings that may differ from a recipe's: they do not change what is
learnt, or show in the result.
"""
TOLERANCE = 0.02
"""Relative difference in a set's number of images that passes, for files that have gone missing."""
SHOWN = 4
"""Differences that a line names."""
HEAD = ("Method", "Data", "Epochs")
ABOUT_FILES = ("slotstream", "format", "imported", "data_license")
"""What weights say that does not tell them from others: the same ones may lie in several files."""


@dataclass(frozen=True)
class Start:
    """What a run's backbone was: the left part of a row."""

    method: str
    data: str
    """A name in PRETRAINING, LABELS, empty for no pre-training; else what the weights say."""
    epochs: str
    facts: tuple[tuple[str, str], ...] = ()
    """All that the weights say of how they were made: others are another backbone."""


@dataclass(frozen=True)
class Result:
    """One run's."""

    file: Path
    name: str
    start: Start
    recipe: Recipe | None
    """That of its task and data set, if there is one."""
    differences: tuple[str, ...]
    """From the recipe, or why there is nothing to compare."""
    seed: int
    metrics: dict[str, float]
    """In percent, over all classes."""
    dataset: str
    scored: str
    """Fingerprint of the images that it was scored on."""

    def fits(self, table: Table) -> bool:
        """It has a place there."""
        made_so = any(column.recipe == self.recipe for column in table.columns)
        return made_so and not self.differences and self.start.data in table.data

    @property
    def placed(self) -> bool:
        """It has a place in one of the paper's tables."""
        return any(self.fits(table) for table in TABLES)


class Line(NamedTuple):
    """A row of a table as it is shown."""

    start: tuple[str, str, str]
    figures: tuple[str, ...]
    own: bool


def main() -> None:
    args = parse_args()
    files = dict.fromkeys(result_file(path) for path in args.runs)
    for option, path in (("--json", args.json), ("--markdown", args.markdown)):
        if path:
            check_writable(option, path)
            if path.resolve() in files:
                raise UserError(f"{option} {path}: is a result to read: give the name of another")
    results = [read_result(file) for file in files]
    check_seeds(results)
    if args.json:
        write_json(args.json, {**provenance(), **as_json(results)})
    if args.markdown:
        write_bytes(args.markdown, (as_text(results, markdown) + "\n").encode())
    print(as_text(results, aligned))


def parse_args() -> argparse.Namespace:
    parser = CommandParser(
        prog="python -m transfer.table", description=__doc__, epilog=EXAMPLES, allow_abbrev=False
    )
    parser.add_argument(
        "runs", nargs="*", type=Path, help="folders of runs, or their result.json files"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="all of it, for programs")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="the tables, for a page")
    return parser.parse_args()


def result_file(path: Path) -> Path:
    """A run's result.json, given itself or the run's folder: one path for one file."""
    return (path / RESULT if path.is_dir() else path).resolve()


def read_result(file: Path) -> Result:
    """What a run's result.json says, or that it has none yet. Raises UserError."""
    if not file.exists() and file.with_name("config.yaml").exists():
        why = f"has no {file.name}"
        return Result(file, file.parent.name, Start("", "", ""), None, (why,), 0, {}, "", "")
    content = read_json(file)
    try:
        dataset = content["dataset"]
        recipe = recipe_of(content["task"], dataset)
        metrics = {
            str(row["metric"]): 100 * float(row["value"])
            for row in content["results"]
            if "class" not in row
        }
        if not isinstance(dataset, str):
            raise TypeError(f"dataset {dataset!r}")
        for metric, value in metrics.items():
            if not 0 <= value <= 100:
                raise ValueError(f"{metric} is not in 0..1")
        return Result(
            file,
            str(content["name"]),
            start_of(content["init"]),
            recipe,
            tuple(differences(content, recipe)),
            int(content["config"]["optim"]["seed"]),
            metrics,
            dataset,
            str(content["scored"]["fingerprint"]) if recipe else "",
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{file}: not the result of a transfer ({error!r})") from None


def recipe_of(task: str, dataset: str) -> Recipe | None:
    """The recipe for this data set, if the paper has one."""
    return next((r for r in RECIPES if (r.task, r.dataset) == (task, dataset)), None)


def start_of(init: Mapping[str, Any]) -> Start:
    """What a result says of its backbone, as the left part of a row."""
    if init["kind"] == "random":
        return Start("random init.", "", "–")
    if init["kind"] == "supervised":
        return Start("supervised (torchvision)", LABELS, "90")
    about = {key: str(value) for key, value in init["metadata"].items()}
    about.setdefault("branch", str(init["branch"]))
    if "run" not in about:
        about["weights"] = str(init["weights"])
    name = about.get("run") or Path(init["weights"]).name
    method = f"{about.get('method', 'weights').partition(' (')[0]}: {name}"
    if about["branch"] != "teacher":
        method += f", {about['branch']}"
    data = about.get("data", "not stated")
    found = pretraining(data, number(about, "data_images"))
    facts = settings_in(about.pop("config", "{}")) | about
    known = tuple(sorted(item for item in facts.items() if item[0] not in ABOUT_FILES))
    return Start(method, found or data, epochs_of(about), known)


def settings_in(text: str) -> dict[str, str]:
    """What weights say under "config", by key; others keep text of their own there, which is one
    fact.
    """
    try:
        content = json.loads(text)
    except ValueError:
        content = None
    if not isinstance(content, dict):
        return {"config": text}
    return {key: str(value) for key, value in flatten(content).items()}


def epochs_of(about: Mapping[str, str]) -> str:
    """Of a pre-training, as its weights say: "800", "400 of 800" if it has not come to the end of
    its schedule, "? of 800" where steps are counted and cannot be converted.
    """
    planned = about.get("epochs", "?")
    if "step" not in about or not planned.isdecimal():
        return planned
    step, batch, images = (number(about, key) for key in ("step", "batch_size", "data_images"))
    if not step or not 0 < batch <= images:
        return f"? of {planned}"
    done = round(step / (images // batch))  # an epoch's last, partial batch is dropped
    return planned if done >= int(planned) else f"{done} of {planned}"


def number(about: Mapping[str, str], key: str) -> int:
    """What the weights say, 0 if they do not."""
    text = about.get(key, "")
    return int(text) if text.isdecimal() else 0


def pretraining(data: str, count: int) -> str | None:
    """Which of PRETRAINING a file of that name and number of images (0: not known) is."""
    stem = re.sub(r"[^a-z0-9+]", "", data.lower().removesuffix(".beton"))
    for name, files, sizes in PRETRAINING:
        if stem in files and (not count or any(near(count, size) for size in sizes)):
            return name
    return None


def near(count: int, expected: int) -> bool:
    return abs(count - expected) <= TOLERANCE * expected


def differences(content: Mapping[str, Any], recipe: Recipe | None) -> Iterable[str]:
    """What a run did otherwise than the recipe, each as "key is, not was"; without one, that."""
    if not recipe:
        yield f"the paper has no {content['dataset']}"
        return
    own = flatten(content["config"])
    for key, value in published_settings(recipe).items():
        if not key.startswith(FREE) and own.get(key) != value:
            yield f"{key} {own.get(key)}, not {value}"
    if content["step"] < content["schedule"]["steps"]:
        yield f"ended at step {content['step']:,} of {content['schedule']['steps']:,}"
    if not near(content["images"], recipe.images):
        yield f"{content['images']:,} training images, not {recipe.images:,}"
    if not near(content["scored"]["images"], recipe.scored):
        yield f"scored on {content['scored']['images']:,} images, not {recipe.scored:,}"


def check_seeds(results: Iterable[Result]) -> None:
    """Refuse two results that would be averaged and are of one seed, or of two sets of scored
    images. Raises UserError.
    """
    seen: dict[Any, Path] = {}
    first: dict[Any, Result] = {}
    for result in results:
        if not result.placed:
            continue
        key = (result.start, result.recipe, result.seed)
        if key in seen:
            raise UserError(
                f"{result.file}: the backbone, recipe and optim.seed of {seen[key]}: give one of "
                "them, for a deviation is over seeds"
            )
        seen[key] = result.file
        other = first.setdefault(key[:2], result)
        if result.scored != other.scored:
            raise UserError(
                f"{result.file}: scored on other images than {other.file}, another seed of the same"
            )


@cache
def published_settings(recipe: Recipe) -> dict[str, Any]:
    """The settings of the file that makes the recipe's column, by key. Raises UserError."""
    kinds: dict[str, Settings[Any]] = {
        "detection": settings_of(DetectionConfig),
        "segmentation": settings_of(SegmentationConfig),
    }
    file = CONFIGS / f"{recipe.config}.yaml"
    config, _ = kinds[recipe.task].load(["--config", str(file), "--data.root", "."])
    return flatten(to_dict(config))


def lines_of(table: Table, results: Sequence[Result]) -> list[Line]:
    """The published rows, then the user's: one for each backbone, over its seeds."""
    lines = [
        Line(
            (row.method, row.data or "–", str(row.epochs or "–")),
            tuple("–" if figure is None else f"{figure:.1f}" for figure in row.figures),
            False,
        )
        for row in table.rows
    ]
    groups: dict[Start, list[Result]] = defaultdict(list)
    for result in results:
        if result.fits(table):
            groups[result.start].append(result)
    for start, group in groups.items():
        figures = tuple(figure(column, group) for column in table.columns)
        method = ", ".join((f"* {start.method}", *distinction(start, groups)))
        lines.append(Line((method, start.data or "–", start.epochs), figures, True))
    return lines


def distinction(start: Start, others: Iterable[Start]) -> list[str]:
    """What sets a backbone apart from those whose rows would look the same: ["step 50000"]."""
    alike = [set(other.facts) for other in others if replace(other, facts=start.facts) == start]
    common = set.intersection(*alike)
    own = [(key, value) for key, value in start.facts if (key, value) not in common]
    # Paths differ anywhere, digests from the beginning.
    return [f"{key} {value if key == 'weights' else value[:12]}" for key, value in own[:SHOWN]]


def figure(column: Column, results: Sequence[Result]) -> str:
    """A column's figure of one backbone: the mean, ± the deviation where there are seeds."""
    same = (result.metrics for result in results if result.recipe == column.recipe)
    return mean_and_deviation([m[column.metric] for m in same if column.metric in m])


def mean_and_deviation(values: Sequence[float]) -> str:
    """Percentages over seeds: "20.4 ± 0.9", "20.4" of a single one, nothing of none."""
    if not values:
        return ""
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation}"


def others(results: Iterable[Result]) -> list[tuple[str, ...]]:
    """A line for each run without a place in the tables: what it is, its figures, what differs."""
    return [
        (
            result.name,
            result.start.method,
            result.dataset,
            "  ".join(
                f"{title} {result.metrics[metric]:.1f}"
                for title, metric in (("AP^b", "box_ap"), ("AP^m", "mask_ap"), ("mIoU", "miou"))
                if metric in result.metrics
            ),
            because(result),
        )
        for result in results
        if not result.placed
    ]


def because(result: Result) -> str:
    """Why a result has no place in the tables."""
    reasons = list(result.differences)
    if not any(result.start.data in table.data for table in TABLES) or not reasons:
        reasons.append(f"pre-trained on {result.start.data}")
    more = f"; and {len(reasons) - SHOWN} more" if len(reasons) > SHOWN else ""
    return "; ".join(reasons[:SHOWN]) + more


Layout = Callable[[str, Sequence[str], Sequence[Sequence[str]]], str]
"""(title, head, rows) → text"""


def as_text(results: Sequence[Result], layout: Layout) -> str:
    """All tables; the user's rows begin with a star."""
    texts = [
        layout(
            f"Table {table.number}: {table.title}",
            (*HEAD, *(column.title for column in table.columns)),
            [(*map(printable, line.start), *line.figures) for line in lines_of(table, results)],
        )
        for table in TABLES
    ]
    if rows := [tuple(map(printable, row)) for row in others(results)]:
        head = ("Run", "Backbone", "Data set", "Result", "What differs")
        texts.append(layout("Other runs, not comparable with the above", head, rows))
    return "\n\n".join(texts)


def aligned(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """For a terminal."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (head, *rows)
    ]
    return "\n".join((title, *lines))


def markdown(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """For a page."""
    cells = [[cell.replace("|", r"\|") for cell in row] for row in (head, *rows)]
    lines = ["| " + " | ".join(row) + " |" for row in cells]
    return "\n".join((f"**{title}**", "", lines[0], "|---" * len(head) + "|", *lines[1:]))


def as_json(results: Sequence[Result]) -> dict[str, Any]:
    """The tables, and the results that they were made from, in percent."""
    return {
        "tables": [
            {
                "number": table.number,
                "title": table.title,
                "columns": [column.title for column in table.columns],
                "rows": [
                    {**dict(zip(("method", "data", "epochs"), line.start, strict=True)),
                     "figures": list(line.figures), "own": line.own}
                    for line in lines_of(table, results)
                ],
            }
            for table in TABLES
        ],
        "runs": [
            {
                "name": result.name,
                "method": result.start.method,
                "data": result.start.data,
                "epochs": result.start.epochs,
                "dataset": result.dataset,
                "in_tables": result.placed,
                "differences": [*result.differences],
                "metrics": result.metrics,
            }
            for result in results
        ],
    }  # fmt: skip


if __name__ == "__main__":
    run(main)
