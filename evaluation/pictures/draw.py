"""Draws the pictures of `evaluation.pictures`, each from the options of the command."""

import argparse
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image

from evaluation.commands import open_run, side_for
from evaluation.datasets.images import ImageSource, open_images, spread
from evaluation.datasets.squares import SquareImages
from evaluation.networks import default_device, run_config
from evaluation.pictures.components import component_colours
from evaluation.pictures.drawing import overlay, prototype_colours, sheet
from evaluation.pictures.prototypes import cut_tiles, draw_rows
from evaluation.pictures.views import draw_pairs, picture_of_views
from evaluation.prototypes import gather_statistics
from evaluation.segment import Segmenter, assign, segment_images
from evaluation.specs import open_all
from pipeline.errors import UserError
from train.run.checkpoint import find, step_of, whole_ones

PANEL = 240
"""Side of a panel in pixels."""
ONE_COLUMN = 6
"""Up to this many prototypes are drawn in one column, more in two."""
PER_ROW = 3
"""Images in a row of `grouping`."""


def draw_prototypes(args: argparse.Namespace) -> Image.Image:
    """The nearest segments of each prototype in a row, the most frequent prototype first."""
    images = open_images(args.data)
    network, _, squares = open_run(args.checkpoint, images, args.size, args.batch)
    indices = spread(len(images), args.max_images)
    batches = segment_images(network, squares, "segmenting", indices)
    nearest = gather_statistics(batches, args.top).nearest
    shown = nearest.by_frequency()[: args.prototypes]
    tiles = cut_tiles(network, squares, nearest, shown)
    active, total = int((nearest.active > 0).sum()), len(nearest.active)
    title = (
        f"{len(shown)} most frequent of {active} active prototypes"
        f" ({total} in all, {nearest.images} images)"
    )
    lines = -(-len(shown) // (1 if len(shown) <= ONE_COLUMN else 2))
    order = list(tiles.items())
    parts = [dict(order[begin : begin + lines]) for begin in range(0, len(order), lines)]
    return draw_rows(title, nearest, [("", part) for part in parts])


def draw_grouping(args: argparse.Namespace) -> Image.Image:
    """Images beside themselves under the colours of the prototypes that win their pixels."""
    images = open_images(args.data)
    network, config, squares = open_run(args.checkpoint, images, args.size)
    pixels, winners = group(network, squares, choose(args, images))
    colours = prototype_colours(winners, config.model.num_prototypes)
    panels = [
        pair
        for image, winner in zip(pixels, winners, strict=True)
        for pair in (plain_panel(image), grouped_panel(image, winner, colours))
    ]
    rows = [panels[begin : begin + 2 * PER_ROW] for begin in range(0, len(panels), 2 * PER_ROW)]
    shown = len(np.unique(winners))
    title = f"{shown} of {len(colours)} prototypes in {len(pixels)} images, a colour each"
    return sheet(title, rows)


def draw_features(args: argparse.Namespace) -> Image.Image:
    """Images beside the principal components of their features: a column for each network and
    stage, whose components are those of the images that are drawn.
    """
    images = open_images(args.data)
    which = choose(args, images)
    size = args.size or side_for(args.checkpoint)
    squares = SquareImages(images, size, default_device())
    columns: dict[str, np.ndarray] = {}
    for features in open_all(args, squares):
        batches = list(squares.batches(features.name, which))
        maps = torch.cat([features(batch.normalised(squares.device)) for batch in batches])
        columns[features.name] = component_colours(maps)
    pixels = np.concatenate([batch.pixels for batch in batches])
    rows = [
        [plain_panel(image), *(component_panel(colours[b]) for colours in columns.values())]
        for b, image in enumerate(pixels)
    ]
    return sheet("principal components of features", rows, ["image", *columns])


def draw_views(args: argparse.Namespace) -> Image.Image:
    """Both views of images as in training: crops, flips, overlap, masks."""
    images = open_images(args.data)
    config = run_config(args.checkpoint)
    if not 0 <= args.epoch < config.train.epochs:
        raise UserError(f"--epoch must be in 0..{config.train.epochs - 1}, not {args.epoch}")
    views = config.views_of(args.epoch)
    which = choose(args, images)
    pairs = draw_pairs(images, which, config.train.seed, args.epoch, views)
    title = f"views of {views.size} pixels, epoch {args.epoch}, seed {config.train.seed}"
    return picture_of_views(pairs, title)


def draw_attention(args: argparse.Namespace) -> Image.Image:
    """The grouping of the same images at several checkpoints. A prototype keeps its colour."""
    checkpoints = whole_ones(args.run)
    if not checkpoints:
        find(args.run)  # raises the reason, unless it is a checkpoint itself
        raise UserError(f"{args.run}: a checkpoint; --run needs the folder of its run")
    chosen = [checkpoints[i] for i in spread_ends(len(checkpoints), args.columns)]
    images = open_images(args.data)
    which = choose(args, images)
    strips = []
    for checkpoint in chosen:
        network, config, squares = open_run(checkpoint, images, args.size)
        pixels, winners = group(network, squares, which)
        strips.append(winners)
    colours = prototype_colours(np.stack(strips), config.model.num_prototypes)
    rows = [
        [plain_panel(image), *(grouped_panel(image, strip[b], colours) for strip in strips)]
        for b, image in enumerate(pixels)
    ]
    names = ["image", *(f"step {step_of(checkpoint)}" for checkpoint in chosen)]
    return sheet(f"{args.run.resolve().name}: grouping over the training", rows, names)


def group(
    network: Segmenter, squares: SquareImages, which: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The images `which` int64 [B] as squares of R pixels, uint8 [B, R, R, 3], and the prototype
    that wins each pixel, int64 [B, R, R].
    """
    batches = segment_images(network, squares, "segmenting", which)
    parts = [(b.squares.pixels, assign(b.scores, squares.size).cpu().numpy()) for b in batches]
    pixels, winners = (np.concatenate(part) for part in zip(*parts, strict=True))
    return pixels, winners


def choose(args: argparse.Namespace, images: ImageSource) -> np.ndarray:
    """int64 [B], the images to draw: those of --only, or --images of them at even distances. Raises
    UserError.
    """
    if args.only is None:
        return spread(len(images), args.images)
    wrong = [number for number in args.only if not 0 <= number < len(images)]
    if wrong:
        raise UserError(f"--only {wrong[0]}: {args.data} has the images 0 to {len(images) - 1}")
    return np.array(args.only, np.int64)


def spread_ends(count: int, at_most: int) -> list[int]:
    """At most `at_most` of 0 … count-1 at even distances, with the first and the last. The last one
    if `at_most` is 1.
    """
    taken = min(count, at_most)
    if taken == 1:
        return [count - 1]
    return [round(i * (count - 1) / (taken - 1)) for i in range(taken)]


def plain_panel(image: np.ndarray) -> tuple[Image.Image, str]:
    """An image uint8 [R, R, 3] as a panel of `sheet`, without a caption."""
    return panel(Image.fromarray(image)), ""


def grouped_panel(
    image: np.ndarray, winner: np.ndarray, colours: np.ndarray
) -> tuple[Image.Image, str]:
    """An image under the colours of its prototypes, and their number as caption; see `overlay`."""
    return panel(overlay(image, winner, colours)), f"{len(np.unique(winner))} prototypes"


def component_panel(colours: np.ndarray) -> tuple[Image.Image, str]:
    """Colours of cells uint8 [h, w, 3] as a panel of `sheet`, with the size of the map."""
    height, width = colours.shape[:2]
    picture = Image.fromarray(colours).resize((PANEL, PANEL), Image.Resampling.BILINEAR)
    return picture, f"{height} x {width} cells"  # its font has no ×


def panel(image: Image.Image) -> Image.Image:
    """The image scaled to PANEL × PANEL pixels."""
    return image.resize((PANEL, PANEL), Image.Resampling.LANCZOS)


DRAW: dict[str, Callable[[argparse.Namespace], Image.Image]] = {
    "prototypes": draw_prototypes,
    "grouping": draw_grouping,
    "features": draw_features,
    "views": draw_views,
    "attention": draw_attention,
}
