"""Write a pre-trained encoder in the file format of another library.

Writes the teacher's encoder, or the student's with --student. If the format has room for metadata,
the file also says how the weights were made. ONNX files also hold the network, the encoder or the
whole segmenter. With --whiten the last map is a whitened one: features of directions that vary
little count more, and no reader needs to know of it.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import UserError, printable
from tools.weights.suffixes import SUFFIXES, check_out
from train.run.cli import CommandParser, run
from train.run.provenance import new_folder, write_bytes

if TYPE_CHECKING:
    from model.names import Branch
    from train.weights import Backbone

EXAMPLES = """examples:
  python -m tools.export runs/coco --to torchvision --out slotcon_r50.safetensors
  python -m tools.export runs/coco --to detectron2 --out slotcon_r50.pkl
  python -m tools.export runs/coco --to mmseg --out slotcon_r50_mmseg.pth
  python -m tools.export runs/coco --to huggingface --out slotcon_r50 --license "CC BY 4.0"
  python -m tools.export runs/post --to timm --out post.safetensors --whiten photos.beton
  python -m tools.export runs/coco/checkpoints/step_1000 --to official --out slotcon_full.pth
  python -m tools.export runs/coco --to onnx-segmenter --out segmenter.onnx

formats:
  torchvision  .safetensors or .pth: the names of torchvision.models.resnet*, without fc
  timm         .safetensors or .pth: the same, for timm.create_model(ARCH, num_classes=0)
  detectron2   .pkl for MODEL.WEIGHTS (INPUT.FORMAT "RGB", RESNETS.STRIDE_IN_1X1 False)
  mmseg        .pth for init_cfg=dict(type='Pretrained', checkpoint=...) of type='ResNet'
  huggingface  a new folder: weights, timm's configuration, a model card
  official     .pth with the whole of SlotCon or SlotMIM under the names of the authors' code
  onnx         .onnx: images float32 [B, 3, H, W], normalised with ImageNet's mean and deviation →
               features [B, D, h, w] of the last stage; any B, H and W (timm: whole cells)
  onnx-segmenter  .onnx: the same images → scores [B, K, h, w] of the prototypes, and ids int64
               [B, H, W], the best one of each pixel (needs the extra [onnx], as onnx does)
"""


def main() -> None:
    args = parse_args()
    check_out(args.to, args.out, args.checkpoint)
    # --help does not wait for these
    from tools.weights.formats import FILES, huggingface, official
    from tools.weights.onnx_file import encoder_file, segmenter_file

    licence = {"data_license": args.license} if args.license else {}
    if args.whiten and args.to in ("official", "onnx-segmenter"):
        raise UserError(f"--whiten: --to {args.to} writes the model as it was trained")
    if args.to == "official":
        if args.student:
            raise UserError("--student: --to official writes teacher and student")
        write_bytes(args.out, official(args.checkpoint, licence))
    elif args.to == "onnx-segmenter":
        content = segmenter_file(args.checkpoint, branch_of(args), licence)
        write_bytes(args.out, content)
    elif args.to == "onnx":
        write_bytes(args.out, encoder_file(read(args, licence)))
    elif args.to == "huggingface":
        with new_folder(args.out) as folder:
            for name, content in huggingface(read(args, licence)).items():
                (folder / name).write_bytes(content)
    else:
        write_bytes(args.out, FILES[args.to](read(args, licence), args.out.suffix))
    print(f"{args.out}: for {args.to}")


def read(args: argparse.Namespace, licence: dict[str, str]) -> Backbone:
    """The encoder that the options choose, with the licence in its metadata. Raises UserError."""
    from model.architectures import is_timm
    from train.encoders import read_encoder

    backbone = read_encoder(args.checkpoint, branch=branch_of(args), partial=True)
    known = backbone.metadata
    timm = is_timm(backbone.arch)
    if timm and args.to not in ("timm", "huggingface", "onnx"):
        raise UserError(
            f"--to {args.to}: for the ResNets of torchvision alone, and {args.checkpoint} has a "
            f"{backbone.arch}: give --to timm, huggingface or onnx"
        )
    if backbone.stages < 4:
        plain = "timm" if timm else "torchvision"
        if args.to != "onnx" and (args.to, args.out.suffix) != (plain, ".safetensors"):
            raise UserError(
                f"--to {args.to}: needs four stages, and {args.checkpoint} ends at stage "
                f"{backbone.stages}: only --to onnx, --to onnx-segmenter, and --to {plain} --out "
                "NAME.safetensors, can say so"
            )
        print(f"{args.checkpoint}: only the stages 1 to {backbone.stages} of a {backbone.arch}")
        known = {"stages": str(backbone.stages), **known}
    if "prefix" in known and "arch" not in known:  # else the prefix is that of an earlier reading
        side = f", the {known['branch']}" if "branch" in known else ""
        print(f"{args.checkpoint}: took the weights below '{printable(known['prefix'])}'{side}")
    if timm and args.to == "timm":
        tell_statistics(backbone)
    backbone = replace(backbone, metadata={"arch": backbone.arch, **known, **licence})
    if args.whiten is None:
        return backbone
    from tools.weights.whitening import whitened

    return whitened(backbone, args.whiten)


def tell_statistics(backbone: Backbone) -> None:
    """Say how images are normalised, where timm's settings for the name would be wrong."""
    from model.timm_encoder import facts
    from train.encoders import image_stats

    own = image_stats(backbone)
    if own != facts(backbone.arch).image_stats:
        mean, deviation = map(list, own)
        print(f"normalise images with mean {mean} and std {deviation}: timm has others for")
        print(f"  {backbone.arch}. A file cannot tell timm, a folder of --to huggingface does")


def branch_of(args: argparse.Namespace) -> Branch:
    """Which of a run's two networks is written."""
    return "student" if args.student else "teacher"


def parse_args() -> argparse.Namespace:
    parser = CommandParser(prog="python -m tools.export", description=__doc__, epilog=EXAMPLES)
    parser.add_argument("checkpoint", type=Path, help="run, checkpoint, or any file of a ResNet")
    parser.add_argument("--to", required=True, choices=tuple(SUFFIXES), help="format, see below")
    parser.add_argument("--out", required=True, type=Path, help="file or new folder to write")
    parser.add_argument("--student", action="store_true", help="write the student's encoder")
    parser.add_argument(
        "--whiten",
        type=Path,
        metavar="IMAGES",
        help="centre the last map and multiply it by covariance^-1/4 of the cells of these images "
        "(a beton or a folder, no labels), within its last convolution; EfficientNets can hold it",
    )
    parser.add_argument("--license", metavar="TEXT", help="licence of the training images")
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
