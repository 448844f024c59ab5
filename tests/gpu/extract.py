"""Writes the first JPEGs of a beton as files: `python -m tests.gpu.extract BETON FOLDER COUNT`."""

import os
import sys
from pathlib import Path

from pipeline.beton import Beton


def main() -> None:
    """Write the files, and print what the beton holds."""
    beton, folder = Beton(sys.argv[1]), Path(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    for number, (pointer, size, *_) in enumerate(beton.records[: int(sys.argv[3])].tolist()):
        (folder / f"{number:04}.jpg").write_bytes(os.pread(beton.file, size, pointer))
    width, height = beton.width.mean(), beton.height.mean()
    print(f"{len(beton)} images, {beton.bytes / 1e6:.1f} MB, on average {width:.0f} x {height:.0f}")


if __name__ == "__main__":
    main()
