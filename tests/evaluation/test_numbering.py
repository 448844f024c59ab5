"""Label maps in another numbering than the data set's are refused or noticed."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from evaluation import unsupervised_segmentation
from evaluation.datasets.coco_classes import CLASSES
from evaluation.datasets.labelled_images import LabelledImages
from evaluation.datasets.layouts import CAMVID
from evaluation.datasets.open import open_labelled
from pipeline.errors import UserError
from tests.helpers.labelled_sets import save_png

SHAPE = (4, 12)
FILES = {
    "folder": ("images/{}.png", "labels/{}.png"),
    "coco-stuff": ("val2017/{}.png", "stuffthingmaps/val2017/{}.png"),
    "coco-stuff-182": ("val2017/{}.png", "stuffthingmaps/val2017/{}.png"),
    "camvid": ("val/{}.png", "valannot/{}.png"),
    "cityscapes": (
        "leftImg8bit/val/x/{}_leftImg8bit.png",
        "gtFine/val/x/{}_gtFine_labelIds.png",
    ),
    "voc": ("JPEGImages/{}.png", "SegmentationClass/{}.png"),
    "voc-aug": ("JPEGImages/{}.png", "SegmentationClass/{}.png"),
    "ade20k": ("images/validation/{}.png", "annotations/validation/{}.png"),
}
"""Where each layout has an image and its label map."""
NAMES = ["a", "b", "c"]


def write(root: Path, kind: str, maps: Sequence[Sequence[int]]) -> LabelledImages:
    """A set of one image for each of `maps`, which lists the ids in it."""
    for i, ids in enumerate(maps):
        image, labels = (root / name.format(i) for name in FILES[kind])
        pixels = np.resize(np.array(ids), SHAPE)
        save_png(image, np.repeat(pixels[..., None], 3, axis=2))
        save_png(labels, pixels)
    if kind.startswith("voc"):
        (root / "ImageSets/Segmentation").mkdir(parents=True)
        listed = "\n".join(map(str, range(len(maps))))
        (root / "ImageSets/Segmentation/val.txt").write_text(listed)
    if kind == "folder":
        (root / "classes.json").write_text(json.dumps(NAMES))
        return open_labelled("folder", images=root / "images", labels=root / "labels")
    return open_labelled(kind, root=root)


def notes_of(data: LabelledImages) -> str:
    """The notes about the numbering of a whole set."""
    data.check_labels()
    notes = [note for note in data.notes() if "the labels show only" not in note]
    assert all(str(data.source) in note for note in notes)
    return " ".join(notes)


@pytest.mark.parametrize(
    ("kind", "maps", "note"),
    [
        ("coco-stuff", [(0, 1, 157), (0, 9, 178)], "no id 255 occurs: .* need dataset coco-stuff"),
        ("coco-stuff-182", [(1, 157), (2, 60)], "no id 0 occurs: .* need dataset coco-stuff"),
        ("cityscapes", [(0, 1, 13, 255), (2, 18)], "none of the ids 19 to 33 occurs: train ids"),
        ("voc", [(0, 1, 16), (0, 1, 4)], "no id 255 occurs: .* numbered from 1"),
        ("voc", [(1, 16, 255)], "no id 0 occurs: .* numbered from 1"),
        ("voc-aug", [(1, 16)], "no id 0 occurs: .* numbered from 1"),
        ("ade20k", [(0, 1, 255), (149,)], "the id 255 occurs: .* numbered from 0"),
        ("folder", [(1, 2), (1, 255)], "no id 0 occurs: class ids run from 0 to 2"),
    ],
)
def test_odd_ids_are_noticed(
    kind: str, maps: list[tuple[int, ...]], note: str, tmp_path: Path
) -> None:
    """Without it a small set in another numbering is scored without a word."""
    assert re.search(note, notes_of(write(tmp_path, kind, maps)))


@pytest.mark.parametrize(
    ("kind", "ids", "other", "advice"),
    [
        ("coco-stuff", (0, 1, 11), 11, "need dataset coco-stuff-182"),
        ("coco-stuff", (0, 182), 182, "need dataset coco-stuff-182"),
        ("coco-stuff-182", (1, 255), 255, "need dataset coco-stuff"),
        ("voc", (0, 21), 21, "are these numbered from 1"),
        ("camvid", (1, 11, 12), 12, "ids run from 0"),
        ("folder", (1, 2, 3), 3, "are these numbered from 1"),
    ],
)
def test_impossible_ids_name_the_numbering(
    kind: str, ids: tuple[int, ...], other: int, advice: str, tmp_path: Path
) -> None:
    """Without it the message names an id, and not that all ids are shifted."""
    data = write(tmp_path, kind, [ids])
    with pytest.raises(UserError, match=rf"class id {other} is not in the table .*: .*{advice}"):
        data.check_labels()


@pytest.mark.parametrize(
    ("kind", "maps"),
    [
        ("coco-stuff", [(0, 156, 255), (8, 177)]),
        ("coco-stuff-182", [(0, 1, 157), (9, 178)]),
        ("camvid", [range(12)]),
        ("cityscapes", [(7, 8, 11, 23, 26)]),
        ("voc", [(0, 15, 255)]),
        ("voc-aug", [(0, 15)]),
        ("ade20k", [(0, 1, 150)]),
        ("folder", [(0, 1), (2,)]),
    ],
)
def test_right_ids_raise_no_doubt(kind: str, maps: list[Sequence[int]], tmp_path: Path) -> None:
    """Without it each evaluation ends with a doubt, and nobody reads the note that matters."""
    assert notes_of(write(tmp_path, kind, maps)) == ""


def test_both_numberings_of_coco_stuff_give_the_same_classes(tmp_path: Path) -> None:
    """Without it maps with COCO's ids are scored as the neighbours of their classes."""
    caffe = write(tmp_path / "a", "coco-stuff", [(0, 156, 181, 255)])
    plain = write(tmp_path / "b", "coco-stuff-182", [(1, 157, 182, 0)])
    names = [CLASSES.index(name) for name in ("person", "sky", "solid")]
    expected = np.resize(np.array([*names, 255]), SHAPE)
    for data in (caffe, plain):
        np.testing.assert_array_equal(data.labels(0, *SHAPE), expected)


def test_few_classes_are_noticed(tmp_path: Path) -> None:
    """Without it maps that are all one value, or a table of another data set, pass unnoticed."""
    for i, (maps, note) in enumerate(
        (
            ([(1,), (1, 255)], "the labels show only 1 of 11 classes: building"),
            ([range(6)], None),
            ([(0, 2)], "the labels show only 2 of 11 classes: sky, pole"),
        )
    ):
        data = write(tmp_path / str(i), "camvid", maps)
        data.check_labels()
        assert data.notes() == ([f"{data.source}: {note}"] if note else [])
    assert len(CAMVID) == 11


def test_notes_reach_the_terminal_and_the_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without it the doubt stays inside the program."""
    write(tmp_path, "coco-stuff", [(0, 1, 157)])
    out = tmp_path / "eval.json"
    command = ["x", "--dataset", "coco-stuff", "--root", str(tmp_path), "--features", "pixels"]
    more = ["--subset", "all", "--clusters", "2", "--match", "majority", "--size", "32"]
    monkeypatch.setattr("sys.argv", [*command, *more, "--json", str(out)])
    unsupervised_segmentation.main()
    notes = json.loads(out.read_text())["notes"]
    assert "coco-stuff-182" in notes[0]
    assert f"note: {notes[0]}\n" in capsys.readouterr().err
