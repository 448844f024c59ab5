"""Small betons for tests. ffcv writes them, so that the reader meets files of another tool."""

import io
from pathlib import Path

import numpy as np
from ffcv.fields import IntField, RGBImageField
from ffcv.writer import DatasetWriter
from PIL import Image


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
    fields = {"image": RGBImageField(mode), "index": IntField()}
    DatasetWriter(str(path), fields, num_workers=1).from_indexed_dataset(_Samples(images))
    return path


def varied(count: int) -> list[np.ndarray]:
    """`count` images of different sizes."""
    return [photograph(i, 24 + 7 * (i % 5), 30 + 5 * (i % 7)) for i in range(count)]


def pil_decode(path: Path, record: np.ndarray) -> np.ndarray:
    """PIL's pixels of a JPEG record of a beton."""
    pointer, size = record[:2]
    data = path.read_bytes()[pointer : pointer + size]
    return np.array(Image.open(io.BytesIO(data)).convert("RGB"))
