"""Both views of an image as in training, with the boxes that the pipeline records.

Letters: B images, S side of a view in pixels. Boxes are x0 y0 x1 y1.
"""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from evaluation.datasets.images import ImageSource
from evaluation.pictures.drawing import OUTLINE, sheet
from evaluation.views import make_views
from pipeline.augment import IMAGENET_MEAN, IMAGENET_STD
from pipeline.views import ViewConfig

HEIGHT, WIDEST = 240, 420
"""Height and largest width of a panel, in pixels."""
THICK, THIN = 6, 2
"""Line widths in pixels: of a crop, and of the overlap, which may lie on top of it."""
CROPS = ("#2f6fed", "#12a150")
"""Colours of the first and of the second view."""
HIDDEN = 230
"""How much grey covers a masked cell, of 255."""

Box = tuple[float, ...]


@dataclass(frozen=True)
class DrawnPair:
    """One image, its views and their boxes."""

    image: np.ndarray
    """uint8 [H, W, 3]."""
    views: list[np.ndarray]
    """Two arrays uint8 [S, S, 3]."""
    crops: list[Box]
    """The box of each view, in pixels of the image."""
    overlaps: list[Box]
    """The overlap in the 0..1 frame of each view, after its flip; x1 <= x0 or y1 <= y0 if empty."""
    flipped: list[bool]
    masks: list[np.ndarray] | None = None
    """Two arrays bool [rows, columns], the hidden cells of each view; None in a run without."""


def draw_pairs(
    images: ImageSource, which: np.ndarray, seed: int, epoch: int, config: ViewConfig
) -> list[DrawnPair]:
    """The views of images `which` int64 [B] in `epoch` of a run with this `seed`, made by the
    reference backend; see `make_views`. Raises UserError.
    """
    pictures, views, params = make_views(images, which, seed, epoch, config)
    pixels = _pixels(views)
    return [
        DrawnPair(
            picture,
            list(pixels[:, b]),
            [tuple(crop) for crop in params.crops[:, b].tolist()],
            [tuple(overlap) for overlap in params.overlap[:, b].tolist()],
            params.flipped[:, b].tolist(),
            None if params.masks is None else list(params.masks[:, b]),
        )
        for b, picture in enumerate(pictures)
    ]


def shared(one: Box, other: Box) -> Box:
    """The intersection of two boxes; x1 <= x0 or y1 <= y0 if it is empty."""
    low = (max(a, b) for a, b in zip(one[:2], other[:2], strict=True))
    high = (min(a, b) for a, b in zip(one[2:], other[2:], strict=True))
    return (*low, *high)


def picture_of_views(pairs: list[DrawnPair], title: str) -> Image.Image:
    """One row a pair: the image with both crops, then the views, all with the overlap outlined.
    Cells that a mask hides are grey, their pixels faint.
    """
    rows = []
    for pair in pairs:
        whole = _panel(pair.image)
        height, width = pair.image.shape[:2]
        common = shared(*pair.crops)
        for box, colour in zip(pair.crops, CROPS, strict=True):
            _outline(whole, box, (width, height), colour, THICK)
        _outline(whole, common, (width, height), OUTLINE, THIN)
        text = f"{width} x {height} pixels" + ("" if _is_area(common) else ", nothing shared")
        row = [(whole, text)]
        for number in (0, 1):
            text = f"view {number + 1}" + (", flipped" if pair.flipped[number] else "")
            view = _panel(pair.views[number])
            if pair.masks:
                mask = pair.masks[number]
                view = _hidden(view, mask)
                text += f", {mask.mean():.0%} hidden"
            _outline(view, (0, 0, 1, 1), (1, 1), CROPS[number], THICK)
            _outline(view, pair.overlaps[number], (1, 1), OUTLINE, THIN)
            row.append((view, text))
        rows.append(row)
    return sheet(title, rows, ("image: crops and what they share", "view 1", "view 2"))


def _panel(pixels: np.ndarray) -> Image.Image:
    """The image scaled to `HEIGHT`, or to `WIDEST` if it would be wider."""
    height, width = pixels.shape[:2]
    scale = min(HEIGHT / height, WIDEST / width)
    side = (max(1, round(width * scale)), max(1, round(height * scale)))
    return Image.fromarray(pixels).resize(side, Image.Resampling.LANCZOS)


def _hidden(panel: Image.Image, mask: np.ndarray) -> Image.Image:
    """The panel with the cells of `mask` bool [rows, columns] greyed out."""
    cells = Image.fromarray(np.where(mask, HIDDEN, 0).astype(np.uint8))
    grey = Image.new("RGB", panel.size, "grey")
    return Image.composite(grey, panel, cells.resize(panel.size, Image.Resampling.NEAREST))


def _outline(panel: Image.Image, box: Box, frame: tuple[int, int], colour: str, line: int) -> None:
    """Draw `box`, given in a `frame` of (width, height), unless it is empty."""
    if not _is_area(box):
        return
    scale = panel.width / frame[0], panel.height / frame[1]
    left, top, right, bottom = (round(box[i] * scale[i % 2]) for i in range(4))
    corners = (left, top, max(left, right - 1), max(top, bottom - 1))
    ImageDraw.Draw(panel).rectangle(corners, outline=colour, width=line)


def _is_area(box: Box) -> bool:
    return box[2] > box[0] and box[3] > box[1]


def _pixels(views: Tensor) -> np.ndarray:
    """Normalised [2, B, 3, S, S] → uint8 [2, B, S, S, 3]."""
    mean, std = (torch.tensor(each)[:, None, None] for each in (IMAGENET_MEAN, IMAGENET_STD))
    levels = ((views * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
    return levels.movedim(2, -1).numpy()
