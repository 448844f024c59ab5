"""A picture of predictions on a few images beside the ground truth, and of IoU by class.

Letters: R the side of an evaluated image in pixels, C classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from evaluation.datasets.label_maps import VOID
from evaluation.datasets.labelled_squares import LabelledSquares
from evaluation.pictures.drawing import FAINT, INK, PAPER, distinct, font

LINE = "#e5e7eb"
TILE, GAP, MARGIN, CAPTION = 240, 12, 32, 44
BAR, LINE_HEIGHT = 24, 29
MEAN = (27, 31, 36)
VOID_COLOUR = (24, 24, 27)
CLASSES_SHOWN = 30


@dataclass(frozen=True)
class Sample:
    """One image and its labels."""

    pixels: np.ndarray
    """uint8 [R, R, 3]"""
    truth: np.ndarray
    """uint8 [R, R], void as 255"""


@dataclass(frozen=True)
class Column:
    """The predictions of one network for all samples."""

    title: str
    clusters: list[np.ndarray]
    """int64 [R, R] for each sample"""
    classes: np.ndarray
    """int64 [K], the class of each cluster; -1 for none"""
    iou: np.ndarray
    """float64 [C]; NaN for a class that does not count"""
    note: str | None = None
    """How the clusters were made"""


def read_samples(squares: LabelledSquares, numbers: np.ndarray) -> list[Sample]:
    """The images `numbers` int64 [M]. Raises UserError."""
    batches = squares.batches(indices=numbers)
    pairs = (pair for b in batches for pair in zip(b.pixels, squares.labels(b), strict=True))
    return [Sample(*pair) for pair in pairs]


def palette(num_classes: int) -> np.ndarray:
    """uint8 [256, 3]: a colour for each class id, and for void."""
    colours = np.zeros((256, 3), np.uint8)
    colours[:num_classes] = distinct(num_classes)
    colours[VOID] = VOID_COLOUR
    return colours


def paint(clusters: np.ndarray, classes: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """Clusters int64 [R, R] → uint8 [R, R, 3] in the colours of their `classes` int64 [K]; clusters
    without one in shades of grey.
    """
    greys = 150 + 37 * np.arange(len(classes)) % 90
    table = np.repeat(greys[:, None], 3, axis=1).astype(np.uint8)
    table[classes >= 0] = colours[classes[classes >= 0]]
    return table[clusters]


def draw_segmentations(
    samples: Sequence[Sample], columns: Sequence[Column], names: Sequence[str]
) -> Image.Image:
    """A row for each sample: image, ground truth, one tile for each column. Below them the IoU of
    each class.
    """
    colours = palette(len(names))
    shown = [c for c in range(len(names)) if any(not np.isnan(k.iou[c]) for k in columns)]
    shown = sorted(shown, key=lambda c: -float(np.nanmax([k.iou[c] for k in columns])))
    shown = shown[:CLASSES_SHOWN]
    width = 2 * MARGIN + (2 + len(columns)) * (TILE + GAP) - GAP
    tiles = CAPTION + len(samples) * (TILE + GAP)
    notes = [f"{column.title}: {column.note}" for column in columns if column.note]
    head = LINE_HEIGHT * (len(notes) + 1) + GAP
    height = 2 * MARGIN + tiles + head + (len(shown) + 1) * LINE_HEIGHT
    picture = Image.new("RGB", (width, height), PAPER)
    pen = ImageDraw.Draw(picture)
    lefts = [MARGIN + i * (TILE + GAP) for i in range(2 + len(columns))]
    for left, title in zip(lefts, ["image", "truth", *(k.title for k in columns)], strict=True):
        write(pen, (left, MARGIN), title, INK)
    for row, sample in enumerate(samples):
        top = MARGIN + CAPTION + row * (TILE + GAP)
        painted = [paint(column.clusters[row], column.classes, colours) for column in columns]
        tiles_of_row = [sample.pixels, colours[sample.truth], *painted]
        for left, pixels in zip(lefts, tiles_of_row, strict=True):
            nearest = Image.Resampling.NEAREST if pixels is not sample.pixels else None
            tile = Image.fromarray(pixels).resize((TILE, TILE), nearest)
            picture.paste(tile, (left, top))
    top = MARGIN + tiles
    unmatched = any((k.classes[np.stack(k.clusters)] < 0).any() for k in columns)
    void = any((sample.truth == VOID).any() for sample in samples)
    caption = "IoU by class" + "; black: void" * void + "; grey: clusters of no class" * unmatched
    for line, text in enumerate([*notes, caption]):
        write(pen, (lefts[0], top + line * LINE_HEIGHT), text, FAINT, width - 2 * MARGIN)
    top += head
    for line, c in enumerate(shown):
        y, colour = top + line * LINE_HEIGHT, tuple(colours[c].tolist())
        pen.rectangle((lefts[0], y + 4, lefts[0] + 18, y + BAR - 4), colour)
        write(pen, (lefts[0] + 28, y), names[c], INK, room=2 * TILE - 30)
        for left, column in zip(lefts[2:], columns, strict=True):
            bar(pen, left, y, float(column.iou[c]), colour)
    y = top + len(shown) * LINE_HEIGHT
    write(pen, (lefts[0] + 28, y), "mean of all classes", INK, room=2 * TILE - 30)
    for left, column in zip(lefts[2:], columns, strict=True):
        bar(pen, left, y, float(np.nanmean(column.iou)), MEAN)
    return picture


def bar(
    pen: ImageDraw.ImageDraw, left: int, top: int, share: float, colour: tuple[int, ...]
) -> None:
    """A horizontal bar as long as `share`, with its number."""
    room = TILE - 70
    pen.rectangle((left, top + 4, left + room, top + BAR - 4), LINE)
    if not np.isnan(share):
        pen.rectangle((left, top + 4, left + round(room * share), top + BAR - 4), colour)
        write(pen, (left + room + 8, top), f"{share:.0%}", INK)


def write(
    pen: ImageDraw.ImageDraw, corner: tuple[int, int], text: str, colour: str, room: int = TILE
) -> None:
    """Write a line of text as large as fits into `room` pixels; shorten it if no size fits."""
    for size in (20, 18, 16, 14, 12):
        letters = font(size)
        if pen.textlength(text, letters) <= room:
            break
    while pen.textlength(text, letters) > room:
        text = text.removesuffix("...")[:-1] + "..."
    pen.text(corner, text, colour, letters)
