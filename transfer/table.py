"""Print transfer results beside those that Wen et al. publish: tables 2, 3, 4 and 7 of the paper.

A run appears in one of these tables if
- its configuration is that of the column (a file in configs/transfer), apart from the name, paths,
  seed, initial weights, logging and efficiency;
- it ran all steps, learned from the whole training set, and was scored on the whole other set;
- its weights were pre-trained on the table's data, recognised by name and number of images.
All other runs follow in a separate table that says what differs.
"""

import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from pipeline.errors import UserError, in_markdown, printable
from train.run.cli import CommandParser, check_writable, run
from train.run.json_file import Settings, Text, read_json
from train.run.provenance import provenance, write_bytes, write_json
from train.run.settings import flatten, to_dict
from transfer.command import settings_of
from transfer.detection.config import DetectionConfig
from transfer.published import LABELS, PUBLISHED, Recipe, Table
from transfer.result import RESULT
from transfer.segmentation.config import SegmentationConfig

EXAMPLES = """examples:
  python -m transfer.table runs/coco_1x_* runs/voc_* runs/city_* runs/ade_* --markdown table.md
  python -m transfer.table runs/camvid_slotcon/result.json --json table.json
  python -m transfer.table                                        # the published rows alone
"""
CONFIGS = Path(__file__).parents[1] / "configs" / "transfer"
CLASSES: dict[str, Any] = {"detection": DetectionConfig, "segmentation": SegmentationConfig}
FREE = (
    "name", "init.weights", "init.branch", "data.root", "data.annotations", "data.images",
    "data.train_images", "data.train_labels", "data.val_images", "data.val_labels", "optim.seed",
    "optim.max_steps", "efficiency.", "log.",
)  # fmt: skip
"""Settings (or how their names begin) that may differ from the recipe's. Training gives the same
result with them, or the table shows their effect elsewhere.
"""
TOLERANCE = 0.02
"""Accepted relative difference in a number of images: a few files may be missing."""
SHOWN = 4
"""How many differences a line names."""
LONGEST = 300
"""Characters of a text in a table."""
ABOUT_FILES = ("slotstream", "format", "imported", "prefix", "data_license")
"""Metadata that does not identify weights: several files may hold the same weights."""


@dataclass(frozen=True)
class Backbone:
    """The initial weights of a run: the left part of a row."""

    method: str = ""
    data: str = ""
    """A name in the published tables, empty for no pre-training; else what the weights say."""
    epochs: str = ""
    facts: tuple[tuple[str, str], ...] = ()
    """All metadata about the training of the weights: other facts are another backbone."""


@dataclass(frozen=True)
class Result:
    """The result of one run."""

    file: Path
    name: str
    differences: tuple[str, ...]
    """From the recipe, or why there is nothing to compare."""
    backbone: Backbone = Backbone()
    dataset: str = ""
    seed: int = 0
    scored: str = ""
    """Fingerprint of the scored images."""
    metrics: dict[str, float] = field(default_factory=dict)
    """In percent, over all classes."""

    def fits(self, table: Table) -> bool:
        """Whether the run appears in `table`."""
        datasets = [PUBLISHED.columns[title][0] for title in table.columns]
        same = not self.differences and self.dataset in datasets
        return same and self.backbone.data in table.data

    @property
    def placed(self) -> bool:
        """Whether the run appears in any table of the paper."""
        return any(map(self.fits, PUBLISHED.tables))


_Count = Annotated[int, Meta(ge=0, le=10**15)]
_Fact = Annotated[str, Meta(max_length=100_000)] | _Count | float | bool | None  # or a whole config


class Init(Struct):
    """The initial weights, as a result.json describes them."""

    kind: Text
    weights: Text = ""
    branch: Text | None = None
    metadata: dict[Text, _Fact] = {}


class Schedule(Struct):
    """The planned training."""

    steps: _Count


class Scored(Struct):
    """The scored images."""

    images: _Count
    fingerprint: Text


