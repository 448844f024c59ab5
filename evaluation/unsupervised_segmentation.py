"""Score groupings against label maps: clusters, Hungarian-matched to classes over the whole set.

The clusters are a run's prototypes, and with --features k-means on maps of features, of the run or
of others. Prints mIoU and pixel accuracy of each, mean ± deviation over the seeds of k-means.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from evaluation.crf import refine
from evaluation.datasets.images import spread
from evaluation.datasets.layouts import (
    LabelledImages,
    add_dataset_options,
    labelled_from,
    square_labels,
)
from evaluation.features import FEATURES_HELP, Features, open_all
from evaluation.grouping import GroupingScore, confusion_matrix, score_grouping
from evaluation.kmeans import kmeans, sample_cells
from evaluation.networks import (
    default_device,
    evaluated_side,
    load_network,
    untrained_network,
)
from evaluation.pictures.drawing import check_picture, write_picture
from evaluation.pictures.segmentation import Column, Sample, draw_segmentations
from evaluation.segment import Segmenter, assign, square_batches
from pipeline.errors import UserError
from train.run.cli import CommandParser, check_writable, run
from train.run.provenance import provenance, write_json

EXAMPLES = """examples:
  python -m evaluation.unsupervised_segmentation --checkpoint runs/demo \\
      --images data/scenes/val/images --labels data/scenes/val/labels \\
      --baseline untrained --json eval.json
  python -m evaluation.unsupervised_segmentation --checkpoint runs/coco --dataset coco-stuff \\
      --root data/coco --features teacher pixels --seeds 0 1 2 --flip --crf --picture eval.png
  python -m evaluation.unsupervised_segmentation --features supervised timm:vit_small_patch16_224.dino \\
      --dataset camvid --root data/CamVid --clusters 11
"""  # noqa: E501
SAMPLES = 4


@dataclass(frozen=True)
class Grouper:
    """One or several clusterings of the cells of any image, from one pass through a network."""

    name: str
    clusters: str
    """prototypes or k-means"""
    seeds: list[int]
    """One a clustering."""
    logits: Callable[[Tensor], list[Tensor]]
    """Normalised images [B, 3, R, R] → [B, K, h, w] for each clustering: log-likelihoods of its
    clusters, up to a constant for each cell."""


@dataclass
class Outcome:
    """One clustering over the whole set."""

    name: str
    clusters: str
    seed: int
    crf: bool
    confusion: np.ndarray | int = 0
    """int64 [K, C]"""
    kept: list[np.ndarray] = field(default_factory=list)
    """int64 [R, R], the clusters of the images that a picture shows."""


def prototype_grouper(name: str, network: Segmenter, seed: int, temperature: float) -> Grouper:
    """A network's own prototypes as clusters; `temperature` is that of its assignments."""
    return Grouper(
        name, "prototypes", [seed], lambda images: [network.segment(images)[0] / temperature]
    )


def kmeans_grouper(
    features: Features,
    data: LabelledImages,
    size: int,
    num_clusters: int,
    seeds: list[int],
    *,
    device: torch.device,
    batch_size: int,
) -> Grouper:
    """k-means with K = `num_clusters` on `features` of the images of `data`, from a start for each
    of `seeds`. All cluster one sample of cells. Raises UserError.
    """
    name = f"{features.name}, k-means"

    def maps() -> Iterator[Tensor]:
        for squares in square_batches(data, size, batch_size=batch_size, progress=f"{name}: cells"):
            yield features(squares.normalised(device))

    cells = sample_cells(maps(), len(data), seeds[0])
    try:
        found = [kmeans(cells, num_clusters, seed, cosine=features.cosine) for seed in seeds]
    except ValueError as error:
        raise UserError(f"--clusters {num_clusters}: {error}") from None

    def logits(images: Tensor) -> list[Tensor]:
        made = features(images)
        return [clusters.logits(made) for clusters in found]

    return Grouper(name, "k-means", seeds, logits)


def both_ways(logits: Callable[[Tensor], list[Tensor]]) -> Callable[[Tensor], list[Tensor]]:
    """`logits` averaged over an image and its mirror image."""

    def averaged(images: Tensor) -> list[Tensor]:
        mirrored = logits(images.flip(3))
        return [
            (own + other.flip(3)) / 2 for own, other in zip(logits(images), mirrored, strict=True)
        ]

    return averaged


def refined(logits: Tensor, clusters: Tensor, pixels: np.ndarray) -> Tensor:
    """Clusters int64 [B, R, R], refined by the CRF; `logits` [B, K, h, w], `pixels` uint8
    [B, R, R, 3].

    Only an image's own clusters, those that win a pixel, take part: with all of 2048 a pixel would
    need 8 KB for each of the three maps.
    """
    size = clusters.shape[1]
    result = []
    for i in range(len(clusters)):
        own = clusters[i].unique()
        upsampled = F.interpolate(logits[i : i + 1, own], (size, size), mode="bilinear")
        colours = torch.from_numpy(pixels[i : i + 1]).to(logits.device)
        better = refine(upsampled.softmax(dim=1), colours)
        result.append(own[better[0].argmax(dim=0)])
    return torch.stack(result)


