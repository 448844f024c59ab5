"""Charts as inline SVG: no scripts, no files, colours from the page's CSS variables.

Classes used: `grid`, `axis`, `tick`, `name`, and `s0` … `s3` for the series' colours.
"""

import html
import math
from collections.abc import Iterable, Mapping, Sequence

WIDTH, HEIGHT = 560, 256
LEFT, RIGHT, TOP, BOTTOM = 52, 16, 30, 40
MAX_POINTS = 240
LARGEST = 1e30

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


def thin(points: Points) -> list[tuple[float, float]]:
    """At most `MAX_POINTS` points, each the mean of its neighbours."""
    size = max(1, -(-len(points) // MAX_POINTS))
    groups = (points[i : i + size] for i in range(0, len(points), size))
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]


def line_chart(
    title: str,
    series: Mapping[str, Points],
    *,
    x_name: str = "step",
    reference: tuple[str, float] | None = None,
    from_zero: bool = False,
    percent: bool = False,
) -> str:
    """Lines over a common axis. `reference` is a named horizontal line; points that are not finite,
    or hardly, are left out.
    """
    lines = {
        name: thin([p for p in points if abs(p[1]) < LARGEST]) for name, points in series.items()
    }
    xs = [x for points in lines.values() for x, _ in points] or [0.0]
    ys = [y for points in lines.values() for _, y in points] or [0.0]
    ys += [reference[1]] if reference else []
    low, high = (0.0 if from_zero else min(ys)), max(ys)
    pad = 0.06 * (high - low) or max(abs(high) * 0.1, 0.1)
    low, high = (low if from_zero else low - pad), high + pad
    left, right = min(xs), max(*xs, min(xs) + 1)

    def at(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (WIDTH - LEFT - RIGHT) * (x - left) / (right - left)
        return across, HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (y - low) / (high - low)

    parts = []
    for y in ticks(low, high):
        _, v = at(left, y)
        label = f"{y:.0%}" if percent else short(y)
        parts.append(_line(LEFT, v, WIDTH - RIGHT, v, "grid"))
        parts.append(_text(LEFT - 8, v + 4, label, "tick", "end"))
    for x in ticks(left, right, 5):
        u, _ = at(x, low)
        parts.append(_text(u, HEIGHT - BOTTOM + 18, short(x), "tick", "middle"))
    parts.append(_text(WIDTH - RIGHT, HEIGHT - 5, x_name, "tick", "end"))
    parts.append(_line(LEFT, HEIGHT - BOTTOM, WIDTH - RIGHT, HEIGHT - BOTTOM, "axis"))
    if reference:
        _, v = at(left, reference[1])
        parts.append(_line(LEFT, v, WIDTH - RIGHT, v, "reference"))
        parts.append(_text(WIDTH - RIGHT, v - 5, reference[0], "tick", "end"))
    for number, points in enumerate(lines.values()):
        path = " ".join("{:.1f},{:.1f}".format(*at(x, y)) for x, y in points)
        parts.append(f'<polyline class="line s{number}" points="{path}"/>')
    return _figure(title, parts, _legend(lines) if len(lines) > 1 else "", HEIGHT)


def dot_chart(title: str, rows: Iterable[tuple[str, float, float, float]], *, unit: str) -> str:
    """Rows (name, value, lowest, highest), all positive, as dots with their range on a logarithmic
    axis.
    """
    rows = list(rows)
    row_height, names, values = 26, 190, 96
    height = TOP + row_height * len(rows) + 24
    low = math.floor(math.log10(min(lowest for _, _, lowest, _ in rows)))
    high = max(low + 1, math.ceil(math.log10(max(highest for *_, highest in rows))))

    def at(value: float) -> float:
        return names + (WIDTH - names - values) * (math.log10(value) - low) / (high - low)

    parts = []
    for power in range(low, high + 1):
        parts.append(_line(at(10**power), TOP - 6, at(10**power), height - 22, "grid"))
        parts.append(_text(at(10**power), height - 6, short(10**power), "tick", "middle"))
    for place, (name, value, lowest, highest) in enumerate(rows):
        v = TOP + row_height * (place + 0.5)
        parts.append(_text(names - 12, v + 4, name, "name", "end"))
        parts.append(_line(at(lowest), v, at(highest), v, "line s0"))
        parts.append(f'<circle class="dot s0" cx="{at(value):.1f}" cy="{v:.1f}" r="5"/>')
        parts.append(_text(WIDTH, v + 4, short(value), "name", "end"))
    parts.append(_text(WIDTH, TOP - 10, unit, "tick", "end"))
    return _figure(title, parts, "", height)


def _figure(title: str, parts: list[str], legend: str, height: float) -> str:
    label = html.escape(title, quote=True)
    return (
        f"<figure><figcaption>{html.escape(title)}{legend}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{label}">'
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


def _text(x: float, y: float, text: str, style: str, anchor: str) -> str:
    return (
        f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">'
        f"{html.escape(text)}</text>"
    )
