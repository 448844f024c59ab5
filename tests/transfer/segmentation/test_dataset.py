"""The data sets of a segmentation run in their official layouts, and refused input."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from evaluation.datasets.labelled_images import LabelledImages
from evaluation.datasets.layouts import ADE20K_CLASSES
from evaluation.datasets.open import open_labelled
from pipeline.errors import UserError
from tests.helpers.labelled_sets import save_png, write_folder_set
from transfer.segmentation.config import DataConfig
from transfer.segmentation.dataset import fingerprint, open_part, open_sets
from transfer.shared import check_apart

SHAPE = (4, 6)


def grid(*values: int) -> np.ndarray:
    """[4, 6] filled with these values in turn."""
    return np.resize(np.array(values), SHAPE)


def photograph(path: Path) -> None:
    """No two names have the same picture."""
    save_png(path, np.random.default_rng(list(path.stem.encode())).integers(0, 256, (*SHAPE, 3)))


def folder_config(root: Path) -> DataConfig:
    parts = {
        f"{part}_{what}": str(root / part / what)
        for part in ("train", "val")
        for what in ("images", "labels")
    }
    return DataConfig(**parts)  # type: ignore[arg-type]


@pytest.fixture
def folder(tmp_path: Path) -> DataConfig:
    write_folder_set(tmp_path, 2, 1, SHAPE)
    return folder_config(tmp_path)


# ---- ADE20K ---------------------------------------------------------------------------------


def ade20k(root: Path) -> None:
    for part, name in (("training", "ADE_train_00000001"), ("validation", "ADE_val_00000001")):
        photograph(root / f"images/{part}/{name}.jpg")
        save_png(root / f"annotations/{part}/{name}.png", grid(0, 1, 150))


def test_ade20k_ids_begin_at_one(tmp_path: Path) -> None:
    """Without the shift, each class would become its neighbour, and "other" would be learned as a
    class.
    """
    ade20k(tmp_path)
    train, val = open_sets(DataConfig("ade20k", str(tmp_path)))
    assert (train.paths[0].stem, val.paths[0].stem) == ("ADE_train_00000001", "ADE_val_00000001")
    assert val.num_classes == ADE20K_CLASSES
    assert val.names is not None
    assert (val.names[0], val.names[-1]) == ("class 1", "class 150")
    np.testing.assert_array_equal(val.labels(0, *SHAPE), grid(255, 0, 149))
    assert len(open_labelled("ade20k", root=tmp_path, split="validation")) == 1
    with pytest.raises(UserError, match=r"expected images/training, found annotations, images$"):
        (tmp_path / "images/training").rename(tmp_path / "images/other")
        open_sets(DataConfig("ade20k", str(tmp_path)))


def test_ade20k_takes_names_from_its_table(tmp_path: Path) -> None:
    """Without it, results are of classes 1 to 150, and their numbers mean nothing to a reader."""
    ade20k(tmp_path)
    table = tmp_path / "objectInfo150.txt"
    rows = [f"{n}\t0.1\t5\t1\t0\t" + ("wall" if n == 1 else f"n{n}, x") for n in range(1, 151)]
    text = "Idx\tRatio\tTrain\tVal\tStuff\tName\n" + "\n".join(rows) + "\n"
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        table.write_bytes(text.encode(encoding))
        names = open_labelled("ade20k", root=tmp_path).names
        assert names is not None
        assert names[:2] == ["wall", "n2"]
    table.write_text("Idx\n" + "\n".join(rows[1:]))
    with pytest.raises(UserError, match="expected ADE20K's table of 150 classes"):
        open_labelled("ade20k", root=tmp_path)


# ---- VOC with more labels ---------------------------------------------------------------------


def voc(root: Path) -> Path:
    """Images a to e. VOC labels a (train) and b (val); the other folder labels a, c and d."""
    for name in "abcde":
        photograph(root / f"JPEGImages/{name}.jpg")
    for name in "ab":
        save_png(root / f"SegmentationClass/{name}.png", grid(0, 20, 255), palette=True)
    for name in "acd":
        save_png(root / f"SegmentationClassAug/{name}.png", grid(7))
    lists = root / "ImageSets/Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("a\n")
    (lists / "val.txt").write_text("b\n")
    (lists / "aug.txt").write_text("c\nd\n")
    return lists


def names_of(data: LabelledImages) -> list[str]:
    return [path.stem for path in data.paths]


def test_voc_aug_learns_from_both_folders_and_scores_vocs_own(tmp_path: Path) -> None:
    """If both folders label an image, VOC's label map is taken, as the authors do."""
    lists = voc(tmp_path / "VOCdevkit/VOC2012")
    config = DataConfig("voc-aug", str(tmp_path))
    train, val = open_sets(config)
    assert (names_of(train), names_of(val)) == (["a", "c", "d"], ["b"])
    np.testing.assert_array_equal(train.labels(0, *SHAPE), grid(0, 20, 255))
    np.testing.assert_array_equal(train.labels(1, *SHAPE), grid(7))

    (lists / "train_aug.txt").write_text("d\na\n")
    assert names_of(open_sets(config)[0]) == ["d", "a"]
    (lists / "train_aug.txt").rename(lists / "trainaug.txt")
    assert names_of(open_sets(config)[0]) == ["d", "a"]
    (lists / "trainaug.txt").unlink()
    with pytest.raises(UserError, match="no list of the split test of voc-aug there"):
        open_part(replace(config, val_split="test"), "val")
    (lists / "aug.txt").unlink()
    with pytest.raises(
        UserError,
        match=r"or train\.txt and aug\.txt: found train\.txt alone$",
    ):
        open_sets(config)
    assert names_of(open_sets(replace(config, dataset="voc"))[0]) == ["a"]


