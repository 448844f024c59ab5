"""WebDataset's tar files; the truth is the package webdataset."""

import tarfile
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import UserError
from pipeline.manifest import Manifest
from tests.pipeline.test_beton_writer import stored
from tests.tools.packing.test_archives import tar
from tests.tools.packing.test_build_dataset import run
from tests.tools.packing.test_parquet import jpeg
from tests.tools.packing.test_run import same
from tools.packing.read import read_image
from tools.packing.webdataset import webdataset


def shards(root: Path, count: int = 3) -> None:
    """Shards whose samples are in no order, as a tar file has them, with captions."""
    for shard in range(count):
        files = {}
        for i in (5, 11, 2, 7):
            key = f"d{shard % 2}/{i:04d}"
            files |= {
                f"{key}.cls": b"%d\n" % (i + shard), f"{key}.json": b'{"label": 99}',
                f"{key}.JPG": jpeg(9 * i + shard), f"{key}.mask.png": jpeg(i, "PNG"),
            }  # fmt: skip
        tar(root / f"shard-{shard:06d}.tar", files, tarfile.PAX_FORMAT)


def test_the_package_webdataset_reads_the_same(tmp_path: Path) -> None:
    """Without it images get the labels of others, or an order that no other reader has."""
    package = pytest.importorskip("webdataset")
    shards(tmp_path / "in")
    pattern = str(tmp_path / "in" / "shard-{000000..000002}.tar")
    theirs: list[dict[str, Any]] = list(package.WebDataset(pattern, shardshuffle=False))
    run("webdataset", Path(pattern), tmp_path / "a.beton")
    records = list(Manifest.beside(tmp_path / "a.beton").records())
    assert stored(tmp_path / "a.beton") == [sample["jpg"] for sample in theirs]
    assert [record.label for record in records] == [int(sample["cls"]) for sample in theirs]
    assert [record.name.split("/", 1)[1] for record in records] == [
        f"{sample['__key__']}.JPG" for sample in theirs
    ]
    run("webdataset", tmp_path / "in", tmp_path / "b.beton")
    assert same(tmp_path, "a.beton", "b.beton")


def test_the_output_of_img2dataset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It writes a table and counts beside each shard: these are no images and no shards."""
    for shard in range(2):
        key = f"{shard:05d}0000"
        files = {f"{key}.jpg": jpeg(shard), f"{key}.json": b"{}", f"{key}.txt": b"a dog"}
        tar(tmp_path / f"in/{shard:05d}.tar", files)
        for name in (f"{shard:05d}.parquet", f"{shard:05d}_stats.json"):
            (tmp_path / "in" / name).write_bytes(b"PAR1")
    run("webdataset", tmp_path / "in", tmp_path / "a.beton")
    assert stored(tmp_path / "a.beton") == [jpeg(0), jpeg(1)]
    said = capsys.readouterr().err
    assert "found 2 images" in said
    for reason in ("4 .json", "2 .parquet", "2 .txt"):
        assert reason in said


def test_labels_in_json(tmp_path: Path) -> None:
    """Without it the labels of sets that keep them in KEY.json cannot be had."""
    files = {"a.jpg": b"", "a.json": b'{"y": {"class": 7}}', "b.jpg": b"", "b.json": b'{"y": 1}'}
    tar(tmp_path / "0.tar", files | {"c.jpg": b"", "c.json": b'{"y": {"class": [1]}}'})
    source = webdataset(tmp_path, label="json:y.class")
    assert source.labels is not None and source.labels.tolist() == [7, -1, -1]
    assert source.faults == {
        1: "its label in b.json: no y.class",
        2: "its label in c.json: y.class is no name and no whole number",
    }
    tar(tmp_path / "1.tar", {"d.jpg": b"", "d.json": b"{", "e.jpg": b"", "e.json": b'{"y": "Q"}'})
    named = webdataset(tmp_path / "1.tar", label="json:y")
    assert named.faults == {0: "its label in d.json: no JSON"} and named.classes == ["Q"]


@pytest.mark.parametrize("root", ["", "s.tar.gz", "s.{tar,x}.tgz"])
def test_compressed_shards_are_told_apart(root: str, tmp_path: Path) -> None:
    """Without it .tar.gz shards are left aside, or called damaged, and nobody says what to do."""
    (tmp_path / "s.tar.gz").write_bytes(b"")
    tar(tmp_path / "s.tar", {"a.jpg": b""})
    with pytest.raises(UserError, match="compressed: gunzip or unpack it"):
        webdataset(tmp_path / root)


def test_labels_that_are_names(tmp_path: Path) -> None:
    """As in a list: the rank of the name. An ending of another name is chosen."""
    tar(tmp_path / "0.tar", {"a.jpg": b"", "a.kind": b"dog", "b.jpg": b"", "b.kind": b"cat"})
    source = webdataset(tmp_path, label="kind")
    assert source.labels is not None
    assert (source.labels.tolist(), source.classes) == ([1, 0], ["cat", "dog"])
    assert webdataset(tmp_path).labels is None
    with pytest.raises(UserError, match=r"no sample has a file KEY\.none"):
        webdataset(tmp_path, label="none")


def test_bad_samples(tmp_path: Path) -> None:
    """Each is one bad image that is named, and none takes its neighbour's label."""
    files = {
        "a.jpg": jpeg(0), "a.cls": b"1", "b.jpg": b"", "c.cls": b"2", "d.jpg": b"", "d.cls": b"",
        "e.jpg": b"", "e.cls": b"\xff", "f.jpg": jpeg(5), "f.cls": b"5", "noending": b"",
    }  # fmt: skip
    whole = tar(tmp_path / "0.tar", files).read_bytes()
    tar(tmp_path / "1.tar", {"a.jpg": jpeg(7), "a.cls": b"7"})
    (tmp_path / "2.tar").write_bytes(whole[:700])
    source = webdataset(tmp_path)
    assert source.labels is not None
    assert source.labels.tolist() == [1, -1, -1, -1, 5, 7, -1, -1]
    assert sorted(source.faults) == [1, 2, 3, 6, 7]
    assert source.faults[1] == "no label: its sample has no .cls"
    assert source.faults[2] == "its label in d.cls: empty"
    assert source.faults[3] == "its label in e.cls: no text"
    assert source.faults[6] == "the archive ends before it does"
    assert "cut short" in source.faults[7]
    assert read_image(source, 5) == jpeg(7)
    assert source.left["samples without an image"] == source.left["of other names"] == 1


