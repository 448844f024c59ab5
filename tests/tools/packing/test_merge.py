"""Merging shards."""

import errno
import os
from pathlib import Path

import pytest

from pipeline.beton import Beton
from pipeline.errors import UserError
from pipeline.ffcv_format import DESCRIPTOR, HEADER, metadata_type
from pipeline.manifest import manifest_path
from tests.helpers.manifests import damage
from tests.tools.packing.test_build_dataset import fill, run, save
from tests.tools.packing.test_run import images, same
from tools import build_dataset
from tools.packing.job import shard_path
from tools.packing.merge import merge_job
from tools.packing.run import pack


@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_merged_shards_equal_one_run(tmp_path: Path, on_error: str) -> None:
    """Packing on n machines or on one gives the same bytes, indices, labels and manifest."""
    root = tmp_path / "in"
    fill(root, *(f"train/n{i % 4}/{i:02d}.JPEG" for i in range(29)))
    save(root / "train/n1/p.JPEG", format="PNG")
    if on_error == "skip":
        for name in ("n0/00", "n2/10", "n3/99"):
            (root / f"train/{name}.JPEG").write_bytes(b"")
    options = ["--on-error", on_error]
    run("imagenet", root, tmp_path / "a.beton", *options)
    for i in (3, 1, 4, 2):
        run("imagenet", root, tmp_path / "b.beton", "--shard", f"{i}/4", *options)
    shards = [str(shard_path(tmp_path / "b.beton", i, 4)) for i in (2, 1, 3, 4)]
    assert all("shard-" in Path(path).name for path in shards)
    with pytest.raises(UserError, match="missing shards of 4: 2"):
        build_dataset.main(["merge", *shards[1:], "--out", f"{tmp_path}/b.beton"])
    with pytest.raises(UserError, match="given twice"):
        build_dataset.main(["merge", *shards, shards[0], "--out", f"{tmp_path}/b.beton"])
    build_dataset.main(["merge", *shards, "--out", f"{tmp_path}/b.beton"])
    assert Beton(tmp_path / "b.beton").index.tolist() == list(
        range(30 if on_error == "stop" else 28)
    )
    assert same(tmp_path, "a.beton", "b.beton")


def test_shards_that_do_not_belong_together(tmp_path: Path) -> None:
    """Shards of two data sets must not be merged."""
    root = fill(tmp_path / "in", "a.jpg", "b.jpg", "c.jpg")
    run("folder", root, tmp_path / "o.beton", "--shard", "1/2")
    run("folder", root, tmp_path / "o.beton", "--shard", "2/2", "--store", "raw")
    paths = [shard_path(tmp_path / "o.beton", i, 2) for i in (1, 2)]
    with pytest.raises(UserError, match="another data set or options"):
        merge_job(paths)
    run("folder", root, tmp_path / "whole.beton")
    with pytest.raises(UserError, match="without --shard"):
        merge_job([tmp_path / "whole.beton"])
    with pytest.raises(UserError, match="--shard 1/4: empty"):
        run("folder", root, tmp_path / "x.beton", "--shard", "1/4")


def test_shards_packed_with_and_without_skipping(tmp_path: Path) -> None:
    """A usual case: one shard of an array job has a bad image and is packed again."""
    root = images(tmp_path / "in", 9)
    (root / "0000.jpg").write_bytes(b"")
    for shard, on_error in (("1/3", "skip"), ("2/3", "stop"), ("3/3", "stop")):
        run("folder", root, tmp_path / "o.beton", "--shard", shard, "--on-error", on_error)
    shards = [str(shard_path(tmp_path / "o.beton", i, 3)) for i in (3, 1, 2)]
    build_dataset.main(["merge", *shards, "--out", f"{tmp_path}/o.beton"])
    run("folder", root, tmp_path / "once.beton", "--on-error", "skip")
    assert same(tmp_path, "o.beton", "once.beton")


def test_a_shard_that_has_changed(tmp_path: Path) -> None:
    """A bit that flips while a shard is copied must not get into the merged beton."""
    root = fill(tmp_path / "in", "a.jpg", "b.jpg")
    paths = [shard_path(tmp_path / "o.beton", i, 2) for i in (1, 2)]
    for i in (1, 2):
        run("folder", root, tmp_path / "o.beton", "--shard", f"{i}/2")
    pointer = int(Beton(paths[1]).records[0, 0])
    with paths[1].open("r+b") as file:
        file.seek(pointer + 50)
        file.write(b"\x77")
    with pytest.raises(UserError, match=r"b\.jpg: its bytes in .*2-of-2\.beton have changed"):
        pack(merge_job(paths), tmp_path / "o.beton")


def two_shards(folder: Path) -> list[Path]:
    """Two shards with labels."""
    fill(folder / "in", *(f"train/n{i % 2}/{i}.JPEG" for i in range(6)))
    for i in (1, 2):
        run("imagenet", folder / "in", folder / "o.beton", "--shard", f"{i}/2")
    return [shard_path(folder / "o.beton", i, 2) for i in (1, 2)]


def test_a_label_that_has_changed(tmp_path: Path) -> None:
    """A record's checksum does not cover its label: a changed one must not get into the result."""
    paths = two_shards(tmp_path)
    content = paths[1].read_bytes()
    fields = metadata_type(["image", "index", "label"]).fields
    assert fields
    label = HEADER.itemsize + 3 * DESCRIPTOR.itemsize + fields["f2"][1]
    damage(paths[1], label, bytes([content[label] ^ 1]))
    with pytest.raises(UserError, match=r"2-of-2\.beton: its manifest belongs to another file"):
        merge_job(paths)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b'"on_error": "stop", ', b"", "does not match its digest"),
        (b'"number": 1, ', b"", "missing required field `number`"),
        (b'"number": 1', b'"number": "1"', "Expected `int`, got `str`"),
        (b'"number": 1', b'"number": 2', "missing shards of 2: 1"),
        (b'"of": 2', b'"of": 2000000000', "another data set or options"),
        (b'"count": 3', b'"count": 4', "its manifest belongs to another file"),
        (b'"shard": {', b'"shard": [{', "damaged: "),
    ],
)
def test_altered_manifests(tmp_path: Path, old: bytes, new: bytes, message: str) -> None:
    """Without it a missing key, a wrong type or a huge number ends in a traceback."""
    paths = two_shards(tmp_path)
    path = manifest_path(paths[0])
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new))
    with pytest.raises(UserError, match=message) as error:
        merge_job(paths)
    assert str(error.value).isprintable()


def test_many_missing_shards(tmp_path: Path) -> None:
    """Without it a number of shards that is out of all proportion fills memory and terminal."""
    paths = two_shards(tmp_path)
    for path in map(manifest_path, paths):
        path.write_bytes(path.read_bytes().replace(b'"of": 2', b'"of": 2000000000'))
    with pytest.raises(UserError, match=r"missing shards of 2000000000: 3, 4, .*, 22, …$"):
        merge_job(paths)


def test_a_shard_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it an error of the shard's disk is reported as one of the output's."""
    paths = two_shards(tmp_path)
    job = merge_job(paths)

    def fail(*_: object) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "pread", fail)
        assert job.load(3, 4) == [f"cannot be read from {paths[1]}: Input/output error"]
