"""Compare packing with ffcv's own writer and with `cp -r`, on the same files, one after the other.

    python -m tests.benchmark_packing IMAGES WORK --repeat-to 20000

The images are copied to WORK until there are `--repeat-to` of them, in the layout of each source.
WORK must have space for five times the result. The page cache is warm: every file is read first.
slotstream's times include the whole command, with verification and sync. ffcv's times exclude its
start, which takes seconds, and ffcv does not sync. Where images are decoded and encoded, only
`--few` of them are used.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

EPILOG = """example:
  python -m tests.benchmark_packing /data/coco/train2017 /tmp/bench --repeat-to 20000 --json p.json
"""

CLASSES = 100
PORT = 18973
URL = f"http://127.0.0.1:{PORT}"
ROW = (
    "| {what} | {images:,} | {images_per_s:,.0f} | {mb_per_s:,.0f} | {gb:.2f} GB | {seconds:.1f} |"
)

FFCV = """
import json
import sys
import time
from pathlib import Path
from PIL import Image
from ffcv.fields import IntField, RGBImageField
from ffcv.writer import DatasetWriter

class Files:
    def __init__(self, folder):
        self.paths = sorted(Path(folder).iterdir())
    def __len__(self):
        return len(self.paths)
    def __getitem__(self, i):
        return Image.open(self.paths[i]).convert("RGB"), i

folder, out, workers, options = sys.argv[1:]
fields = {"image": RGBImageField("jpg", **json.loads(options)), "index": IntField()}
writer = DatasetWriter(out, fields, num_workers=int(workers))
start = time.perf_counter()
writer.from_indexed_dataset(Files(folder))
print(time.perf_counter() - start)
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Copy the files, measure, print a table, delete the copies."""
    args = _parse(argv)
    work: Path = args.work
    work.mkdir(parents=True)
    try:
        _lay_out(args.images, work, args.repeat_to, args.few)
        os.sync()
        turn = _sharded if args.sharded else _round
        print("| what | images | images/s | MB/s | output | seconds |", "|---" * 6 + "|", sep="\n")
        results = []
        for _ in range(args.rounds):
            for result in turn(work, args.workers):
                results.append(result)
                print(ROW.format(**result), flush=True)
    finally:
        shutil.rmtree(work)
    if args.json:
        args.json.write_text(json.dumps({"results": results}, indent=1) + "\n")


def _lay_out(images: Path, work: Path, count: int, few: int) -> None:
    """Copy the images as COCO, ImageNet, archives of both, a list, and a folder with `few`."""
    sources = sorted(path for path in images.iterdir() if path.is_file())
    coco, imagenet = work / "coco/train2017", work / "imagenet/train"
    for folder in (coco, work / "few", work / "zip", work / "tar/train"):
        folder.mkdir(parents=True)
    for i in range(count):
        path = coco / f"{i:07d}.jpg"
        shutil.copyfile(sources[i % len(sources)], path)
        member = imagenet / f"n{i * CLASSES // count:08d}" / f"{i:07d}.JPEG"
        member.parent.mkdir(parents=True, exist_ok=True)
        member.hardlink_to(path)
        if i < few:
            (work / "few" / path.name).hardlink_to(path)
    with zipfile.ZipFile(work / "zip/train2017.zip", "w") as archive:
        for path in sorted(coco.iterdir()):
            archive.write(path, f"train2017/{path.name}")
    for folder in imagenet.iterdir():
        with tarfile.open(work / f"tar/train/{folder.name}.tar", "w") as tar:
            for path in folder.iterdir():
                tar.add(path, path.name)
    rows = (f"{path},{path.parent.name}\n" for path in sorted(imagenet.rglob("*.JPEG")))
    (work / "list.csv").write_text("path,label\n" + "".join(rows))
    _lay_out_shards(coco, work)


def _lay_out_shards(coco: Path, work: Path) -> None:
    """The images as shards of 1,000: Parquet with row groups of 100, as Hugging Face's `datasets`
    writes, and WebDataset; and lists of their URLs.
    """
    import pyarrow
    from pyarrow import parquet

    paths = sorted(coco.iterdir())
    for k in range(0, len(paths), 1000):
        part = paths[k : k + 1000]
        rows = [{"image": {"bytes": path.read_bytes(), "path": path.name}} for path in part]
        (work / "parquet").mkdir(exist_ok=True)
        table = pyarrow.Table.from_pylist(rows)
        parquet.write_table(table, work / f"parquet/train-{k:07d}.parquet", row_group_size=100)
        (work / "webdataset").mkdir(exist_ok=True)
        with tarfile.open(work / f"webdataset/train-{k:07d}.tar", "w") as tar:
            for path in part:
                tar.add(path, path.name)
    (work / "names.txt").write_text("".join(f"{path.name}\n" for path in paths))
    urls = (f'url = "{URL}/{path.name}"\noutput = "{work}/copy/{path.name}"\n' for path in paths)
    (work / "curl.txt").write_text("".join(urls))


@contextmanager
def _server(folder: Path) -> Iterator[None]:
    """The standard library's HTTP server of a folder, in a process of its own."""
    command = [sys.executable, "-m", "http.server", str(PORT), "--bind", "127.0.0.1"]
    command += ["--directory", str(folder), "--protocol", "HTTP/1.1"]
    quiet = subprocess.DEVNULL
    with subprocess.Popen(command, stdout=quiet, stderr=quiet) as process:
        try:
            time.sleep(2)
            yield
        finally:
            process.terminate()