def test_samples_with_several_images(tmp_path: Path) -> None:
    """Without it a mask is trained on as a picture. One name twice is a duplicate, as in any tar:
    webdataset refuses it.
    """
    tar(tmp_path / "0.tar", {"a.jpg": b"1", "a.png": b"2", "b.jpg": b"3", "b.png": b"4"})
    with pytest.raises(UserError, match=r"a\.jpg: .* choose one with --image, jpg or png"):
        webdataset(tmp_path)
    assert webdataset(tmp_path, image="png").names == ["0.tar/a.png", "0.tar/b.png"]
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        for name in ("a.jpg", "a.jpg", "b.jpg"):
            archive.addfile(tarfile.TarInfo(name))
    assert webdataset(tmp_path).faults == {1: "duplicate path"}


def test_endings_are_named_as_people_write_them(tmp_path: Path) -> None:
    """Without it `--label .CLS` finds no label of KEY.cls, and shards of `a.input.jpg` hold nothing
    and nobody is told what they do hold.
    """
    tar(tmp_path / "0.tar", {"a.input.jpg": jpeg(1), "a.mask.png": b"", "a.CLS": b"3"})
    source = webdataset(tmp_path, image=".input.JPG", label=".CLS")
    assert source.names == ["0.tar/a.input.jpg"]
    assert source.labels is not None
    assert source.labels.tolist() == [3]
    with pytest.raises(UserError, match=r"no images; left aside: .*1 \.input\.jpg.*--image NAME"):
        webdataset(tmp_path)


def test_a_file_whose_name_ends_in_a_dot(tmp_path: Path) -> None:
    """Without it the image of its sample is lost, and it is read as one itself."""
    tar(tmp_path / "0.tar", {"a.": b"text", "a.jpg": jpeg(1), "b.": b"text"})
    source = webdataset(tmp_path)
    assert source.names == ["0.tar/a.jpg"]
    assert not source.faults


def test_missing_shards(tmp_path: Path) -> None:
    """Without it a set without its last shards is packed as whole."""
    shards(tmp_path, 2)
    source = webdataset(tmp_path / "shard-{000000..000003}.tar", image="jpg")
    bad = [source.names[i] for i in sorted(source.faults)]
    assert bad == ["shard-000002.tar", "shard-000003.tar"]
    assert set(source.faults.values()) == {"No such file or directory"}
    with pytest.raises(UserError, match=r"No such file or directory \(and 1 more like it"):
        webdataset(tmp_path / "shard-{000002..000003}.tar")
