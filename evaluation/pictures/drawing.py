"""Drawing that the pictures share: colours, segments over an image, sheets of panels, files.

Letters: K prototypes, R the side of an evaluated image in pixels.
"""

import colorsys
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pipeline.errors import UserError
from train.run.cli import check_writable
from train.run.provenance import write_bytes

INK, FAINT, PAPER, OUTLINE = "#1b1f24", "#6b7280", "#ffffff", "#ff4d2e"
MARGIN, GAP, TITLE, CAPTION = 40, 10, 56, 34
FORMATS = (".png", ".jpg", ".webp")

_GOLDEN = 0.6180339887  # step on the circle of hues: the next hue falls into the largest gap
_LOOKS = ((0.62, 0.9), (0.5, 0.66), (0.75, 0.55), (0.3, 0.95))  # saturation and value, in turn
_COVER = 0.55  # opacity of a segment's colour over the image


Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def font(size: int) -> Font:
    """Pillow's default font, `size` pixels high."""
    return ImageFont.load_default(size)


def fitting_font(
    text: str, width: int, size: int = 20
) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The font of at most `size` pixels in which `text` is at most `width` pixels wide."""
    while size > 8 and font(size).getlength(text) > width:
        size -= 1
    return font(size)


def check_picture(option: str, path: Path) -> None:
    """Raise UserError if no picture can be written to `path`."""
    if path.suffix.lower() not in FORMATS:
        raise UserError(f"{option} {path}: must end in {', '.join(FORMATS)}")
    check_writable(option, path)


def write_picture(path: Path, picture: Image.Image) -> None:
    """Write the picture in the format of the suffix, atomically, and print its size. Raises
    UserError.
    """
    stream = io.BytesIO()
    picture.save(stream, Image.registered_extensions()[path.suffix.lower()])
    write_bytes(path, stream.getvalue())
    print(f"wrote {path}: {picture.width}×{picture.height} pixels")


def distinct(count: int) -> np.ndarray:
    """uint8 [count, 3]: colours; the first ones differ most from each other."""
    colours = [
        colorsys.hsv_to_rgb(i * _GOLDEN % 1, *_LOOKS[i // 8 % len(_LOOKS)]) for i in range(count)
    ]
    return np.round(255 * np.array(colours).reshape(-1, 3)).astype(np.uint8)


def prototype_colours(winners: np.ndarray, num_prototypes: int) -> np.ndarray:
    """uint8 [K, 3]: one colour a prototype. Prototypes that win most pixels of `winners` (int, any
    shape) get the most different colours.
    """
    pixels = np.bincount(winners.ravel(), minlength=num_prototypes)
    colours = np.empty((num_prototypes, 3), np.uint8)
    colours[np.argsort(-pixels, kind="stable")] = distinct(num_prototypes)
    return colours


def overlay(pixels: np.ndarray, winner: np.ndarray, colours: np.ndarray) -> Image.Image:
    """An image uint8 [R, R, 3], in grey, under the `colours` of its segments, with white borders.
    `winner` int [R, R] gives the segment of each pixel.
    """
    grey = pixels.mean(axis=-1, keepdims=True)  # so that all colour in the result is a segment's
    mixed = (1 - _COVER) * grey + _COVER * colours[winner]
    border = np.zeros(winner.shape, bool)
    border[:, 1:] |= winner[:, 1:] != winner[:, :-1]
    border[1:] |= winner[1:] != winner[:-1]
    mixed[border] = 255
    return Image.fromarray(np.round(mixed).astype(np.uint8))


def sheet(
    title: str,
    rows: Sequence[Sequence[tuple[Image.Image, str]]],
    columns: Sequence[str] = (),
) -> Image.Image:
    """Rows of panels with a caption below each, under a title and the names of the columns.

    A column is as wide as its widest panel, a row as high as its highest.
    """
    widths = [
        max(row[i][0].width for row in rows if i < len(row)) for i in range(max(map(len, rows)))
    ]
    heights = [max(panel.height for panel, _ in row) for row in rows]
    captions = [CAPTION if any(caption for _, caption in row) else 0 for row in rows]
    top = MARGIN + TITLE + (CAPTION if columns else 0)
    width = 2 * MARGIN + sum(widths) + GAP * (len(widths) - 1)
    height = top + sum(heights) + sum(captions) + GAP * (len(rows) - 1) + MARGIN
    title_font = font(28)
    picture = Image.new(
        "RGB", (max(width, round(title_font.getlength(title)) + 2 * MARGIN), height)
    )
    picture.paste(PAPER, (0, 0, *picture.size))
    draw = ImageDraw.Draw(picture)
    draw.text((MARGIN, MARGIN - 8), title, INK, title_font)
    lefts = [MARGIN + sum(widths[:i]) + GAP * i for i in range(len(widths))]
    for left, wide, name in zip(lefts, widths, columns, strict=False):
        draw.text((left, top - CAPTION + 2), name, INK, fitting_font(name, wide))
    for row, line, caption in zip(rows, heights, captions, strict=True):
        for left, (panel, text) in zip(lefts, row, strict=False):
            picture.paste(panel, (left, top))
            draw.text((left, top + line + 6), text, FAINT, font(18))
        top += line + caption + GAP
    return picture