def _round(work: Path, workers: int) -> Iterator[dict[str, Any]]:
    coco, few = work / "coco/train2017", work / "few"
    yield _measure("cp -r", work, coco, ["cp", "-r", coco, work / "copy"])
    synced = f"cp -r {coco} {work}/copy && sync -f {work}/copy"
    yield _measure("cp -r, then sync", work, coco, ["sh", "-c", synced])
    for title, options in (
        ("coco", ["coco", "--root", work / "coco"]),
        ("coco, train2017.zip", ["coco", "--root", work / "zip"]),
        ("imagenet", ["imagenet", "--root", work / "imagenet"]),
        ("imagenet, a tar file a class", ["imagenet", "--root", work / "tar"]),
        ("folder", ["folder", "--root", work / "coco"]),
        ("list, with labels", ["list", "--list", work / "list.csv"]),
        ("coco --check decode", ["coco", "--root", work / "coco", "--check", "decode"]),
    ):
        yield _pack(title, work, coco, workers, options)
    yield from _sharded(work, workers)
    budget = sum(path.stat().st_size for path in few.iterdir()) // 2
    for store in ("jpeg --max-side 500", "raw --max-side 256", f"auto --budget {budget}"):
        options = ["folder", "--root", few, "--store", *store.split()]
        yield _pack(f"folder --store {store}", work, few, workers, options)
    for settings in ({}, {"max_resolution": 500, "jpeg_quality": 95}):
        shown = "".join(f", {name} {value}" for name, value in settings.items())
        yield _ffcv(f"ffcv's writer, jpg{shown}", work, few, workers, settings)


def _sharded(work: Path, workers: int) -> Iterator[dict[str, Any]]:
    """Sources of shards, and files behind a URL."""
    coco = work / "coco/train2017"
    yield _measure("cp -r", work, coco, ["cp", "-r", coco, work / "copy"])
    for kind in ("folder", "parquet", "webdataset"):
        root = coco if kind == "folder" else work / kind
        yield _pack(kind, work, coco, workers, [kind, "--root", root])
    half = len(list(coco.iterdir())) // 2
    part = ["parquet", "--root", work / "parquet", "--subset", half]
    yield _pack("parquet, --subset of half", work, coco, workers, part)
    with _server(coco):
        fetch = ["curl", "--no-progress-meter", "--create-dirs", "--parallel", "--parallel-max"]
        fetch += [str(workers), "--config", f"{work}/curl.txt"]
        yield _measure(f"curl, HTTP, {workers} at once", work, coco, fetch)
        fetch[-3] = "16"
        yield _measure("curl, HTTP, 16 at once", work, coco, fetch)
        listed = ["list", "--list", work / "names.txt", "--root", URL]
        yield _pack("list, HTTP", work, coco, workers, listed)
        yield _pack("list, HTTP, --workers 16", work, coco, 16, listed)


def _pack(
    title: str, work: Path, files: Path, workers: int, options: Sequence[object]
) -> dict[str, Any]:
    command = [sys.executable, "-m", "tools.build_dataset", *options, "--workers", workers]
    return _measure(title, work, files, [*command, "--out", work / "o.beton"])


def _ffcv(
    title: str, work: Path, files: Path, workers: int, settings: dict[str, int]
) -> dict[str, Any]:
    command = [sys.executable, "-c", FFCV, files, work / "o.beton", workers, json.dumps(settings)]
    return _measure(title, work, files, command)


def _measure(title: str, work: Path, files: Path, command: Sequence[object]) -> dict[str, Any]:
    """Run `command` on `files`. If it prints its time in seconds, that time counts."""
    sizes = [len(path.read_bytes()) for path in files.iterdir()]  # fills the page cache
    start = time.perf_counter()
    done = subprocess.run([str(part) for part in command], check=True, stdout=subprocess.PIPE)
    seconds = time.perf_counter() - start
    if "DatasetWriter" in str(command):
        seconds = float(done.stdout)
    made = [*(work / "copy").glob("*"), *work.glob("o.beton")]
    result = {
        "what": title,
        "images": len(sizes),
        "images_per_s": len(sizes) / seconds,
        "mb_per_s": sum(sizes) / seconds / 1e6,
        "gb": sum(path.stat().st_size for path in made) / 1e9,
        "seconds": seconds,
    }
    shutil.rmtree(work / "copy", ignore_errors=True)
    for path in work.glob("o.beton*"):
        path.unlink()
    os.sync()
    return result


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmark_packing",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("images", type=Path, help="folder of images")
    parser.add_argument("work", type=Path, help="folder to create, and to delete at the end")
    parser.add_argument(
        "--repeat-to", type=int, default=20000, help="number of files (default 20000)"
    )
    parser.add_argument(
        "--few", type=int, default=6000, help="number of files to encode (default 6000)"
    )
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--sharded", action="store_true", help="only shards, URLs, and cp beside them"
    )
    parser.add_argument("--rounds", type=int, default=1, help="number of repetitions")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to FILE")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
