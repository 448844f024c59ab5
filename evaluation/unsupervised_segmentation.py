"""Score clusters against label maps: match clusters and classes one to one over the whole set.

The clusters are the prototypes of a run, or with --merge groups of these. With --features they are
also those of k-means on features of the run or of other networks. Prints mIoU and pixel accuracy of
each, mean ± deviation over the seeds of k-means.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from evaluation.options import AS_CLASSES, add_scoring_options, check_scoring_options
from evaluation.protocols import CLUSTERS, KMEANS, UPSAMPLE, clusters_itself, flag, settle
from pipeline.errors import UserError
from train.run.cli import CommandParser, run

EXAMPLES = """examples:
  python -m evaluation.unsupervised_segmentation --checkpoint runs/demo \\
      --images data/scenes/val/images --labels data/scenes/val/labels \\
      --json eval.json
  python -m evaluation.unsupervised_segmentation --checkpoint runs/demo --merge \\
      --unlabelled data/sample.beton --images data/scenes/val/images \\
      --labels data/scenes/val/labels --picture groups.png
  python -m evaluation.unsupervised_segmentation --checkpoint runs/coco --dataset coco-stuff \\
      --root data/coco --features teacher pixels --seeds 0 1 2 --flip --crf --picture eval.png
  python -m evaluation.unsupervised_segmentation --features supervised timm:vit_small_patch16_224.dino \\
      --dataset camvid --root data/CamVid --clusters 11
  python -m evaluation.unsupervised_segmentation --protocol picie --checkpoint runs/coco \\
      --dataset coco-stuff --root data/coco
  python -m evaluation.unsupervised_segmentation --protocol leopart --clusters 500 \\
      --features timm:vit_small_patch16_224.dino --dataset voc --root VOCdevkit/VOC2012
"""  # noqa: E501


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = CommandParser(
        prog="python -m evaluation.unsupervised_segmentation",
        description=__doc__,
        epilog=EXAMPLES,
    )
    add_scoring_options(parser, features=[], table=CLUSTERS)
    add_merge_options(parser)
    add_kmeans_options(parser)
    parser.add_argument(
        "--upsample",
        choices=UPSAMPLE,
        help="what is upsampled: scores of cells, bilinearly; features, which are then normalised; "
        "or nothing: each pixel takes the cluster of its cell (scores)",
    )
    parser.add_argument(
        "--masks",
        type=int,
        metavar="SIDE",
        help="compare predictions and labels at so many pixels (that of the images)",
    )
    parser.add_argument(
        "--crf",
        action="store_true",
        default=None,
        help="also score the clusters refined to colour edges by a fully connected CRF, with "
        "STEGO's constants (needs the extra [crf])",
    )
    parser.add_argument(
        "--crf-temperature",
        type=float,
        metavar="T",
        help="clusters have probabilities softmax(cosine / T) before the CRF (0.07; prototypes: "
        "the teacher's)",
    )
    parser.add_argument(
        "--flip", action="store_true", default=None, help="average each image with its mirror image"
    )
    return parser.parse_args(argv)


def add_merge_options(parser: CommandParser) -> None:
    parser.add_argument(
        "--merge",
        type=groups,
        nargs="?",
        const=AS_CLASSES,
        metavar="N",
        help="score groups of prototypes: those are joined that two views of --unlabelled images "
        "confuse most, until there are N (as many as classes)",
    )
    parser.add_argument(
        "--unlabelled",
        type=Path,
        metavar="DATA",
        help=".beton or folder of images, of which --merge takes up to 1,000; no label is read",
    )


def add_kmeans_options(parser: CommandParser) -> None:
    parser.add_argument(
        "--clusters", type=int, metavar="K", help="of k-means (default: the number of classes)"
    )
    parser.add_argument(
        "--kmeans",
        choices=KMEANS,
        help="greedy: from k-means++, on all cells that fit; breathing: so, then centres are added "
        "and removed while it helps, which nears the best of many starts; faiss: as faiss by "
        "default, from K of 256 K cells, by distance (greedy)",
    )
    parser.add_argument(
        "--restarts", type=int, metavar="N", help="starts of k-means, of which the best counts (1)"
    )
    parser.add_argument(
        "--pca", type=int, metavar="N", help="cluster N principal components of the features"
    )


def groups(text: str) -> int | str:
    """A number of groups, or as many as classes: the type of `--merge`."""
    try:
        return text if text == AS_CLASSES else int(text)
    except ValueError:
        what = "a whole number of groups, or nothing for as many as classes"
        raise argparse.ArgumentTypeError(f"expected {what}") from None


def check(args: argparse.Namespace) -> None:
    """Refuse bad options before any work. Raises UserError."""
    of_kmeans = (
        "clusters", "kmeans", "restarts", "pca", "standardise", "seeds", "stage", "whiten",
    )  # fmt: skip
    if not args.features:
        for name in of_kmeans:
            if (value := getattr(args, name)) is not None:
                raise UserError(f"{flag(name, value)} is for k-means, which needs --features")
    settle(args, CLUSTERS)
    counts = ("clusters", "restarts", "pca", "masks", "crf_temperature")
    check_scoring_options(args, counts, prototypes=args.checkpoint is not None)
    if args.checkpoint is None and not args.features:
        raise UserError("nothing to score: needs --checkpoint or --features")
    check_merge(args)
    if clusters_itself(args.protocol) and not args.features:
        raise UserError(
            f"--protocol {args.protocol} clusters features by k-means: it needs --features"
        )
    one_to_one = args.protocol is not None and args.match == "pixels"
    if one_to_one and args.subset == "all":
        raise UserError(f"--protocol {args.protocol} scores PiCIE's images: not --subset all")
    if args.crf and (args.masks or args.upsample == "cells"):
        raise UserError("--crf refines upsampled scores: not with --masks or --upsample cells")
    if args.crf_temperature is not None and not args.crf:
        raise UserError("--crf-temperature needs --crf")
    if args.match == "none":
        raise UserError("--match none: clusters are no classes; evaluation.probe predicts classes")


def check_merge(args: argparse.Namespace) -> None:
    """Refuse options that contradict --merge. Raises UserError."""
    if args.merge is None:
        if args.unlabelled is not None:
            raise UserError("--unlabelled is for --merge")
        return
    if args.merge != AS_CLASSES and args.merge < 1:
        raise UserError(f"--merge must be above 0, not {args.merge}")
    if args.checkpoint is None:
        raise UserError("--merge joins prototypes, which only a run has: it needs --checkpoint")
    if args.unlabelled is None:
        raise UserError("--merge needs --unlabelled, images whose views show what is confused")
    if clusters_itself(args.protocol):
        raise UserError(f"--merge joins prototypes: --protocol {args.protocol} clusters features")
    if args.upsample == "features":
        raise UserError("--merge counts the cells of a group: not with --upsample features")
    if args.crf_temperature is not None and not args.features:
        raise UserError("--crf-temperature is of cosines: --merge has shares of cells")


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(sys.argv[1:] if argv is None else argv)
    check(args)
    from evaluation.clusters import score_clusters  # takes seconds: --help does not wait for it

    score_clusters(args)


if __name__ == "__main__":
    run(main)
