"""Small sets of images with label maps, for tests."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = np.array([[200, 40, 40], [40, 200, 40], [40, 40, 200]], np.uint8)
NAMES = ["red", "green", "blue"]
VOID = 255


def save_png(path: Path, pixels: np.ndarray, palette: bool = False) -> None:
    """Write uint8 [H, W] or [H, W, 3]; with a palette the values are its indices."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels.astype(np.uint8))
    if palette:
        image.putpalette(list(range(256)) * 3)
    image.save(path)


def blocks(seed: int, shape: tuple[int, int]) -> np.ndarray:
    """Labels uint8 [H, W]: a grid of 4 × 4 blocks of random classes, void in the first row."""
    generator = np.random.default_rng(seed)
    classes = generator.integers(len(NAMES), size=(4, 4))
    rows = np.arange(shape[0]) * 4 // shape[0]
    columns = np.arange(shape[1]) * 4 // shape[1]
    labels = classes[rows[:, None], columns[None]].astype(np.uint8)
    labels[0] = VOID
    return labels


def picture(labels: np.ndarray, seed: int) -> np.ndarray:
    """uint8 [H, W, 3]: each class in its colour, with some noise."""
    noise = np.random.default_rng(seed).integers(-20, 21, (*labels.shape, 3))
    colours = COLOURS[np.where(labels == VOID, 0, labels)]
    return np.clip(colours + noise, 0, 255).astype(np.uint8)


def write_folder_set(root: Path, train: int, val: int, shape: tuple[int, int] = (48, 64)) -> None:
    """Write root/{train,val}/{images,labels}/ and root/classes.json: each class has a colour."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "classes.json").write_text(json.dumps(NAMES))
    for part, count, first in (("train", train, 0), ("val", val, 1000)):
        for i in range(count):
            labels = blocks(first + i, shape)
            save_png(root / part / "labels" / f"{part}{i:02}.png", labels)
            save_png(root / part / "images" / f"{part}{i:02}.png", picture(labels, first + i))
