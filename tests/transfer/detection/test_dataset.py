"""COCO's annotations become training examples; wrong annotations are refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.errors import UserError
from tests.helpers.coco_sets import (
    annotation,
    box_mask,
    compressed,
    polygon,
    run_lengths,
    varied_set,
    write_coco,
)
from transfer.detection.dataset import CocoInstances, TrainingExamples, open_instances, resized
from transfer.detection.evaluate import ground_truth
from transfer.examples import generator

BOX = (10, 5, 20, 30)


def opened(root: Path, split: str = "train2017") -> CocoInstances:
    return open_instances(root, "annotations/instances_{split}.json", "{split}", split)


def examples(source: CocoInstances, *sides: int, flip: float = 0.0) -> TrainingExamples:
    return TrainingExamples(source, sides, 1000, flip)


def test_all_ways_to_write_a_mask_are_the_same_mask(tmp_path: Path) -> None:
    """COCO's files hold polygons and both kinds of run lengths. A transposed or shifted mask would
    train and score another object.
    """
    mask = box_mask(BOX, 50, 60)
    shapes = [polygon(BOX), run_lengths(mask), compressed(mask)]
    write_coco(tmp_path, "train2017", [(50, 60)], [annotation(1, 7, BOX, s) for s in shapes])
    source = opened(tmp_path)
    masks = source.masks(source.records[0], 50, 60)
    assert masks.shape == (3, 50, 60)
    assert all((one == mask).all() for one in masks)


def test_labels_follow_the_order_of_the_ids(tmp_path: Path) -> None:
    """COCO's 80 categories have ids up to 90. If a label is not its id's position, one class is
    trained as another.
    """
    objects = [annotation(1, c, BOX, polygon(BOX)) for c in (90, 2, 7)]
    write_coco(tmp_path, "train2017", [(50, 60)], objects)
    source = opened(tmp_path)
    assert source.categories == {2: "box", 7: "disc", 90: "bar"}
    assert source.records[0].labels.tolist() == [3, 1, 2]


def test_crowds_and_empty_images_do_not_train(tmp_path: Path) -> None:
    """A crowd's box is not the box of one object, and torchvision's heads cannot train on an image
    without objects. The evaluation sees all images.
    """
    crowd = annotation(2, 7, BOX, run_lengths(box_mask(BOX, 50, 60)), iscrowd=1)
    one = annotation(1, 7, BOX, polygon(BOX))
    write_coco(tmp_path, "train2017", [(50, 60)] * 3, [one, crowd])
    source = opened(tmp_path)
    assert [len(record.boxes) for record in source.records] == [1, 0, 0]
    assert len(examples(source, 50)) == 1


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_image_boxes_and_masks_are_resized_and_mirrored_alike(tmp_path: Path, flip: float) -> None:
    """If boxes do not follow their pixels, the detector learns wrong positions."""
    write_coco(tmp_path, "train2017", [(50, 60)], [annotation(1, 7, BOX, polygon(BOX))])
    one = examples(opened(tmp_path), 100, flip=flip).load(0, np.random.default_rng(0))
    assert one["image"].shape == (3, 100, 120)
    x1, y1, x2, y2 = one["boxes"][0].tolist()
    assert (x1, x2) == ((60, 100) if flip else (20, 60))
    assert (y1, y2) == (10, 70)
    bright = one["image"][0] > 60
    assert (bright == one["masks"][0].bool()).float().mean() > 0.97  # edges are blurred
    rows, columns = np.nonzero(one["masks"][0].numpy())
    assert [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1] == [x1, y1, x2, y2]


def test_the_longer_side_has_a_limit() -> None:
    """Without it, a panorama of 800 pixels height would not fit into the GPU's memory."""
    assert resized(480, 640, 800, 1333) == (800, 1067)
    assert resized(200, 1000, 800, 1333) == (267, 1333)
    assert resized(1000, 200, 800, 1333) == (1333, 267)


def test_examples_follow_from_their_generator(tmp_path: Path) -> None:
    """Draws from elsewhere would differ between numbers of workers and after a resume."""
    varied_set(tmp_path)
    data = examples(opened(tmp_path), 40, 48, 56, 64, flip=0.5)

    def seen(epoch: int) -> list[tuple[Any, ...]]:
        found = [data.load(i, generator(3, epoch, i)) for i in range(len(data))]
        return [(*one["image"].shape, one["boxes"][0, 0].item()) for one in found]

    assert seen(0) == seen(0)
    assert len({tuple(seen(epoch)) for epoch in range(4)}) == 4


