"""The table and the picture of `tests.evidence curves`, from the files of its runs."""

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from tests.evidence.scores import JOINED, READINGS
from tools.report.charts import FAINT, INK, PAPER, RULE, decades, short, ticks
from transfer.table import mean_and_deviation

Reading = tuple[str, str]
"""(stage, probe)"""
PANELS: tuple[Reading, ...] = (("3", "knn"), ("4", "knn"), ("4", "linear"), (JOINED, "linear"))
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


@dataclass
class Row:
    """The runs of a recipe with one budget, a value for each seed."""

    recipe: str
    budget: float
    facts: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    """TFLOP, steps and CPU seconds."""
    scores: dict[Reading, list[float]] = field(default_factory=lambda: defaultdict(list))
    """mIoU in percent."""

    def mean(self, fact: str) -> float:
        return statistics.mean(self.facts[fact] or [0.0])


def rows_of(work: Path) -> list[Row]:
    """All runs of WORK that have been scored: untrained ones first, then by budget."""
    rows: dict[tuple[float, str], Row] = {}
    for file in sorted(work.glob("*/linear.json")):
        recipe, *budget, _ = file.parent.name.split("_")
        size = float(budget[0]) if budget else 0.0
        row = rows.setdefault((size, recipe), Row(recipe, size))
        facts = file.with_name("facts.json")
        for name, value in json.loads(facts.read_text()).items() if budget else ():
            if name in ("tflop", "steps", "cpu_seconds"):
                row.facts[name].append(value)
        for probe in READINGS:
            for each in json.loads(file.with_name(f"{probe}.json").read_text())["results"]:
                if each["metric"] == "miou":
                    row.scores[each["stage"], probe].append(100 * each["value"])
    order = list(COLOURS)
    return sorted(rows.values(), key=lambda row: (row.budget, order.index(row.recipe)))


def table(rows: Sequence[Row]) -> str:
    """mIoU in percent, mean ± deviation over the seeds, as a Markdown table."""
    readings: list[Reading] = [
        (stage, probe) for probe, stages in READINGS.items() for stage in stages
    ]
    heads = [f"{'k-NN' if probe == 'knn' else probe} {stage}" for stage, probe in readings]
    lines = [f"| recipe | TFLOP | steps | CPU s | seeds | {' | '.join(heads)} |"]
    lines.append("|---" * (5 + len(heads)) + "|")
    for row in rows:
        facts = [f"{row.mean('tflop'):.1f}", f"{row.mean('steps'):.0f}"]
        facts += [f"{row.mean('cpu_seconds'):.0f}", str(max(map(len, row.scores.values())))]
        cells = [mean_and_deviation(row.scores[reading]) for reading in readings]
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
    for number, (recipe, colour) in enumerate(COLOURS.items()):
        left = GAP + 160 * number
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
    trained = [row for row in rows if row.facts[fact]]
    xs = [math.log(x) for row in trained for x in row.facts[fact]] or [0.0]
    ys = [y for row in rows for y in row.scores[reading]] or [0.0]
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
    stage, probe = reading
    name = f"{'k-NN' if probe == 'knn' else probe}, stage {stage}: mIoU % against {unit}"
    pen.text((corner[0], corner[1] - 8), name, INK, small, anchor="lb")
    for row in rows:
        if not row.budget:
            y = statistics.mean(row.scores[reading])
            pen.line((at(math.exp(left), y), at(math.exp(right), y)), COLOURS[row.recipe], 3)
    for recipe, colour in COLOURS.items():
        own = [row for row in trained if row.recipe == recipe]
        means = [at(row.mean(fact), statistics.mean(row.scores[reading])) for row in own]
        pen.line(means, colour, 4)
        for row in own:
            for x, y in zip(row.facts[fact], row.scores[reading], strict=True):
                pen.circle(at(x, y), 6, colour)


def tables(data: str, work: Path) -> str:
    """The table; draws WORK/curves.png too, once a run has been scored."""
    rows = rows_of(work)
    if rows:
        picture(rows, f"{data}: quality against the cost of training").save(work / "curves.png")
    return table(rows)
