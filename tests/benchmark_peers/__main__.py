"""slotstream's data path beside other people's: two coloured views of each image, from the same
JPEG files, on the same cores, by turns.

    python -m tests.benchmark_peers --images /data/coco/train2017 --json peers.json

All peers get SlotCon's recipe: crops of 8 to 100 % of the area, flip, colour jitter, grey, blur,
solarisation, normalised float32 views of 224 pixels. A turn is a new process, so that no peer's
imports, threads or caches disturb another. It makes its first batch, warms up, and is then timed.
Every second round runs in reversed order. A peer that is not installed, or fails, becomes a row
with the reason.
"""

import argparse
import contextlib
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pipeline.errors import UserError, printable
from pipeline.ffcv_format import JPEG
from tests.benchmark_peers.peers import PEERS, Job
from tests.benchmark_peers.rounds import run_rounds
from tests.benchmark_peers.table import content_of, markdown
from train.run.cli import CommandParser, check_writable, run
from train.run.provenance import provenance, write_bytes, write_json

EXAMPLES = """examples:
  python -m tests.benchmark_peers --images /data/coco/train2017 --markdown peers.md
  python -m tests.benchmark_peers --images coco.beton --peers slotstream dali --rounds 9
  python -m tests.benchmark_peers --images /data/coco/train2017 --first-batch
  python -m tests.benchmark_peers --images /data/coco/train2017 --threads 16 --device cuda

Peers
{peers}
"""
SUFFIXES = (".jpg", ".jpeg")


def main() -> None:
    args = parse(sys.argv[1:])
    check(args)
    with tempfile.TemporaryDirectory(prefix="peers-") as folder:
        work = Path(folder)
        images = lay_out(args.images, args.count, work / "files")
        if images < args.batch:
            raise UserError(f"{args.images}: has {images} JPEG files, a batch needs {args.batch}")
        reasons = pack(work, args.peers)
        machine = provenance()
        with contextlib.suppress(PackageNotFoundError):
            machine["versions"]["lightly"] = version("lightly")
        shown = ""
        for turns in run_rounds(job_of(args, work), args.peers, args.rounds, reasons):
            content = machine | content_of(args, images, turns, reasons)
            shown = markdown(content)
            write(args, content, shown)
    print(shown)


def write(args: argparse.Namespace, content: dict[str, Any], shown: str) -> None:
    """What is known so far, each file whole or not at all."""
    if args.json:
        write_json(args.json, content)
    if args.markdown:
        write_bytes(args.markdown, f"{shown}\n".encode())


def parse(argv: Sequence[str]) -> argparse.Namespace:
    peers = "\n".join(f"  {name:22}{peer.about}" for name, peer in PEERS.items())
    parser = CommandParser(
        prog="python -m tests.benchmark_peers",
        description=__doc__,
        epilog=EXAMPLES.format(peers=peers),
    )
    parser.add_argument(
        "--images", type=Path, required=True, help="folder of JPEG files, or a beton with JPEGs"
    )
    parser.add_argument(
        "--count", type=int, default=512, help="use this many of the images at most (512)"
    )
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS), metavar="PEER")
    parser.add_argument("--rounds", type=int, default=4, help="turns of each peer (4)")
    parser.add_argument("--seconds", type=float, default=3.0, help="timed part of a turn (3)")
    parser.add_argument(
        "--first-batch", action="store_true", help="measure only the time to the first batch"
    )
    parser.add_argument("--batch", type=int, default=32, help="images in a batch (32)")
    parser.add_argument("--size", type=int, default=224, help="side of the views in pixels (224)")
    parser.add_argument(
        "--threads",
        type=int,
        default=len(os.sched_getaffinity(0)),
        help="threads or workers of each peer, which gets as many cores (all)",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all figures here")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the table here")
    args = parser.parse_args(argv)
    args.peers = list(dict.fromkeys(args.peers))
    return args


def check(args: argparse.Namespace) -> None:
    """Refuse options that cannot be measured, before the first turn. Raises UserError."""
    if min(args.count, args.rounds, args.batch, args.size, args.threads) < 1:
        raise UserError("--count, --rounds, --batch, --size and --threads must be at least 1")
    if not 0 < args.seconds < math.inf:
        raise UserError("--seconds must be above 0")
    cores = len(os.sched_getaffinity(0))
    if args.threads > cores:
        raise UserError(f"--threads {args.threads}: this process may use {cores} cores")
    for option, path in (("--json", args.json), ("--markdown", args.markdown)):
        if path:
            check_writable(option, path)
    if args.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise UserError("--device cuda: PyTorch finds no CUDA GPU here")


def lay_out(images: Path, count: int, files: Path) -> int:
    """Copy at most `count` of the images, evenly spread, into the new folder `files`; the page
    cache then holds them. Returns how many. Raises UserError.
    """
    files.mkdir()
    done = 0
    for done, jpeg in enumerate(_jpegs(images, count), 1):
        (files / f"{done:07d}.jpg").write_bytes(jpeg)
    return done


def _jpegs(images: Path, count: int) -> Iterator[bytes]:
    if images.is_file():
        from pipeline.beton import Beton

        beton = Beton(images)
        if any(mode != JPEG for mode in beton.records[:, 4].tolist()):
            raise UserError(f"{images}: holds pixels, not only JPEG files: give the folder")
        for pointer, size, *_ in _spread(beton.records.tolist(), count):
            yield os.pread(beton.file, size, pointer)
        return
    from pipeline.folders import find_images

    found, _ = find_images(images)
    for path in _spread([path for path in found if path.suffix.lower() in SUFFIXES], count):
        yield path.read_bytes()


def _spread(items: list, count: int) -> list:
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def pack(work: Path, peers: Sequence[str]) -> dict[str, str]:
    """Pack `work`/files as images.beton and, for the peers that read it, tiles.beton. Returns why
    a peer cannot be measured, by name. Raises UserError if packing fails.
    """
    if reason := _pack(work, "images.beton"):
        raise UserError(f"the images cannot be packed: {reason}")
    tiled = [name for name in peers if PEERS[name].options.get("data") == "tiles"]
    reason = _pack(work, "tiles.beton", "--tiles") if tiled else ""
    return dict.fromkeys(tiled, f"packing with --tiles: {reason}") if reason else {}


def _pack(work: Path, name: str, *options: str) -> str:
    """Returns why it failed, or ""."""
    command = [sys.executable, "-m", "tools.build_dataset", "folder", "--root", work / "files"]
    done = subprocess.run(
        [*command, "--out", work / name, *options], capture_output=True, text=True, check=False
    )
    reason = done.stderr.strip().splitlines()[-1:] if done.returncode else []
    return printable(reason[0].removeprefix("error: ")) if reason else ""


def job_of(args: argparse.Namespace, work: Path) -> Job:
    """The job of the first peer; the others' differ by its name."""
    from pipeline.views import ViewConfig

    return Job(
        peer=args.peers[0],
        files=str(work / "files"),
        beton=str(work / "images.beton"),
        tiles=str(work / "tiles.beton"),
        views=asdict(ViewConfig(size=args.size)),
        batch=args.batch,
        threads=args.threads,
        device=args.device,
        warm_up=args.seconds / 3,
        seconds=0.0 if args.first_batch else args.seconds,
    )


if __name__ == "__main__":
    run(main)
