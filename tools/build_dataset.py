"""Pack a folder of images into one FFCV beton."""

import argparse
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from pipeline.errors import UserError, run
from tools import scenes
from tools.beton_writer import BetonWriter
from tools.images import BadImage, Record, load_record
from tools.parallel import ordered_map
from tools.sources import SOURCES, Source

MAX_NAMED = 20  # bad files named one by one; the rest are counted

EPILOG = """examples:
  python -m tools.build_dataset coco --root /data/coco --out coco.beton
  python -m tools.build_dataset cocoplus --root /data/coco --out cocoplus.beton
  python -m tools.build_dataset imagenet --root /data/imagenet --out in1k.beton --max-side 500
  python -m tools.build_dataset folder --root ~/photos --out photos.beton
  python -m tools.build_dataset sample --out sample.beton

JPEG files are copied byte for byte; anything else is converted once, losslessly. Every image is
decoded while packing. Bad files are all named at the end, and then nothing is written.
FILE.beton.json lists the packed files in order.
"""


@dataclass(frozen=True)
class Storage:
    """How images are stored."""

    max_side: int | None = None
    """Larger images are scaled down to this side, in pixels, and stored as JPEG. None: never."""
    quality: int = 95
    """JPEG quality of the scaled images, 1 to 100."""


@dataclass
class Summary:
    """What a packing run did."""

    images: int = 0
    seconds: float = 0.0
    converted: dict[str, str] = field(default_factory=dict)
    """File name to the reason why it was not copied unchanged."""


def main(argv: Sequence[str] | None = None) -> None:
    """Pack as the command line says, and print one line about it."""
    args = _parse(argv)
    out: Path = args.out
    check_output(out, args.force)
    if args.source == "sample":
        root = args.root or out.parent / "scenes"
        scenes.write(root, args.count, args.val_count, args.seed, args.workers, args.force)
        source = SOURCES["folder"](root / "train" / "images")
    else:
        source = SOURCES[args.source](args.root)
    summary = pack(source, out, args.source, Storage(args.max_side, args.quality), args.workers)
    size, converted = out.stat().st_size, len(summary.converted)
    print(
        f"wrote {out}: {summary.images:,} images, {size / 1e6:,.1f} MB in {summary.seconds:.1f} s"
        f" ({summary.images / summary.seconds:,.0f} images/s);"
        f" {summary.images - converted:,} copied unchanged, {converted:,} converted"
    )


def check_output(out: Path, force: bool) -> None:
    """Refuse an `out` that cannot be written, before the work is done.

    Raises:
        UserError: where it exists and `force` is not set, or its folder is missing or read-only.
    """
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {out.parent}")
    if out.is_dir():
        raise UserError(f"--out {out}: is a folder")
    if out.exists() and not force:
        raise UserError(f"--out {out}: exists; --force replaces it")
    if not os.access(out.parent, os.W_OK):
        raise UserError(f"--out {out}: the folder {out.parent} is not writable")


def pack(source: Source, out: Path, kind: str, storage: Storage, workers: int) -> Summary:
    """Verify the images of `source` and write them to `out`, and a manifest to `<out>.json`.

    Args:
        kind: the name of the source, for the manifest.
        workers: threads that read, verify and convert; the decoders run without Python's lock.

    Raises:
        UserError: naming the bad files, or where `out` cannot be written. Nothing is left then.
    """

    def load(name: str) -> Record | BadImage:
        try:
            return load_record(source.root / name, storage.max_side, storage.quality)
        except BadImage as error:
            return error

    start, count, bad = time.perf_counter(), len(source.names), []
    summary = Summary(count)
    integers = ("index", "label") if source.labels else ("index",)
    records = ordered_map(load, source.names, workers)
    manifest = out.with_name(out.name + ".json")
    try:
        with BetonWriter(out, count, integers) as writer:
            for index, record in enumerate(
                tqdm(records, "packing", count, unit="img", disable=None)
            ):
                if isinstance(record, BadImage):
                    bad.append(f"{source.root / source.names[index]}: {record}")
                elif not bad:  # after the first bad file the rest is only verified
                    label = [source.labels[index]] if source.labels else []
                    writer.append(record.data, record.height, record.width, index, *label)
                    if record.converted:
                        summary.converted[source.names[index]] = record.converted
            if bad:
                raise UserError(_describe_bad(bad, count))
            manifest.unlink(missing_ok=True)  # never an old list of names beside a new beton
        write_manifest(manifest, source, kind, storage, summary)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}") from error
    summary.seconds = time.perf_counter() - start
    return summary


def write_manifest(
    path: Path, source: Source, kind: str, storage: Storage, summary: Summary
) -> None:
    """Write what is in the beton: source, options, classes, conversions, names in stored order."""
    content = {
        "format": 1,
        "source": kind,
        "options": {"max_side": storage.max_side, "quality": storage.quality},
        "count": summary.images,
        "classes": source.classes,
        "converted": summary.converted,
        "names": source.names,
    }
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(path)


def _describe_bad(bad: list[str], count: int) -> str:
    if len(bad) == 1:
        return f"1 of {count:,} files is bad, nothing was written: {bad[0]}"
    more = [f"and {len(bad) - MAX_NAMED:,} more"] if len(bad) > MAX_NAMED else []
    lines = [f"{len(bad):,} of {count:,} files are bad, nothing was written:"]
    return "\n  ".join(lines + bad[:MAX_NAMED] + more)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.build_dataset",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="source", required=True, metavar="SOURCE")
    for name, build in SOURCES.items():
        _add_source(commands, name, build.__doc__ or "")
    sample = _add_source(commands, "sample", "Generated scenes with label maps, and photographs.")
    sample.add_argument(
        "--count", type=_positive, default=1000, help="training scenes (default 1000)"
    )
    sample.add_argument(
        "--val-count", type=_positive, default=100, help="held-out scenes (default 100)"
    )
    sample.add_argument("--seed", type=int, default=0, help="of the generator (default 0)")
    return parser.parse_args(argv)


def _add_source(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]", name: str, about: str
) -> argparse.ArgumentParser:
    command = commands.add_parser(
        name,
        help=about,
        description=about,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sample = name == "sample"
    root_help = "folder for the scenes (default: scenes/ beside FILE)" if sample else "data folder"
    command.add_argument("--root", type=Path, required=not sample, metavar="DIR", help=root_help)
    command.add_argument("--out", type=Path, required=True, metavar="FILE", help="beton to write")
    command.add_argument(
        "--max-side",
        type=_positive,
        metavar="N",
        help="scale larger images down to N pixels, as JPEG",
    )
    command.add_argument(
        "--quality", type=_quality, default=95, metavar="Q", help="of those JPEGs (default 95)"
    )
    command.add_argument(
        "--workers", type=_positive, default=len(os.sched_getaffinity(0)), metavar="N",
        help="threads (default: all cores)",
    )  # fmt: skip
    command.add_argument("--force", action="store_true", help="replace what is at --out")
    return command


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


def _quality(text: str) -> int:
    value = int(text)
    if not 1 <= value <= 100:
        raise argparse.ArgumentTypeError(f"{value} is not from 1 to 100")
    return value


if __name__ == "__main__":
    run(main)
