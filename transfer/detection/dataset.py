"""COCO's instance annotations: images with boxes and masks, for training and for evaluation.

Letters: N objects of an image, H W the stored image's height and width, h w the resized image's, in
pixels. Boxes are x1 y1 x2 y2 in pixels, masks uint8 0 or 1.
"""

import os
import pickle
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import file_digest
from pathlib import Path

import numpy as np
import torch
from faster_coco_eval.core import mask as rle
from numpy.typing import NDArray
from PIL import Image

from pipeline.errors import UserError, printable
from pipeline.images import load_rgb, load_size
from transfer.detection.annotations import (
    Annotation,
    Annotations,
    ImageEntry,
    encloses,
    read_annotations,
    to_rle,
)

HAIRLINE = 1e-5
"""Of an image's side: float32 rounds away what is thinner when boxes are resized and mirrored."""


@dataclass(frozen=True)
class Record:
    """One image and its objects."""

    id: int
    name: str
    """The file's path under the folder of images."""
    height: int
    width: int
    boxes: NDArray[np.float32]
    """[N, 4]; inside the image, of positive size."""
    labels: NDArray[np.int64]
    """[N], 1 … C."""
    segmentations: bytes
    """The list of the N segmentations, pickled: as Python objects, COCO's would take gigabytes in
    each process that loads images."""


class CocoInstances:
    """The images of an annotation file, with their objects. Crowds are skipped: training does not
    use them, and the evaluator reads them from the file.

    An object is skipped, and counted in `dropped`, if its mask has no area, or its box inside the
    image is thinner than `HAIRLINE`. Raises UserError if the file or an image is missing, or if the
    file's content is not of the format.
    """

    def __init__(self, annotations: Path, images: Path) -> None:
        self.annotations, self.images = annotations, images
        content = read_annotations(annotations)
        self.categories: dict[int, str] = {c.id: c.name for c in content.categories}
        """Names by id, in the order of the ids: label n is the n-th, counted from 1."""
        self.derived = content.derived
        """Objects whose area is their mask's, because the file has none."""
        self.dropped = 0
        self.records = self._records(content)
        self._check_images()

    def fingerprint(self) -> str:
        """SHA-256 of the annotation file."""
        with self.annotations.open("rb") as file:
            return file_digest(file, "sha256").hexdigest()

    def load(self, record: Record) -> Image.Image:
        """The upright RGB image. Raises UserError unless it has the size in the annotations."""
        path = self.images / record.name
        pixels = load_rgb(path)
        self._check_size(path, (pixels.shape[1], pixels.shape[0]), record)
        return Image.fromarray(pixels)

    def check_headers(self) -> None:
        """Raise UserError for the first file that is not an image of the size in the annotations.
        Only headers are read. Without this check, a run would fail when it first loads the file.
        """
        for record in self.records:
            path = self.images / record.name
            self._check_size(path, load_size(path), record)

    def masks(self, record: Record, height: int, width: int) -> NDArray[np.uint8]:
        """The objects' masks, resized: [N, height, width]. Only one has its full size at a time."""
        masks = np.empty((len(record.boxes), height, width), np.uint8)
        for mask, one in zip(masks, pickle.loads(record.segmentations), strict=True):
            mask[:] = nearest(rle.decode(to_rle(one, record.height, record.width)), height, width)
        return masks

    def _records(self, content: Annotations) -> list[Record]:
        labels = {category: n for n, category in enumerate(self.categories, start=1)}
        objects = defaultdict(list)
        for one in content.annotations:
            if not one.iscrowd:
                objects[one.image_id].append(one)
        return [self._record(image, objects[image.id], labels) for image in content.images]

    def _record(
        self, image: ImageEntry, objects: list[Annotation], labels: dict[int, int]
    ) -> Record:
        height, width = image.height, image.width
        corners = np.array([o.bbox for o in objects], np.float64).reshape(-1, 4)
        corners[:, 2:] += corners[:, :2]
        boxes = corners.clip(0, [width, height, width, height]).astype(np.float32)
        least = np.array([HAIRLINE * width, HAIRLINE * height], np.float32)
        good = np.all(boxes[:, 2:] - boxes[:, :2] > least, axis=1)
        good &= np.array([encloses(o.segmentation) for o in objects], bool)
        self.dropped += int((~good).sum())
        kept = [o for o, keep in zip(objects, good.tolist(), strict=True) if keep]
        return Record(
            id=image.id,
            name=image.file_name,
            height=height,
            width=width,
            boxes=boxes[good],
            labels=np.array([labels[o.category_id] for o in kept], np.int64),
            segmentations=pickle.dumps([o.segmentation for o in kept]),
        )

    def _check_size(self, path: Path, size: tuple[int, int], record: Record) -> None:
        if size != (record.width, record.height):
            raise UserError(
                f"{path}: {size[0]}×{size[1]} pixels, but {self.annotations.name} says"
                f" {record.width}×{record.height}"
            )

    def _check_images(self) -> None:
        if not self.images.is_dir():
            raise UserError(f"{self.images}: no such folder of images")
        listed = {path.name for path in self.images.iterdir()}  # one call instead of thousands
        names = [record.name for record in self.records]
        missing = [
            name
            for name in names
            if name not in listed and not os.path.isfile(self.images / name)  # noqa: PTH113 (raises for long names)
        ]
        if missing:
            raise UserError(
                f"{self.annotations}: {len(missing)} of its {len(names)} images are not in"
                f" {self.images} (the first: {printable(missing[0])})"
            )