class Row(Struct):
    """A result."""

    metric: Text
    value: Annotated[float, Meta(ge=0, le=1)]
    name: Text | None = msgspec.field(name="class", default=None)
    """Of a class."""


class Content(Struct):
    """What the table needs from a result.json."""

    name: Text
    task: Text
    dataset: Text
    images: _Count
    scored: Scored
    schedule: Schedule
    init: Init
    step: _Count
    results: list[Row]
    config: Settings


def main() -> None:
    parser = CommandParser(prog="python -m transfer.table", description=__doc__, epilog=EXAMPLES)
    parser.add_argument("runs", nargs="*", type=Path, help="runs, or their result.json files")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write tables and runs as JSON")
    parser.add_argument(
        "--markdown", type=Path, metavar="FILE", help="write the tables as Markdown"
    )
    args = parser.parse_args()
    files = [(path / RESULT if path.is_dir() else path).resolve() for path in args.runs]
    for option, path in (("--json", args.json), ("--markdown", args.markdown)):
        if path:
            check_writable(option, path)
            if path.resolve() in files:
                raise UserError(f"{option} {path}: is a result to read: give the name of another")
    results = [read_result(file) for file in dict.fromkeys(files)]
    check_seeds(results)
    content = content_of(results)
    if args.json:
        write_json(args.json, {**provenance(), **content})
    if args.markdown:
        write_bytes(args.markdown, (as_text(content, markdown) + "\n").encode())
    print(as_text(content, aligned))


# ---- reading -----------------------------------------------------------------------------------


def read_result(file: Path) -> Result:
    """The result in `file`; a run that is still training has none. Raises UserError."""
    if not file.exists() and file.with_name("config.yaml").exists():
        return Result(file, file.parent.name, (f"has no {file.name}",))
    content = read_json(file, Content, what="the result of a transfer")
    recipe = PUBLISHED.recipes.get(content.dataset)
    if recipe and recipe.task != content.task:
        recipe = None
    settings = flatten(content.config)
    if not isinstance(seed := settings.get("optim.seed"), int):
        raise UserError(f"{file}: config.optim.seed is {cell(seed)}: expected int")
    return Result(
        file,
        content.name,
        tuple(differences(content, settings, recipe)),
        backbone_of(content.init),
        content.dataset,
        seed,
        content.scored.fingerprint if recipe else "",
        {row.metric: 100 * row.value for row in content.results if row.name is None},
    )


def differences(
    content: Content, settings: Mapping[str, Any], recipe: Recipe | None
) -> Iterator[str]:
    """How a run differs from its recipe, or that it has none."""
    if not recipe:
        yield f"the paper has no {content.dataset}"
        return
    for key, value in published_settings(recipe).items():
        if not key.startswith(FREE) and settings.get(key) != value:
            yield f"{key} {cell(settings.get(key))}, not {value}"
    if content.step < content.schedule.steps:
        yield f"ended at step {content.step:,} of {content.schedule.steps:,}"
    if not near(content.images, recipe.images):
        yield f"{content.images:,} training images, not {recipe.images:,}"
    if not near(content.scored.images, recipe.scored):
        yield f"scored on {content.scored.images:,} images, not {recipe.scored:,}"


@cache
def published_settings(recipe: Recipe) -> dict[str, Any]:
    """The settings in the recipe's file, by key. Raises UserError."""
    arguments = ["--config", str(CONFIGS / f"{recipe.config}.yaml"), "--data.root", "."]
    return flatten(to_dict(settings_of(CLASSES[recipe.task]).load(arguments)[0]))


def backbone_of(init: Init) -> Backbone:
    """The backbone that a result describes."""
    if init.kind == "random":
        return Backbone("random init.", "", "–")
    if init.kind == "supervised":
        return Backbone("supervised (torchvision)", LABELS, "90")
    about = {key: str(value) for key, value in init.metadata.items()}
    about.setdefault("branch", str(init.branch))
    if "run" not in about:
        about["weights"] = init.weights
    name = about.get("run") or Path(init.weights).name
    method = f"{about.get('method', 'weights').partition(' (')[0]}: {name}"
    if about["branch"] != "teacher":
        method += f", {about['branch']}"
    data = about.get("data", "not stated")
    known = pretraining(data, number(about, "data_images"))
    facts = settings_in(about.pop("config", "{}")) | about
    training = sorted(item for item in facts.items() if item[0] not in ABOUT_FILES)
    return Backbone(method, known or data, epochs_of(about), tuple(training))


