"""Annotation files that are damaged, hostile or beyond a limit are refused in one line."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faster_coco_eval.core import mask as rle

from pipeline.errors import UserError
from tests.helpers.coco_sets import (
    annotation,
    box_mask,
    compressed,
    polygon,
    varied_set,
    write_coco,
)
from transfer.detection import annotations
from transfer.detection.annotations import read_annotations, to_rle
from transfer.detection.dataset import CocoInstances, open_instances
from transfer.detection.evaluate import score

BOX = (10, 5, 20, 30)
NAN, INF = float("nan"), float("inf")


def opened(root: Path) -> CocoInstances:
    return open_instances(root, "annotations/instances_{split}.json", "{split}", "train2017")


def spoilt(root: Path, change: Callable[[dict[str, Any]], Any]) -> str:
    """The error for a changed annotation file, without the file's name."""
    file = varied_set(root)
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    with pytest.raises(UserError) as caught:
        opened(root)
    message = str(caught.value)
    assert message.startswith(f"{file}: ") and message.isprintable()
    return message.removeprefix(f"{file}: ")


@pytest.mark.parametrize(
    ("entries", "field", "value", "message"),
    [
        ("annotations", "image_id", "1", 'is "1": expected int, got str'),
        ("annotations", "image_id", 1.5, "is 1.5: expected int, got float"),
        ("annotations", "category_id", [2], ": expected int, got array"),
        ("annotations", "category_id", 10**18, "is 1000000000000000000: expected int <= 9007"),
        ("annotations", "id", [1], ": expected int | float | str | null, got array"),
        ("annotations", "bbox", [1, 2, 3], ": expected array of length >= 4"),
        ("annotations", "bbox", [1, 2, 3, 4, 5], ": expected array of length <= 4"),
        (
            "annotations",
            "bbox",
            [NAN, 2, 3, 4],
            "bbox[0] (id 1) is NaN: expected float >=",
        ),
        (
            "annotations",
            "bbox",
            [INF, 2, 3, 4],
            "bbox[0] (id 1) is Infinity: expected float <=",
        ),
        (
            "annotations",
            "bbox",
            [0, 0, 1e300, 4],
            "bbox[2] (id 1) is 1e+300: expected float <=",
        ),
        ("annotations", "bbox", ["a", 2, 3, 4], 'bbox[0] (id 1) is "a": expected flo'),
        ("annotations", "bbox", [[1], 2, 3, 4], "bbox[0] (id 1): expected float, got array"),
        ("annotations", "area", "x", 'is "x": expected float | null, got str'),
        ("annotations", "area", 10**400, "is an integer of 1329 bits: number out of range"),
        ("annotations", "iscrowd", "0", 'is "0": expected bool | int | null, got'),
        ("annotations", "iscrowd", 2, "is 2: invalid enum value 2"),
        ("annotations", "segmentation", "x", 'is "x": expected object | array | null, got str'),
        ("annotations", "bbox", [], ": expected array of length >= 4"),
        (
            "annotations",
            "segmentation",
            [["a"] * 6],
            '[0][0] (id 1) is "a": expected flo',
        ),
        (
            "annotations",
            "segmentation",
            [[NAN] * 6],
            "[0][0] (id 1) is NaN: expected float >=",
        ),
        (
            "annotations",
            "segmentation",
            [[1e30] * 6],
            "[0][0] (id 1) is 1e+30: expected float <=",
        ),
        ("images", "file_name", 7, "is 7: expected str, got int"),
        ("images", "file_name", "", 'is "": expected str of length >= 1'),
        ("images", "id", "1", 'is "1": expected int, got str'),
        ("images", "id", True, "is true: expected int, got bool"),
        ("images", "id", -1, "is -1: expected int >= 0"),
        ("images", "id", 2**64, "is 18446744073709551616: expected int <= 9007199254740992"),
        ("images", "height", 0, "is 0: expected int >= 1"),
        ("images", "height", 10**7, "is 10000000: expected int <= 100000"),
        ("categories", "name", None, "is null: expected str, got null"),
    ],
)
def test_wrong_values_are_named(
    entries: str, field: str, value: Any, message: str, tmp_path: Path
) -> None:
    """Without the check, each would be a traceback, or train on nonsense."""
    found = spoilt(tmp_path, lambda content: content[entries][0].update({field: value}))
    assert message in found
    assert found.startswith(f"{entries}[0].{field}")
    assert "(id " in found or field == "id"