def evaluate(
    grouper: Grouper,
    data: LabelledImages,
    size: int,
    *,
    crf: bool,
    device: torch.device,
    batch_size: int = 8,
    keep: Sequence[int] = (),
) -> list[Outcome]:
    """Group all images at `size` × `size` pixels, one batch in memory at a time: an outcome for
    each clustering, and one more with the CRF. Raises UserError for a bad image or label map.
    """
    variants = (False, True) if crf else (False,)
    outcomes = [
        [Outcome(grouper.name, grouper.clusters, seed, variant) for variant in variants]
        for seed in grouper.seeds
    ]
    for squares in square_batches(data, size, batch_size=batch_size, progress=grouper.name):
        truth = square_labels(data, squares, size)
        with torch.inference_mode():
            made = grouper.logits(squares.normalised(device))
        for logits, pair in zip(made, outcomes, strict=True):
            clusters = assign(logits.float(), size)
            for outcome in pair:
                if outcome.crf:
                    clusters = refined(logits.float(), clusters, squares.pixels)
                host = clusters.cpu().numpy()
                outcome.confusion = outcome.confusion + confusion_matrix(
                    host, truth, logits.shape[1], data.num_classes
                )
                shown = np.flatnonzero(np.isin(squares.index, list(keep)))
                outcome.kept += [host[i] for i in shown]
    return [outcome for pair in outcomes for outcome in pair]


def score(outcome: Outcome, data: LabelledImages) -> GroupingScore:
    """`score_grouping`, with nothing to score as the user's mistake."""
    try:
        return score_grouping(np.asarray(outcome.confusion))
    except ValueError as error:
        raise UserError(f"{data.source}: {error}: the label maps are all void") from None


def result_rows(
    outcome: Outcome, scored: GroupingScore, names: list[str], common: dict[str, Any]
) -> list[dict[str, Any]]:
    """One row a number, for --json: miou, pixel_accuracy, the number of clusters in use, and the
    iou of each class.
    """
    head = {
        "network": variant_name(outcome),
        "clusters": outcome.clusters,
        "num_clusters": len(np.asarray(outcome.confusion)),
        "crf": outcome.crf,
        "seed": outcome.seed,
        **common,
    }
    used = "used_prototypes" if outcome.clusters == "prototypes" else "used_clusters"
    rows: list[dict[str, Any]] = [
        {"metric": "miou", "value": scored.miou, **head},
        {"metric": "pixel_accuracy", "value": scored.accuracy, **head},
        {"metric": used, "value": scored.used, **head},
    ]
    shown = np.flatnonzero(~np.isnan(scored.iou))
    return rows + [
        {"metric": "iou", "class": names[c], "value": float(scored.iou[c]), **head} for c in shown
    ]


def variant_name(outcome: Outcome) -> str:
    return f"{outcome.name}, CRF" if outcome.crf else outcome.name


