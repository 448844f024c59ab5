"""Pictures of a data set: histograms of the images' shapes and sizes, and a contact sheet."""

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pipeline.beton import Beton, CorruptRecord
from pipeline.parallel import ordered_map
from tools.report.charts import FAINT, INK, PAPER, decades, histogram, image, short, stacked, ticks

MISSING = "#f3d9d4"
RATIOS = (0.25, 1 / 3, 0.5, 2 / 3, 0.75, 1, 4 / 3, 1.5, 2, 3, 4)

# In pixels. The pictures are drawn at twice the size at which they are viewed.
MARGIN, CAPTION = 48, 100
COLUMNS, ROWS, CELL, LABEL, CELL_GAP = 8, 5, 280, 60, 16
HISTOGRAM = 1005
"""Width of a histogram, in the units of `tools.report.charts`."""


def histograms(beton: Beton) -> Image.Image:
    """Histograms of the longer side, the aspect ratio and the bytes of all images."""
    side, size = np.maximum(beton.height, beton.width), beton.records[:, 1]
    about = f"{_shorten(beton.path.name, 60)}: {len(beton):,} images, {size_text(beton.bytes)}"
    pictures = []
    for title, values, marks, label, logarithmic in (
        ("longest side, pixels", side, ticks(side.min(), side.max()), short, False),
        ("aspect, width : height", beton.width / beton.height, RATIOS, _ratio, True),
        ("bytes of a record", size, decades(size.min(), size.max()), size_text, True),
    ):
        chart = histogram(title, values, marks, label, logarithmic=logarithmic, width=HISTOGRAM)
        middle = label(float(np.median(values)))
        pictures.append(image(chart, f"{about}; median {middle}"))
    return stacked(pictures)


def contact_sheet(beton: Beton, workers: int) -> Image.Image:
    """Up to 40 images with their names and sizes, evenly spread over the file."""
    count = min(len(beton), COLUMNS * ROWS)
    chosen = np.linspace(0, len(beton) - 1, count).astype(np.int64).tolist()
    rows, columns = -(-count // COLUMNS), min(count, COLUMNS)
    width = 2 * MARGIN + max(columns, 4) * (CELL + CELL_GAP) - CELL_GAP
    height = 2 * MARGIN + CAPTION + rows * (CELL + LABEL + CELL_GAP) - CELL_GAP
    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN - 8), _shorten(beton.path.name, 60), INK, ImageFont.load_default(36))
    about = f"{count} of {len(beton):,} images"
    draw.text((MARGIN, MARGIN + 38), about, FAINT, ImageFont.load_default(26))
    label = ImageFont.load_default(18)
    thumbnails = ordered_map(lambda i: _thumbnail(beton, i), chosen, workers)
    for number, (i, thumbnail) in enumerate(zip(chosen, thumbnails, strict=True)):
        row, column = divmod(number, COLUMNS)
        x = MARGIN + column * (CELL + CELL_GAP)
        y = MARGIN + CAPTION + row * (CELL + LABEL + CELL_GAP)
        inset = ((CELL - thumbnail.width) // 2, CELL - thumbnail.height)
        sheet.paste(thumbnail, (x + inset[0], y + inset[1]))
        name, size = _shorten(beton.name(i), 26), f"{beton.width[i]} x {beton.height[i]}"
        draw.text((x + CELL // 2, y + CELL + 8), name, INK, label, anchor="ma")
        draw.text((x + CELL // 2, y + CELL + 32), size, FAINT, label, anchor="ma")
    return sheet


def _thumbnail(beton: Beton, i: int) -> Image.Image:
    """Image `i` within CELL × CELL pixels; a tinted square if it is damaged."""
    try:
        image = Image.fromarray(beton.decode(i))
    except CorruptRecord:
        image = Image.new("RGB", (CELL, CELL), MISSING)
        ImageDraw.Draw(image).text(
            (CELL // 2, CELL // 2), "damaged", INK, ImageFont.load_default(26), anchor="mm"
        )
    image.thumbnail((CELL, CELL), Image.Resampling.LANCZOS)
    return image


def _shorten(name: str, length: int) -> str:
    """A name for a picture: of a long name only the end, which differs between images; characters
    that cannot be printed become question marks.
    """
    shown = "".join(c if c.isprintable() else "?" for c in name)
    return shown if len(shown) <= length else "..." + shown[3 - length :]


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
