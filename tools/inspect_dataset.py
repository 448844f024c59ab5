"""Summarise a beton; optionally verify every record, draw pictures, extract the images."""

import argparse
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image

from pipeline.beton import Beton
from pipeline.errors import UserError, printable
from pipeline.ffcv_format import JPEG
from pipeline.manifest import Manifest, manifest_path
from tools.packing import check, pictures
from tools.packing.check import Outcome, Problem
from tools.packing.pictures import size_text
from train.run.cli import CommandParser, check_writable, run

MAX_NAMED = 50  # problems that are printed; --json lists all of them
QUANTILES = (0, 0.05, 0.5, 0.95, 1)

EXAMPLES = """examples:
  python -m tools.inspect_dataset coco.beton
  python -m tools.inspect_dataset coco.beton --plot shapes.png --sheet images.png --json coco.json
  python -m tools.inspect_dataset coco.beton --verify
  python -m tools.inspect_dataset coco.beton --extract coco-images

--verify reads and decodes every record and compares it with the manifest beside the beton. It names
each damaged image; the exit code is 1 if there is damage. Without a manifest it only finds images
that cannot be decoded.
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Inspect a beton; exit code 1 if a record is damaged."""
    args = _parse(argv)
    manifest, damage = _manifest(args.file)
    beton = _open(args.file, manifest, args)
    content: dict[str, Any] = {"dataset": summarise(beton, manifest, damage), "results": []}
    print_summary(beton, content["dataset"])
    if not args.verify:  # --verify measures the rate on all records
        content["results"].append(_rate(beton, args.workers))
    if args.plot:
        _save(args.plot, pictures.histograms(beton))
    if args.sheet:
        _save(args.sheet, pictures.contact_sheet(beton, args.workers))
    problems: dict[Problem, None] = {}  # a set that keeps its order
    if args.verify:
        outcome = check.verify(beton, manifest, args.workers)
        outcome.problems += [(str(manifest_path(args.file)), damage)] if damage else []
        problems |= dict.fromkeys(outcome.problems)
        content["results"].append(_result("verify", outcome, args.workers))
        _report(outcome, "verified" if manifest else "decoded (no manifest: no checksums)")
    if args.extract:
        outcome = check.extract(beton, manifest, args.extract, args.workers)
        problems |= dict.fromkeys(outcome.problems)
        content["results"].append(_result("extract", outcome, args.workers))
        _report(outcome, f"extracted to {args.extract}")
    _finish(args, content, list(problems))


def summarise(beton: Beton, manifest: Manifest | None, damage: str = "") -> dict[str, Any]:
    """The numbers that --json writes."""
    size = beton.records[:, 1]
    jpeg = int((beton.records[:, 4] == JPEG).sum())
    first = int(beton.records[:, 0].min()) // beton.page_size * beton.page_size
    return {
        "file": str(beton.path),
        "images": len(beton),
        "bytes": beton.bytes,
        "source": manifest.source if manifest else None,
        "options": manifest.options if manifest else None,
        "jpeg": jpeg,
        "raw": len(beton) - jpeg,
        "stored": manifest.stored if manifest else None,
        "skipped": len(manifest.skipped) if manifest else None,
        "longest_side": _quantiles(np.maximum(beton.height, beton.width)),
        "shortest_side": _quantiles(np.minimum(beton.height, beton.width)),
        "aspect": _quantiles(beton.width / beton.height),
        "record_bytes": _quantiles(size),
        "page_bytes": beton.page_size,
        "page_use": float(size.sum() / (beton.table - first)),
        "classes": len(manifest.classes) if manifest and manifest.classes else None,
        "labels": None if beton.label is None else len(np.unique(beton.label)),
        "manifest": damage or _manifest_state(beton, manifest),
        "memory_free": psutil.virtual_memory().available,
    }


def print_summary(beton: Beton, summary: dict[str, Any]) -> None:
    """Print the summary as text."""
    how = f", packed from {printable(summary['source'])}" if summary["source"] else ""
    print(f"{beton.path}: {len(beton):,} images, {size_text(beton.bytes)}{how}")
    print(f"  {'':14}" + "".join(f"{name:>10}" for name in ("min", "5 %", "median", "95 %", "max")))
    for name, key, form in (
        ("longest side", "longest_side", "{:,.0f}"),
        ("shortest side", "shortest_side", "{:,.0f}"),
        ("width : height", "aspect", "{:.2f}"),
        ("bytes", "record_bytes", "{:,.0f}"),
    ):
        print(f"  {name:14}" + "".join(f"{form.format(value):>10}" for value in summary[key]))
    rows = {
        "storage": _storage(summary),
        "pages": f"{summary['page_bytes'] >> 20} MiB, {summary['page_use']:.1%} used",
        "cache": f"needs {size_text(beton.bytes)} of memory"
        f" ({size_text(summary['memory_free'])} free on this machine)",
        "labels": _labels(summary),
        "manifest": summary["manifest"],
    }
    for name, value in rows.items():
        print(f"  {name:14}  {value}")


def _storage(summary: dict[str, Any]) -> str:
    parts = [f"{summary['jpeg']:,} JPEG", f"{summary['raw']:,} raw"]
    if stored := summary["stored"]:
        tiles = f", {stored['tiles']:,} with tiles" if stored.get("tiles") else ""
        parts[0] += f" ({stored.get('original', 0):,} unchanged{tiles})"
    if summary["skipped"]:
        parts.append(f"{summary['skipped']:,} bad files skipped")
    return ", ".join(parts)


def _labels(summary: dict[str, Any]) -> str:
    if summary["labels"] is None:
        return "none"
    named = f" of {summary['classes']:,} named classes" if summary["classes"] else ""
    return f"{summary['labels']:,} different{named}"