def summarise(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and sample deviation (of one value: None) of each network's miou and pixel_accuracy over
    seeds.
    """
    summary = []
    for network in dict.fromkeys(row["network"] for row in rows):
        for metric in ("miou", "pixel_accuracy"):
            values = [
                row["value"] for row in rows if (row["network"], row["metric"]) == (network, metric)
            ]
            deviation = statistics.stdev(values) if len(values) > 1 else None
            summary.append(
                {
                    "network": network,
                    "metric": metric,
                    "mean": statistics.mean(values),
                    "sd": deviation,
                    "seeds": len(values),
                }
            )
    return summary


def print_scores(pairs: list[tuple[Outcome, GroupingScore]]) -> None:
    """One line for each network, over its seeds."""
    for name in dict.fromkeys(variant_name(outcome) for outcome, _ in pairs):
        own = [pair for pair in pairs if variant_name(pair[0]) == name]
        cells = [f"{name:24}"]
        for title, values in (
            ("mIoU", [scored.miou for _, scored in own]),
            ("pixel accuracy", [scored.accuracy for _, scored in own]),
        ):
            deviation = f" ± {100 * statistics.stdev(values):4.2f}" if len(own) > 1 else ""
            cells.append(f"{title} {statistics.mean(values):7.2%}{deviation}  ")
        outcome, scored = own[0]
        what = "prototypes" if outcome.clusters == "prototypes" else "clusters"
        total = len(np.asarray(outcome.confusion))
        use = f"{scored.used} of {total} {what} in use" if len(own) == 1 else f"{len(own)} seeds"
        print(" ".join([*cells, use]), flush=True)


def picture(
    pairs: list[tuple[Outcome, GroupingScore]],
    data: LabelledImages,
    size: int,
    shown: np.ndarray,
    names: list[str],
) -> Image.Image:
    """The images `shown`, and the first seed of each network."""
    first = {variant_name(pair[0]): pair for pair in reversed(pairs)}
    columns = [
        Column(name, first[name][0].kept, first[name][1].cluster, first[name][1].iou)
        for name in dict.fromkeys(variant_name(outcome) for outcome, _ in pairs)
    ]
    samples = []
    for squares in square_batches(data, size, indices=shown):
        truth = square_labels(data, squares, size)
        samples += [Sample(*pair) for pair in zip(squares.pixels, truth, strict=True)]
    return draw_segmentations(samples, columns, names)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = CommandParser(
        prog="python -m evaluation.unsupervised_segmentation",
        description=__doc__,
        epilog=EXAMPLES,
    )
    parser.add_argument(
        "--checkpoint", type=Path, help="run folder, or one of its checkpoints: its prototypes"
    )
    add_dataset_options(parser)
    parser.add_argument(
        "--features", nargs="+", default=[], metavar="SPEC", help=f"k-means on {FEATURES_HELP}"
    )
    parser.add_argument("--weights", type=Path, help="file of weights for supervised or timm:NAME")
    parser.add_argument(
        "--clusters", type=int, metavar="K", help="of k-means (as many as there are classes)"
    )
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0], help="starts of k-means, one result each (0)"
    )
    parser.add_argument(
        "--crf", action="store_true", help="also score the clusters refined to colour edges"
    )
    parser.add_argument(
        "--flip", action="store_true", help="average each image with its mirror image"
    )
    parser.add_argument(
        "--size",
        type=int,
        help="side of the evaluated square in pixels (in proportion to the views: 320 for 224)",
    )
    parser.add_argument(
        "--baseline", choices=["untrained"], help="score this network's prototypes as well"
    )
    parser.add_argument("--batch", type=int, default=8, help="images segmented at once (8)")
    parser.add_argument("--json", type=Path, help="write the results here as well")
    parser.add_argument("--picture", type=Path, help="draw samples and IoU by class here (.png)")
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    """Refuse what would fail later. Raises UserError."""
    for name in ("batch", "size", "clusters"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name} must be at least 1")
    if min(args.seeds) < 0 or len(set(args.seeds)) < len(args.seeds):
        raise UserError("--seeds must be different and at least 0")
    if len(set(args.features)) < len(args.features):
        raise UserError("--features names the same features twice")
    if args.checkpoint is None and not args.features:
        raise UserError("nothing to score: needs --checkpoint or --features")
    if args.checkpoint is None and args.baseline:
        raise UserError(f"--baseline {args.baseline} needs --checkpoint")
    if args.json:
        check_writable("--json", args.json)
    if args.picture:
        check_picture("--picture", args.picture)


def groupers(
    args: argparse.Namespace, data: LabelledImages, size: int, device: torch.device
) -> Iterator[Grouper]:
    """What the options ask for, one after the other; all is opened before anything is computed."""
    if args.features and args.clusters is None and data.names is None:
        raise UserError("k-means needs --clusters: no class table says how many classes")
    opened = open_all(
        args.features, args.checkpoint, device, weights=args.weights, images=data, size=size
    )
    if args.checkpoint is not None:
        trained, config = load_network(args.checkpoint, device)
        seed, temperature = config.train.seed, config.model.teacher_temp
        yield prototype_grouper("trained", trained, seed, temperature)
        if args.baseline == "untrained":
            network = untrained_network(config.model, seed, data, size, device)
            yield prototype_grouper("untrained", network, seed, temperature)
    num_clusters = args.clusters or data.num_classes
    for features in opened:
        yield kmeans_grouper(
            features, data, size, num_clusters, args.seeds, device=device, batch_size=args.batch
        )


def main() -> None:
    args = parse(sys.argv[1:])
    check(args)
    data = labelled_from(args)
    device, size = default_device(), evaluated_side(args.size, args.checkpoint)
    names = data.names or [f"class {c}" for c in range(data.num_classes)]
    shown = spread(len(data), SAMPLES) if args.picture else np.array([], np.int64)
    pairs: list[tuple[Outcome, GroupingScore]] = []
    rows: list[dict[str, Any]] = []
    for grouper in groupers(args, data, size, device):
        if args.flip:
            grouper = Grouper(  # noqa: PLW2901
                grouper.name, grouper.clusters, grouper.seeds, both_ways(grouper.logits)
            )
        outcomes = evaluate(
            grouper,
            data,
            size,
            crf=args.crf,
            device=device,
            batch_size=args.batch,
            keep=shown.tolist(),
        )
        scored = [(outcome, score(outcome, data)) for outcome in outcomes]
        print_scores(scored)
        common = {"flip": args.flip, "images": len(data), "size": size, "dataset": args.dataset}
        for outcome, result in scored:
            rows += result_rows(outcome, result, names, common)
        pairs += scored
    if args.json:
        write_json(args.json, provenance() | {"results": rows, "summary": summarise(rows)})
    if args.picture:
        write_picture(args.picture, picture(pairs, data, size, shown, names))


if __name__ == "__main__":
    run(main)
