"""Compile now what the first batch of the first run would wait for: the decoder, the draws of the
views, the crops and the CPU's colours. `make setup` does it; the code is kept beside the source, or
in the user's cache if that cannot be written.
"""

import contextlib
import io
import tempfile
import time
from pathlib import Path

from train.run.cli import CommandParser, run

EXAMPLES = """examples:
  python -m tools.warm_up                     # once on each kind of processor
  NUMBA_CACHE_DIR=/big/disk/numba python -m tools.warm_up
"""


def main() -> None:
    parser = CommandParser(prog="python -m tools.warm_up", description=__doc__, epilog=EXAMPLES)
    parser.parse_args()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        first_batches(pack_tiny(Path(folder)))
    print(f"compiled for this processor in {time.perf_counter() - began:.0f} s")


def first_batches(path: Path) -> None:
    """Load a batch of the beton in each way that compiles code."""
    import torch

    from pipeline.beton import Beton
    from pipeline.choices import Crops
    from pipeline.loader import make_loader
    from pipeline.views import ViewConfig

    ways: tuple[Crops, ...] = ("device", "host")
    for crops in ways:
        loader = make_loader(
            Beton(path), ViewConfig(size=32, mask_ratio=0.3), 2,
            crops=crops, backend="compiled", device=torch.device("cpu"), seed=0,
        )  # fmt: skip
        for _ in loader.epoch(0):
            pass


def pack_tiny(folder: Path) -> Path:
    """Pack two images in `folder`: a JPEG with tiles, and raw pixels."""
    import numpy as np
    from PIL import Image

    from tools.build_dataset import main as pack

    images, beton = folder / "images", folder / "tiny.beton"
    images.mkdir()
    pixels = np.arange(64 * 80 * 3, dtype=np.uint8).reshape(64, 80, 3)
    for name in ("jpeg.jpg", "raw.png"):
        Image.fromarray(pixels).save(images / name)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        pack(["folder", "--root", str(images), "--out", str(beton), "--tiles"])
    return beton


if __name__ == "__main__":
    run(main)
