"""Write a pre-trained encoder as the file that another library reads.

The teacher's, unless --student is given; how it was made is written into the file where the format
has room for that.
"""

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from model.encoder import encoder_dim
from model.names import to_detectron2
from pipeline.augment import IMAGENET_MEAN, IMAGENET_STD
from pipeline.errors import UserError
from tools.weights.model_card import model_card, of_slotcon
from tools.weights.official_settings import official_settings
from train.pickles import pickle_arrays, torch_bytes
from train.run.checkpoint import find, load_model, read_record
from train.run.cli import CommandParser, check_writable, run
from train.run.provenance import new_folder, write_bytes
from train.weights import (
    FOLDER_CONFIG,
    FOLDER_WEIGHTS,
    META,
    Backbone,
    describe,
    read_backbone,
    safetensors_bytes,
)

EXAMPLES = """examples:
  python -m tools.export runs/coco --to torchvision --out slotcon_r50.safetensors
  python -m tools.export runs/coco --to detectron2 --out slotcon_r50.pkl
  python -m tools.export runs/coco --to mmseg --out slotcon_r50_mmseg.pth
  python -m tools.export runs/coco --to huggingface --out slotcon_r50 --license "CC BY 4.0"
  python -m tools.export runs/coco/checkpoints/step_1000 --to official --out slotcon_full.pth

formats:
  torchvision  .safetensors or .pth: the names of torchvision.models.resnet*, without fc
  timm         .safetensors or .pth: the same, for timm.create_model(ARCH, num_classes=0)
  detectron2   .pkl for MODEL.WEIGHTS (INPUT.FORMAT "RGB", RESNETS.STRIDE_IN_1X1 False)
  mmseg        .pth for init_cfg=dict(type='Pretrained', checkpoint=...) of type='ResNet'
  huggingface  a new folder: weights, timm's configuration, a model card
  official     .pth with the whole of SlotCon under the names of the authors' code
"""


def main() -> None:
    args = parse_args()
    check_out(args.to, args.out, args.checkpoint)
    licence = {"data_license": args.license} if args.license else {}
    if args.to == "official":
        if args.student:
            raise UserError("--student: --to official writes teacher and student")
        write_bytes(args.out, official(args.checkpoint, licence))
    elif args.to == "huggingface":
        with new_folder(args.out) as folder:
            for name, content in huggingface(chosen(args, licence)).items():
                (folder / name).write_bytes(content)
    else:
        write_bytes(args.out, FILES[args.to](chosen(args, licence), args.out.suffix))
    print(f"{args.out}: for {args.to}")


def chosen(args: argparse.Namespace, licence: dict[str, str]) -> Backbone:
    """The encoder that the command line names. Raises UserError."""
    backbone = read_backbone(args.checkpoint, branch="student" if args.student else "teacher")
    return replace(backbone, metadata=backbone.metadata | licence)


def parse_args() -> argparse.Namespace:
    parser = CommandParser(
        prog="python -m tools.export", description=__doc__, epilog=EXAMPLES, allow_abbrev=False
    )
    parser.add_argument(
        "checkpoint", type=Path, help="a run, a checkpoint, or any file of a ResNet's weights"
    )
    parser.add_argument("--to", required=True, choices=tuple(SUFFIXES), help="format, see below")
    parser.add_argument("--out", required=True, type=Path, help="file, or new folder, to write")
    parser.add_argument("--student", action="store_true", help="the student, not the teacher")
    parser.add_argument("--license", metavar="TEXT", help="of the images it was trained on")
    return parser.parse_args()


def check_out(to: str, out: Path, source: Path) -> None:
    """Refuse an output that cannot be written, is `source` itself or a file that is in it, or has
    a suffix that its readers would misunderstand.

    Raises UserError.
    """
    suffixes = SUFFIXES[to]
    if suffixes and out.suffix not in suffixes:
        raise UserError(f"--out {out}: --to {to} writes a {' or '.join(suffixes)} file")
    if suffixes:
        check_writable("--out", out, source)
        if source.is_dir() and out.exists() and out.resolve().is_relative_to(source.resolve()):
            raise UserError(f"--out {out}: is a file of {source}: give the name of a new one")


def state_dict(backbone: Backbone, suffix: str) -> bytes:
    """Weights under torchvision's names, which are timm's: safetensors, or a plain state dict."""
    if suffix == ".safetensors":
        return safetensors_bytes(backbone)
    return torch_bytes(backbone.weights)


def detectron2(backbone: Backbone, suffix: str) -> bytes:
    """The dictionary that detectron2's DetectionCheckpointer reads from a .pkl."""
    arrays = {name: value.numpy() for name, value in to_detectron2(backbone.weights).items()}
    return pickle_arrays(
        {
            "model": arrays,
            "__author__": "slotstream",
            "matching_heuristics": True,
            META: backbone.metadata,
        }
    )


def mmseg(backbone: Backbone, suffix: str) -> bytes:
    """The dictionary that mmengine's load_checkpoint reads."""
    return torch_bytes({"state_dict": backbone.weights, META: backbone.metadata})


def huggingface(backbone: Backbone) -> dict[str, bytes]:
    """The files of a model on the hub as timm reads them, by name."""
    size = backbone.metadata.get("view_size", "")
    side = int(size) if size.isdecimal() else 224
    config = {
        "architecture": backbone.arch,
        "num_classes": 0,
        "num_features": encoder_dim(backbone.arch),
        "pretrained_cfg": {
            "tag": "slotcon" if of_slotcon(backbone) else "",
            "custom_load": False,
            "input_size": [3, side, side],
            "fixed_input_size": False,
            "interpolation": "bicubic",
            "crop_pct": 0.875,
            "crop_mode": "center",
            "mean": IMAGENET_MEAN,
            "std": IMAGENET_STD,
            "num_classes": 0,
            "pool_size": [math.ceil(side / 32)] * 2,
            "first_conv": "conv1",
            "classifier": "fc",
        },
    }
    return {
        FOLDER_WEIGHTS: state_dict(backbone, ".safetensors"),
        FOLDER_CONFIG: (json.dumps(config, indent=2) + "\n").encode(),
        "README.md": model_card(backbone).encode(errors="backslashreplace"),
    }


def official(checkpoint: Path, metadata: dict[str, str]) -> bytes:
    """The whole model as the authors' scripts read it, with its settings under their names.

    Raises UserError.
    """
    if checkpoint.is_file():
        raise UserError(f"{checkpoint}: a file: --to official needs a run or its checkpoint")
    record = read_record(find(checkpoint))
    model, config = load_model(checkpoint)
    return torch_bytes(
        {
            "model": {f"module.{k}": v for k, v in model.official_state_dict().items()},
            "args": official_settings(config),
            META: describe(record) | metadata,
        }
    )


FILES: dict[str, Callable[[Backbone, str], bytes]] = {
    "torchvision": state_dict,
    "timm": state_dict,
    "detectron2": detectron2,
    "mmseg": mmseg,
}
"""The formats that are one file of a backbone."""
SUFFIXES = {
    "torchvision": (".safetensors", ".pth"),
    "timm": (".safetensors", ".pth"),
    "detectron2": (".pkl",),
    "mmseg": (".pth",),
    "huggingface": (),
    "official": (".pth",),
}
"""What a file of each format must end with; none: it is a folder."""

if __name__ == "__main__":
    run(main)