def open_instances(root: Path, annotations: str, images: str, split: str) -> CocoInstances:
    """A split of a data set in COCO's layout. `annotations` and `images` are paths, absolute or
    under `root`, in which {split} stands for the split. Raises UserError.
    """
    if not root.is_dir():
        raise UserError(f"{root}: no such folder")
    file, folder = (root / path.replace("{split}", split) for path in (annotations, images))
    if not file.is_file():
        parent = file.parent if file.parent.is_dir() else root
        names = sorted(path.name for path in parent.iterdir())
        raise UserError(
            f"{file}: no such file: expected COCO's layout, ROOT/{annotations} beside"
            f" ROOT/{images}/; found {', '.join(names[:8]) or 'nothing'} in {parent}"
        )
    return CocoInstances(file, folder)


def resized(height: int, width: int, side: int, longest: int) -> tuple[int, int]:
    """Height and width with a shorter side of `side` pixels, or less if the longer side would
    exceed `longest`.
    """
    scale = min(side / min(height, width), longest / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


class TrainingExamples:
    """Images with objects, resized and mirrored at random."""

    def __init__(
        self, source: CocoInstances, sides: Sequence[int], longest: int, flip: float
    ) -> None:
        """`sides`: shorter sides to draw from; `longest`: limit of the longer side; `flip`:
        probability of mirroring. Raises UserError if no image has an object.
        """
        self.source, self.sides, self.longest, self.flip = source, sides, longest, flip
        self.records = [record for record in source.records if len(record.boxes)]
        if not self.records:
            skipped = f" ({source.dropped} are skipped)" if source.dropped else ""
            raise UserError(f"{source.annotations}: no image with an object to learn from{skipped}")

    def __len__(self) -> int:
        return len(self.records)

    def load(self, index: int, generator: np.random.Generator) -> dict[str, torch.Tensor]:
        """image uint8 [3, h, w], boxes float32 [N, 4], labels int64 [N], masks uint8 [N, h, w].

        Raises UserError.
        """
        record = self.records[index]
        side = int(generator.choice(self.sides))
        mirror = generator.random() < self.flip
        height, width = resized(record.height, record.width, side, self.longest)
        pixels = pixels_of(self.source.load(record), height, width)
        masks = self.source.masks(record, height, width)
        scale = np.array([width / record.width, height / record.height] * 2, np.float32)
        boxes = record.boxes * scale
        if mirror:
            pixels, masks = pixels[:, :, ::-1], masks[:, :, ::-1]
            boxes[:, [0, 2]] = width - boxes[:, [2, 0]]
        return {
            "image": torch.from_numpy(np.ascontiguousarray(pixels)),
            "boxes": torch.from_numpy(boxes),
            "labels": torch.from_numpy(record.labels),
            "masks": torch.from_numpy(np.ascontiguousarray(masks)),
        }


def pixels_of(image: Image.Image, height: int, width: int) -> NDArray[np.uint8]:
    """The image resized, bilinear and antialiased as in detectron2: uint8 [3, h, w]."""
    return np.asarray(image.resize((width, height), Image.Resampling.BILINEAR)).transpose(2, 0, 1)


def nearest(masks: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """Masks […, H, W] resized to […, h, w]."""
    rows, columns = (
        ((np.arange(new) + 0.5) * old / new).astype(np.int64)
        for new, old in ((height, masks.shape[-2]), (width, masks.shape[-1]))
    )
    return masks[..., rows[:, None], columns]
