"""The benchmark as a picture: a bar for each stage, on a logarithmic axis, under its ceilings."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from tools.benchmark_report import find
from tools.benchmark_timing import Result
from tools.charts import short

INK, FAINT, RULE, PAPER = "#1b1f24", "#6b7280", "#e5e7eb", "#ffffff"
STAGE_COLOURS = {
    "read": "#8d99ae",
    "decode": "#2f6fde",
    "params": "#8d99ae",
    "transfer": "#8d99ae",
    "augment": "#1a936f",
    "step": "#c8553d",
    "pipeline": "#6a4c93",
}
LINE_COLOURS = ("#6b7280", "#111111", "#2f6fde", "#1a936f", "#c8553d")

# Pixels; the picture is drawn at twice the size it is looked at.
MARGIN, TITLE, NAMES, PLOT, VALUES = 48, 110, 620, 1240, 150
ROW, BAR, GROUP_GAP, LINE_LABEL, AXIS = 44, 30, 18, 36, 60


class Line(NamedTuple):
    """A ceiling: a name and images/s."""

    name: str
    rate: float
    colour: str


def ceilings(results: Sequence[Result]) -> list[Line]:
    """What no data path can beat, in images/s, of what was measured."""
    named = (
        ("disk", find(results, "read", "disk")),
        ("page cache", find(results, "read", "page cache")),
        ("bare decoding", find(results, "decode", "libjpeg-turbo")),
        (
            "copy bandwidth",
            find(results, "transfer", "device copy") or find(results, "transfer", "memory copy"),
        ),
        ("cached-batch training", find(results, "step", "plain")),
    )
    return [
        Line(name, found.images_per_s, colour)
        for (name, found), colour in zip(named, LINE_COLOURS, strict=True)
        if found
    ]


def draw(results: Sequence[Result], caption: str) -> Image.Image:
    """Bars of whole stages, whiskers from the lowest to the highest repeat; single operations are
    left to the table, and so is decoding with fewer threads.
    """
    most = max((r.threads for r in results if r.stage == "decode"), default=0)
    rows = [r for r in results if r.operation in (None, "overlap")]
    rows = [r for r in rows if r.stage != "decode" or r.threads == most]
    lines = sorted(ceilings(results), key=lambda line: -line.rate)
    rates = [rate for r in rows for rate in (r.slowest, r.fastest)]
    low, high = math.floor(math.log10(min(rates))), math.ceil(math.log10(max(rates)))
    high = max(high, low + 1)
    left, top = MARGIN + NAMES, MARGIN + TITLE + LINE_LABEL * len(lines) + 10
    gaps = sum(a.stage != b.stage for a, b in itertools.pairwise(rows))
    bottom = top + ROW * len(rows) + GROUP_GAP * gaps
    picture = Image.new("RGB", (left + PLOT + VALUES + MARGIN, bottom + AXIS + MARGIN), PAPER)
    pen = ImageDraw.Draw(picture)

    def across(rate: float) -> float:
        return left + PLOT * (math.log10(rate) - low) / (high - low)

    pen.text((MARGIN, MARGIN - 8), "images a second, by stage", INK, _font(36))
    pen.text((MARGIN, MARGIN + 42), caption, FAINT, _font(24))
    for power in range(low, high + 1):
        x = across(10.0**power)
        pen.line((x, top - 6, x, bottom), RULE, 2)
        pen.text((x, bottom + 14), short(10.0**power), FAINT, _font(24), anchor="ma")
    middles, y = [], float(top)
    for number, row in enumerate(rows):
        y += GROUP_GAP if number and row.stage != rows[number - 1].stage else 0
        middles.append(y + ROW / 2)
        y += ROW
    for row, y in zip(rows, middles, strict=True):
        pen.text((left - 16, y), row.name, INK, _font(24), anchor="rm")
        end = max(across(row.images_per_s), left + 3)
        pen.rectangle((left, y - BAR / 2, end, y + BAR / 2), STAGE_COLOURS[row.stage])
    for place, line in enumerate(lines):
        _ceiling(pen, line, across(line.rate), MARGIN + TITLE + LINE_LABEL * place, bottom)
    for row, y in zip(rows, middles, strict=True):
        _spread(pen, row, y, across)
    pen.line((left, top - 6, left, bottom), FAINT, 2)
    return picture


def _ceiling(pen: ImageDraw.ImageDraw, line: Line, x: float, y: float, bottom: float) -> None:
    """A dashed line down from its name, which stands to the left of it."""
    for begin in range(int(y), int(bottom), 14):
        pen.line((x, begin, x, min(begin + 8, bottom)), line.colour, 3)
    text = f"{line.name}  {short(round(line.rate, 1))}"
    pen.text((x - 10, y + 10), text, line.colour, _font(24), anchor="rm")


def _spread(
    pen: ImageDraw.ImageDraw, row: Result, y: float, across: Callable[[float], float]
) -> None:
    """Lowest to highest, and the value beside it."""
    low, high = across(row.slowest), across(row.fastest)
    pen.line((low, y, high, y), INK, 3)
    for x in (low, high):
        pen.line((x, y - 7, x, y + 7), INK, 3)
    text = short(round(row.images_per_s, 1))
    start = max(high, across(row.images_per_s)) + 12
    width = pen.textlength(text, _font(24))
    pen.rectangle((start - 4, y - 14, start + width + 4, y + 14), PAPER)  # lines pass behind it
    pen.text((start, y), text, INK, _font(24), anchor="lm")


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
