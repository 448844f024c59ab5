"""Small betons for tests. ffcv writes them, so that the reader meets files of another tool. Where
it is not installed, as on many machines with a GPU, our own writer does.
"""

import io
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.beton_writer import BetonWriter, Sample


def photograph(i: int, height: int, width: int) -> np.ndarray:
    """A smooth coloured image, different for each i: uint8 [height, width, 3]."""
    generator = np.random.default_rng(i)
    coarse = generator.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return np.array(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


class _Samples:
    def __init__(self, images: list[np.ndarray]) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[np.ndarray, int]:
        return self.images[i], i


def write_beton(path: Path, images: list[np.ndarray], mode: str = "jpg") -> Path:
    """Write `images` as an ffcv beton with fields image and index."""
    if not find_spec("ffcv"):
        return _by_our_writer(path, images, mode)
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    fields = {"image": RGBImageField(mode), "index": IntField()}
    DatasetWriter(str(path), fields, num_workers=1).from_indexed_dataset(_Samples(images))
    return path


def _by_our_writer(path: Path, images: list[np.ndarray], mode: str) -> Path:
    with BetonWriter(path, len(images)) as writer:
        for i, image in enumerate(images):
            stream = io.BytesIO()
            Image.fromarray(image).save(stream, "JPEG", quality=90)
            data = stream.getvalue() if mode == "jpg" else image
            writer.append([Sample(data, *image.shape[:2], (i,))])
    return path


def ffcv_reader(path: Path) -> Any:
    """ffcv's own reader of a beton. Skips the test where ffcv is not installed."""
    return pytest.importorskip("ffcv.reader", reason="needs ffcv").Reader(str(path))


def varied(count: int) -> list[np.ndarray]:
    """`count` images of different sizes."""
    return [photograph(i, 24 + 7 * (i % 5), 30 + 5 * (i % 7)) for i in range(count)]


def pil_decode(path: Path, record: np.ndarray) -> np.ndarray:
    """PIL's pixels of a JPEG record of a beton."""
    pointer, size = record[:2]
    data = path.read_bytes()[pointer : pointer + size]
    return np.array(Image.open(io.BytesIO(data)).convert("RGB"))
