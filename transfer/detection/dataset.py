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
from typing import Any

import numpy as np
import torch
from faster_coco_eval.core import mask as rle
from numpy.typing import NDArray
from PIL import Image

from pipeline.errors import UserError, printable
from pipeline.folders import require_root
from pipeline.images import load_rgb, load_size
from transfer.detection.annotations import (
    Annotation,
    Annotations,
    ImageEntry,
    bounds,
    read_annotations,
    to_rle,
)

HAIRLINE = 1e-5
"""Of an image's side: float32 rounds away what is thinner when boxes are resized and mirrored."""
NO_AREA = "their boxes or masks have no area within the image"
"""Why objects are skipped."""
SLACK = 2
"""Pixels by which a box may differ from its mask's bounds, or reach out of the image: tools round
and count pixels differently."""


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
    masked: NDArray[np.bool_]
    """[N]: whether the object has a mask."""
    segmentations: bytes
    """The list of the N segmentations, None without a mask, pickled: as Python objects, COCO's
    would take gigabytes in each process that loads images."""


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
        self.areas, self.boxes = content.areas, content.boxes
        """Objects whose area or box is derived, because the file has none."""
        self.maskless = {one.image_id for one in content.annotations if one.segmentation is None}
        """Ids of images with an object or a crowd without a mask."""
        self.dropped = self.contradicting = self.outside = 0
        """Objects that training skips; whose box is not that of their mask; or whose box reaches
        out of the image."""
        self.records = self._records(content)
        self._check_images()

    def fingerprint(self) -> str:
        """SHA-256 of the annotation file."""
        with self.annotations.open("rb") as file:
            return file_digest(file, "sha256").hexdigest()

    def paths(self) -> list[Path]:
        """The image files."""
        return [self.images / record.name for record in self.records]

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
        """The objects' masks, resized: [N, height, width], 0 where an object has none. Only one has
        its full size at a time.
        """
        masks = np.zeros((len(record.boxes), height, width), np.uint8)
        for mask, one in zip(masks, pickle.loads(record.segmentations), strict=True):
            if one is not None:
                whole = rle.decode(to_rle(one, record.height, record.width))
                mask[:] = nearest(whole, height, width)
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
        inside = corners.clip(0, [width, height, width, height])
        self.outside += int((np.abs(corners - inside) > SLACK).any(axis=1).sum())
        boxes = inside.astype(np.float32)
        least = np.array([HAIRLINE * width, HAIRLINE * height], np.float32)
        good = np.all(boxes[:, 2:] - boxes[:, :2] > least, axis=1)
        masked = np.array([o.segmentation is not None for o in objects], bool)
        shown = np.array([bounds(o.segmentation) for o in objects if o.segmentation is not None])
        shown = shown.reshape(-1, 4)
        self.contradicting += int(contradict(inside[masked], shown).sum())
        good[masked] &= (shown[:, 2:] > shown[:, :2]).all(axis=1)
        self.dropped += int((~good).sum())
        kept = [o for o, keep in zip(objects, good.tolist(), strict=True) if keep]
        return Record(
            id=image.id,
            name=image.file_name,
            height=height,
            width=width,
            boxes=boxes[good],
            labels=np.array([labels[o.category_id] for o in kept], np.int64),
            masked=masked[good],
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
    require_root(root)
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


def contradict(boxes: NDArray[np.float64], masks: NDArray[np.float64]) -> NDArray[np.bool_]:
    """[N]: whether boxes [N, 4] and the bounds of their masks [N, 4] share less than half of what
    both cover, and differ by more than `SLACK` on a side.
    """
    first, last = np.maximum(boxes, masks)[:, :2], np.minimum(boxes, masks)[:, 2:]
    shared = (last - first).clip(0).prod(axis=1)
    both = sum((each[:, 2:] - each[:, :2]).clip(0).prod(axis=1) for each in (boxes, masks))
    far = (np.abs(boxes - masks) > SLACK).any(axis=1)
    return far & (shared < 0.5 * (both - shared))


class TrainingExamples:
    """Images with objects, resized and mirrored at random."""

    def __init__(
        self,
        source: CocoInstances,
        sides: Sequence[int],
        longest: int,
        flip: float,
        masks: bool = True,
    ) -> None:
        """`sides`: shorter sides to draw from; `longest`: limit of the longer side; `flip`:
        probability of mirroring; `masks`: whether examples have masks. Raises UserError if no image
        has an object, or with `masks` no object a mask.
        """
        self.source, self.sides, self.longest, self.flip = source, sides, longest, flip
        self.with_masks = masks
        self.records = [record for record in source.records if len(record.boxes)]
        if not self.records:
            skipped = f" ({source.dropped} are skipped: {NO_AREA})" if source.dropped else ""
            raise UserError(f"{source.annotations}: no image with an object to learn from{skipped}")
        if masks and not any(record.masked.any() for record in self.records):
            raise UserError(
                f"{source.annotations}: no object has a mask: give --model.masks false to learn"
                " and score boxes alone"
            )

    def __len__(self) -> int:
        return len(self.records)

    def load(self, index: int, generator: np.random.Generator) -> dict[str, torch.Tensor]:
        """image uint8 [3, h, w], boxes float32 [N, 4], labels int64 [N]; and unless masks are left
        out, masks uint8 [N, h, w] and masked bool [N], whether an object has one.

        Raises UserError.
        """
        record = self.records[index]
        side = int(generator.choice(self.sides))
        mirror = generator.random() < self.flip
        height, width = resized(record.height, record.width, side, self.longest)
        pixels = pixels_of(self.source.load(record), height, width)
        scale = np.array([width / record.width, height / record.height] * 2, np.float32)
        boxes = record.boxes * scale
        if mirror:
            pixels = pixels[:, :, ::-1]
            boxes[:, [0, 2]] = width - boxes[:, [2, 0]]
        arrays: dict[str, NDArray[Any]] = {
            "image": pixels,
            "boxes": boxes,
            "labels": record.labels,
        }
        if self.with_masks:
            masks = self.source.masks(record, height, width)
            arrays["masks"] = masks[:, :, ::-1] if mirror else masks
            arrays["masked"] = record.masked
        return {k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in arrays.items()}


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
