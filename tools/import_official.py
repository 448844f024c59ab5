"""Read a checkpoint of the authors' code (github.com/CVMI-Lab/SlotCon).

A full one becomes the folder of a run, for evaluation, export and transfer; one of a backbone
alone becomes a file of weights under torchvision's names. Nothing in the file is run: it may hold
tensors, plain values and argparse's settings.
"""

import argparse
import sys
from pathlib import Path

from model.names import Branch
from pipeline.errors import UserError
from tools.weights.official import PROTOTYPES, import_backbone, import_run, read_official
from train.run.cli import CommandParser, run
from train.weights import read_file, state_in

EXAMPLES = """examples:
  python -m tools.import_official ckpt_epoch_800.pth --out runs/slotcon_coco
  python -m evaluation.slots --checkpoint runs/slotcon_coco --data coco.beton
  python -m tools.import_official slotcon_coco_r50_800ep_backbone.pth --out backbone.safetensors \\
      --data COCO --epochs 800

A full checkpoint does not say which images it saw: the run's data are the name of the set and the
number of its images, where the file gives them, and its fingerprint is "unknown". The optimiser is
left behind: training cannot go on from it.
"""


def main() -> None:
    args = parse_args()
    if args.epochs is not None and args.epochs < 1:
        raise UserError(f"--epochs {args.epochs}: must be 1 or more")
    content, metadata = read_file(args.file)
    wrapped, _ = state_in(content, args.file)
    state = {name.removeprefix("module."): value for name, value in wrapped.items()}
    stated = {"data": args.data, "epochs": args.epochs and str(args.epochs)}
    if PROTOTYPES in state:
        if args.student or any(stated.values()):
            raise UserError(
                f"--student, --data, --epochs: are for a backbone alone, and {args.file} is more"
            )
        official = read_official(args.file, state, content, metadata)
        import_run(official, args.out)
        optimizer = official.args.get("optimizer", "lars")
        if optimizer != "lars":
            print(f"warning: trained with {optimizer}, not config.yaml's LARS", file=sys.stderr)
        steps = f"{official.step:,}" if official.step else "an unknown number of"
        print(f"{args.out}: a run of {steps} steps")
    else:
        branch: Branch = "student" if args.student else "teacher"
        import_backbone(args.file, args.out, branch, {k: v for k, v in stated.items() if v})
        print(f"{args.out}: a backbone")


def parse_args() -> argparse.Namespace:
    parser = CommandParser(
        prog="python -m tools.import_official",
        description=__doc__,
        epilog=EXAMPLES,
        allow_abbrev=False,
    )
    parser.add_argument("file", type=Path, help="the checkpoint")
    parser.add_argument(
        "--out",
        required=True,
        type=Path,
        help="a full checkpoint's new folder; a backbone's .safetensors file",
    )
    text = "that a backbone was trained on, which its file does not say: transfer.table asks"
    parser.add_argument("--data", metavar="NAME", help=f"set of images (COCO, ImageNet, …) {text}")
    parser.add_argument("--epochs", metavar="N", type=int, help="passes over them")
    parser.add_argument(
        "--student", action="store_true", help="of two backbones, the one that learns (encoder_q)"
    )
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
