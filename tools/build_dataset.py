"""Pack images into one FFCV beton."""

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline.errors import UserError
from pipeline.folders import say_found
from pipeline.formats import MAX_PIXELS
from pipeline.images import Limits
from pipeline.manifest import ORIGINAL, TILES, manifest_path
from tools.packing import scenes
from tools.packing.archives import MAX_FILES
from tools.packing.budget import choose
from tools.packing.images import Storage
from tools.packing.job import job_of, shard_path
from tools.packing.lists import listed
from tools.packing.merge import merge_job
from tools.packing.parquet import parquet
from tools.packing.remote import place
from tools.packing.run import Summary, is_complete, is_interrupted, pack
from tools.packing.sources import KNOWN_COUNTS, SOURCES, Source
from tools.packing.subset import subset
from tools.packing.webdataset import webdataset
from train.run.cli import CommandParser, check_writable, run

SHARDED = {"parquet": (parquet, "column"), "webdataset": (webdataset, "ending")}
"""Sources whose shards have named parts: the function, and what a part is."""
REMOTE = ("folder", "imagefolder")
"""Sources below a root that may be a URL; those of `SHARDED` and `list` may too."""
MAX_WORKERS = 1024
"""Threads. Each has up to four batches in memory."""

EPILOG = """examples:
  python -m tools.build_dataset coco --root /data/coco --out coco.beton
  python -m tools.build_dataset imagenet --root /data/imagenet --out in1k.beton
  python -m tools.build_dataset coco --root /data/coco --out coco.beton --tiles
  python -m tools.build_dataset imagenet --root /data/imagenet --out in500.beton --store jpeg --max-side 500
  python -m tools.build_dataset openimages --root /data/oi --out oi.beton --store auto --budget 400GB
  python -m tools.build_dataset folder --root ~/photos --out photos.beton --on-error skip
  python -m tools.build_dataset list --list train.csv --root /data --out mine.beton
  python -m tools.build_dataset parquet --root '/data/in1k/data/train-*.parquet' --out in1k.beton
  python -m tools.build_dataset webdataset --root '/data/shard-{000000..000099}.tar' --out w.beton
  python -m tools.build_dataset folder --root s3://bucket/photos --out photos.beton
  python -m tools.build_dataset imagenet --root /data/imagenet --out in118k.beton --subset 118000
  python -m tools.build_dataset imagenet --root /data/imagenet --out in1k.beton --shard 3/16
  python -m tools.build_dataset merge in1k.shard-*-of-16.beton --out in1k.beton
  python -m tools.build_dataset sample --out sample.beton

Images in .tar and .zip files are read in place: train2017.zip, train/<wnid>.tar or
ILSVRC2012_img_train.tar under --root, and any archive below a folder.

After a kill, the same command resumes. FILE appears only when it is complete. FILE.beton.json lists
the images in order with their checksums. By default only the structure of a copied JPEG is checked:
complete headers, and an end marker, which a truncated file does not have. --check decode also
decodes each JPEG. This finds more damage, and takes 1 to 2 ms per image and core.
"""  # noqa: E501


def main(argv: Sequence[str] | None = None) -> None:
    """Pack the data set and print a summary."""
    args = _parse(argv)
    out: Path = args.out
    if args.source != "merge" and args.shard:
        out = shard_path(out, *args.shard)
    check_writable("--out", out)
    check_output(out, args.force or is_interrupted(out))  # before the listing, which takes time
    if getattr(args, "subset", 1) is None and (args.subset_lt or args.seed is not None):
        raise UserError(f"{'--subset-lt' if args.subset_lt else '--seed'} needs --subset N")
    if args.source == "merge":
        job = merge_job(args.shards)
    else:
        storage, limits = _storage(args), Limits(args.max_bytes, args.max_pixels)
        source = _chosen(args, _source(args, out))
        if args.store == "auto":
            storage = fit(source, args.budget, storage, args.workers, limits)
        job = job_of(args.source, source, storage, args.shard, limits)
    if is_complete(out, job):
        print(f"{out} is complete")
        return
    check_output(out, args.force)
    _print_summary(out, pack(job, out, args.on_error, args.workers))


