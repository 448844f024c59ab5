"""Charts as inline SVG: no scripts, no files, colours from the page's CSS variables.

Classes used: `grid`, `axis`, `reference`, `tick`, `name`, `line`, `dot`, and `s0`, `s1`, … for the
series' colours. `image` draws a chart as a picture instead.
"""

import html
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from xml.etree import ElementTree

import numpy as np
from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT = 560, 256
LEFT, RIGHT, TOP, BOTTOM = 52, 16, 30, 40
ROW, VALUES = 26, 96
LETTER = 14
"""Room for a letter of the largest text on a page, see style.css: 22 units on a narrow screen."""
LONGEST = 48
"""Letters of a row's name above its dot; the rest of a longer one is left out."""
MAX_POINTS = 240
BINS = 48
SMALLEST, LARGEST = 1e-30, 1e30
"""Of drawn values, or of their differences from each other and, on a logarithmic axis, from 0."""

# Of pictures, whose pixels are half as large as the page's.
SCALE, MARGIN, TITLE = 2, 24, 56
INK, FAINT, RULE, PAPER = "#1b1f24", "#6b7280", "#e5e7eb", "#ffffff"
SERIES = (
    "#2f6fde", "#1d4a9c", "#8fb4f0", "#1a936f", "#88d498", "#e9c46a", "#c8553d", "#b56576",
    "#6a4c93", "#111111", "#7d5a3c", "#c4c9d1",
)  # fmt: skip
COLOURS = {"grid": RULE, "axis": FAINT, "reference": FAINT, "tick": FAINT, "name": INK}
COLOURS |= {f"s{number}": colour for number, colour in enumerate(SERIES)}
ANCHORS = {"start": "ls", "middle": "ms", "end": "rs"}

Points = Sequence[tuple[float, float]]


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers from `low` to `high`: steps of 1, 2 or 5 times a power of ten."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [n * step for n in range(first, last + 1)]


def decades(low: float, high: float) -> list[float]:
    """1, 2 and 5 times the powers of ten around positive `low` to `high`, two numbers or more.

    Over more than two decades only the powers of ten.
    """
    factors = (1, 2, 5) if high < 100 * low else (1,)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 2)
    numbers = [factor * 10.0**power for power in powers for factor in factors]
    first = sum(number <= low for number in numbers) - 1
    last = sum(number < high for number in numbers)
    return numbers[first : max(last, first + 1) + 1]


def short(value: float) -> str:
    """A number for an axis or a table: 0.25, 12, 1,200, 35 k, 1.2 M; nan and inf as they are."""
    if not math.isfinite(value):
        return str(value)
    if abs(value) >= 999_500:
        return f"{value / 1e6:.3g} M"
    if abs(value) >= 10_000:
        return f"{value / 1e3:.3g} k"
    if abs(value) >= 100 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.3g}"


