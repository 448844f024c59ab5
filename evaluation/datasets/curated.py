"""The images of COCO that unsupervised segmentation is scored on: PiCIE's list, made by its rule.

PiCIE, STEGO and CAUSE score 2,175 of the 5,000 images of val2017.
"""

import hashlib
import sys

import numpy as np
from tqdm import tqdm

from evaluation.datasets.coco_classes import CLASSES, STUFF
from evaluation.datasets.images import DECODE_THREADS
from evaluation.datasets.labelled_images import LabelledImages
from pipeline.errors import UserError
from pipeline.images import load_size
from pipeline.parallel import ordered_map

LEAST_SIDE, LEAST_STUFF = 360, 0.75
"""Both sides have at least so many pixels, and so large a share of all pixels is stuff."""
IDS_SHA256 = "7c629734c88f1a74bba6311e01d4d9fe976df84f07cb4fc86452ce5116e51655"
"""Of the 2,175 ids of PiCIE's list (janghyuncho/PiCIE c3aa029, curated/val2017), in order, each of
12 digits and a newline."""


def curated(data: LabelledImages) -> LabelledImages:
    """The images of `data`, COCO-Stuff in the 27 classes, that PiCIE's rule selects.

    Reads all label maps. Says how many there are, and whether they are PiCIE's 2,175. Raises
    UserError if there are none.
    """
    stuff = np.array([CLASSES.index(name) for name in STUFF])

    def chosen(i: int) -> bool:
        width, height = load_size(data.paths[i])
        if min(width, height) < LEAST_SIDE:
            return False
        return bool(np.isin(data.labels(i, height, width), stuff).mean() >= LEAST_STUFF)

    verdicts = ordered_map(chosen, range(len(data)), DECODE_THREADS)
    bar = tqdm(verdicts, "PiCIE's list", len(data), unit="image")
    numbers = np.flatnonzero(list(bar))
    if not len(numbers):
        raise UserError(
            f"{data.source}: PiCIE's rule selects none of {len(data)} images (both sides at least"
            f" {LEAST_SIDE} pixels, {LEAST_STUFF:.0%} stuff): --subset all scores all"
        )
    ids = "".join(f"{data.paths[i].stem}\n" for i in numbers)
    if hashlib.sha256(ids.encode()).hexdigest() == IDS_SHA256:
        name = f"PiCIE's {len(numbers):,} images"
    else:
        name = f"{len(numbers):,} of {len(data):,} images, by PiCIE's rule"
    print(f"{data.source}: {name} (--subset all scores all)", file=sys.stderr)
    return data.only(numbers, name)