def _manifest_state(beton: Beton, manifest: Manifest | None) -> str:
    """Whether the manifest is complete and belongs to this beton. Does not compare checksums."""
    if manifest is None:
        return "none: names and checksums are unknown"
    try:
        sizes = np.fromiter((record.bytes for record in manifest.records()), np.int64)
    except UserError as error:
        return f"damaged: {error}"
    if not np.array_equal(sizes, beton.records[:, 1]) or manifest.bytes != beton.bytes:
        return "belongs to another beton: sizes differ"
    return f"digest ok, {manifest.digest[:16]}…, by {printable(manifest.tool)}"


def _manifest(file: Path) -> tuple[Manifest | None, str]:
    """The manifest beside `file` or None, and its damage or ""."""
    if not os.path.lexists(manifest_path(file)):  # a broken link is damage
        return None, ""
    try:
        return Manifest.beside(file), ""
    except UserError as error:
        return None, check.problem(manifest_path(file), error)[1]


def _open(file: Path, manifest: Manifest | None, args: argparse.Namespace) -> Beton:
    """Open the beton. If it cannot be opened, --verify reports this and the lost images."""
    try:
        return Beton(file)
    except UserError as error:
        if not (args.verify and file.is_file()):
            raise
        outcome = Outcome(problems=[check.problem(file, error)])
        try:
            outcome.problems += check.beyond_the_end(file, manifest) if manifest else []
        except UserError as damage:
            outcome.problems.append(check.problem(manifest_path(file), damage))
        _report(outcome, "verified")
        _finish(args, {"dataset": None, "results": []}, outcome.problems)
        raise


def _rate(beton: Beton, workers: int) -> dict[str, Any]:
    outcome = check.decode_rate(beton, workers)
    print(
        f"  decoding        {outcome.images_per_s:,.0f} images/s, {outcome.mb_per_s:,.0f} MB/s"
        f" on {workers} threads (a sample, in the page cache)"
    )
    return _result("decode", outcome, workers)


def _result(stage: str, outcome: Outcome, workers: int) -> dict[str, Any]:
    return {
        "stage": stage,
        "backend": "libjpeg-turbo",
        "images": outcome.images,
        "images_per_s": outcome.images_per_s,
        "mb_per_s": outcome.mb_per_s,
        "seconds": outcome.seconds,
        "threads": workers,
        "problems": len(outcome.problems),
    }


def _report(outcome: Outcome, verb: str) -> None:
    """Print the problems to stderr and a summary to stdout."""
    for name, reason in outcome.problems[:MAX_NAMED]:
        print(f"bad: {printable(name)}: {reason}", file=sys.stderr)
    if len(outcome.problems) > MAX_NAMED:
        print(f"bad: and {len(outcome.problems) - MAX_NAMED:,} more", file=sys.stderr)
    if outcome.images:
        print(
            f"{outcome.images:,} records {verb} in {outcome.seconds:.1f} s"
            f" ({outcome.images_per_s:,.0f} images/s, {outcome.mb_per_s:,.0f} MB/s):"
            f" {f'{len(outcome.problems):,} problems' if outcome.problems else 'all good'}"
        )


def _finish(args: argparse.Namespace, content: dict[str, Any], problems: list[Problem]) -> None:
    if args.json:
        from train.run.provenance import provenance, write_json  # loads torch

        write_json(args.json, provenance() | content | {"problems": problems})
    if problems:
        sys.exit(1)


def _save(path: Path, picture: Image.Image) -> None:
    from train.run.provenance import write_bytes  # loads torch

    stream = io.BytesIO()
    picture.save(stream, "PNG")
    write_bytes(path, stream.getvalue())
    print(f"wrote {path}")


def _quantiles(values: np.ndarray) -> list[float]:
    return [float(value) for value in np.quantile(values, QUANTILES)]


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser(
        prog="python -m tools.inspect_dataset", description=__doc__, epilog=EXAMPLES
    )
    parser.add_argument("file", type=Path, metavar="FILE.beton", help="the beton")
    parser.add_argument("--verify", action="store_true", help="check every record")
    parser.add_argument(
        "--extract", type=Path, metavar="DIR",
        help="write the images to DIR, a new or empty folder",
    )  # fmt: skip
    parser.add_argument(
        "--plot", type=Path, metavar="PNG", help="draw histograms of shapes and sizes"
    )
    parser.add_argument("--sheet", type=Path, metavar="PNG", help="draw a contact sheet")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the numbers and all problems"
    )
    parser.add_argument(
        "--workers", type=int, default=len(os.sched_getaffinity(0)), metavar="N",
        help="threads (default: all cores)",
    )  # fmt: skip
    args = parser.parse_args(argv)
    if args.workers < 1:
        raise UserError("--workers must be at least 1")
    outputs = {f"--{name}": getattr(args, name) for name in ("plot", "sheet", "json")}
    used = [
        path for file in (args.file, args.file.resolve()) for path in (file, manifest_path(file))
    ]
    for option, path in outputs.items():
        if path:
            _check_output(option, path, used)
            used.append(path)
    if args.extract and not args.extract.name:
        raise UserError(f"--extract {args.extract}: needs the name of a folder")
    return args


def _check_output(option: str, path: Path, used: Sequence[Path]) -> None:
    if option != "--json" and path.suffix.lower() != ".png":
        raise UserError(f"{option} {path}: must end in .png")
    check_writable(option, path)
    if path.resolve() in [other.resolve() for other in used]:
        raise UserError(f"{option} {path}: would replace the beton, its manifest or another output")


if __name__ == "__main__":
    run(main)
