"""Errors against PIL of each way to make views, given the same images and view parameters.

    python -m tests.fidelity --images /data/coco/train2017
    python -m tests.fidelity --images /data/coco/train2017 --ways triton --count 8 --size 32 \\
        --cases geometry "all colour" recipe

A way is a backend, which crops and colours whole images ("compiled": on the threads that decode
them); or it is "host" or "dali", which crop (DALI also decodes) before the reference colours.
Geometry is crop, resize and flip, with everything else off. A single colour operation gets PIL's
crops, so its row holds no other error. Without a GPU triton runs in its interpreter, which takes
seconds for each small view.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline.augment import BACKENDS, IMAGENET_MEAN, IMAGENET_STD, get_backend
from pipeline.beton import Beton
from pipeline.loader import make_loader
from pipeline.views import ViewConfig, sample_views
from train.run.cli import run
from train.run.provenance import provenance

WAYS = (*(name for name in BACKENDS if name != "reference"), "host", "dali")
EDGE = 8
"""Levels of 255. Larger errors are counted: thresholds and edges may cause a few."""
BATCH = 8

OFF: dict[str, Any] = {
    "jitter": 0, "brightness": 0, "contrast": 0, "saturation": 0, "hue": 0,
    "grey": 0, "blur": (0, 0), "solarize": (0, 0),
}  # fmt: skip
WHOLE: dict[str, dict[str, Any]] = {
    "geometry": OFF,
    "geometry, blur": OFF | {"blur": (1, 1)},
    "geometry, solarize": OFF | {"solarize": (1, 1)},
    "recipe": {},
}
COLOUR: dict[str, dict[str, Any]] = {
    "brightness": OFF | {"jitter": 1, "brightness": 0.4},
    "contrast": OFF | {"jitter": 1, "contrast": 0.4},
    "saturation": OFF | {"jitter": 1, "saturation": 0.2},
    "hue": OFF | {"jitter": 1, "hue": 0.1},
    "grey": OFF | {"grey": 1},
    "blur": OFF | {"blur": (1, 1)},
    "solarize": OFF | {"solarize": (1, 1)},
    "all colour": {},
}
ROW = "| {way} | {case} | {mae:.3f} | {worst_mae:.3f} | {psnr:.1f} | {edges:.4%} | {most:.0f} |"
HEAD = (
    "| way | case | mean error | worst view's | worst view's PSNR, dB |"
    f" values off by more than {EDGE} | largest |"
)


class Error(NamedTuple):
    """Errors over all views of a case, in levels of 255."""

    way: str
    case: str
    mae: float
    worst_mae: float
    psnr: float
    edges: float
    most: float


def levels(views: Tensor) -> Tensor:
    """Undo the normalisation: 0..255, on the CPU."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    return (views.float().cpu() * std + mean) * 255


def measure(way: str, case: str, pairs: Sequence[tuple[Tensor, Tensor]]) -> Error:
    """From pairs of (views, PIL's views), both [2, B, 3, S, S]."""
    off = torch.cat([(levels(a) - levels(b)).double().abs() for a, b in pairs], dim=1)
    each = off.flatten(0, 1).flatten(1)  # [views, values]
    square = each.square().mean(dim=1).max().clamp_min(1e-9)
    return Error(
        way,
        case,
        mae=each.mean().item(),
        worst_mae=each.mean(dim=1).max().item(),
        psnr=(10 * torch.log10(255**2 / square)).item(),
        edges=(each > EDGE).double().mean().item(),
        most=each.max().item(),
    )


def views_of(
    beton: Beton, way: str, views: ViewConfig, count: int, device: torch.device
) -> list[Tensor]:
    """Batches [2, B, 3, S, S] of the first `count` images' views, through the loader."""
    crops, backend = (way, "reference") if way in ("host", "dali") else ("device", way)
    crops = "host" if way == "compiled" else crops
    loader = make_loader(
        beton, views, BATCH, crops=crops, backend=backend, device=device, seed=0,
        order="sequential", threads=1,
    )  # fmt: skip
    batches = loader.epoch(0)
    taken = [next(batches) for _ in range(count // BATCH)]
    assert [i for b in taken for i in b.index.tolist()] == beton.index[
        : len(taken) * BATCH
    ].tolist()
    return [batch.views.cpu() for batch in taken]


def compare(
    beton: Beton,
    ways: Sequence[str],
    cases: Sequence[str],
    size: int,
    count: int,
    device: torch.device,
) -> Iterator[Error]:
    """The errors of every case of every way."""
    cpu = torch.device("cpu")
    for case, changes in ((case, WHOLE[case]) for case in cases if case in WHOLE):
        views = ViewConfig(size=size, **changes)
        truth = views_of(beton, "reference", views, count, cpu)
        for way in ways:
            made = views_of(beton, way, views, count, device)
            yield measure(way, case, list(zip(made, truth, strict=True)))
    cut = views_of(beton, "reference", ViewConfig(size=size, **OFF), count, cpu)
    pixels = [levels(views).round().byte().permute(0, 1, 3, 4, 2).contiguous() for views in cut]
    for case, changes in ((case, COLOUR[case]) for case in cases if case in COLOUR):
        for way in ways:
            if way in BACKENDS:
                yield measure(way, case, list(_coloured(beton, way, pixels, changes, device)))


def _coloured(
    beton: Beton, way: str, pixels: Sequence[Tensor], changes: dict[str, Any], device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """The same crops, uint8 [2, B, S, S, 3], coloured by `way` and by PIL."""
    for number, crops in enumerate(pixels):
        which = slice(number * BATCH, (number + 1) * BATCH)
        sizes = beton.height[which], beton.width[which]
        views = ViewConfig(size=crops.shape[2], **changes)
        drawn = sample_views(0, 0, beton.index[which], *sizes, views)
        cpu = torch.device("cpu")
        truth = get_backend("reference").colour(crops, drawn, cpu, torch.float32)
        yield get_backend(way).colour(crops.to(device), drawn, device, torch.float32), truth


def main() -> None:
    """Pack the images, compare, print a table."""
    args = parse(sys.argv[1:])
    device = torch.device(args.device)
    if device.type == "cpu" and "triton" in args.ways:
        os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "images.beton"
        command = [sys.executable, "-m", "tools.build_dataset", "folder", "--root", args.images]
        subprocess.run([*command, "--out", out], check=True, stdout=subprocess.DEVNULL)
        beton = Beton(out)
        count = min(args.count, len(beton)) // BATCH * BATCH
        print(f"{count} images, two views of {args.size} pixels each, on the {device.type}\n")
        print(HEAD, "|---" * 7 + "|", sep="\n")
        errors = []
        for error in compare(beton, args.ways, args.cases, args.size, count, device):
            errors.append(error)
            print(ROW.format(**error._asdict()), flush=True)
    if args.json:
        settings = {"count": count, "size": args.size, "device": args.device}
        results = [error._asdict() for error in errors]
        content = provenance() | {"settings": settings, "results": results}
        args.json.write_text(json.dumps(content, indent=1) + "\n")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m tests.fidelity",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--images", type=Path, required=True, help="folder of images")
    parser.add_argument("--count", type=int, default=128, help="images, a multiple of 8 (128)")
    parser.add_argument("--size", type=int, default=224, help="side of the views (224)")
    parser.add_argument(
        "--ways", nargs="+", choices=WAYS, default=["compiled", "kornia", "host", "dali"]
    )
    known = [*WHOLE, *COLOUR]
    parser.add_argument("--cases", nargs="+", choices=known, default=known, metavar="CASE")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the errors here as well")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run(main)