def thin(points: Points) -> list[list[tuple[float, float]]]:
    """At most `MAX_POINTS` points and one for each gap, each the mean of its neighbours. A gap is
    where a number is not finite or beyond `LARGEST`; it divides the points.
    """
    size = max(1, -(-len(points) // MAX_POINTS))
    stretches = itertools.groupby(points, lambda p: all(abs(number) < LARGEST for number in p))
    whole = [list(stretch) for drawn, stretch in stretches if drawn]
    return [[_mean(part[i : i + size]) for i in range(0, len(part), size)] for part in whole]


def _mean(points: Points) -> tuple[float, float]:
    return sum(x for x, _ in points) / len(points), sum(y for _, y in points) / len(points)


def line_chart(
    title: str,
    series: Mapping[str, Points],
    *,
    x_name: str = "step",
    reference: tuple[str, float] | None = None,
    from_zero: bool = False,
    percent: bool = False,
) -> str:
    """Lines over a common axis, with gaps where points are beyond `LARGEST` or not finite; a point
    between gaps is a dot. `reference` is a named horizontal line.
    """
    lines = {name: thin(points) for name, points in series.items()}
    points = [point for stretches in lines.values() for part in stretches for point in part]
    xs = [x for x, _ in points] or [0.0]
    ys = [y for _, y in points] or [0.0]
    reference = reference if reference and abs(reference[1]) < LARGEST else None
    ys += [reference[1]] if reference else []
    low, high = min(ys), max(ys)
    low = min(low, 0.0) if from_zero else low
    spread = high - low
    pad = 0.06 * spread if spread > SMALLEST else max(abs(high) * 0.1, 0.1)
    low, high = (low if from_zero else low - pad), high + pad
    left, right = min(xs), max(*xs, min(xs) + max(1, 1e-9 * abs(min(xs))))
    labels = {y: f"{y:.0%}" if percent else short(y) for y in ticks(low, high)}
    edge = max(LEFT, 12 + LETTER * max(map(len, labels.values()), default=0))

    def at(x: float, y: float) -> tuple[float, float]:
        across = edge + (WIDTH - edge - RIGHT) * (x - left) / (right - left)
        return across, HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (y - low) / (high - low)

    parts = []
    for y, label in labels.items():
        _, v = at(left, y)
        parts.append(_line(edge, v, WIDTH - RIGHT, v, "grid"))
        parts.append(_text(edge - 8, v + 4, label, "tick", "end"))
    for x in ticks(left, right, 5):
        u, _ = at(x, low)
        parts.append(_text(u, HEIGHT - BOTTOM + 18, short(x), "tick", "middle"))
    parts.append(_text(WIDTH - RIGHT, HEIGHT - 5, x_name, "tick", "end"))
    parts.append(_line(edge, HEIGHT - BOTTOM, WIDTH - RIGHT, HEIGHT - BOTTOM, "axis"))
    if reference:
        _, v = at(left, reference[1])
        parts.append(_line(edge, v, WIDTH - RIGHT, v, "reference"))
        parts.append(_text(WIDTH - RIGHT, v - 5, reference[0], "tick", "end"))
    for number, stretches in enumerate(lines.values()):
        parts += [_curve([at(*point) for point in part], number) for part in stretches]
    return _figure(title, parts, _legend(lines) if len(lines) > 1 else "", HEIGHT)


def dot_chart(
    title: str,
    rows: Iterable[tuple[str, float, float, float]],
    *,
    unit: str,
    ceilings: Mapping[str, float] | None = None,
    width: float = WIDTH,
    names: float = 0,
) -> str:
    """Rows (name, value, lowest, highest) as dots with their range on a logarithmic axis, without
    rows that have a number outside `SMALLEST` … `LARGEST`. `ceilings` are named vertical lines;
    `names` is the width of a column for the rows' names. Without it each name stands above its row.
    """
    rows = [row for row in rows if all(SMALLEST < number < LARGEST for number in row[1:])]
    lines = [line for line in (ceilings or {}).items() if SMALLEST < line[1] < LARGEST]
    lines.sort(key=lambda line: -line[1])
    top = TOP + 18.0 * len(lines)
    row_height, start = (ROW, names) if names else (2 * ROW, LEFT)
    bottom = top + row_height * len(rows)
    marks = decades(
        min([n for row in rows for n in row[1:]] + [n for _, n in lines], default=1.0),
        max([n for row in rows for n in row[1:]] + [n for _, n in lines], default=1.0),
    )
    marks = marks if len(marks) > 3 else ticks(marks[0], marks[-1])

    def at(value: float) -> float:
        return start + (width - start - VALUES) * math.log(value / marks[0], marks[-1] / marks[0])

    parts = []
    for mark in marks:
        parts.append(_line(at(mark), top - 6, at(mark), bottom + 2, "grid"))
        parts.append(_text(at(mark), bottom + 18, short(mark), "tick", "middle"))
    for number, (name, value) in enumerate(lines):
        v = TOP + 18.0 * number
        parts.append(_line(at(value), v - 12, at(value), bottom + 2, "reference"))
        parts.append(_text(at(value) - 6, v - 2, f"{name} {short(value)}", "tick", "end"))
    for number, (name, value, lowest, highest) in enumerate(rows):
        v = top + row_height * (number + 1) - ROW / 2
        if names:
            parts.append(_text(names - 12, v + 4, name, "name", "end"))
        else:
            shown = name if len(name) <= LONGEST else name[: LONGEST - 1] + "…"
            parts.append(_text(0, v - 14, shown, "name", "start"))
        parts.append(_line(at(lowest), v, at(highest), v, "line s0"))
        parts.append(f'<circle class="dot s0" cx="{at(value):.1f}" cy="{v:.1f}" r="5"/>')
        parts.append(_text(width, v + 4, short(value), "name", "end"))
    parts.append(_text(width, TOP - 10, unit, "tick", "end"))
    return _figure(title, parts, "", bottom + 24, width)


def share_chart(
    title: str, rows: Mapping[str, Mapping[str, float]], *, unit: str, width: float, names: float
) -> str:
    """A bar for each row, divided by its parts' shares; under the bars each part's values."""
    order = dict.fromkeys(part for row in rows.values() for part in row)
    parts = []
    for number, (name, row) in enumerate(rows.items()):
        v, left, total = TOP + 2.0 * ROW * number, names, sum(row.values())
        parts.append(_text(names - 12, v + 25, name, "name", "end"))
        for series, part in enumerate(order):
            wide = (width - names - VALUES) * row.get(part, 0.0) / (total or 1.0)
            parts.append(_box(left, v, wide, 1.6 * ROW, f"dot s{series}"))
            left += wide
        parts.append(_text(width, v + 25, f"{total:,.0f} {unit}", "name", "end"))
    v = TOP + 2.0 * ROW * len(rows) - 4
    for series, part in enumerate(order):
        if not any(row.get(part) for row in rows.values()):
            continue
        v += 20
        values = (f"{name} {row.get(part, 0.0):,.1f}" for name, row in rows.items())
        parts.append(_box(names, v - 10, 12, 12, f"dot s{series}"))
        parts.append(_text(names + 20, v, part, "name", "start"))
        parts.append(_text(names + 160, v, "   ".join(values), "tick", "start"))
    return _figure(title, parts, "", v + 8, width)


def histogram(
    title: str,
    values: np.ndarray,
    marks: Iterable[float],
    label: Callable[[float], str],
    *,
    logarithmic: bool,
    width: float,
) -> str:
    """The number of `values` in each of `BINS` bins of equal width. `label` writes the numbers
    `marks` below the axis. A logarithmic axis needs positive values.
    """
    scale = np.log if logarithmic else np.asarray
    scaled = scale(values)
    scaled = scaled[np.abs(scaled) < LARGEST]
    if not scaled.size:
        return _figure(title, [], "", HEIGHT, width)
    largest, pad = float(np.abs(scaled).max()), 0.02 * float(np.ptp(scaled))
    pad = pad if pad > 1e-9 * largest else max(0.5, 0.02 * largest)
    counts, edges = np.histogram(scaled, BINS, (scaled.min() - pad, scaled.max() + pad))
    bar, base = (width - LEFT - RIGHT) / BINS, HEIGHT - BOTTOM
    unit = (base - TOP) / counts.max()
    parts = []
    for count in ticks(0, int(counts.max()), 4)[1:]:
        v = base - unit * count
        parts.append(_line(LEFT, v, width - RIGHT, v, "grid"))
        parts.append(_text(LEFT - 8, v + 4, short(count), "tick", "end"))
    for number in np.flatnonzero(counts):
        tall = max(1.5, unit * counts[number])  # one image among a million is visible
        parts.append(_box(LEFT + bar * number + 0.5, base - tall, bar - 1, tall, "dot s0"))
    parts.append(_line(LEFT, base, width - RIGHT, base, "axis"))
    free = -math.inf  # the end of the last label
    for mark in marks:
        u = LEFT + bar * (float(scale(mark)) - edges[0]) / (edges[1] - edges[0])
        half = 3.5 * len(label(mark))  # about half of the label's width
        if LEFT <= u <= width - RIGHT and u - half >= free:
            parts.append(_line(u, base, u, base + 4, "axis"))
            parts.append(_text(u, base + 18, label(mark), "tick", "middle"))
            free = u + half + 7
    return _figure(title, parts, "", HEIGHT, width)


def stacked(pictures: Sequence[Image.Image]) -> Image.Image:
    """The pictures in one, from top to bottom."""
    whole = Image.new("RGB", (pictures[0].width, sum(p.height for p in pictures)), PAPER)
    top = 0
    for picture in pictures:
        whole.paste(picture, (0, top))
        top += picture.height
    return whole


def image(figure: str, caption: str) -> Image.Image:
    """A chart as a picture, under its title and a caption. Not for line charts."""
    svg = ElementTree.fromstring(figure)[1]
    *_, width, height = map(float, svg.attrib["viewBox"].split())
    size = (width + 2 * MARGIN, TITLE + height + MARGIN)
    picture = Image.new("RGB", (round(SCALE * size[0]), round(SCALE * size[1])), PAPER)
    pen = ImageDraw.Draw(picture)
    heading = ((svg.attrib["aria-label"], 18, 36, INK), (caption, 12, 58, FAINT))
    for text, font_size, baseline, colour in heading:
        font = ImageFont.load_default(SCALE * font_size)
        pen.text((SCALE * MARGIN, SCALE * baseline), text, colour, font, anchor="ls")
    for mark in svg:
        colour, at = COLOURS[mark.attrib["class"].split()[-1]], mark.attrib

        def place(x: str, y: str, at: Mapping[str, str] = at) -> tuple[float, float]:
            return SCALE * (MARGIN + float(at[x])), SCALE * (TITLE + float(at[y]))

        if mark.tag == "text":
            font = ImageFont.load_default(SCALE * 12)
            pen.text(place("x", "y"), mark.text or "", colour, font, ANCHORS[at["text-anchor"]])
        elif mark.tag == "circle":
            pen.circle(place("cx", "cy"), SCALE * float(at["r"]), colour)
        elif mark.tag == "rect":
            x, y = place("x", "y")
            pen.rectangle(
                (x, y, x + SCALE * float(at["width"]), y + SCALE * float(at["height"])), colour
            )
        else:
            pen.line((place("x1", "y1"), place("x2", "y2")), colour, SCALE)
    return picture


def _figure(title: str, parts: list[str], legend: str, height: float, width: float = WIDTH) -> str:
    label = html.escape(title, quote=True)
    return (
        f"<figure><figcaption>{html.escape(title)}{legend}</figcaption>"
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{label}">'
        f"{''.join(parts)}</svg></figure>"
    )


def _legend(names: Iterable[str]) -> str:
    keys = (
        f'<span class="key s{number}">{html.escape(name)}</span>'
        for number, name in enumerate(names)
    )
    return f'<span class="legend">{"".join(keys)}</span>'


def _line(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
    return f'<line class="{style}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _curve(points: Points, series: int) -> str:
    """A line through the points; a single one is a dot."""
    if len(points) == 1:
        u, v = points[0]
        return f'<circle class="dot s{series}" cx="{u:.1f}" cy="{v:.1f}" r="3"/>'
    path = " ".join(f"{u:.1f},{v:.1f}" for u, v in points)
    return f'<polyline class="line s{series}" points="{path}"/>'


def _text(x: float, y: float, text: str, style: str, anchor: str) -> str:
    return (
        f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">'
        f"{html.escape(text)}</text>"
    )


def _box(x: float, y: float, width: float, height: float, style: str) -> str:
    size = f'width="{width:.1f}" height="{height:.1f}"'
    return f'<rect class="{style}" x="{x:.1f}" y="{y:.1f}" {size}/>'