@pytest.mark.parametrize(
    ("entries", "field"), [("annotations", "image_id"), ("images", "file_name")]
)
def test_missing_fields_are_named(entries: str, field: str, tmp_path: Path) -> None:
    """Without the check, each would be a traceback."""
    found = spoilt(tmp_path, lambda content: content[entries][0].pop(field))
    assert found == f"{entries}[0] (id 1): object missing required field {field}"


def first(content: dict[str, Any]) -> dict[str, Any]:
    return content["annotations"][0]  # type: ignore[no-any-return]


def crowd(content: dict[str, Any]) -> dict[str, Any]:
    """The run lengths of the crowd. Training does not use them: without a check, the error would
    come after the last step.
    """
    return content["annotations"][-1]["segmentation"]  # type: ignore[no-any-return]


def many(content: dict[str, Any]) -> None:
    """A thousand polygons of 400 corners far outside, left and right in turn."""
    far = [(-25_000 if n % 2 else 25_000, n / 8) for n in range(400)]
    shape = [[number for corner in far for number in corner]]
    content["annotations"] = [
        annotation(1, 7, BOX, shape, id=1000 + number) for number in range(1000)
    ]


def crowded(content: dict[str, Any]) -> None:
    """A large image whose masks, of a few bytes each, take a minute to decode."""
    content["images"][0].update(height=10_000, width=10_000)
    shape = {"size": [10_000, 10_000], "counts": [10, 10**8 - 10]}
    content["annotations"] = [annotation(1, 7, BOX, shape)] * 101


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: first(c).update(category_id=3), "1 of 10 annotations have a category_id "),
        (lambda c: first(c).update(image_id=99), "annotations[0] (id 1) is of image 99, which"),
        (
            lambda c: first(c).update(segmentation=[[1, 2, 3]]),
            "annotations[0] (id 1): segmentation: a polygon with an odd number of coordinates",
        ),
        (
            lambda c: first(c).update(segmentation=[1, 2, 3, 4]),
            "annotations[0] (id 1): segmentation: numbers that are no polygon",
        ),
        (
            lambda c: first(c).update(segmentation=[[1, 2, 3, 4, 5, 6], 7]),
            "annotations[0] (id 1): segmentation: numbers that are no polygon",
        ),
        (
            lambda c: first(c).update(segmentation=[[]], bbox=None),
            "annotations[0] (id 1) has neither bbox nor segmentation",
        ),
        (
            lambda c: [one.update(bbox=[0.1, 0, 0.5, 0.9]) for one in c["annotations"]],
            "all boxes lie within 0..1: expected x, y, width, height in pixels",
        ),
        (lambda c: c["images"][0].update(height=48.5), "image 1: height or width is no whole"),
        (
            lambda c: c["images"][0].update(file_name="./" + c["images"][1]["file_name"]),
            "1 of 6 images repeat a file_name (the first: 000000000002.png)",
        ),
        (
            lambda c: first(c).update(segmentation={"size": [9, 8], "counts": "0"}),
            "annotations[0] (id 1): a mask of size [9, 8] for an image of [48, 72]",
        ),
        (lambda c: crowd(c).update(counts=[10, 20]), "segmentation: 2 run lengths of 30 pixels"),
        (lambda c: crowd(c).update(counts=[48 * 72, *[0] * 9000]), "segmentation: 9001 run"),
        (lambda c: crowd(c).update(counts="zzzz"), "segmentation: counts are not COCO's comp"),
        (lambda c: crowd(c).update(counts="é"), "segmentation: counts are not COCO's compressed"),
        (lambda c: crowd(c).update(counts="P" * 70 + "0"), "segmentation: counts are not COCO's"),
        (lambda c: crowd(c).update(counts="0" * 9000), "segmentation: 9000 run lengths of 0 p"),
        (lambda c: crowd(c).update(counts="0" * 10**7), "segmentation: counts are longer than 1,0"),
        (lambda c: crowd(c).update(counts=[-1, "a"]), "counts[0] (id 10) is -1: expected int >="),
        (lambda c: crowd(c).pop("counts"), "segmentation (id 10): object missing required field"),
        (lambda c: crowd(c).update(size=[1]), "segmentation.size (id 10): expected array of l"),
        (lambda c: c["images"][0].update(file_name="x" * 300), "1 of its 6 images are not in"),
        (lambda c: c["images"][0].update(file_name="a\nb.png"), "(the first: 'a\\nb.png')"),
        (lambda c: c["images"][0].update(file_name="../a"), "image 1: file_name '../a' leaves"),
        (lambda c: c["images"][0].update(file_name="/a.png"), "image 1: file_name '/a.png' leav"),
        (lambda c: c["images"][0].update(file_name="a/../\x1b"), "file_name 'a/../\\x1b' leaves"),
        (
            lambda c: c["images"][0].update(width=10**5, height=10**5),
            "image 1: 100000×100000 are more than 178,956,970 pixels",
        ),
        (
            lambda c: c.pop("categories"),
            "not COCO instance annotations: object missing required field categ",
        ),
        (lambda c: c.update(images=[], annotations=[]), "lists no images"),
        (lambda c: c.update(categories=c["categories"] * 2), "3 of 6 categories repeat an id"),
        (lambda c: c.update(annotations=[7]), "annotations[0] is 7: expected object, got int"),
        (many, "image 1: segmentation: outlines of more than 2,000,000 pixels (the last read: a"),
        (
            lambda c: c["annotations"].extend([first(c)] * 5000),
            "image 1 has 5,001 objects, at most 5,000 for its size",
        ),
        (crowded, "image 1 has 101 objects, at most 100 for its size"),
        (
            lambda c: c["categories"].extend({"id": 100 + n, "name": "x"} for n in range(10_000)),
            "10,003 categories, at most 10,000",
        ),
    ],
)
def test_annotations_that_do_not_fit_are_refused(
    change: Callable[[dict[str, Any]], Any], message: str, tmp_path: Path
) -> None:
    """Without the check, each would be a traceback, train on nonsense, or take hours."""
    began = time.monotonic()
    found = spoilt(tmp_path, change)
    assert message in found
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("entries", ["categories", "info"])
def test_other_encodings_are_refused(entries: str, tmp_path: Path) -> None:
    """Without the check, a traceback, or names that are silently wrong; also in unused fields."""
    file = varied_set(tmp_path)
    content = json.loads(file.read_text())
    content[entries] = [*content.get(entries, []), {"name": "caf\xe9"}]
    file.write_bytes(json.dumps(content, ensure_ascii=False).encode("latin-1"))
    with pytest.raises(UserError, match=r"instances_train2017.json: not UTF-8 \(byte \d+\)"):
        opened(tmp_path)


