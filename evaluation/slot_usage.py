"""How a run uses its prototypes; `evaluation.slots` is the command."""

import argparse
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from evaluation.commands import open_run
from evaluation.datasets.images import open_images, spread
from evaluation.datasets.squares import SquareImages
from evaluation.options import SHOWN
from evaluation.pictures.drawing import write_picture
from evaluation.pictures.prototypes import cut_tiles, draw_rows
from evaluation.prototypes import NearestSegments, SlotStatistics, gather_statistics
from evaluation.segment import Segmenter, segment_images
from train.health import DUPLICATE, prototype_cosines
from train.run.checkpoint import find, step_of
from train.run.provenance import provenance, write_json


def report_usage(args: argparse.Namespace) -> None:
    """Count, print, and write the files that the options name. Raises UserError."""
    images = open_images(args.data)
    network, config, squares = open_run(args.checkpoint, images, args.size, args.batch)
    indices = spread(len(images), args.max_images)
    batches = segment_images(network, squares, "segmenting", indices)
    statistics = gather_statistics(batches, args.top)
    duplicates = duplicate_pairs(network.teacher.grouping.prototypes)
    print(describe(statistics, duplicates))
    if args.picture:
        write_picture(args.picture, draw_ends(network, squares, statistics))
    if args.json:
        step = step_of(find(args.checkpoint))
        common = {
            "step": step,
            "images": len(indices),
            "size": squares.size,
            "seed": config.train.seed,
        }
        rows = result_rows(statistics, duplicates, common)
        write_json(args.json, provenance() | {"results": rows})


def duplicate_pairs(prototypes: Tensor) -> list[tuple[int, int, float]]:
    """Near-duplicates among prototypes [K, D]: their numbers and cosine, the nearest pair first."""
    cosines = prototype_cosines(prototypes).cpu()
    numbers = (cosines > DUPLICATE).nonzero().tolist()
    pairs = [(i, j, float(cosines[i, j])) for i, j in numbers]
    return sorted(pairs, key=lambda pair: -pair[2])


def result_rows(
    statistics: SlotStatistics, duplicates: list[tuple[int, int, float]], common: dict[str, Any]
) -> list[dict[str, Any]]:
    """One row a number, for --json: of all prototypes, of each prototype, of each near-duplicate
    pair.
    """
    slots, cells, nearest = statistics.slots, statistics.cells, statistics.nearest
    whole = {
        "active_slots": float(slots.mean()),
        "active_slots_sd": float(slots.std()),
        "usage_entropy": statistics.entropy,
        "dead_prototypes": statistics.dead,
        "near_duplicates": len(duplicates),
    }
    rows = [{"metric": name, "value": value, **common} for name, value in whole.items()]
    for name, values in (
        ("image_share", nearest.active / nearest.images),
        ("cell_share", cells / cells.sum()),
    ):
        rows += [
            {"metric": name, "prototype": k, "value": value, **common}
            for k, value in enumerate(values.tolist())
        ]
    return rows + [
        {"metric": "cosine", "prototypes": [i, j], "value": cosine, **common}
        for i, j, cosine in duplicates
    ]


def describe(statistics: SlotStatistics, duplicates: list[tuple[int, int, float]]) -> str:
    """The numbers as lines of text."""
    slots, nearest = statistics.slots, statistics.nearest
    total = len(statistics.cells)
    often, seldom = (
        ", ".join(f"#{k} {nearest.active[k] / nearest.images:.0%}" for k in end)
        for end in ends(nearest)
    )
    same = ", ".join(f"#{i} #{j} {cosine:.2f}" for i, j, cosine in duplicates[:SHOWN])
    lines = (
        ("active slots an image", f"{slots.mean():.2f} ± {slots.std():.2f}"
         f" ({slots.min()} to {slots.max()}, {len(slots)} images)"),
        ("usage entropy", f"{statistics.entropy:.3f} of log {total}"),
        ("dead prototypes", f"{statistics.dead} of {total}"),
        ("near-duplicates", f"{len(duplicates)} pairs with a cosine above {DUPLICATE:g}"
         + (f": {same}" if same else "")),
        ("in most images", often),
        ("in fewest images", seldom),
    )  # fmt: skip
    return "\n".join(f"{name:22} {text}" for name, text in lines if text)


def ends(nearest: NearestSegments) -> tuple[np.ndarray, np.ndarray]:
    """The prototypes that are active in most images, and those of the others that are active in
    fewest; each int64, at most `SHOWN`.
    """
    order = nearest.by_frequency()
    return order[:SHOWN], order[SHOWN:][-SHOWN:][::-1]


def draw_ends(network: Segmenter, squares: SquareImages, statistics: SlotStatistics) -> Image.Image:
    """The nearest segments of the most frequent and of the rarest active prototypes."""
    nearest = statistics.nearest
    both = ends(nearest)
    tiles = cut_tiles(network, squares, nearest, np.concatenate(both))
    often, seldom = ({k: tiles[k] for k in end.tolist()} for end in both)
    title = (
        f"{statistics.slots.mean():.1f} of {len(statistics.cells)} slots active an image,"
        f" usage entropy {statistics.entropy:.2f}, {statistics.dead} dead"
    )
    columns = [("in most images", often)] + ([("in fewest", seldom)] if seldom else [])
    return draw_rows(title, nearest, columns)