def check_output(out: Path, force: bool) -> None:
    """Raises UserError if `out` exists, unless `force` is set and it is called .beton."""
    if out.exists() and force and out.suffix != ".beton":
        raise UserError(f"--out {out}: exists; --force replaces only files called .beton")
    if out.exists() and not force:
        raise UserError(f"--out {out}: exists; --force replaces it")


def fit(source: Source, budget: int, base: Storage, workers: int, limits: Limits) -> Storage:
    """Choose and print the storage with the largest side that fits `budget` bytes, from a sample.

    Raises:
        UserError: if no storage fits.
    """
    choice = choose(source, budget, base, workers, limits)
    storage = choice.storage
    side = f" --max-side {storage.max_side}" if storage.max_side else ""
    print(
        f"--store {storage.store}{side}: about {choice.bytes / 1e9:.2f} of {budget / 1e9:.2f} GB;"
        f" one core decodes {choice.images_per_s:,.0f} images/s ({choice.images} images sampled)"
    )
    return storage


def _chosen(args: argparse.Namespace, source: Source) -> Source:
    """The part of a source that the options ask for; warns if the whole has another size than it
    should.
    """
    if expected := KNOWN_COUNTS.get(args.source):
        _warn_of_count(source, args.source, expected)
    count = getattr(args, "subset", None)
    if count is None:
        return source
    seed = args.seed or 0
    part = subset(source, count, seed, args.subset_lt)
    print(f"taken: {count:,} of them, by --seed {seed}", file=sys.stderr)
    return part


def _source(args: argparse.Namespace, out: Path) -> Source:
    if args.source == "sample":
        root = args.root or out.parent / "scenes"
        scenes.write(root, args.count, args.val_count, args.seed, args.workers, args.force)
        return SOURCES["folder"](root / "train" / "images")
    if args.source == "list":
        return listed(args.list, args.root)
    if args.source in SHARDED:
        source = SHARDED[args.source][0](args.root, args.image, args.label)
    else:
        source = SOURCES[args.source](args.root)
    say_found(len(source) - len(source.faults), source.root, source.left)
    if source.sidecars:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in source.sidecars.most_common(8))
        print(
            f"warning: {kinds} beside images of their names are not read: the beton gets no labels"
            " or captions from them; `list` takes labels from a CSV file of path,label, and"
            " `webdataset` from the .cls files of a WebDataset",
            file=sys.stderr,
        )
    return source


def _storage(args: argparse.Namespace) -> Storage:
    """The storage options. Raises UserError if they contradict each other."""
    if args.max_side and args.store in ("original", "auto"):
        hint = "use --store jpeg or raw" if args.store == "original" else "it chooses the side"
        raise UserError(f"--max-side cannot be used with --store {args.store}: {hint}")
    if args.quality and args.store not in ("jpeg", "auto"):
        raise UserError(f"--quality cannot be used with --store {args.store}: it encodes no JPEG")
    if (args.budget is not None) != (args.store == "auto"):
        raise UserError("--store auto and --budget need each other")
    store = "original" if args.store == "auto" else args.store
    if args.tiles and args.store == "raw":
        raise UserError("--tiles cannot be used with --store raw: it stores no JPEG")
    return Storage(store, args.max_side, args.quality or Storage.quality, args.check, args.tiles)


def _warn_of_count(source: Source, kind: str, expected: int) -> None:
    count = len(source) - len(source.faults)
    if count != expected:
        print(f"warning: {kind} has {expected:,} images, but found {count:,}", file=sys.stderr)


