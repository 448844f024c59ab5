"""Rows of segments, one row a prototype: its number, the share of images in which it is active, and
its nearest segments with their cosine similarity.

Letters: R the side of an evaluated image in pixels, N prototypes of the picture.
"""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageChops, ImageDraw, ImageEnhance, ImageFilter

from evaluation.datasets.squares import SquareImages
from evaluation.pictures.drawing import FAINT, GAP, INK, MARGIN, OUTLINE, PAPER, font
from evaluation.prototypes import NearestSegments
from evaluation.segment import Segmenter, assign, segment_images

# In pixels of the picture, which is drawn at twice its display size.
TILE, LABEL = 160, 200
CAPTION, HEADING, BLOCK_GAP = 72, 52, 56


@dataclass(frozen=True)
class Tile:
    """One drawn segment."""

    picture: Image.Image
    """TILE × TILE pixels."""
    similarity: float


Rows = dict[int, list[Tile]]
"""The segments of each prototype, nearest first."""


def draw_segment(pixels: np.ndarray, mask: np.ndarray) -> Image.Image:
    """A square image uint8 [R, R, 3] with the segment bool [R, R] outlined, the rest dim."""
    image = Image.fromarray(pixels).resize((TILE, TILE), Image.Resampling.LANCZOS)
    inside = Image.fromarray(mask).convert("L").resize((TILE, TILE), Image.Resampling.BILINEAR)
    inside = inside.point(lambda value: 255 * (value > 127))
    dimmed = ImageEnhance.Brightness(ImageEnhance.Color(image).enhance(0.25)).enhance(0.45)
    drawn = Image.composite(image, dimmed, inside)
    edge = ImageChops.difference(inside, inside.filter(ImageFilter.MinFilter(5)))
    drawn.paste(OUTLINE, mask=edge.filter(ImageFilter.GaussianBlur(0.6)))
    return drawn


def cut_tiles(
    network: Segmenter, squares: SquareImages, nearest: NearestSegments, prototypes: np.ndarray
) -> Rows:
    """The drawn segments of `prototypes` int64 [N]. Decodes only the images that are drawn."""
    wanted = nearest.image[prototypes]
    pictures: dict[tuple[int, int], Image.Image] = {}
    needed = np.unique(wanted[wanted >= 0])
    size = squares.size
    for batch in segment_images(network, squares, "drawing", needed):
        winner = assign(batch.scores, size).cpu().numpy()
        cells = batch.scores.argmax(dim=1, keepdim=True).float()
        blocks = torch.nn.functional.interpolate(cells, (size, size)).squeeze(1).cpu().numpy()
        for i, number in enumerate(batch.squares.index.tolist()):
            for k in prototypes[(wanted == number).any(axis=1)].tolist():
                mask = winner[i] == k
                # A cell won narrowly may vanish in the upsampled map. Then draw its whole block.
                mask = mask if mask.any() else blocks[i] == k
                pictures[k, number] = draw_segment(batch.squares.pixels[i], mask)
    return {
        k: [
            Tile(pictures[k, number], similarity)
            for number, similarity in zip(
                nearest.image[k].tolist(), nearest.similarity[k].tolist(), strict=True
            )
            if number >= 0
        ]
        for k in prototypes.tolist()
    }


def draw_rows(title: str, nearest: NearestSegments, columns: list[tuple[str, Rows]]) -> Image.Image:
    """Columns of rows side by side, each with its heading (which may be empty)."""
    lines = max(len(rows) for _, rows in columns)
    head = CAPTION + (HEADING if any(heading for heading, _ in columns) else 0)
    block = LABEL + nearest.image.shape[1] * (TILE + GAP) - GAP
    width = 2 * MARGIN + len(columns) * block + (len(columns) - 1) * BLOCK_GAP
    height = 2 * MARGIN + head + lines * (TILE + GAP) - GAP
    picture = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(picture)
    draw.text((MARGIN, MARGIN - 8), title, INK, font(30))
    for number, (heading, rows) in enumerate(columns):
        left = MARGIN + number * (block + BLOCK_GAP)
        draw.text((left, MARGIN + CAPTION - 16), heading, INK, font(26))
        for line, (k, tiles) in enumerate(rows.items()):
            share = int(nearest.active[k]) / nearest.images
            draw_row(picture, left, MARGIN + head + line * (TILE + GAP), (k, share, tiles))
    return picture


def draw_row(picture: Image.Image, left: int, top: int, row: tuple[int, float, list[Tile]]) -> None:
    """Draw one prototype: number, frequency, tiles."""
    number, frequency, tiles = row
    draw = ImageDraw.Draw(picture)
    draw.text((left, top + TILE // 2 - 44), f"#{number}", INK, font(38))
    draw.text((left, top + TILE // 2 + 8), f"in {frequency:.0%} of images", FAINT, font(22))
    for column, tile in enumerate(tiles):
        x = left + LABEL + column * (TILE + GAP)
        picture.paste(tile.picture, (x, top))
        draw.rounded_rectangle((x + 6, top + TILE - 32, x + 62, top + TILE - 6), 6, "#000000")
        corner = (x + 34, top + TILE - 19)
        draw.text(corner, f"{tile.similarity:.2f}", PAPER, font(20), anchor="mm")
