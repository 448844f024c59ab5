"""Write the features of images to a file: a row for each image, or for each of its slots.

An image is scaled and cropped to a square. Its row is the mean of the features of all cells. With
--slots a row is a slot: the mean under the assignment of the cells to a prototype (the paper,
section 3.1), for each prototype that wins a cell of the image.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from evaluation.datasets.images import FIT_HELP, FITS
from evaluation.options import add_feature_options, check_feature_options, require_positive
from pipeline.errors import UserError
from train.run.cli import CommandParser, check_writable, run

EXAMPLES = """examples:
  python -m evaluation.embed --checkpoint runs/coco --data photos --out photos.npy
  python -m evaluation.embed --checkpoint runs/coco --data coco.beton --stage 3+4 --out coco.parquet
  python -m evaluation.embed --checkpoint runs/coco --data photos --features projector --slots \\
      --out slots.npy
  python -m evaluation.embed --features timm:vit_small_patch16_224.dino --data list.txt --out a.npy

files:
  .npy      float32 [rows, features]; beside it FILE.npy.csv: the image of each row, and with
            --slots the prototype and its share of the image's cells
  .parquet  the same as columns: image, slot, share, features (needs the extra [parquet])
"""
SUFFIXES = (".npy", ".parquet")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = CommandParser(prog="python -m evaluation.embed", description=__doc__, epilog=EXAMPLES)
    parser.add_argument(
        "--data", type=Path, required=True,
        help="a beton, a folder of images, or a list (.txt) with a path on each line",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, help="file to write: .npy or .parquet")
    parser.add_argument("--checkpoint", type=Path, help="run folder, or one of its checkpoints")
    parser.add_argument(
        "--slots", action="store_true", help="a row for each slot, by the run's prototypes"
    )
    add_feature_options(parser, ["teacher"], compare=False)
    parser.add_argument(
        "--size", type=int, help="side of the square in pixels (320 for 224-pixel views)"
    )
    parser.add_argument(
        "--fit", choices=FITS, default="crop", help=f"how images become squares. {FIT_HELP}"
    )
    parser.add_argument("--batch", type=int, default=8, help="images at once (8)")
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    """Refuse bad options before any work. Raises UserError."""
    require_positive(args, ("size", "batch"))
    check_feature_options(args)
    if args.out.suffix.lower() not in SUFFIXES:
        raise UserError(f"--out {args.out}: must end in {' or '.join(SUFFIXES)}")
    check_writable("--out", args.out, args.data)
    if args.slots and args.checkpoint is None:
        raise UserError("--slots needs --checkpoint, a run with prototypes")


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(sys.argv[1:] if argv is None else argv)
    check(args)
    from evaluation.embeddings import write_embeddings  # slow: --help does not wait for it

    write_embeddings(args)


if __name__ == "__main__":
    run(main)
