"""Score a run's grouping against label maps: prototypes as clusters, Hungarian-matched to classes
over the whole set.

Prints mIoU and pixel accuracy of the run's teacher, and of the untrained network beside it with
--baseline untrained.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from evaluation.grouping import GroupingScore, confusion_matrix, score_grouping
from evaluation.images import (
    VOID,
    FolderImages,
    LabelMaps,
    centre_square,
    evaluation_size,
    read_classes,
)
from evaluation.networks import default_device, load_network, untrained_network
from evaluation.segment import Segmenter, assign, segment_images
from pipeline.errors import CommandParser, UserError, check_writable, run
from train.provenance import provenance, write_json

EXAMPLES = """examples:
  python -m evaluation.unsupervised_segmentation --checkpoint runs/demo \\
      --images data/scenes/val/images --labels data/scenes/val/labels \\
      --baseline untrained --json eval.json
  python -m evaluation.unsupervised_segmentation --checkpoint runs/camvid/checkpoints/step_500 \\
      --images CamVid/val --labels CamVid/valannot --classes camvid.json --void 11 --size 320
"""


def grouping_confusion(
    network: Segmenter,
    images: FolderImages,
    labels: LabelMaps,
    size: int,
    *,
    device: torch.device,
    batch_size: int = 8,
    progress: str | None = None,
) -> np.ndarray:
    """int64 [K, C] over all images at `size` × `size` pixels. Raises UserError for a bad image or
    label map.
    """
    total: np.ndarray | int = 0
    for batch in segment_images(
        network, images, size, device=device, batch_size=batch_size, progress=progress
    ):
        clusters = assign(batch.scores, size).cpu().numpy()
        truth = np.stack(
            [
                centre_square(labels.load(int(i), *shape), size, Image.Resampling.NEAREST)
                for i, shape in zip(batch.squares.index, batch.squares.shape, strict=True)
            ]
        )
        total = total + confusion_matrix(clusters, truth, batch.scores.shape[1], labels.num_classes)
    return np.asarray(total)


def score(confusion: np.ndarray, folder: Path) -> GroupingScore:
    """`score_grouping`, with nothing to score as the user's mistake."""
    try:
        return score_grouping(confusion)
    except ValueError as error:
        raise UserError(f"{folder}: {error}: the label maps are all void") from None


def result_rows(
    network: str, scored: GroupingScore, names: list[str], common: dict[str, Any]
) -> list[dict[str, Any]]:
    """One row a number, for --json: miou, pixel_accuracy, used_prototypes, and the iou of each
    class.
    """
    head = {"network": network, **common}
    rows: list[dict[str, Any]] = [
        {"metric": "miou", "value": scored.miou, **head},
        {"metric": "pixel_accuracy", "value": scored.accuracy, **head},
        {"metric": "used_prototypes", "value": scored.used, **head},
    ]
    shown = np.flatnonzero(~np.isnan(scored.iou))
    return rows + [
        {"metric": "iou", "class": names[c], "value": float(scored.iou[c]), **head} for c in shown
    ]


def find_classes(given: Path | None, labels: Path) -> list[str] | None:
    """The class table: `given`, or classes.json in the labels' folder or up to two above it, or
    None.
    """
    if given is not None:
        return read_classes(given)
    folders = [labels, *labels.resolve().parents[:2]]
    found = [folder / "classes.json" for folder in folders if (folder / "classes.json").is_file()]
    return read_classes(found[0]) if found else None


def parse(argv: list[str]) -> argparse.Namespace:
    parser = CommandParser(
        prog="python -m evaluation.unsupervised_segmentation",
        description=__doc__,
        epilog=EXAMPLES,
    )
    parser.add_argument(
        "--checkpoint", type=Path, required=True, help="run folder, or one of its checkpoints"
    )
    parser.add_argument("--images", type=Path, required=True, help="folder of images")
    parser.add_argument(
        "--labels", type=Path, required=True, help="folder of label PNGs of the same names"
    )
    parser.add_argument(
        "--classes",
        type=Path,
        help="JSON list of class names by id (default: classes.json beside or above the labels; "
        "without one, every id in the labels is a class)",
    )
    parser.add_argument(
        "--void", type=int, nargs="+", default=[VOID], metavar="ID", help="ids to ignore (255)"
    )
    parser.add_argument(
        "--size",
        type=int,
        help="side of the evaluated square in pixels (in proportion to the views: 320 for 224)",
    )
    parser.add_argument("--baseline", choices=["untrained"], help="score this network as well")
    parser.add_argument("--batch", type=int, default=8, help="images segmented at once (8)")
    parser.add_argument("--json", type=Path, help="write the results here as well")
    return parser.parse_args(argv)


def main() -> None:
    args = parse(sys.argv[1:])
    if args.batch < 1 or (args.size is not None and args.size < 1):
        raise UserError("--batch and --size must be at least 1")
    if args.json:
        check_writable("--json", args.json)
    images = FolderImages(args.images)
    labels = LabelMaps(images, args.labels, find_classes(args.classes, args.labels), args.void)
    device = default_device()
    trained, config = load_network(args.checkpoint, device)
    size = args.size or evaluation_size(config.views.size)
    networks = {"trained": trained}
    if args.baseline == "untrained":
        networks["untrained"] = untrained_network(
            config.model, config.train.seed, images, size, device
        )
    names = labels.classes or [f"class {c}" for c in range(labels.num_classes)]
    common = {"seed": config.train.seed, "images": len(images), "size": size}
    rows = []
    for name, network in networks.items():
        confusion = grouping_confusion(
            network, images, labels, size, device=device, batch_size=args.batch, progress=name
        )
        scored = score(confusion, args.labels)
        rows += result_rows(name, scored, names, common)
        print(
            f"{name:10} mIoU {scored.miou:7.2%}   pixel accuracy {scored.accuracy:7.2%}"
            f"   {scored.used} of {len(confusion)} prototypes in use"
        )
    if args.json:
        write_json(args.json, provenance() | {"results": rows})


if __name__ == "__main__":
    run(main)
