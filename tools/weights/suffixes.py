"""Which files each format of `tools.weights.formats` may write."""

from pathlib import Path

from pipeline.errors import UserError
from train.run.cli import check_writable

SUFFIXES = {
    "torchvision": (".safetensors", ".pth"),
    "timm": (".safetensors", ".pth"),
    "detectron2": (".pkl",),
    "mmseg": (".pth",),
    "huggingface": (),
    "official": (".pth",),
    "onnx": (".onnx",),
    "onnx-segmenter": (".onnx",),
}
"""Allowed suffixes of each format; empty: the format is a folder."""


def check_out(to: str, out: Path, source: Path) -> None:
    """Raise UserError if the output cannot be written, is `source` or a file in it, or has a wrong
    suffix: its readers choose the format by the suffix.
    """
    suffixes = SUFFIXES[to]
    if suffixes and out.suffix not in suffixes:
        raise UserError(f"--out {out}: --to {to} writes a {' or '.join(suffixes)} file")
    if suffixes:
        check_writable("--out", out, source)
        if source.is_dir() and out.exists() and out.resolve().is_relative_to(source.resolve()):
            raise UserError(f"--out {out}: is a file of {source}: give the name of a new file")