def _print_summary(out: Path, summary: Summary) -> None:
    unchanged, tiles = summary.stored[ORIGINAL], summary.stored[TILES]
    converted = summary.images - unchanged - tiles
    with_tiles = f" {tiles:,} with tiles," if tiles else ""
    packed = max(0, summary.images + summary.skipped - summary.resumed)
    seconds = max(summary.seconds, 1e-9)
    skipped = f", {summary.skipped:,} skipped: see {manifest_path(out)}" if summary.skipped else ""
    print(
        f"wrote {out}: {summary.images:,} images, {summary.bytes / 1e6:,.1f} MB in {seconds:.1f} s"
        f" ({packed / seconds:,.0f} images/s);"
        f"{with_tiles} {unchanged:,} copied unchanged, {converted:,} converted{skipped}"
    )


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser(prog="python -m tools.build_dataset", description=__doc__, epilog=EPILOG)
    commands = parser.add_subparsers(dest="source", required=True, metavar="SOURCE")
    for name, build in SOURCES.items():
        command = _add_command(commands, name, build.__doc__ or "")
        command.add_argument(
            "--root", type=place if name in REMOTE else Path, required=True, metavar="DIR",
            help="folder of the data set" + ", or its URL" * (name in REMOTE),
        )  # fmt: skip
        _add_subset(command)
        _add_storage(command)
    for name, (build, parts) in SHARDED.items():
        command = _add_command(commands, name, build.__doc__ or "")
        command.add_argument(
            "--root", type=place, required=True, metavar="PATH",
            help="file, folder or pattern of the shards, or its URL",
        )  # fmt: skip
        for option, kind in (("image", "images"), ("label", "labels")):
            command.add_argument(f"--{option}", metavar="NAME", help=f"{parts} of the {kind}")
        _add_subset(command)
        _add_storage(command)
    command = _add_command(commands, "list", listed.__doc__ or "")
    command.add_argument("--list", type=Path, required=True, metavar="FILE", help="the list")
    command.add_argument(
        "--root",
        type=place,
        metavar="DIR",
        help="folder of the paths, or its URL (default: list's)",
    )
    _add_subset(command)
    _add_storage(command)
    command = _add_command(commands, "sample", "Generated scenes with label maps, and photographs.")
    command.add_argument(
        "--root",
        type=Path,
        metavar="DIR",
        help="folder for the scenes (default: scenes/ beside FILE)",
    )
    for option, default, kind in (("count", 1000, "training"), ("val-count", 100, "held-out")):
        command.add_argument(
            f"--{option}",
            type=_positive,
            default=default,
            help=f"{kind} scenes (default {default})",
        )
    command.add_argument("--seed", type=_seed, default=0, help="seed of the generator (default 0)")
    _add_storage(command)
    command = _add_command(commands, "merge", "Merge the shards that --shard made into one beton.")
    command.add_argument("shards", type=Path, nargs="+", metavar="SHARD", help="all shards")
    command.set_defaults(on_error="stop")
    return parser.parse_args(argv)


def _add_command(
    commands: "argparse._SubParsersAction[CommandParser]", name: str, about: str
) -> CommandParser:
    command = commands.add_parser(
        name,
        help=about.split("\n", maxsplit=1)[0],
        description=about,
        epilog=EPILOG,
    )
    command.add_argument("--out", type=Path, required=True, metavar="FILE", help="beton to write")
    command.add_argument(
        "--workers", type=_threads, default=len(os.sched_getaffinity(0)), metavar="N",
        help="threads (default: all cores)",
    )  # fmt: skip
    command.add_argument("--force", action="store_true", help="replace an existing FILE")
    return command


def _add_subset(command: CommandParser) -> None:
    command.add_argument(
        "--subset", type=_positive, metavar="N",
        help="pack only N images, chosen by their names and --seed; as many of each class, where"
        " there are labels",
    )  # fmt: skip
    command.add_argument(
        "--subset-lt", action="store_true",
        help="the classes of --subset have long-tailed sizes, as those of ImageNet-LT",
    )  # fmt: skip
    command.add_argument("--seed", type=_seed, metavar="N", help="seed of --subset (default 0)")