def test_boxes_without_area_in_the_image_are_skipped_and_counted(tmp_path: Path) -> None:
    """One such box would end a training of days with a loss that is not finite."""
    boxes = [(10, 5, 20, 30), (10, 5, 0, 30), (10, 5, 20, -3), (60, 0, 9, 9), (-5, -5, 20, 20)]
    objects = [annotation(1, 7, box, polygon(BOX)) for box in boxes]
    write_coco(tmp_path, "train2017", [(50, 60)], objects)
    source = opened(tmp_path)
    assert source.dropped == 3
    assert source.records[0].boxes.tolist() == [[10, 5, 30, 35], [0, 0, 15, 15]]
    assert len(source.masks(source.records[0], 50, 60)) == 2


def test_masks_without_area_are_skipped_and_counted(tmp_path: Path) -> None:
    """COCO's tools skip polygons of two points: one of them must not refuse the whole set."""
    empty = compressed(np.zeros((50, 60), np.uint8))
    shapes = [polygon(BOX), [*polygon(BOX), [1, 2, 3, 4]], [[1, 2, 3, 4]], empty]
    write_coco(tmp_path, "train2017", [(50, 60)], [annotation(1, 7, BOX, s) for s in shapes])
    source = opened(tmp_path)
    assert source.dropped == 2
    first, second = source.masks(source.records[0], 50, 60)
    assert first.any()
    assert (first == second).all()
    assert len(ground_truth(source).anns) == 4


def test_objects_without_masks_train_boxes(tmp_path: Path) -> None:
    """Without it they are lost, or their boxes are learned as masks."""
    objects = [annotation(1, 7, BOX, polygon(BOX)), annotation(1, 2, (30, 20, 9, 9), [])]
    write_coco(tmp_path, "train2017", [(50, 60)], objects)
    one = examples(opened(tmp_path), 50, flip=1).load(0, generator(0, 0, 0))
    assert one["masked"].tolist() == [True, False]
    assert len(one["boxes"]) == 2
    assert one["masks"][0].any() and not one["masks"][1].any()
    boxes = TrainingExamples(opened(tmp_path), (50,), 1000, 1, masks=False)
    alone = boxes.load(0, generator(0, 0, 0))
    assert alone.keys() == {"image", "boxes", "labels"}
    assert all(alone[key].equal(one[key]) for key in alone)


def test_a_set_without_masks_needs_the_setting(tmp_path: Path) -> None:
    """Without it a mask head learns nothing, without a word."""
    write_coco(tmp_path, "train2017", [(50, 60)], [annotation(1, 7, BOX, None)])
    source = opened(tmp_path)
    with pytest.raises(UserError, match=r"no object has a mask: give --model\.masks false"):
        examples(source, 50)
    assert len(TrainingExamples(source, (50,), 1000, 0, masks=False)) == 1


def test_boxes_that_contradict_their_masks_are_counted(tmp_path: Path) -> None:
    """Without it boxes of corners are learned as x, y, width, height, without a word. Tools that
    count pixels differently do not contradict.
    """
    x, y, w, h = BOX
    mask = compressed(box_mask(BOX, 50, 60))
    boxes = [BOX, (x, y, x + w, y + h), (x + 2, y - 2, w, h), (x, y, w, 5), (40, 40, 15, 9)]
    objects = [annotation(1, 7, BOX, s, bbox=box) for box in boxes for s in (polygon(BOX), mask)]
    objects.append(annotation(1, 7, BOX, [], bbox=(40, 40, 15, 9)))
    tiny = [[1, 1, 2, 1, 2, 2, 1, 2]]
    objects.append(annotation(1, 7, BOX, tiny, bbox=(2, 2, 1, 1)))
    write_coco(tmp_path, "train2017", [(50, 60)], objects)
    source = opened(tmp_path)
    assert source.contradicting == 2 * 2
    assert source.outside == 0
    assert source.dropped == 0


def test_boxes_out_of_their_image_are_counted(tmp_path: Path) -> None:
    """Without it boxes of corners that have no masks are cut without a word."""
    boxes = [(30, 20, 60, 50), (-2, 5, 20, 30), (0, 0, 62, 52), (-3, 5, 20, 30)]
    objects = [annotation(1, 7, BOX, None, bbox=box) for box in boxes]
    write_coco(tmp_path, "train2017", [(50, 60)], objects)
    assert opened(tmp_path).outside == 2


