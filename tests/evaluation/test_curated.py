"""PiCIE's list of images, made by its rule."""

import argparse
import hashlib
from pathlib import Path

import numpy as np
import pytest

from evaluation.datasets import curated as module
from evaluation.datasets.open import add_dataset_options, labelled_from
from pipeline.errors import UserError
from tests.helpers.labelled_sets import save_png
from train.run.cli import CommandParser

STUFF, THING, VOID = 181, 0, 255


def options(root: Path, *more: str) -> argparse.Namespace:
    parser = CommandParser()
    add_dataset_options(parser)
    return parser.parse_args(["--dataset", "coco-stuff", "--root", str(root), *more])


def write(root: Path, name: str, height: int, width: int, others: int, value: int) -> None:
    """An image whose first `others` pixels have a `value`, and the rest is stuff."""
    labels = np.full(height * width, STUFF)
    labels[:others] = value
    save_png(root / f"stuffthingmaps/val2017/{name}.png", labels.reshape(height, width))
    save_png(root / f"val2017/{name}.jpg", np.zeros((height, width, 3)))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    quarter = 360 * 400 // 4
    write(tmp_path, "000000000001", 360, 400, 0, VOID)
    write(tmp_path, "000000000002", 359, 400, 0, VOID)
    write(tmp_path, "000000000003", 400, 359, 0, VOID)
    write(tmp_path, "000000000004", 360, 400, quarter, VOID)
    write(tmp_path, "000000000005", 360, 400, quarter + 1, VOID)
    write(tmp_path, "000000000006", 360, 400, quarter + 1, THING)
    return tmp_path


def test_rule_is_picies(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At least 360 pixels on both sides, at least 75 % stuff of all pixels: another list would give
    other scores than published ones. What is selected is said, and recognised by its hash.
    """
    data = labelled_from(options(root))
    assert [path.stem for path in data.paths] == ["000000000001", "000000000004"]
    assert data.selection == "2 of 6 images, by PiCIE's rule"
    digest = hashlib.sha256(b"000000000001\n000000000004\n").hexdigest()
    monkeypatch.setattr(module, "IDS_SHA256", digest)
    assert labelled_from(options(root)).selection == "PiCIE's 2 images"


def test_list_is_the_default_and_all_the_option(root: Path) -> None:
    """A list of the user's own, and a training split, are taken as they are."""
    assert len(labelled_from(options(root, "--subset", "all"))) == 6
    (root / "list.txt").write_text("2\n")
    listed = options(root, "--list", str(root / "list.txt"))
    assert [path.stem for path in labelled_from(listed).paths] == ["000000000002"]
    listed.subset = "curated"
    with pytest.raises(UserError, match="--subset curated is for coco-stuff and coco-stuff-182"):
        labelled_from(listed)


def test_no_image_left_is_an_error(tmp_path: Path) -> None:
    """Without it a small set would end in a traceback."""
    write(tmp_path, "000000000002", 359, 400, 0, VOID)
    with pytest.raises(UserError, match="PiCIE's rule selects none of 1 images"):
        labelled_from(options(tmp_path))
