"""The benchmark as a picture: a bar for each stage, under its ceilings."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from tools.benchmark.profile import PARTS
from tools.benchmark.timing import Result
from tools.benchmark.verdict import find
from tools.report.charts import short

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
PART_COLOURS = dict(
    zip(
        PARTS,
        (
            "#2f6fde", "#1d4a9c", "#8fb4f0", "#1a936f", "#88d498", "#e9c46a", "#c8553d", "#b56576",
            "#6a4c93", "#111111", "#c4c9d1",
        ),
        strict=True,
    )
)  # fmt: skip
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
        ("cached-batch training", find(results, "step", "fast")),
    )
    return [
        Line(name, found.images_per_s, colour)
        for (name, found), colour in zip(named, LINE_COLOURS, strict=True)
        if found
    ]


def draw(results: Sequence[Result], caption: str) -> Image.Image:
    """The stages' rates and, under them, where the time of profiled training steps goes."""
    panels = [draw_rates(results, caption)]
    steps = [r for r in results if r.detail and r.detail.parts]
    panels += [draw_parts(steps, panels[0].width)] if steps else []
    picture = Image.new("RGB", (panels[0].width, sum(panel.height for panel in panels)), PAPER)
    top = 0
    for panel in panels:
        picture.paste(panel, (0, top))
        top += panel.height
    return picture


def draw_parts(steps: Sequence[Result], width: int) -> Image.Image:
    """A bar for each step, of its parts' shares, and the parts' names with their ms."""
    rows = [(step, step.detail.parts) for step in steps if step.detail and step.detail.parts]
    names = [part for part in PARTS if any(part in parts for _, parts in rows)]
    top, left = MARGIN + TITLE, MARGIN + NAMES
    legend = top + 2 * ROW * len(rows) + 2 * GROUP_GAP
    picture = Image.new("RGB", (width, legend + LINE_LABEL * (len(names) + 1) + MARGIN), PAPER)
    pen = ImageDraw.Draw(picture)
    pen.text((MARGIN, MARGIN - 8), "where the time of a step goes", INK, _font(36))
    about = "shares of a step in the profiler, each part with its backward; ms beside the names"
    pen.text((MARGIN, MARGIN + 42), about, FAINT, _font(24))
    for place, (step, parts) in enumerate(rows):
        x, y, total = float(left), top + 2 * ROW * place, sum(parts.values())
        pen.text((left - 16, y + ROW * 0.75), step.name, INK, _font(24), anchor="rm")
        for part in names:
            end = x + PLOT * parts.get(part, 0.0) / total
            pen.rectangle((x, y, end, y + 1.5 * ROW), PART_COLOURS[part])
            x = end
        pen.text((x + 12, y + ROW * 0.75), f"{total:,.0f} ms", INK, _font(24), anchor="lm")
    for place, part in enumerate(names):
        y = legend + LINE_LABEL * place
        pen.rectangle((left, y, left + 24, y + 24), PART_COLOURS[part])
        shares = (parts.get(part, 0.0) for _, parts in rows)
        values = "   ".join(
            f"{step.operation or step.backend} {ms:,.1f}"
            for (step, _), ms in zip(rows, shares, strict=True)
        )
        pen.text((left + 40, y + 12), part, INK, _font(24), anchor="lm")
        pen.text((left + 320, y + 12), values, FAINT, _font(24), anchor="lm")
    return picture


def draw_rates(results: Sequence[Result], caption: str) -> Image.Image:
    """Bars of whole stages, whiskers from the lowest to the highest repeat; single operations are
    left to the table, and so is decoding with fewer threads.
    """
    most = max((r.threads for r in results if r.stage == "decode"), default=0)
    rows = [r for r in results if r.operation in (None, "overlap") or r.stage == "step"]
    rows = [r for r in rows if r.stage != "decode" or r.threads == most]
    lines = sorted(ceilings(results), key=lambda line: -line.rate)
    rates = [rate for r in rows for rate in (r.slowest, r.fastest)]
    share, ticks = _axis(min(rates), max(rates))
    left, top = MARGIN + NAMES, MARGIN + TITLE + LINE_LABEL * len(lines) + 10
    gaps = sum(a.stage != b.stage for a, b in itertools.pairwise(rows))
    bottom = top + ROW * len(rows) + GROUP_GAP * gaps
    picture = Image.new("RGB", (left + PLOT + VALUES + MARGIN, bottom + AXIS + MARGIN), PAPER)
    pen = ImageDraw.Draw(picture)

    def across(rate: float) -> float:
        return left + PLOT * share(rate)

    pen.text((MARGIN, MARGIN - 8), "images a second, by stage", INK, _font(36))
    pen.text((MARGIN, MARGIN + 42), caption, FAINT, _font(24))
    for tick in ticks:
        x = across(tick)
        pen.line((x, top - 6, x, bottom), RULE, 2)
        pen.text((x, bottom + 14), short(tick), FAINT, _font(24), anchor="ma")
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


def _axis(lowest: float, highest: float) -> tuple[Callable[[float], float], list[float]]:
    """Where a rate lies on the axis (0..1), and the axis's ticks. It begins with 0, unless there
    are rates so small that only a logarithm shows them.
    """
    if highest < 10 * lowest:
        unit = 10.0 ** math.floor(math.log10(highest))
        count = math.ceil(highest / unit)
        return lambda rate: rate / (count * unit), [unit * i for i in range(count + 1)]
    low, high = math.floor(math.log10(lowest)), math.ceil(math.log10(highest))
    return (
        lambda rate: (math.log10(rate) - low) / (high - low),
        [10.0**power for power in range(low, high + 1)],
    )


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