def test_another_layout_is_described(tmp_path: Path) -> None:
    """For a wrong folder, the message says what is expected and what is there."""
    (tmp_path / "images").mkdir()
    with pytest.raises(UserError, match=r"expected COCO's layout, ROOT/annotations/.*found images"):
        opened(tmp_path)
    varied_set(tmp_path)
    with pytest.raises(UserError, match=r"instances_val2017.json: no such file.*found instances_t"):
        opened(tmp_path, "val2017")
    with pytest.raises(UserError, match="no such folder"):
        opened(tmp_path / "elsewhere")


def test_other_braces_in_paths_are_kept(tmp_path: Path) -> None:
    """Only {split} is replaced; other braces are part of the name."""
    file = varied_set(tmp_path)
    file.rename(tmp_path / "{0}-{train2017.json")
    assert len(open_instances(tmp_path, "{0}-{{split}.json", "{split}", "train2017").records) == 6
    with pytest.raises(UserError, match=r"\{foo\}.json: no such file"):
        open_instances(tmp_path, "{foo}.json", "{split}", "train2017")


def test_missing_images_are_counted(tmp_path: Path) -> None:
    """They are reported at the start, not after an hour."""
    varied_set(tmp_path)
    for name in ("000000000002.png", "000000000004.png"):
        (tmp_path / "train2017" / name).unlink()
    with pytest.raises(UserError, match=r"2 of its 6 images are not in .*first: 000000000002.png"):
        opened(tmp_path)


def test_an_image_of_another_size_is_refused(tmp_path: Path) -> None:
    """Its boxes would be at wrong positions."""
    write_coco(tmp_path, "train2017", [(50, 60)], [annotation(1, 7, BOX, polygon(BOX))])
    file = tmp_path / "annotations" / "instances_train2017.json"
    file.write_text(file.read_text().replace('"height": 50', '"height": 51'))
    with pytest.raises(UserError, match=r"0001.png: 60×50 pixels, but instances_.* says 60×51"):
        examples(opened(tmp_path), 50).load(0, np.random.default_rng(0))


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_hairline_boxes_are_skipped_and_counted(flip: float, tmp_path: Path) -> None:
    """Without it float32 rounds their width to 0 when they are mirrored: NaN at the first step."""
    boxes = [(300, 5, 1e-5, 30), (300, 5, 20, 1e-6), (300, 5, 0.05, 0.05)]
    objects = [annotation(1, 7, BOX, polygon(BOX), bbox=box) for box in boxes]
    write_coco(tmp_path, "train2017", [(400, 600)], objects)
    source = opened(tmp_path)
    assert source.dropped == 2
    ((x1, y1, x2, y2),) = examples(source, 50, flip=flip).load(0, generator(0, 0, 0))["boxes"]
    assert x2 > x1 and y2 > y1


def test_nothing_to_learn_from_is_refused(tmp_path: Path) -> None:
    """For example, a set whose annotations are all crowds. Without the second half nobody learns
    what is wrong with boxes that are all too thin.
    """
    write_coco(tmp_path, "train2017", [(50, 60)], [])
    with pytest.raises(UserError, match=r"no image with an object to learn from$"):
        examples(opened(tmp_path), 50)
    thin = annotation(1, 7, BOX, polygon(BOX), bbox=(5, 5, 1e-6, 30))
    write_coco(tmp_path / "thin", "train2017", [(50, 60)], [thin])
    with pytest.raises(UserError, match=r"1 are skipped: their boxes or masks have no area"):
        examples(opened(tmp_path / "thin"), 50)


def test_a_turned_photograph_is_read_as_it_was_annotated(tmp_path: Path) -> None:
    """COCO's sizes and boxes are those of the picture that a viewer shows. Without it the objects
    of a phone's photographs are looked for beside them.
    """
    write_coco(tmp_path, "train2017", [(50, 60)], [annotation(1, 7, BOX, polygon(BOX))])
    file = tmp_path / "train2017" / "000000000001.png"
    upright = Image.open(file).convert("RGB")
    tag = Image.Exif()
    tag[0x0112] = 6
    upright.transpose(Image.Transpose.ROTATE_90).save(file, exif=tag)
    source = opened(tmp_path)
    source.check_headers()
    np.testing.assert_array_equal(np.asarray(source.load(source.records[0])), np.asarray(upright))
