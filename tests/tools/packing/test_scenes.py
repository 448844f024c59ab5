"""The generated sample set."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from evaluation.datasets.open import open_labelled
from pipeline.errors import UserError
from pipeline.manifest import Manifest
from tests.helpers.manifests import names_of
from tools import build_dataset
from tools.packing import scenes


@settings(max_examples=20)
@given(seed=st.integers(0, 2**64), index=st.integers(0, 2**40))
def test_a_scene_depends_on_seed_and_index_alone(seed: int, index: int) -> None:
    """Otherwise the demo's scores would change with the thread count or the number of scenes."""
    image, labels = scenes.scene(seed, index)
    again, labels_again = scenes.scene(seed, index)
    np.testing.assert_array_equal(image, again)
    np.testing.assert_array_equal(labels, labels_again)
    assert image.dtype == labels.dtype == np.uint8
    assert image.shape == (*labels.shape, 3)
    assert min(labels.shape) >= 144
    assert max(labels.shape) <= 256
    assert labels.max() < len(scenes.CLASSES)
    assert image.std() > 5


def test_every_class_and_both_formats_occur() -> None:
    """A class that never appears would count as 0 in the mean IoU."""
    drawn = [scenes.scene(0, index)[1] for index in range(40)]
    present = [np.unique(labels) for labels in drawn]
    assert set(np.concatenate(present)) == set(range(len(scenes.CLASSES)))
    assert any(height > width for height, width in (labels.shape for labels in drawn))
    assert any(height < width for height, width in (labels.shape for labels in drawn))
    assert all((classes < len(scenes.BACKGROUNDS)).any() for classes in present)


def test_colour_alone_does_not_tell_the_classes_apart() -> None:
    """If it did, the demo would prove nothing: an untrained network already groups by colour."""
    means: dict[int, list[np.ndarray]] = {}
    for index in range(60):
        image, labels = scenes.scene(1, index)
        for label in np.unique(labels):
            means.setdefault(int(label), []).append(image[labels == label].mean(axis=0))
    centres = np.array([np.mean(means[label], axis=0) for label in sorted(means)])
    hits = [
        int(np.argmin(((centres - colour) ** 2).sum(axis=1))) == label
        for label, colours in means.items()
        for colour in colours
    ]
    assert np.mean(hits) < 0.5


def test_the_sample_set_on_disk(tmp_path: Path) -> None:
    """Evaluation finds a label map by the image's name. A photograph's label map is all void."""
    out = tmp_path / "s.beton"
    arguments = ["sample", "--out", str(out), "--count", "6", "--val-count", "2", "--workers", "2"]
    build_dataset.main(arguments)
    root = tmp_path / "scenes"
    names = names_of(Manifest.beside(out))
    photographs = [name for name in names if name.startswith("photo_")]
    assert names[:6] == [f"{i:06d}.jpg" for i in range(6)]
    assert len(photographs) == len(scenes.PHOTOGRAPHS) == len(names) - 6
    assert json.loads((root / "classes.json").read_text()) == list(scenes.CLASSES)
    for split, count, start in (("train", 6, 0), ("val", 2, scenes.VAL_START)):
        files = sorted((root / split / "labels").glob("0*.png"))
        assert len(files) == count
        for index, file in enumerate(files):
            image, labels = scenes.scene(0, start + index)
            np.testing.assert_array_equal(np.asarray(Image.open(file)), labels)
            drawn = np.asarray(Image.open(root / split / "images" / f"{file.stem}.jpg"))
            assert drawn.shape == image.shape
            assert np.abs(drawn.astype(int) - image).mean() < 8
    train = open_labelled(images=root / "train/images", labels=root / "train/labels")
    assert len(train) == len(names)
    last = len(train) - 1
    assert (train.labels(last, *train.load(last).shape[:2]) == 255).all()
    with pytest.raises(UserError, match=r"--out .* exists"):
        build_dataset.main(arguments)
    build_dataset.main([*arguments, "--force"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s.beton", "s.beton.json", "scenes"]


def test_an_empty_folder_is_used(tmp_path: Path) -> None:
    """Users often create the folder first."""
    (tmp_path / "mine").mkdir()
    scenes.write(tmp_path / "mine", 1, 1, 0, 1, force=False)
    assert sorted(path.name for path in (tmp_path / "mine").iterdir()) == [
        "classes.json",
        "recipe.json",
        "train",
        "val",
    ]


def test_a_set_that_is_there_is_used(tmp_path: Path) -> None:
    """If packing is killed after the scenes are written, the same command uses them."""
    root = tmp_path / "mine"
    scenes.write(root, 2, 1, 0, 1, force=False)
    made = (root / "classes.json").stat().st_ino
    scenes.write(root, 2, 1, 0, 1, force=False)
    assert (root / "classes.json").stat().st_ino == made
    with pytest.raises(UserError, match="--root"):
        scenes.write(root, 2, 1, 7, 1, force=False)
    (root / "recipe.json").write_bytes(b"\xff\xfe")  # not text: another program's file
    with pytest.raises(UserError, match="--root"):
        scenes.write(root, 2, 1, 0, 1, force=False)


def test_a_folder_of_the_users_is_not_replaced(tmp_path: Path) -> None:
    """--force with a wrong --root must not delete the user's data."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    for force in (False, True):
        with pytest.raises(UserError, match="--root"):
            scenes.write(tmp_path / "mine", 1, 1, 0, 1, force)
    assert (tmp_path / "mine" / "thesis.txt").exists()
