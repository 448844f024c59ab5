"""Packing beside ffcv's own writer and `cp -r`, on the same files, one after the other.

    python -m tests.benchmark_packing IMAGES WORK --repeat-to 20000

WORK must have room for three times the images. The page cache is warm: every file is read first.
slotstream's times are those of the whole command, which ends when the file is on the disk; ffcv's
leave out its start, which takes seconds, and it does not sync. ffcv and jpeg get fewer files.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

EPILOG = """example:
  python -m tests.benchmark_packing /data/coco/train2017 /tmp/bench --repeat-to 20000 --json p.json
"""

FFCV = """
import sys
import time
from pathlib import Path
from PIL import Image
from ffcv.fields import IntField, RGBImageField
from ffcv.writer import DatasetWriter

class Files:
    def __init__(self, folder, count):
        self.paths = sorted(Path(folder).iterdir())[:count]
    def __len__(self):
        return len(self.paths)
    def __getitem__(self, i):
        return Image.open(self.paths[i]).convert("RGB"), i

folder, out, count, workers, mode = sys.argv[1:]
fields = {"image": RGBImageField(mode), "index": IntField()}
writer = DatasetWriter(out, fields, num_workers=int(workers))
start = time.perf_counter()
writer.from_indexed_dataset(Files(folder, int(count)))
print(time.perf_counter() - start)
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Make the files, measure, print a table, tidy up."""
    args = _parse(argv)
    work: Path = args.work
    (work / "in").mkdir(parents=True)
    try:
        files = sorted(path for path in args.images.iterdir() if path.is_file())
        for i in range(args.repeat_to):
            source = files[i % len(files)]
            copy = work / "in" / f"{i:07d}{source.suffix}"
            if args.link:
                copy.hardlink_to(source)
            else:
                shutil.copyfile(source, copy)
        (work / "few").mkdir()
        for path in sorted((work / "in").iterdir())[: args.few]:
            (work / "few" / path.name).hardlink_to(path)
        os.sync()
        results = [result for _ in range(args.rounds) for result in _round(args, work)]
    finally:
        shutil.rmtree(work)
    for result in results:
        print("{what:24} {images_per_s:9,.0f} images/s {mb_per_s:8,.0f} MB/s {gb:7.2f} GB"
              " {seconds:7.1f} s".format(**result))  # fmt: skip
    if args.json:
        args.json.write_text(json.dumps({"results": results}, indent=1) + "\n")


def _round(args: argparse.Namespace, work: Path) -> list[dict[str, Any]]:
    folder, out, results = work / "in", work / "o.beton", []
    total = sum(len(path.read_bytes()) for path in folder.iterdir())

    def measure(what: str, command: Sequence[object], count: int = args.repeat_to) -> None:
        start = time.perf_counter()
        done = subprocess.run([str(part) for part in command], check=True, stdout=subprocess.PIPE)
        seconds = time.perf_counter() - start
        if what.startswith("ffcv"):
            seconds = float(done.stdout)
        made = work / "copy" if (work / "copy").exists() else out
        size = (
            sum(p.stat().st_size for p in made.iterdir()) if made.is_dir() else out.stat().st_size
        )
        rate = count / seconds
        mb = total * count / args.repeat_to / seconds / 1e6
        row = {"what": what, "images_per_s": rate, "mb_per_s": mb, "gb": size / 1e9}
        results.append(row | {"seconds": seconds, "images": count})
        shutil.rmtree(work / "copy", ignore_errors=True)
        for path in work.glob("o.beton*"):
            path.unlink()
        os.sync()

    pack = [sys.executable, "-m", "tools.build_dataset", "folder", "--root", folder, "--out", out]
    pack += ["--workers", args.workers]
    ffcv = [sys.executable, "-c", FFCV, folder, out, args.few, args.workers]
    measure("cp -r", ["cp", "-r", folder, work / "copy"])
    measure("cp -r, then sync", ["sh", "-c", f"cp -r {folder} {work}/copy && sync -f {work}/copy"])
    measure("slotstream original", pack)
    pack[pack.index(folder)] = work / "few"
    jpeg = [*pack, "--store", "jpeg", "--max-side", 500]
    measure("slotstream jpeg 500", jpeg, args.few)
    measure("ffcv jpg", [*ffcv, "jpg"], args.few)
    return results


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmark_packing",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("images", type=Path, help="folder of images")
    parser.add_argument("work", type=Path, help="a folder to make, and to delete at the end")
    parser.add_argument("--repeat-to", type=int, default=20000, help="files (default 20000)")
    parser.add_argument("--link", action="store_true", help="hard links instead of copies")
    parser.add_argument("--few", type=int, default=3000, help="files for ffcv and jpeg (3000)")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=1, help="how often all is measured")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to FILE")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
