"""The tables and the picture of `tests.evidence curves`, from the files of its runs."""

import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, NamedTuple

import msgspec
from msgspec import Meta
from PIL import Image, ImageDraw, ImageFont

from pipeline.errors import UserError
from tests.evidence.scores import DEEP, FILES, JOINED, STAGES
from tools.report.charts import FAINT, INK, PAPER, RULE, decades, short, ticks
from train.run.json_file import read_json
from transfer.table import mean_and_deviation

PROBES = {"knn": "k-NN", "linear": "linear"}


class Reading(NamedTuple):
    """A probe of a stage."""

    stage: str
    probe: str
    whitened: bool = False

    @property
    def title(self) -> str:
        return f"{'whitened ' * self.whitened}{PROBES[self.probe]} {self.stage}"


PLAIN = tuple(Reading(stage, probe) for probe in PROBES for stage in (*STAGES, JOINED))
WHITENED = tuple(Reading(stage, probe, whitened=True) for probe in PROBES for stage in DEEP)
PANELS = (
    Reading("4", "knn"),
    Reading("4", "knn", whitened=True),
    Reading("4", "linear"),
    Reading(JOINED, "linear"),
)
COLOURS = {
    "fast": "#c8553d",
    "today": "#2f6fde",
    "control": "#1a936f",
    "slotmim": "#8a4fbf",
    "untrained": FAINT,
    "untrained-vit": "#b9a3cf",
}
SIDE, GAP = 520, 90
"""Of a panel of the picture, in pixels: its drawn square, and the room around it."""


class Cost(msgspec.Struct):
    """What is read of a run's facts."""

    tflop: Annotated[float, Meta(gt=0)]
    steps: Annotated[int, Meta(gt=0)]
    cpu_seconds: Annotated[float, Meta(gt=0)]


class Score(msgspec.Struct):
    """What is read of each score in a file of `evaluation.probe`."""

    stage: str
    metric: str
    value: Annotated[float, Meta(ge=0, le=1)]


class Scored(msgspec.Struct):
    """A file of scores."""

    results: list[Score]


@dataclass
class Row:
    """The runs of a recipe with one budget, one of each seed."""

    recipe: str
    budget: float
    runs: list[tuple[dict[str, float], dict[Reading, float]]] = field(default_factory=list)
    """Facts (TFLOP, steps, CPU seconds; none of an untrained network), and scores: mIoU in percent
    of the readings that there are."""

    def mean(self, fact: str) -> float:
        return statistics.mean(facts.get(fact, 0.0) for facts, _ in self.runs)

    def scores(self, reading: Reading) -> list[float]:
        return [scores[reading] for _, scores in self.runs if reading in scores]

    def points(self, fact: str, reading: Reading) -> list[tuple[float, float]]:
        """A fact and a score of each run that has both."""
        return [
            (facts[fact], scores[reading])
            for facts, scores in self.runs
            if fact in facts and reading in scores
        ]


def rows_of(work: Path) -> list[Row]:
    """All runs of WORK that have been scored: untrained ones first, then by budget. Folders of
    other names are not looked at. Raises UserError if a file cannot be read.
    """
    rows: dict[tuple[float, str], Row] = {}
    number = r"\d+(?:\.\d+)?(?:e[+-]\d+)?"
    known = re.compile(rf"({'|'.join(COLOURS)})(?:_({number}))?_\d+")
    for file in sorted(work.glob("*/linear.json")):
        match = known.fullmatch(file.parent.name)
        recipe, budget = match.groups() if match else ("", None)
        if not match or recipe.startswith("untrained") == bool(budget):
            continue
        size = float(budget or 0)
        row = rows.setdefault((size, recipe), Row(recipe, size))
        facts = {}
        if budget:
            facts = msgspec.structs.asdict(read_json(file.with_name("facts.json"), Cost))
        row.runs.append((facts, scores_in(file.parent)))
    order = list(COLOURS)
    return sorted(rows.values(), key=lambda row: (row.budget, order.index(row.recipe)))


def scores_in(folder: Path) -> dict[Reading, float]:
    """mIoU in percent of each reading in the folder of a run."""
    results = [
        (each, scores)
        for name, scores in FILES.items()
        if (folder / f"{name}.json").is_file()
        for each in read_json(folder / f"{name}.json", Scored).results
    ]
    return {
        Reading(each.stage, scores.probe, scores.whitened): 100 * each.value
        for each, scores in results
        if each.metric == "miou"
    }