def test_byte_order_marks_and_odd_ids_are_read(tmp_path: Path) -> None:
    """Without it whole files of other tools are refused, though only messages use these ids."""
    file = varied_set(tmp_path)
    content = json.loads(file.read_text())
    for one, number in zip(content["annotations"], ("a", 1.5, None, 2**62, 7, 7), strict=False):
        one["id"] = number
    file.write_text("\ufeff" + json.dumps(content), encoding="utf-8")
    assert len(opened(tmp_path).records) == 6


@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")
def test_corners_outside_the_image_draw_as_pycocotools_does(tmp_path: Path) -> None:
    """Without it objects at the border have another mask than in all published figures."""
    masks = pytest.importorskip("pycocotools.mask")
    random = np.random.default_rng(0)
    height, width = 50, 60
    shapes = [
        (random.normal(0.5, spread, (random.integers(3, 9), 2)) * (width, height)).ravel().tolist()
        for spread in (0.2, 1, 5, 50, 500)
        for _ in range(20)
    ]
    for begin in range(0, len(shapes), 4):  # an image has a limit on its outlines
        group = shapes[begin : begin + 4]
        objects = [annotation(1, 7, BOX, [shape]) for shape in group]
        read = read_annotations(write_coco(tmp_path, "train2017", [(height, width)], objects))
        for shape, one in zip(group, read.annotations, strict=True):
            expected = masks.decode(masks.merge(masks.frPyObjects([shape], height, width)))
            assert (rle.decode(to_rle(one.segmentation, height, width)) == expected).all()


def test_the_largest_ids_are_scored(tmp_path: Path) -> None:
    """Without the limit of ids the evaluator, which holds them as float64, mixes objects up."""
    largest = 2**53
    objects = [annotation(1, 7, BOX, polygon(BOX))]
    file = write_coco(tmp_path, "train2017", [(50, 60)] * 2, objects)
    content = json.loads(file.read_text())
    content["images"][0]["id"], content["images"][1]["id"] = largest, largest - 1
    content["categories"][0]["id"], content["categories"][1]["id"] = largest, largest - 1
    content["annotations"][0].update(image_id=largest, category_id=largest)
    file.write_text(json.dumps(content))
    mask = compressed(box_mask(BOX, 50, 60))
    result = {"image_id": largest, "category_id": largest, "score": 0.9, "bbox": list(BOX),
              "segmentation": mask}  # fmt: skip
    rows = {row["metric"]: row["value"] for row in score(opened(tmp_path), [result])}
    assert rows["box_ap"] == rows["mask_ap"] == 1