def settings_in(text: str) -> dict[str, str]:
    """The settings that weights hold under "config", by key. Text of another form is one fact."""
    try:
        settings = msgspec.json.decode(text, type=Settings)
    except (msgspec.DecodeError, UnicodeEncodeError, RecursionError):
        return {"config": text}
    return {key: str(value) for key, value in flatten(settings).items()}


def epochs_of(about: Mapping[str, str]) -> str:
    """Epochs of a pre-training: "800"; "400 of 800" if it did not finish its schedule; "? of 800"
    if its steps cannot be converted to epochs.
    """
    planned = about.get("epochs", "?")
    if "step" not in about or not number(about, "epochs"):
        return planned
    step, batch, images = (number(about, key) for key in ("step", "batch_size", "data_images"))
    if not step or not 0 < batch <= images:
        return f"? of {planned}"
    done = round(step / (images // batch))  # each epoch drops its last, partial batch
    return planned if done >= int(planned) else f"{done} of {planned}"


def number(about: Mapping[str, str], key: str) -> int:
    """A number in the metadata; 0 if it is missing, or no count of anything."""
    text = about.get(key, "")
    return int(text) if text.isdecimal() and len(text) < 16 else 0


def pretraining(data: str, count: int) -> str | None:
    """The published name of a data file with `count` images (0: unknown)."""
    stem = re.sub(r"[^a-z0-9+]", "", data.lower().removesuffix(".beton"))
    for name, known in PUBLISHED.pretraining.items():
        if stem in known.files and (not count or any(near(count, size) for size in known.images)):
            return name
    return None


def near(count: int, expected: int) -> bool:
    return abs(count - expected) <= TOLERANCE * expected


def check_seeds(results: Iterable[Result]) -> None:
    """Results to average need different seeds and the same scored images. Raises UserError."""
    seen: dict[Any, Result] = {}
    for result in results:
        if not result.placed:
            continue
        group = result.backbone, result.dataset
        first, same = seen.setdefault(group, result), seen.setdefault((*group, result.seed), result)
        if same is not result:
            raise UserError(
                f"{result.file}: same backbone, recipe and optim.seed as {same.file}: give one of "
                "them, because the deviation is over seeds"
            )
        if result.scored != first.scored:
            raise UserError(
                f"{result.file}: scored on other images than {first.file}, the same recipe with "
                "another seed"
            )


# ---- printing ----------------------------------------------------------------------------------


def content_of(results: Sequence[Result]) -> dict[str, Any]:
    """All that is printed, as --json writes it: tables and runs, with metrics in percent."""
    tables = [
        {"number": table.number, "title": table.title, "columns": table.columns,
         "rows": [*rows_of(table, results)]}
        for table in PUBLISHED.tables
    ]  # fmt: skip
    runs = [
        {"name": one.name, "method": one.backbone.method, "data": one.backbone.data,
         "epochs": one.backbone.epochs, "dataset": one.dataset, "in_tables": one.placed,
         "differences": one.differences, "metrics": one.metrics}
        for one in results
    ]  # fmt: skip
    return {"tables": tables, "runs": runs}


def rows_of(table: Table, results: Iterable[Result]) -> list[dict[str, Any]]:
    """The published rows, then the user's: one for each backbone, averaged over seeds."""
    rows: list[tuple[Any, ...]] = []
    for row in table.rows:
        figures = ["–" if value is None else f"{value:.1f}" for value in row.figures]
        rows.append((row.method, row.data or "–", str(row.epochs or "–"), figures, False))
    groups: dict[Backbone, list[Result]] = defaultdict(list)
    for result in results:
        if result.fits(table):
            groups[result.backbone].append(result)
    for backbone, group in groups.items():
        method = ", ".join((f"* {backbone.method}", *distinction(backbone, groups)))
        figures = [figure(title, group) for title in table.columns]
        rows.append((method, backbone.data or "–", backbone.epochs, figures, True))
    keys = "method", "data", "epochs", "figures", "own"
    return [dict(zip(keys, row, strict=True)) for row in rows]


def distinction(backbone: Backbone, others: Iterable[Backbone]) -> list[str]:
    """Facts that distinguish a backbone from others with the same text: ["step 50000"]."""
    facts = [set(one.facts) for one in others if replace(one, facts=backbone.facts) == backbone]
    common = set.intersection(*facts)
    special = [(key, value) for key, value in backbone.facts if (key, value) not in common]
    # Digests differ in their first characters, paths anywhere.
    return [f"{key} {value if key == 'weights' else value[:12]}" for key, value in special[:SHOWN]]


def figure(title: str, results: Iterable[Result]) -> str:
    """A backbone's figure in a column; empty without a result."""
    dataset, metric = PUBLISHED.columns[title]
    metrics = [result.metrics for result in results if result.dataset == dataset]
    return mean_and_deviation([values[metric] for values in metrics if metric in values])


def mean_and_deviation(values: Sequence[float]) -> str:
    """Percentages over seeds: "20.4 ± 0.9"; "20.4" for a single one, "" for none."""
    if not values:
        return ""
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation}"


Layout = Callable[[str, Sequence[Sequence[str]]], str]
"""(title, rows, of which the first is the head) → text"""


def as_text(content: Mapping[str, Any], layout: Layout) -> str:
    """The paper's tables with the user's rows, which begin with a star; then all other runs."""
    texts = []
    for table in content["tables"]:
        rows = [("Method", "Data", "Epochs", *table["columns"])]
        for row in table["rows"]:
            start = (cell(row[key]) for key in ("method", "data", "epochs"))
            rows.append((*start, *row["figures"]))
        texts.append(layout(f"Table {table['number']}: {table['title']}", rows))
    others = [other_run(run) for run in content["runs"] if not run["in_tables"]]
    if others:
        head = ("Run", "Backbone", "Data set", "Result", "What differs")
        texts.append(layout("Other runs, not comparable with the above", [head, *others]))
    return "\n\n".join(texts)


def cell(value: object) -> str:
    """A value from a file for one cell of a line: printable, not too long."""
    text = printable(str(value))
    return text if len(text) <= LONGEST else text[:LONGEST] + "…"


def other_run(run: Mapping[str, Any]) -> tuple[str, ...]:
    """The row of a run that is in none of the paper's tables."""
    titles = {"box_ap": "AP^b", "mask_ap": "AP^m", "miou": "mIoU"}
    shown = [(title, run["metrics"].get(metric)) for metric, title in titles.items()]
    figures = "  ".join(f"{title} {value:.1f}" for title, value in shown if value is not None)
    reasons = list(run["differences"])
    if not reasons or not any(run["data"] in table.data for table in PUBLISHED.tables):
        reasons.append(f"pre-trained on {run['data']}")
    more = f"; and {len(reasons) - SHOWN} more" if len(reasons) > SHOWN else ""
    cells = run["name"], run["method"], run["dataset"], figures, "; ".join(reasons[:SHOWN]) + more
    return tuple(map(cell, cells))


def aligned(title: str, rows: Sequence[Sequence[str]]) -> str:
    """The table for a terminal."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
    return "\n".join((title, *lines))


def markdown(title: str, rows: Sequence[Sequence[str]]) -> str:
    """The table in Markdown. Texts of the files are neither markup nor HTML in it."""
    head, *lines = ("| " + " | ".join(map(in_markdown, row)) + " |" for row in rows)
    return "\n".join((f"**{title}**", "", head, "|---" * len(rows[0]) + "|", *lines))


if __name__ == "__main__":
    run(main)
