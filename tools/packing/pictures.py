"""Pictures of a data set: histograms of the images' shapes and sizes, and a contact sheet."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pipeline.beton import Beton, CorruptRecord
from pipeline.parallel import ordered_map
from tools.report.charts import short, ticks

INK, FAINT, RULE, PAPER, BAR, MISSING = (
    "#1b1f24", "#6b7280", "#e5e7eb", "#ffffff", "#2f6fde", "#f3d9d4",
)  # fmt: skip

# In pixels. The pictures are drawn at twice the size at which they are viewed.
MARGIN, CAPTION = 48, 100
PANEL, PANEL_GAP, PLOT, AXIS, TITLE = 760, 96, 420, 64, 92
BINS = 48
COLUMNS, ROWS, CELL, LABEL, CELL_GAP = 8, 5, 280, 60, 16


@dataclass(frozen=True)
class Panel:
    """One histogram. `scale` maps values to positions on the axis: the identity or a logarithm."""

    title: str
    values: np.ndarray
    ticks: Sequence[float]
    scale: Callable[[np.ndarray], np.ndarray]
    label: Callable[[float], str]


def histograms(beton: Beton) -> Image.Image:
    """Histograms of the longer side, the aspect ratio and the bytes of all images."""
    side = np.maximum(beton.height, beton.width)
    size = beton.records[:, 1]
    panels = [
        Panel("longest side, pixels", side, ticks(int(side.min()), int(side.max())), _same, short),
        Panel(
            "aspect, width : height",
            beton.width / beton.height,
            (0.25, 1 / 3, 0.5, 2 / 3, 0.75, 1, 4 / 3, 1.5, 2, 3, 4),
            np.log,
            _ratio,
        ),
        Panel("bytes of a record", size, _decades(size), np.log, size_text),
    ]
    width = MARGIN + len(panels) * (PANEL + PANEL_GAP)
    picture = Image.new("RGB", (width, 2 * MARGIN + CAPTION + TITLE + PLOT + AXIS), PAPER)
    draw = ImageDraw.Draw(picture)
    _caption(draw, beton, f"{len(beton):,} images, {size_text(beton.bytes)}")
    for number, panel in enumerate(panels):
        _draw_panel(draw, MARGIN + number * (PANEL + PANEL_GAP), MARGIN + CAPTION, panel)
    return picture


def contact_sheet(beton: Beton, workers: int) -> Image.Image:
    """Up to 40 images with their names and sizes, evenly spread over the file."""
    count = min(len(beton), COLUMNS * ROWS)
    chosen = np.linspace(0, len(beton) - 1, count).astype(np.int64).tolist()
    rows, columns = -(-count // COLUMNS), min(count, COLUMNS)
    width = 2 * MARGIN + max(columns, 4) * (CELL + CELL_GAP) - CELL_GAP
    height = 2 * MARGIN + CAPTION + rows * (CELL + LABEL + CELL_GAP) - CELL_GAP
    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    _caption(draw, beton, f"{count} of {len(beton):,} images")
    thumbnails = ordered_map(lambda i: _thumbnail(beton, i), chosen, workers)
    for number, (i, thumbnail) in enumerate(zip(chosen, thumbnails, strict=True)):
        row, column = divmod(number, COLUMNS)
        x = MARGIN + column * (CELL + CELL_GAP)
        y = MARGIN + CAPTION + row * (CELL + LABEL + CELL_GAP)
        inset = ((CELL - thumbnail.width) // 2, CELL - thumbnail.height)
        sheet.paste(thumbnail, (x + inset[0], y + inset[1]))
        name = _shorten(beton.name(i), 26)
        draw.text((x + CELL // 2, y + CELL + 8), name, INK, _font(18), anchor="ma")
        size = f"{beton.width[i]} x {beton.height[i]}"
        draw.text((x + CELL // 2, y + CELL + 32), size, FAINT, _font(18), anchor="ma")
    return sheet


def _thumbnail(beton: Beton, i: int) -> Image.Image:
    """Image `i` within CELL × CELL pixels; a tinted square if it is damaged."""
    try:
        image = Image.fromarray(beton.decode(i))
    except CorruptRecord:
        image = Image.new("RGB", (CELL, CELL), MISSING)
        ImageDraw.Draw(image).text((CELL // 2, CELL // 2), "damaged", INK, _font(26), anchor="mm")
    image.thumbnail((CELL, CELL), Image.Resampling.LANCZOS)
    return image


def _draw_panel(draw: ImageDraw.ImageDraw, left: int, top: int, panel: Panel) -> None:
    scaled = panel.scale(panel.values)
    low, high = float(scaled.min()), float(scaled.max())
    pad = 0.5 if low == high else (high - low) * 0.02
    counts, edges = np.histogram(scaled, BINS, (low - pad, high + pad))
    base = top + TITLE + PLOT

    def across(value: float) -> float:
        return left + PANEL * (value - edges[0]) / (edges[-1] - edges[0])

    draw.text((left, top), panel.title, INK, _font(30))
    middle = f"median {panel.label(float(np.median(panel.values)))}"
    draw.text((left, top + 40), middle, FAINT, _font(24))
    for count in ticks(0, int(counts.max()), 4)[1:]:
        y = base - PLOT * count / counts.max()
        draw.line((left, y, left + PANEL, y), RULE, 2)
        draw.text((left + PANEL + 10, y), short(count), FAINT, _font(20), anchor="lm")
    for count, begin, end in zip(counts, edges[:-1], edges[1:], strict=True):
        if count:  # at least 3 pixels high, so that one image among a million shows
            y = base - max(3, PLOT * count / counts.max())
            draw.rectangle((across(begin) + 1, y, across(end) - 1, base), BAR)
    draw.line((left, base, left + PANEL, base), FAINT, 2)
    free = -math.inf  # the end of the last label
    for value in panel.ticks:
        x, label = across(float(panel.scale(np.array(value)))), panel.label(value)
        half = draw.textlength(label, _font(22)) / 2
        if x - half < max(free, left - half) or x > left + PANEL:
            continue
        draw.line((x, base, x, base + 8), FAINT, 2)
        draw.text((x, base + 14), label, FAINT, _font(22), anchor="ma")
        free = x + half + 14


def _caption(draw: ImageDraw.ImageDraw, beton: Beton, text: str) -> None:
    draw.text((MARGIN, MARGIN - 8), _shorten(beton.path.name, 60), INK, _font(36))
    draw.text((MARGIN, MARGIN + 38), text, FAINT, _font(26))


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _shorten(name: str, length: int) -> str:
    """A name for a picture: of a long name only the end, which differs between images; characters
    that cannot be printed become question marks.
    """
    shown = "".join(c if c.isprintable() else "?" for c in name)
    return shown if len(shown) <= length else "..." + shown[3 - length :]


def _same(value: np.ndarray) -> np.ndarray:
    return value


def _decades(values: np.ndarray) -> list[float]:
    """1, 2 and 5 times the powers of ten around `values`."""
    powers = range(int(math.log10(values.min())), int(math.log10(values.max())) + 1)
    return [m * 10.0**power for power in powers for m in (1, 2, 5)]


def size_text(value: float) -> str:
    """A number of bytes: 22.6 kB, 30.7 MB, 19.3 GB."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f} B"


def _ratio(value: float) -> str:
    """1:2, 3:4, 4:3, or 1.26 if the ratio is not one of small numbers."""
    for height in (1, 2, 3, 4):
        width = value * height
        if abs(width - round(width)) < 0.01 and 1 <= round(width) <= 4:
            return f"{round(width)}:{height}"
    return f"{value:.2f}"