def test_voc_aug_names_label_maps_that_are_missing(tmp_path: Path) -> None:
    """Otherwise they would be skipped silently, and the figures would be of other data."""
    lists = voc(tmp_path)
    (lists / "aug.txt").write_text("c\ne\n")
    with pytest.raises(UserError, match=r"no label map for 1 of 3 images \(the first: e\.png\)"):
        open_sets(DataConfig("voc-aug", str(tmp_path)))


# ---- any folder, and refused input ------------------------------------------------------------


def test_folders_need_a_class_table(folder: DataConfig, tmp_path: Path) -> None:
    """A head needs the number of classes."""
    train, val = open_sets(folder)
    assert train.names == val.names == ["red", "green", "blue"]
    assert train.num_classes == 3
    (tmp_path / "classes.json").rename(tmp_path / "names.json")
    with pytest.raises(UserError, match=r"no class table: give data\.classes"):
        open_sets(folder)
    given = replace(folder, classes=str(tmp_path / "names.json"), void=[2, 255])
    train, _ = open_sets(given)
    assert 2 not in train.labels(0, *SHAPE)
    with pytest.raises(UserError, match=r"^--data\.dataset folder needs --data\.train_images$"):
        open_sets(DataConfig())
    with pytest.raises(UserError, match=r"^--data\.classes and --data\.void are for --data\.datas"):
        open_sets(replace(given, dataset="voc"))


def test_training_images_are_not_scored(folder: DataConfig, tmp_path: Path) -> None:
    """Scores on training images are not comparable."""
    both = replace(folder, val_images=folder.train_images, val_labels=folder.train_labels)
    with pytest.raises(
        UserError, match=r"2 of the 2 images to score are in the training set \(.*train00\.png\)"
    ):
        open_sets(both)
    copy = tmp_path / "val/images/val00.png"
    shutil.copy(copy, tmp_path / "train/images/other.png")
    shutil.copy(tmp_path / "val/labels/val00.png", tmp_path / "train/labels/other.png")
    with pytest.raises(UserError, match=r"1 of the 1 images to score are in the training set"):
        open_sets(folder)
    Image.open(copy).rotate(180).save(copy)  # another picture
    assert len(open_sets(folder)[0]) == 3
    (tmp_path / "val/classes.json").write_text(json.dumps(["a", "b"]))
    with pytest.raises(UserError, match="has other classes than"):
        open_sets(folder)


def test_a_large_set_may_have_a_few_copies(tmp_path: Path) -> None:
    """Without it a published set is refused for a photograph that its authors took twice."""
    paths = [tmp_path / f"{i}.png" for i in range(100)]
    for path in paths:
        photograph(path)
    others = [tmp_path / f"copy{i}.png" for i in range(2)]
    for path, other in zip(paths, others, strict=False):
        shutil.copy(path, other)
    check_apart(others[:1], paths, tmp_path)
    with pytest.raises(UserError, match="2 of the 100 images to score"):
        check_apart(others, paths, tmp_path)
    (tmp_path / "train").mkdir()
    same_name = Path(shutil.copy(paths[7], tmp_path / "train"))
    with pytest.raises(UserError, match="1 of the 100 images to score"):
        check_apart([same_name], paths, tmp_path)


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (np.eye(3)[np.zeros(SHAPE, int)], "not a label map: its pixels are RGB colours"),
        (np.full(SHAPE, 3), "class id 3 is not in the table of 3 classes"),
        (np.zeros((5, 6)), "label map of 6×5 pixels for an image of 6×4"),
    ],
)
def test_bad_label_maps_are_named(folder: DataConfig, pixels: np.ndarray, message: str) -> None:
    """Each would train on wrong labels, or end in a CUDA assertion."""
    assert folder.train_labels is not None
    path = Path(folder.train_labels) / "train00.png"
    save_png(path, pixels)
    with pytest.raises(UserError, match=f"{path}: {message}"):
        open_part(folder, "train").labels(0, *SHAPE)
    if "class id" not in message:  # headers tell the others before the first step
        with pytest.raises(UserError, match=f"{path}: {message}"):
            open_sets(folder)


