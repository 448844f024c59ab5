"""COCO's instance annotations: an altered file is refused in one line, or its masks are right."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
from faster_coco_eval.core import mask as rle

from pipeline.errors import UserError
from tests.fuzz.damage import Random
from tests.fuzz.json_damage import alter, put
from tests.helpers.coco_sets import varied_set
from transfer.detection.dataset import CocoInstances, Record, TrainingExamples, open_instances
from transfer.detection.evaluate import ground_truth


class Target:
    """A small set, and the code that damages its annotation file."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.file = folder, varied_set(folder)
        self.content = json.loads(self.file.read_text())

    def try_one(self, random: Random) -> str:
        put(self.file, alter(self.content, random))
        try:
            source = open_instances(
                self.folder, "annotations/instances_{split}.json", "{split}", "train2017"
            )
            source.check_headers()
        except UserError as error:
            message = str(error)
            assert str(self.folder) in message and message.isprintable(), repr(message)
            assert len(message) < 1000, message
            return "refused"
        self._check(source)
        if random.integers(4) == 0:
            ground_truth(source)
            if any(len(record.boxes) for record in source.records):
                examples = TrainingExamples(source, [40], 80, 0.5)
                one = examples.load(int(random.integers(len(examples))), random)
                boxes, (height, width) = one["boxes"], one["image"].shape[1:]
                assert one["masks"].shape == (len(boxes), height, width)
                assert (boxes[:, 2:] > boxes[:, :2]).all()
        return "read"

    def _check(self, source: CocoInstances) -> None:
        content = json.loads(self.file.read_text("utf-8-sig"))
        given: dict[int, list[Any]] = {image["id"]: [] for image in content["images"]}
        for one in content["annotations"]:
            if not one.get("iscrowd"):
                given[one["image_id"]].append(one)
        dropped = 0
        for record in source.records:
            boxes, limit = record.boxes, (record.width, record.height) * 2
            assert np.isfinite(boxes).all() and (boxes >= 0).all() and (boxes <= limit).all()
            assert (boxes[:, 2:] > boxes[:, :2]).all()
            assert ((record.labels >= 1) & (record.labels <= len(source.categories))).all()
            masks = source.masks(record, record.height, record.width)
            dropped += len(given[record.id]) - len(masks)
            expected = [_mask(one["segmentation"], record) for one in given[record.id]]
            remaining = iter(expected)  # those of dropped objects are left out, the order stays
            assert all(any(np.array_equal(mask, e) for e in remaining) for mask in masks)
        assert dropped == source.dropped


def _mask(segmentation: Any, record: Record) -> np.ndarray:
    """The mask [H, W] by other code than the reader's."""
    height, width = record.height, record.width
    if isinstance(segmentation, list):
        polygons = [polygon for polygon in segmentation if len(polygon) >= 6]
        if not polygons:
            return np.zeros((height, width), np.uint8)
        # A test compares the library's polygons with pycocotools'; here: before the reader.
        return rle.decode(rle.segmToRle(polygons, width, height))
    counts = segmentation["counts"]
    counts = _numbers(counts) if isinstance(counts, str) else counts
    values = itertools.cycle([0, 1])
    runs = [np.full(count, value, np.uint8) for count, value in zip(counts, values, strict=False)]
    return np.concatenate(runs).reshape(width, height).T


def _numbers(text: str) -> list[int]:
    """COCO's text for run lengths: 5 bits a character, least first; a set bit 5: more follow."""
    counts: list[int] = []
    value = place = 0
    for character in text:
        bits = ord(character) - 48
        value |= (bits & 31) << place
        place += 5
        if not bits & 32:
            value -= (1 << place) if bits & 16 else 0
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value = place = 0
    return counts
