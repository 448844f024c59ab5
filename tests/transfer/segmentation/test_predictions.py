"""Predicted label maps as the benchmarks' servers want them."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evaluation.confusion import confusion_matrix
from evaluation.datasets.label_maps import IdReader, table_of
from evaluation.datasets.labelled_images import LabelledImages
from evaluation.datasets.layouts import CITYSCAPES
from evaluation.datasets.open import open_labelled
from tests.helpers.labelled_sets import save_png, write_folder_set
from tests.transfer.segmentation.test_run import small_config, trainer
from transfer.segmentation.evaluate import score_rows
from transfer.segmentation.predictions import LabelWriter, class_ids

SHAPE = (4, 6)


def photograph(path: Path) -> None:
    save_png(path, np.zeros((*SHAPE, 3)))


def cityscapes(root: Path) -> list[int]:
    for city in ("bonn", "ulm"):
        name = f"{city}/{city}_000000_000019"
        photograph(root / f"leftImg8bit/val/{name}_leftImg8bit.png")
        save_png(root / f"gtFine/val/{name}_gtFine_labelIds.png", np.full(SHAPE, 7))
    return sorted(CITYSCAPES)


def ade20k(root: Path) -> list[int]:
    photograph(root / "images/validation/ADE_val_00000001.jpg")
    save_png(root / "annotations/validation/ADE_val_00000001.png", np.full(SHAPE, 1))
    return list(range(1, 151))


def voc(root: Path) -> list[int]:
    photograph(root / "JPEGImages/2007_000033.jpg")
    save_png(root / "SegmentationClass/2007_000033.png", np.full(SHAPE, 255), palette=True)
    (root / "ImageSets/Segmentation").mkdir(parents=True)
    (root / "ImageSets/Segmentation/val.txt").write_text("2007_000033\n")
    return list(range(21))


def camvid(root: Path) -> list[int]:
    photograph(root / "val/0016E5_07959.png")
    save_png(root / "valannot/0016E5_07959.png", np.full(SHAPE, 3))
    return list(range(11))


def coco_stuff(root: Path) -> list[int]:
    photograph(root / "val2017/000000000139.jpg")
    save_png(root / "stuffthingmaps/val2017/000000000139.png", np.full(SHAPE, 0))
    return list(range(27))  # many ids are one class: the class's number


FILES = {
    "cityscapes": (
        cityscapes,
        [f"{city}/{city}_000000_000019_leftImg8bit.png" for city in ("bonn", "ulm")],
    ),
    "ade20k": (ade20k, ["ADE_val_00000001.png"]),
    "voc": (voc, ["2007_000033.png"]),
    "camvid": (camvid, ["0016E5_07959.png"]),
    "coco-stuff": (coco_stuff, ["000000000139.png"]),
}


@pytest.mark.parametrize("kind", FILES)
def test_files_have_the_names_and_ids_of_the_benchmark(kind: str, tmp_path: Path) -> None:
    """Without it a server scores other classes than were predicted: Cityscapes' 19 training ids
    instead of its label ids, or ADE20K's classes one too low.
    """
    write, names = FILES[kind]
    ids = write(tmp_path / "set")
    data = open_labelled(kind, root=tmp_path / "set")
    out = tmp_path / "out"
    keep = LabelWriter(out, data)
    predicted = np.resize(np.arange(data.num_classes), (2, data.num_classes))
    for index in range(len(data)):
        keep(index, predicted)
    assert sorted(str(path.relative_to(out)) for path in out.rglob("*.png")) == names
    image = Image.open(out / names[0])
    assert image.mode == "L"
    assert np.asarray(image).tolist() == [ids, ids]
    if kind != "coco-stuff":  # whose ids stand for more than one class
        reread = data.reader.read(out / names[0], *predicted.shape)
        np.testing.assert_array_equal(reread, predicted)


def test_ids_that_are_ignored_stay_classes() -> None:
    """Without it a class without an id of its own is written as the first one."""
    assert class_ids(IdReader(["a", "b", "c"], table_of(range(3), (1, 255)))).tolist() == [0, 1, 2]


def test_images_of_one_name_in_two_folders_have_two_files(tmp_path: Path) -> None:
    """Without it the prediction of one replaces that of the other."""
    for folder in "ab":
        photograph(tmp_path / f"images/{folder}/1.v2.png")
        save_png(tmp_path / f"labels/{folder}/1.v2.png", np.zeros(SHAPE))
    data = open_labelled(images=tmp_path / "images", labels=tmp_path / "labels")
    keep = LabelWriter(tmp_path / "out", data)
    for index in range(2):
        keep(index, np.full(SHAPE, index))
    for index, folder in enumerate("ab"):
        assert (np.asarray(Image.open(tmp_path / f"out/{folder}/1.v2.png")) == index).all()


def scores(data: LabelledImages, folder: Path) -> list[dict[str, object]]:
    """Those of the PNGs in a folder."""
    count = data.num_classes
    confusion = np.zeros((count, count), np.int64)
    for index, image in enumerate(data.paths):
        found = np.asarray(Image.open(folder / f"{image.stem}.png"))
        truth = data.labels(index, *data.load(index).shape[:2])
        assert found.shape == truth.shape
        confusion += confusion_matrix(found, truth, count, count)
    return score_rows(confusion, data.class_names)


def test_predictions_of_a_run_have_its_scores(tmp_path: Path) -> None:
    """Without it the files show another prediction than the one that was scored. Those of an
    earlier scoring are replaced.
    """
    root = tmp_path / "set"
    write_folder_set(root, 10, 3)
    config = small_config(root, tmp_path)
    old = tmp_path / "run/predictions/old.png"
    old.parent.mkdir(parents=True)
    old.touch()
    trainer(replace(config, log=replace(config.log, predictions=True))).train()
    folder = tmp_path / "run/predictions"
    assert sorted(path.name for path in folder.iterdir()) == [f"val0{n}.png" for n in range(3)]
    data = open_labelled(images=root / "val/images", labels=root / "val/labels")
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert scores(data, folder) == result["results"]
    assert not list((tmp_path / "run").glob(".predictions*"))
