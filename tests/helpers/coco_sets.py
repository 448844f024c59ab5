"""Small sets of images with COCO instance annotations, for tests."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from faster_coco_eval.core import mask as rle
from PIL import Image

CATEGORIES: list[dict[str, Any]] = [
    {"id": 7, "name": "disc"},
    {"id": 2, "name": "box"},
    {"id": 90, "name": "bar"},
]
"""Neither in order nor without gaps, as COCO's own ids."""
Box = tuple[int, int, int, int]
"""x, y, width, height."""


def box_mask(box: Box, height: int, width: int) -> np.ndarray:
    """uint8 [H, W]."""
    x, y, w, h = box
    mask = np.zeros((height, width), np.uint8)
    mask[y : y + h, x : x + w] = 1
    return mask


def polygon(box: Box) -> list[list[float]]:
    x, y, w, h = box
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]


def run_lengths(mask: np.ndarray) -> dict[str, Any]:
    """Uncompressed, column by column, as COCO writes crowds."""
    flat = mask.ravel(order="F")
    edges = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff([0, *edges, flat.size]).tolist()
    return {"size": list(mask.shape), "counts": [0, *counts] if flat[0] else counts}


def compressed(mask: np.ndarray) -> dict[str, Any]:
    runs = rle.encode(np.asfortranarray(mask))
    return {"size": list(mask.shape), "counts": runs["counts"].decode()}


def annotation(image: int, category: int, box: Box, segmentation: Any, **more: Any) -> dict:
    return {
        "image_id": image,
        "category_id": category,
        "bbox": list(box),
        "area": box[2] * box[3],
        "iscrowd": 0,
        "segmentation": segmentation,
        **more,
    }


def write_coco(
    root: Path, split: str, sizes: list[tuple[int, int]], annotations: list[dict]
) -> Path:
    """Write images 1, 2, … of the given (height, width), black with a bright rectangle for each
    object, and their annotation file. One pixel differs between splits: no image is in two. Returns
    the annotation file.
    """
    images = []
    for number, (height, width) in enumerate(sizes, start=1):
        pixels = np.zeros((height, width, 3), np.uint8)
        pixels[-1, -1, 2] = sum(split.encode()) % 256
        for one in (a for a in annotations if a["image_id"] == number):
            x, y, w, h = (int(v) for v in one["bbox"])
            pixels[max(y, 0) : y + h, max(x, 0) : x + w] = 255 - 40 * (one["category_id"] % 5)
        name = f"{number:012}.png"
        (root / split).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(root / split / name)
        images.append({"id": number, "file_name": name, "height": height, "width": width})
    numbered = [{"id": n, **one} for n, one in enumerate(annotations, start=1)]
    file = root / "annotations" / f"instances_{split}.json"
    file.parent.mkdir(exist_ok=True)
    content = {"images": images, "annotations": numbered, "categories": CATEGORIES}
    file.write_text(json.dumps(content))
    return file


def boxes_of(seed: int, height: int, width: int, count: int) -> list[Box]:
    """Rectangles inside the image; their sides are at least a fifth of the image's."""
    generator = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        w, h = (int(generator.integers(side // 5, side // 2)) for side in (width, height))
        found.append(
            (int(generator.integers(width - w)), int(generator.integers(height - h)), w, h)
        )
    return found


def varied_set(root: Path, split: str = "train2017", images: int = 6) -> Path:
    """Images of different sizes; objects as polygons and as both kinds of run lengths; a crowd; no
    object in the last image.
    """
    sizes = [(48 + 8 * (n % 3), 72 - 8 * (n % 2)) for n in range(images)]
    ids = [c["id"] for c in CATEGORIES]
    annotations = []
    for n, (height, width) in enumerate(sizes[:-1]):
        for place, box in enumerate(boxes_of(n, height, width, 1 + n % 3)):
            mask = box_mask(box, height, width)
            shapes = (polygon(box), compressed(mask), run_lengths(mask))
            category = ids[(n + place) % 3]
            annotations.append(annotation(n + 1, category, box, shapes[(n + place) % 3]))
    crowd = (2, 3, 30, 20)
    runs = run_lengths(box_mask(crowd, *sizes[0]))
    annotations.append(annotation(1, ids[0], crowd, runs, iscrowd=1))
    return write_coco(root, split, sizes, annotations)