def _add_storage(command: CommandParser) -> None:
    command.add_argument(
        "--store", choices=("original", "jpeg", "raw", "auto"), default="original",
        help="original (default): JPEG files unchanged, other images as pixels; jpeg: JPEG files up"
        " to --max-side unchanged, other images encoded; raw: pixels; auto: the largest side and"
        " the storage that fit --budget, from a sample",
    )  # fmt: skip
    command.add_argument(
        "--tiles", action="store_true",
        help="restart markers about every 64 pixels in each JPEG, without loss: training decodes"
        " only the region of its crops",
    )  # fmt: skip
    command.add_argument(
        "--max-side", type=_positive, metavar="N",
        help="scale images with a longer side down to N pixels, antialiased (--store jpeg or raw)",
    )  # fmt: skip
    command.add_argument(
        "--quality", type=_quality, metavar="Q", help="JPEG quality of encoded images (default 95)"
    )
    command.add_argument(
        "--max-pixels", type=_pixels, default=Limits.max_pixels, metavar="N",
        help=f"refuse larger images (default {Limits.max_pixels:,}, at most {MAX_PIXELS:,})",
    )  # fmt: skip
    command.add_argument(
        "--max-bytes", type=_bytes, default=Limits.max_bytes, metavar="SIZE",
        help=f"refuse larger image files (default {Limits.max_bytes // 10**6}MB)",
    )  # fmt: skip
    command.add_argument(
        "--budget", type=_bytes, metavar="SIZE", help="size for --store auto: 40GB, 500MB, 1.5TB"
    )
    command.add_argument(
        "--check", choices=("structure", "decode"), default="structure",
        help="how to check copied JPEGs: headers and end (default), or decode them, 1-2 ms each",
    )  # fmt: skip
    command.add_argument(
        "--on-error", choices=("stop", "skip"), default="stop",
        help="bad images: read all images, name the bad ones and stop (default), or skip them",
    )  # fmt: skip
    command.add_argument(
        "--shard", type=_shard, metavar="I/N",
        help="pack shard I of N into FILE.shard-I-of-N.beton; merge joins the shards",
    )  # fmt: skip


def _positive(text: str) -> int:
    value = _whole(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    if value > MAX_FILES:
        raise argparse.ArgumentTypeError(f"{text}: at most {MAX_FILES:,}")
    return value


def _threads(text: str) -> int:
    value = _positive(text)
    if value > MAX_WORKERS:
        raise argparse.ArgumentTypeError(f"{text}: at most {MAX_WORKERS:,}")
    return value


def _whole(text: str) -> int:
    """The value of up to 18 digits; -1 for any other text."""
    return int(text) if re.fullmatch(r"[0-9]{1,18}", text) else -1


def _seed(text: str) -> int:
    value = _whole(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of up to 18 digits")
    return value


def _pixels(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= MAX_PIXELS:
        raise argparse.ArgumentTypeError(f"{text!r} is not from 1 to {MAX_PIXELS}")
    return int(text)


def _quality(text: str) -> int:
    if not 1 <= _whole(text) <= 100:
        raise argparse.ArgumentTypeError(f"{text!r} is not from 1 to 100")
    return int(text)


def _bytes(text: str) -> int:
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([KMGT]?)(i?)B?", text, re.IGNORECASE)
    if not match or (match[3] and not match[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size like 40GB")
    factor = (1024 if match[3] else 1000) ** " KMGT".index(match[2].upper() or " ")
    value = float(match[1]) * factor
    if value > 1e18:
        raise argparse.ArgumentTypeError("more than 1e18 bytes")
    return int(value)


def _shard(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([0-9]{1,18})/([0-9]{1,18})", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with I from 1 to N")
    return int(match[1]), int(match[2])


if __name__ == "__main__":
    run(main)
