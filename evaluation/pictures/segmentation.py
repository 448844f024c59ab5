"""What a grouping made of a few images, beside the truth in the same colours, and IoU by class.

Letters: R the side of an evaluated image in pixels, C classes, K clusters.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from evaluation.datasets.layouts import VOID
from evaluation.pictures.drawing import FAINT, INK, PAPER, distinct, font

LINE = "#e5e7eb"
TILE, GAP, MARGIN, CAPTION = 240, 12, 32, 64
BAR = 26
VOID_COLOUR = (24, 24, 27)
CLASSES_SHOWN = 30


@dataclass(frozen=True)
class Sample:
    """One image: what it shows."""

    pixels: np.ndarray
    """uint8 [R, R, 3]"""
    truth: np.ndarray
    """uint8 [R, R], void 255"""


@dataclass(frozen=True)
class Column:
    """One grouping of all samples, matched to classes."""

    title: str
    clusters: list[np.ndarray]
    """int64 [R, R] for each sample"""
    matched: np.ndarray
    """int64 [C], the cluster of each class; -1 for none"""
    iou: np.ndarray
    """float64 [C], NaN for a class that no label shows"""


def palette(num_classes: int) -> np.ndarray:
    """uint8 [256, 3]: a colour for each class id, and for void."""
    colours = np.zeros((256, 3), np.uint8)
    colours[:num_classes] = distinct(num_classes)
    colours[VOID] = VOID_COLOUR
    return colours


def paint(clusters: np.ndarray, matched: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """Clusters int64 [R, R] → uint8 [R, R, 3] in the colours of their classes; clusters left over
    in greys.
    """
    count = max(int(clusters.max()), int(matched.max())) + 1
    greys = 150 + 37 * np.arange(count) % 90
    table = np.repeat(greys[:, None], 3, axis=1).astype(np.uint8)
    of_class = np.flatnonzero(matched >= 0)
    table[matched[of_class]] = colours[of_class]
    return table[clusters]


def draw_segmentations(
    samples: Sequence[Sample], columns: Sequence[Column], names: Sequence[str]
) -> Image.Image:
    """A row for each sample: image, truth, one tile a column; below, IoU of each class."""
    colours = palette(len(names))
    shown = [c for c in range(len(names)) if any(not np.isnan(k.iou[c]) for k in columns)]
    shown = sorted(shown, key=lambda c: -float(np.nanmax([k.iou[c] for k in columns])))
    shown = shown[:CLASSES_SHOWN]
    width = 2 * MARGIN + (2 + len(columns)) * (TILE + GAP) - GAP
    tiles = CAPTION + len(samples) * (TILE + GAP)
    height = 2 * MARGIN + tiles + CAPTION + len(shown) * (BAR + 6)
    picture = Image.new("RGB", (width, height), PAPER)
    pen = ImageDraw.Draw(picture)
    lefts = [MARGIN + i * (TILE + GAP) for i in range(2 + len(columns))]
    for left, title in zip(lefts, ["image", "truth", *(k.title for k in columns)], strict=True):
        write(pen, (left, MARGIN), title, INK)
    for row, sample in enumerate(samples):
        top = MARGIN + CAPTION + row * (TILE + GAP)
        own = [paint(column.clusters[row], column.matched, colours) for column in columns]
        for left, pixels in zip(lefts, [sample.pixels, colours[sample.truth], *own], strict=True):
            nearest = Image.Resampling.NEAREST if pixels is not sample.pixels else None
            tile = Image.fromarray(pixels).resize((TILE, TILE), nearest)
            picture.paste(tile, (left, top))
    top = MARGIN + tiles
    left_over = any((~np.isin(k.clusters, k.matched)).any() for k in columns)
    void = any((sample.truth == VOID).any() for sample in samples)
    caption = "IoU by class" + "; black: void" * void + "; grey: clusters of no class" * left_over
    write(pen, (lefts[0], top), caption, FAINT, 2 * TILE)
    for line, c in enumerate(shown):
        y = top + CAPTION + line * (BAR + 6)
        pen.rectangle((lefts[0], y + 4, lefts[0] + 18, y + BAR - 4), tuple(colours[c].tolist()))
        write(pen, (lefts[0] + 28, y), names[c], INK, room=2 * TILE - 30)
        for left, column in zip(lefts[2:], columns, strict=True):
            bar(pen, left, y, float(column.iou[c]), tuple(colours[c].tolist()))
    return picture


def bar(
    pen: ImageDraw.ImageDraw, left: int, top: int, share: float, colour: tuple[int, ...]
) -> None:
    """A share of a tile's width, with its number."""
    room = TILE - 70
    pen.rectangle((left, top + 4, left + room, top + BAR - 4), LINE)
    if not np.isnan(share):
        pen.rectangle((left, top + 4, left + round(room * share), top + BAR - 4), colour)
        write(pen, (left + room + 8, top), f"{share:.0%}", INK)


def write(
    pen: ImageDraw.ImageDraw, place: tuple[int, int], text: str, colour: str, room: int = TILE
) -> None:
    """A line of text as large as fits into `room` pixels, cut off if no size does."""
    for size in (20, 18, 16, 14, 12):
        letters = font(size)
        if pen.textlength(text, letters) <= room:
            break
    while pen.textlength(text, letters) > room:
        text = text.removesuffix("...")[:-1] + "..."
    pen.text(place, text, colour, letters)