def test_palettes_hold_ids(folder: DataConfig) -> None:
    """A conversion to grey or RGB would lose the ids of a palette PNG."""
    assert folder.train_labels is not None
    save_png(Path(folder.train_labels) / "train00.png", grid(2, 1, 255), palette=True)
    np.testing.assert_array_equal(open_sets(folder)[0].labels(0, *SHAPE), grid(2, 1, 255))


def test_fingerprint_depends_on_the_set_not_on_its_folder(
    folder: DataConfig, tmp_path: Path
) -> None:
    """Without it, a resumed run could silently continue on other images."""
    first = fingerprint(open_sets(folder)[0])
    write_folder_set(tmp_path / "copy", 2, 1, SHAPE)
    copy = folder_config(tmp_path / "copy")
    assert fingerprint(open_sets(copy)[0]) == first
    (tmp_path / "one.txt").write_text("train01\n")
    fewer = replace(copy, train_list=str(tmp_path / "one.txt"))
    assert fingerprint(open_sets(fewer)[0]) != first


def test_fingerprint_of_names_that_are_not_utf8(folder: DataConfig, tmp_path: Path) -> None:
    """Without it a set with names from a Chinese or Japanese Windows ends in a traceback."""
    first = fingerprint(open_sets(folder)[0])
    write_folder_set(tmp_path / "copy", 2, 1, SHAPE)
    for part in ("images", "labels"):
        path = next((tmp_path / f"copy/train/{part}").glob("*01.png"))
        path.rename(path.with_name(os.fsdecode("照片.png".encode("gbk"))))
    assert fingerprint(open_sets(folder_config(tmp_path / "copy"))[0]) != first


def test_voc_aug_reads_lists_of_images_and_label_maps(tmp_path: Path) -> None:
    """DeepLab's list of 10,582 images has both on each line. Its label maps are those it names."""
    lists = voc(tmp_path)
    lines = [
        "/JPEGImages/d.jpg /SegmentationClassAug/d.png",
        "JPEGImages/a.jpg SegmentationClassAug/a.png",
    ]
    (lists / "train_aug.txt").write_text("\n".join(lines))
    train, _ = open_sets(DataConfig("voc-aug", str(tmp_path)))
    assert names_of(train) == ["d", "a"]
    np.testing.assert_array_equal(train.labels(1, *SHAPE), grid(7))
    (lists / "train_aug.txt").write_text(f"{lines[0]}\n{lines[1]}\nd\n")
    with pytest.raises(UserError, match=r"names d\.jpg twice"):
        open_sets(DataConfig("voc-aug", str(tmp_path)))
    (lists / "train_aug.txt").write_text("/JPEGImages/d.jpg /SegmentationClassAug/lost.png")
    with pytest.raises(UserError, match=r"no label map for 1 of 1 images"):
        open_sets(DataConfig("voc-aug", str(tmp_path)))


def test_a_label_map_fits_the_turned_photograph(folder: DataConfig, tmp_path: Path) -> None:
    """Without it a phone's photographs are learned on their side, with upright labels."""
    tag = Image.Exif()
    tag[0x0112] = 6
    for path in sorted(tmp_path.glob("*/images/*")):
        shown = Image.open(path).convert("RGB")
        shown.transpose(Image.Transpose.ROTATE_90).save(path, exif=tag)
        train, val = open_sets(folder)
        data = train if "train" in path.parts else val
        found = data.load(data.paths.index(path))
        assert found.shape == (*SHAPE, 3)
        if path.suffix == ".png":
            np.testing.assert_array_equal(found, np.asarray(shown))


def test_a_label_map_with_long_texts_is_read(folder: DataConfig, tmp_path: Path) -> None:
    """Without it a label map that an editor has commented ends in a traceback."""
    for path in tmp_path.glob("*/labels/*.png"):
        note = PngInfo()
        note.add_text("history", "x" * (2 << 20), zip=True)
        Image.open(path).save(path, pnginfo=note)
    train, val = open_sets(folder)
    assert train.labels(0, *SHAPE).shape == val.labels(0, *SHAPE).shape == SHAPE
