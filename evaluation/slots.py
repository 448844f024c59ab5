"""How a run uses its prototypes: active slots an image, how often each prototype is active, usage
entropy, prototypes that never win, prototypes that are nearly the same.

A slot is active in an image if its prototype wins at least one cell. Counts are those of the
teacher, over whole images.
"""

import argparse
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from evaluation.datasets.images import ImageSource, evaluation_size, open_images, spread
from evaluation.networks import default_device, load_network
from evaluation.pictures.drawing import check_picture, write_picture
from evaluation.pictures.prototypes import cut_tiles, draw_rows
from evaluation.prototypes import NearestSegments, segment_similarity
from evaluation.segment import Segmented, Segmenter, segment_images
from model.grouping import won_cells
from pipeline.errors import UserError
from train.health import DUPLICATE, prototype_cosines, usage_entropy
from train.run.checkpoint import find, step_of
from train.run.cli import CommandParser, check_writable, run
from train.run.provenance import provenance, write_json

EXAMPLES = """examples:
  python -m evaluation.slots --checkpoint runs/demo --data data/sample.beton --picture slots.png
  python -m evaluation.slots --checkpoint runs/coco/checkpoints/step_9000 --data val2017 \\
      --max-images 2000 --json slots.json
"""
SHOWN = 5
"""Prototypes at each end of the picture."""


@dataclass(frozen=True)
class SlotStatistics:
    """Of N images and K prototypes."""

    slots: np.ndarray
    """int64 [N], active slots of each image."""
    cells: np.ndarray
    """int64 [K], cells that each prototype wins."""
    nearest: NearestSegments
    """How often each prototype is active, and where."""

    @property
    def entropy(self) -> float:
        """Of the share of cells, in shares of log K."""
        return usage_entropy(torch.from_numpy(self.cells))

    @property
    def dead(self) -> int:
        """Prototypes that never win."""
        return int((self.cells == 0).sum())


def gather_statistics(batches: Iterable[Segmented], top: int) -> SlotStatistics:
    """Run through `batches` once, keeping the `top` nearest segments of each prototype. Raises
    ValueError if there are none.
    """
    nearest: NearestSegments | None = None
    slots: list[np.ndarray] = []
    cells: np.ndarray | int = 0
    for batch in batches:
        won = won_cells(batch.scores).cpu().numpy()
        if nearest is None:
            nearest = NearestSegments(won.shape[1], top)
        similarity = segment_similarity(batch.scores, batch.features)
        nearest.add(batch.squares.index, similarity.cpu().numpy())
        slots.append((won > 0).sum(axis=1))
        cells = cells + won.sum(axis=0)
    if nearest is None:
        raise ValueError("no images to look at")
    return SlotStatistics(np.concatenate(slots), np.asarray(cells), nearest)


def duplicate_pairs(prototypes: Tensor) -> list[tuple[int, int, float]]:
    """Pairs of prototypes [K, D] that are nearly the same, and their cosine; the nearest first."""
    cosines = prototype_cosines(prototypes).cpu()
    pairs = (cosines > DUPLICATE).nonzero().tolist()
    found = [(i, j, float(cosines[i, j])) for i, j in pairs]
    return sorted(found, key=lambda pair: -pair[2])


def result_rows(
    statistics: SlotStatistics, duplicates: list[tuple[int, int, float]], common: dict[str, Any]
) -> list[dict[str, Any]]:
    """One row a number, for --json: those of all prototypes, of each one, of each pair that is
    nearly the same.
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
    """The numbers for people."""
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
    """The prototypes that are active in most images, and of the others those in fewest; each
    int64 [5] or fewer.
    """
    order = nearest.by_frequency()
    return order[:SHOWN], order[SHOWN:][-SHOWN:][::-1]


def draw_ends(
    network: Segmenter,
    images: ImageSource,
    statistics: SlotStatistics,
    size: int,
    device: torch.device,
) -> Image.Image:
    """The nearest segments of the prototypes that are active most often, and most seldom."""
    nearest = statistics.nearest
    both = ends(nearest)
    tiles = cut_tiles(network, images, nearest, np.concatenate(both), size, device)
    often, seldom = ({k: tiles[k] for k in end.tolist()} for end in both)
    title = (
        f"{statistics.slots.mean():.1f} of {len(statistics.cells)} slots active an image,"
        f" usage entropy {statistics.entropy:.2f}, {statistics.dead} dead"
    )
    columns = [("in most images", often)] + ([("in fewest", seldom)] if seldom else [])
    return draw_rows(title, nearest, columns)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = CommandParser(prog="python -m evaluation.slots", description=__doc__, epilog=EXAMPLES)
    parser.add_argument(
        "--checkpoint", type=Path, required=True, help="run folder, or one of its checkpoints"
    )
    parser.add_argument("--data", type=Path, required=True, help="a beton, or a folder of images")
    parser.add_argument("--max-images", type=int, help="look at this many images (all)")
    parser.add_argument(
        "--size", type=int, help="side of the segmented square in pixels (320 for 224-pixel views)"
    )
    parser.add_argument("--batch", type=int, default=8, help="images segmented at once (8)")
    parser.add_argument(
        "--picture",
        type=Path,
        help=f"draw the {SHOWN} prototypes at each end, with their nearest segments",
    )
    parser.add_argument("--top", type=int, default=5, help="segments for each prototype (5)")
    parser.add_argument("--json", type=Path, help="write the results here as well")
    args = parser.parse_args(argv)
    for name in ("top", "max_images", "size", "batch"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1")
    return args


def main() -> None:
    args = parse(sys.argv[1:])
    if args.json:
        check_writable("--json", args.json)
    if args.picture:
        check_picture("--picture", args.picture)
    images = open_images(args.data)
    device = default_device()
    network, config = load_network(args.checkpoint, device)
    size = args.size or evaluation_size(config.views.size)
    indices = spread(len(images), args.max_images)
    batches = segment_images(
        network,
        images,
        size,
        device=device,
        indices=indices,
        batch_size=args.batch,
        progress="segmenting",
    )
    statistics = gather_statistics(batches, args.top)
    duplicates = duplicate_pairs(network.teacher.grouping.prototypes)
    print(describe(statistics, duplicates))
    if args.picture:
        write_picture(args.picture, draw_ends(network, images, statistics, size, device))
    if args.json:
        step = step_of(find(args.checkpoint))
        common = {"step": step, "images": len(indices), "size": size, "seed": config.train.seed}
        rows = result_rows(statistics, duplicates, common)
        write_json(args.json, provenance() | {"results": rows})


if __name__ == "__main__":
    run(main)