def test_missing_areas_are_those_of_the_masks(tmp_path: Path) -> None:
    """Without it whole sets of other tools are refused, though the masks say what is missing."""
    file = varied_set(tmp_path)
    content = json.loads(file.read_text())
    areas = [one.pop("area") for one in content["annotations"]]
    content["annotations"][0].update(area=None, iscrowd=None)
    file.write_text(json.dumps(content))
    read = read_annotations(file)
    assert [one.area for one in read.annotations] == areas
    assert read.areas == opened(tmp_path).areas == len(areas)


def test_missing_boxes_are_those_of_the_masks(tmp_path: Path) -> None:
    """Without it a set of masks alone is refused, though they say where the objects are."""
    file = varied_set(tmp_path)
    content = json.loads(file.read_text())
    boxes = [one.pop("bbox") for one in content["annotations"]]
    file.write_text(json.dumps(content))
    read = read_annotations(file)
    assert [one.bbox for one in read.annotations] == boxes
    assert read.boxes == opened(tmp_path).boxes == len(boxes)


@pytest.mark.parametrize("nothing", [None, [], [[]], "absent"])
def test_objects_without_masks_keep_their_boxes(nothing: Any, tmp_path: Path) -> None:
    """Without it sets of boxes are refused; or a box silently counts as a mask."""
    file = varied_set(tmp_path)
    content = json.loads(file.read_text())
    areas = []
    for one in content["annotations"]:
        one["segmentation"] = nothing
        if nothing == "absent":
            del one["segmentation"]
        del one["area"]
        areas.append(one["bbox"][2] * one["bbox"][3])
    file.write_text(json.dumps(content))
    read = read_annotations(file)
    assert all(one.segmentation is None for one in read.annotations)
    assert [one.area for one in read.annotations] == areas
    source = opened(tmp_path)
    assert source.maskless == {1, 2, 3, 4, 5}
    assert sum(len(each.boxes) for each in source.records) == len(areas) - 1  # a crowd
    assert not any(each.masked.any() for each in source.records)


def test_numbers_of_other_tools_are_read(tmp_path: Path) -> None:
    """Without it whole sets are refused because their sizes passed through floats, or a polygon is
    not in a list.
    """
    file = varied_set(tmp_path)
    before = read_annotations(file)
    content = json.loads(file.read_text())
    for one in content["images"]:
        one.update(height=float(one["height"]), width=float(one["width"]))
    for one in content["annotations"]:
        if isinstance(one["segmentation"], list):
            (one["segmentation"],) = one["segmentation"]
    file.write_text(json.dumps(content))
    assert "48.0" in file.read_text()
    assert read_annotations(file) == before
    assert all(type(one.height) is int for one in read_annotations(file).images)


def test_images_of_one_pixel_are_read(tmp_path: Path) -> None:
    """Without it such a set is refused: all its boxes lie within 0..1, as relative ones do."""
    objects = [annotation(1, 7, (0, 0, 1, 1), None)]
    file = write_coco(tmp_path, "train2017", [(1, 1)], objects)
    assert read_annotations(file).annotations[0].bbox == [0, 0, 1, 1]


def test_masks_survive_their_reading(tmp_path: Path) -> None:
    """Without it text of another program, with trailing runs of 0, is refused or read otherwise."""
    mask = box_mask(BOX, 50, 60)
    whole = rle.decode(compressed(mask)).ravel(order="F")
    edges = np.flatnonzero(np.diff(whole)) + 1
    counts = [*np.diff([0, *edges, whole.size]).tolist(), 0, 0]
    objects = [annotation(1, 7, BOX, {"size": [50, 60], "counts": counts})]
    read = read_annotations(write_coco(tmp_path, "train2017", [(50, 60)], objects))
    assert (rle.decode(to_rle(read.annotations[0].segmentation, 50, 60)) == mask).all()


def test_a_file_has_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it a file larger than the memory is read until the machine stops."""
    varied_set(tmp_path)
    monkeypatch.setattr(annotations, "ANNOTATION_BYTES", 1000)
    with pytest.raises(UserError, match=r"too large: .* bytes, at most 1,000 are read"):
        opened(tmp_path)
