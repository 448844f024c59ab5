"""Write a mask for each image: a PNG of its size whose values are the segments, with a palette.

The segments are the run's prototypes, with --merge groups of these, or with --clusters those of
k-means on features of all the images. The whole image is segmented, scaled until its shorter side
has --size pixels. FOLDER/segments.json says what the values are.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from evaluation.options import add_feature_options, check_feature_options, require_positive
from pipeline.errors import UserError
from train.run.cli import CommandParser, run

EXAMPLES = """examples:
  python -m evaluation.masks --checkpoint runs/coco --data photos --out masks
  python -m evaluation.masks --checkpoint runs/coco --data photos --merge 27 --out masks --crf
  python -m evaluation.masks --checkpoint runs/coco --data photos --merge 27 \\
      --unlabelled coco.beton --out masks
  python -m evaluation.masks --features timm:vit_small_patch16_224.dino --clusters 20 \\
      --data photos --out masks
"""
KMEANS_OPTIONS = ("features", "weights", "stage", "seed")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = CommandParser(prog="python -m evaluation.masks", description=__doc__, epilog=EXAMPLES)
    parser.add_argument(
        "--data", type=Path, required=True,
        help="a beton, a folder of images, or a list (.txt) with a path on each line",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="a new folder")
    parser.add_argument("--checkpoint", type=Path, help="run folder, or one of its checkpoints")
    parser.add_argument(
        "--merge",
        type=int,
        metavar="N",
        help="N groups of prototypes: those are joined that two views of --unlabelled confuse most",
    )
    parser.add_argument(
        "--unlabelled",
        type=Path,
        metavar="DATA",
        help="images of which --merge takes up to 1,000 (those of --data)",
    )
    parser.add_argument(
        "--clusters", type=int, metavar="K", help="K clusters of k-means on --features of the set"
    )
    add_feature_options(parser, [], compare=False)
    parser.add_argument("--seed", type=int, help="of k-means (0)")
    parser.add_argument(
        "--crf",
        action="store_true",
        help="move the borders to edges of colour by a fully connected CRF (needs the extra [crf])",
    )
    parser.add_argument(
        "--size", type=int, help="shorter side of the segmented image (320 for 224-pixel views)"
    )
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    """Refuse bad options before any work; fill in those of k-means. Raises UserError."""
    require_positive(args, ("size", "merge", "clusters"))
    if args.out.exists() and not (args.out.is_dir() and not any(args.out.iterdir())):
        raise UserError(f"--out {args.out}: is there already: give the name of a new folder")
    if args.clusters is None:
        for name in KMEANS_OPTIONS:
            if getattr(args, name) not in ([], None):
                raise UserError(f"--{name} is for k-means, which needs --clusters")
        if args.checkpoint is None:
            raise UserError("needs --checkpoint, a run with prototypes; or --clusters")
    if args.merge is not None and args.clusters is not None:
        raise UserError("--merge joins prototypes, --clusters takes none: give one of them")
    if args.unlabelled is not None and args.merge is None:
        raise UserError("--unlabelled is for --merge")
    if args.seed is not None and args.seed < 0:
        raise UserError(f"--seed must be at least 0, not {args.seed}")
    if args.clusters is not None:
        args.features = args.features or ["teacher"]
    check_feature_options(args, prototypes=args.clusters is None)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(sys.argv[1:] if argv is None else argv)
    check(args)
    from evaluation.mask_files import write_masks  # slow: --help does not wait for it

    write_masks(args)


if __name__ == "__main__":
    run(main)
