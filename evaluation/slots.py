"""Count how a run uses its prototypes: active slots in each image, frequency of each prototype,
usage entropy, dead prototypes and near-duplicates.

A slot is active in an image if its prototype wins at least one cell. The teacher is counted, on
whole images.
"""

import argparse
import sys
from pathlib import Path

from evaluation.options import SHOWN, check_outputs, require_positive
from train.run.cli import CommandParser, run

EXAMPLES = """examples:
  python -m evaluation.slots --checkpoint runs/demo --data data/sample.beton --picture slots.png
  python -m evaluation.slots --checkpoint runs/coco/checkpoints/step_9000 --data val2017 \\
      --max-images 2000 --json slots.json
"""


def parse(argv: list[str]) -> argparse.Namespace:
    parser = CommandParser(prog="python -m evaluation.slots", description=__doc__, epilog=EXAMPLES)
    parser.add_argument(
        "--checkpoint", type=Path, required=True, help="run folder, or one of its checkpoints"
    )
    parser.add_argument("--data", type=Path, required=True, help="a beton, or a folder of images")
    parser.add_argument("--max-images", type=int, help="number of images to read (all)")
    parser.add_argument(
        "--size", type=int, help="side of the segmented square in pixels (320 for 224-pixel views)"
    )
    parser.add_argument("--batch", type=int, default=8, help="images segmented at once (8)")
    parser.add_argument(
        "--picture",
        type=Path,
        help=f"draw nearest segments of the {SHOWN} most frequent and {SHOWN} rarest prototypes",
    )
    parser.add_argument("--top", type=int, default=5, help="segments for each prototype (5)")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    return parser.parse_args(argv)


def main() -> None:
    args = parse(sys.argv[1:])
    require_positive(args, ("top", "max_images", "size", "batch"))
    check_outputs(args)
    from evaluation.slot_usage import report_usage  # takes seconds, which --help does not wait for

    report_usage(args)


if __name__ == "__main__":
    run(main)
