"""Convert a checkpoint of the authors' code (CVMI-Lab/SlotCon or CVMI-Lab/SlotMIM on GitHub).

A full checkpoint becomes the folder of a run, for evaluation, export and transfer. A checkpoint of
a backbone becomes a file of weights under the names of torchvision, or of timm for a ViT. The file
may hold tensors, plain values and settings of argparse; no code in it is executed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import UserError
from train.run.cli import CommandParser, run

if TYPE_CHECKING:
    from model.names import Branch

EXAMPLES = """examples:
  python -m tools.import_official ckpt_epoch_800.pth --out runs/slotcon_coco
  python -m evaluation.slots --checkpoint runs/slotcon_coco --data coco.beton
  python -m tools.import_official slotcon_coco_r50_800ep_backbone.pth --out backbone.safetensors \\
      --data COCO --epochs 800
  python -m tools.import_official slotmim_cocoplus_vitb.pth --out vitb.safetensors --data COCO+

A full checkpoint does not identify its training images. The run records the name of the data set
and the number of images if the file gives them, and the fingerprint "unknown". The state of the
optimiser is not imported: training cannot resume from the run.

The file of a backbone often does not say how it was trained: --data and --epochs add this for
transfer.table. If it holds two backbones, the teacher (encoder_k) is taken by default.
"""


def main() -> None:
    args = parse_args()
    if args.epochs is not None and args.epochs < 1:
        raise UserError(f"--epochs {args.epochs}: must be 1 or more")
    # Slow imports, which --help does not wait for.
    from tools.weights.official import (
        PROTOTYPES,
        import_backbone,
        import_run,
        objective_of,
        read_official,
    )
    from train.weights import read_file, state_below, tensors_in

    content, metadata = read_file(args.file)
    tensors = tensors_in(content)
    stated = {"data": args.data, "epochs": args.epochs and str(args.epochs)}
    if objective := objective_of(tensors):
        if args.student or any(stated.values()):
            raise UserError(
                f"--student, --data, --epochs: only for a backbone, and {args.file} holds more"
            )
        if args.arch and objective == "slotcon":
            raise UserError(f"--arch: only for a ViT, and {args.file} holds a SlotCon")
        state, _ = state_below(tensors, PROTOTYPES[objective], args.file, "a whole SlotCon")
        official = read_official(args.file, objective, state, content, metadata)
        import_run(official, args.out, args.arch)
        ours = {"slotcon": "LARS", "slotmim": "AdamW"}[objective]
        if (theirs := official.args.get("optimizer", ours.lower())) != ours.lower():
            print(f"warning: trained with {theirs}, not config.yaml's {ours}", file=sys.stderr)
        steps = f"{official.step:,}" if official.step else "an unknown number of"
        print(f"{args.out}: a run of {steps} steps")
    else:
        branch: Branch = "student" if args.student else "teacher"
        known = {k: v for k, v in stated.items() if v}
        import_backbone(args.file, args.out, branch, known, args.arch)
        print(f"{args.out}: a backbone")


def parse_args() -> argparse.Namespace:
    parser = CommandParser(
        prog="python -m tools.import_official",
        description=__doc__,
        epilog=EXAMPLES,
    )
    parser.add_argument("file", type=Path, help="the checkpoint")
    parser.add_argument("--out", required=True, type=Path, help="new folder, or .safetensors file")
    parser.add_argument("--data", metavar="NAME", help="data set of a backbone, such as COCO")
    parser.add_argument("--epochs", metavar="N", type=int, help="epochs on this data set")
    parser.add_argument("--arch", metavar="timm:NAME", help="of a ViT whose size is not usual")
    parser.add_argument("--student", action="store_true", help="of two backbones, take encoder_q")
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
