"""One walk over folders, one rule for what it leaves aside."""

import os
from pathlib import Path
from typing import Any

import pytest

from evaluation.datasets.images import FolderImages, open_images
from evaluation.datasets.open import open_labelled
from pipeline.beton import Beton
from pipeline.errors import UserError
from pipeline.folders import SERVICE_FOLDERS, as_url, find_images
from tools.packing.sources import SOURCES
from transfer.detection.dataset import open_instances


def fill(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def names_of(root: Path) -> list[str]:
    return [path.relative_to(root).as_posix() for path in find_images(root)[0]]


def test_the_rule_is_the_same_for_every_command(tmp_path: Path) -> None:
    """Without it thumbnails and macOS's ._ files are scored or packed, or end in an error, and an
    image in a linked folder is in one command's set and not in the other's.
    """
    top, store = tmp_path / "top", tmp_path / "store"
    fill(top, "a.jpg", "B.PNG", "._a.jpg", ".git/c.jpg", "d/@eaDir/a.jpg/SYNO.jpg", "notes.txt")
    fill(top, "d/.ipynb_checkpoints/a-checkpoint.jpg", "like.jpg/e.jpg", "Thumbs.db")
    fill(top, *(f"service/{name}/x.jpg" for name in SERVICE_FOLDERS))
    fill(store, "f.jpg")
    (top / "linked").symlink_to(store)
    (top / "linked.jpg").symlink_to(store)
    (top / "up").symlink_to(top)
    expected = ["B.PNG", "a.jpg", "like.jpg/e.jpg", "linked/f.jpg", "linked.jpg/f.jpg"]
    source = SOURCES["folder"](top)
    assert names_of(top) == expected
    assert source.names == sorted(expected)
    left = FolderImages(top).left
    assert source.left == left
    assert left["hidden"] == 3
    assert left["@eaDir"] == left["__macosx"] == left["link to a folder that contains it"] == 1
    assert (left[".txt"], left[".db"]) == (1, 1)
    assert left.total() == 7 + len(SERVICE_FOLDERS)


def test_a_folder_of_service_may_be_the_root(tmp_path: Path) -> None:
    """Without it a data set below a hidden folder, such as ~/.cache, has no images."""
    root = tmp_path / ".cache" / "@eaDir"
    fill(root, "a.jpg")
    assert names_of(root) == SOURCES["folder"](root).names == ["a.jpg"]


def test_classes_are_no_folders_of_service(tmp_path: Path) -> None:
    """Without it a storage server's @eaDir becomes a class of ImageNet and shifts the labels."""
    fill(tmp_path, "train/@eaDir/a.JPEG", "train/n01/a.JPEG", "train/n01/@eaDir/a.JPEG")
    fill(tmp_path, "train/n01/more/b.JPEG", "train/c.JPEG")
    source = SOURCES["imagenet"](tmp_path)
    assert (source.names, source.classes) == (["train/n01/a.JPEG"], ["n01"])
    left = {"@eaDir": 2, "folders, not searched": 1, "images in no class": 1}
    assert +source.left == left


def test_what_was_found_is_said_on_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without it nobody notices that half of a set was left aside. Only one process says it."""
    fill(tmp_path, "a.jpg", "b.jpg", ".c.jpg", "d.txt", "e.txt", "in\n/x.jpg")
    open_images(tmp_path)
    said = capsys.readouterr().err
    assert said == f"found 3 images in {tmp_path}; left aside: 2 .txt, 1 hidden\n"
    monkeypatch.setenv("RANK", "1")
    open_images(tmp_path)
    assert not capsys.readouterr().err


def test_a_folder_that_cannot_be_read_ends_an_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without it fewer images are scored than there are."""
    fill(tmp_path, "a.jpg", "b/c.jpg")
    scan = os.scandir

    def refuse(folder: Path) -> Any:
        if folder.name == "b":
            raise PermissionError(13, "Permission denied")
        return scan(folder)

    monkeypatch.setattr("pipeline.folders.os.scandir", refuse)
    with pytest.raises(UserError, match=r"/b: Permission denied"):
        find_images(tmp_path)
    assert list(SOURCES["folder"](tmp_path).faults.values()) == ["Permission denied"]


@pytest.mark.parametrize(
    ("name", "url"),
    [
        ("https:/host/a", "https://host/a"), ("s3://b/c", "s3://b/c"), ("gs:/b", "gs://b"),
        ("file:///a/b", "file:///a/b"),        ("C:/photos", ""), ("a/b:c", ""), ("/a", ""),
    ],
)  # fmt: skip
def test_urls_are_named_as_such(tmp_path: Path, name: str, url: str) -> None:
    """Without it the message shows https:/host, as if slotstream had mistyped it."""
    assert as_url(str(Path(name))) == url
    if url:
        for kind in ("folder", "coco", "imagenet", "openimages"):
            with pytest.raises(UserError, match=f"{url}: a URL"):
                SOURCES[kind](Path(name))
        with pytest.raises(UserError, match=f"{url}: a URL"):
            open_images(Path(name))
        with pytest.raises(UserError, match=f"{url}: a URL"):
            Beton(Path(name))
        with pytest.raises(UserError, match=f"{url}: a URL"):
            open_instances(Path(name), "instances_{split}.json", "{split}", "val2017")
        with pytest.raises(UserError, match=f"{url}: a URL"):
            open_labelled("voc", root=Path(name))