def table(rows: Sequence[Row], readings: Sequence[Reading]) -> str:
    """mIoU in percent, mean ± deviation over the seeds, as a Markdown table."""
    heads = [reading.title for reading in readings]
    lines = [f"| recipe | TFLOP | steps | CPU s | seeds | {' | '.join(heads)} |"]
    lines.append("|---" * (5 + len(readings)) + "|")
    for row in rows:
        facts = [f"{row.mean('tflop'):.1f}", f"{row.mean('steps'):.0f}"]
        facts += [f"{row.mean('cpu_seconds'):.0f}", str(len(row.runs))]
        cells = [mean_and_deviation(row.scores(reading)) for reading in readings]
        lines.append(f"| {row.recipe} | {' | '.join([*facts, *cells])} |")
    return "\n".join(lines)


def picture(rows: Sequence[Row], title: str) -> Image.Image:
    """Each of PANELS against TFLOP, above, and against CPU seconds, below. A dot is a seed's run, a
    line joins means, a level line is an untrained network.
    """
    step = SIDE + GAP
    whole = Image.new("RGB", (len(PANELS) * step + GAP, 2 * step + GAP), PAPER)
    pen = ImageDraw.Draw(whole)
    pen.text((GAP, 20), title, INK, ImageFont.load_default(26))
    drawn = {row.recipe for row in rows}
    for number, recipe in enumerate(recipe for recipe in COLOURS if recipe in drawn):
        left, colour = GAP + 160 * number, COLOURS[recipe]
        pen.rectangle((left, 62, left + 16, 78), colour)
        pen.text((left + 24, 58), recipe, colour, ImageFont.load_default(22))
    for across, reading in enumerate(PANELS):
        for down, (fact, unit) in enumerate((("tflop", "TFLOP"), ("cpu_seconds", "CPU seconds"))):
            corner = (GAP + across * step, GAP + 40 + down * step)
            draw_panel(pen, corner, rows, reading, fact, unit)
    return whole


def draw_panel(
    pen: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    rows: Sequence[Row],
    reading: Reading,
    fact: str,
    unit: str,
) -> None:
    """One reading against one fact, on a logarithmic axis, in the square below `corner`."""
    points = {(row.recipe, row.budget): row.points(fact, reading) for row in rows}
    xs = [math.log(x) for each in points.values() for x, _ in each] or [0.0]
    ys = [y for row in rows for y in row.scores(reading)] or [0.0]
    left, right = min(xs) - 0.7, max(xs) + 0.7  # a factor of two
    low, high = min(ys) - 1, max(ys) + 1
    small = ImageFont.load_default(18)

    def at(x: float, y: float) -> tuple[float, float]:
        share = (math.log(x) - left) / (right - left), (y - low) / (high - low)
        return corner[0] + (SIDE - 20) * share[0], corner[1] + (SIDE - 40) * (1 - share[1])

    for y in ticks(low, high):
        ends = at(math.exp(left), y), at(math.exp(right), y)
        pen.line(ends, RULE, 2)
        pen.text((ends[0][0] - 8, ends[0][1]), short(y), FAINT, small, anchor="rm")
    for x in decades(math.exp(left), math.exp(right)):
        if left <= math.log(x) <= right:
            pen.text((at(x, low)[0], corner[1] + SIDE - 30), short(x), FAINT, small, anchor="mt")
    name = f"{reading.title}: mIoU % against {unit}"
    pen.text((corner[0], corner[1] - 8), name, INK, small, anchor="lb")
    for row in rows:
        if not row.budget and row.scores(reading):
            y = statistics.mean(row.scores(reading))
            pen.line((at(math.exp(left), y), at(math.exp(right), y)), COLOURS[row.recipe], 3)
    for recipe, colour in COLOURS.items():
        own = [points[row.recipe, row.budget] for row in rows if row.recipe == recipe]
        means = [tuple(map(statistics.mean, zip(*each, strict=True))) for each in own if each]
        pen.line([at(x, y) for x, y in means], colour, 4)
        for x, y in (point for each in own for point in each):
            pen.circle(at(x, y), 6, colour)


def tables(data: str, work: Path) -> str:
    """The scores as they are, and those of whitened features. Draws WORK/curves.png too. Raises
    UserError if no run has been scored.
    """
    rows = rows_of(work)
    if not rows:
        lacks = "no run has been scored here" if work.is_dir() else "no such folder"
        raise UserError(f"{work}: {lacks}")
    picture(rows, f"{data}: quality against the cost of training").save(work / "curves.png")
    return "\n\n".join(table(rows, readings) for readings in (PLAIN, WHITENED))
