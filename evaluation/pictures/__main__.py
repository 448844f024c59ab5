"""Draw pictures of a run: the segments nearest to each prototype, the grouping of whole images,
principal components of features, the views of training, and the grouping over the checkpoints.
"""

import argparse
import sys
from pathlib import Path

from evaluation.options import add_feature_options, check_feature_options, require_positive
from evaluation.pictures.drawing import check_picture, write_picture
from train.run.cli import CommandParser, run

EXAMPLES = """examples:
  python -m evaluation.pictures prototypes --checkpoint runs/demo --data sample.beton \\
      --out prototypes.png
  python -m evaluation.pictures prototypes --checkpoint runs/coco/checkpoints/step_9000 \\
      --data val2017 --out prototypes.png --prototypes 40 --max-images 2000
  python -m evaluation.pictures grouping --checkpoint runs/demo --data val2017 --out grouping.png
  python -m evaluation.pictures features --checkpoint runs/demo --data val2017 --stage 2 4 \\
      --out features.png
  python -m evaluation.pictures features --features timm:vit_small_patch16_224.dino \\
      --data val2017 --out features.png
  python -m evaluation.pictures views --checkpoint runs/demo --data sample.beton --out views.png
  python -m evaluation.pictures attention --run runs/demo --data sample.beton --only 3 7 \\
      --out attention.png
"""
PICTURES = {
    "prototypes": "The nearest segments of each prototype in a row, the most frequent first.",
    "grouping": "Images beside themselves under the colours of their pixels' prototypes.",
    "features": "Images beside the first three principal components of features, as colours.",
    "views": "Both views of images as in training: crops, flips, overlap, masks.",
    "attention": "The grouping of the same images at several checkpoints.",
}
_IMAGES = {"grouping": 12, "features": 6, "views": 6, "attention": 4}


def parse(argv: list[str]) -> argparse.Namespace:
    parser = CommandParser(
        prog="python -m evaluation.pictures", description=__doc__, epilog=EXAMPLES
    )
    kinds = parser.add_subparsers(dest="picture", required=True, metavar="PICTURE")
    for name, about in PICTURES.items():
        one = kinds.add_parser(name, help=about, description=about)
        if name == "attention":
            one.add_argument("--run", type=Path, required=True, help="run folder")
            one.add_argument("--columns", type=int, default=6, help="checkpoints to show (6)")
        else:
            one.add_argument(
                "--checkpoint",
                type=Path,
                required=name != "features",
                help="run folder, or a checkpoint of it",
            )
        one.add_argument("--data", type=Path, required=True, help="a beton, or a folder of images")
        one.add_argument("--out", type=Path, required=True, help="picture to write (.png)")
        if name == "prototypes":
            one.add_argument("--top", type=int, default=5, help="segments for each prototype (5)")
            one.add_argument("--prototypes", type=int, default=20, help="number to draw (20)")
            one.add_argument("--max-images", type=int, help="number of images to read (all)")
            one.add_argument("--batch", type=int, default=8, help="images segmented at once (8)")
        else:
            count = _IMAGES[name]
            one.add_argument(
                "--images", type=int, default=count, help=f"number of images ({count})"
            )
            one.add_argument(
                "--only", type=int, nargs="+", metavar="I", help="draw these images, by number"
            )
        if name == "features":
            add_feature_options(one, ["teacher"])
        if name == "views":
            one.add_argument("--epoch", type=int, default=0, help="counted from 0 (0)")
        else:
            one.add_argument(
                "--size",
                type=int,
                help="side of the segmented square in pixels (320 for 224-pixel views)",
            )
    return parser.parse_args(argv)


def main() -> None:
    args = parse(sys.argv[1:])
    counts = ("top", "prototypes", "max_images", "size", "batch", "images", "columns")
    require_positive(args, counts)
    check_picture("--out", args.out)
    if args.picture == "features":
        check_feature_options(args)
    from evaluation.pictures.draw import DRAW  # takes seconds, which --help does not wait for

    write_picture(args.out, DRAW[args.picture](args))


if __name__ == "__main__":
    run(main)
