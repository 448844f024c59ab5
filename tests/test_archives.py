"""Images in tar and zip files, read in place; and lists of files."""

import io
import os
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import UserError
from pipeline.manifest import Manifest
from tests.test_build_dataset import fill, run
from tests.test_packing import same
from tools.archives import members
from tools.images import BadImage
from tools.packing import read_image
from tools.sources import SOURCES, Source, listed


def tar(path: Path, files: Mapping[str, bytes], layout: int = tarfile.GNU_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=layout) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def contents(root: Path, below: str = "") -> dict[str, bytes]:
    """Name to bytes of all files in ROOT/below."""
    files = sorted(path for path in (root / below).rglob("*") if path.is_file())
    return {str(path.relative_to(root / below)): path.read_bytes() for path in files}


def zipped(path: Path, files: Mapping[str, bytes], method: int) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


name_part = st.text("aé/. \\x", min_size=1, max_size=120).map(lambda text: f"d/{text}x")


@settings(max_examples=40)
@given(
    files=st.dictionaries(name_part, st.binary(max_size=1500), max_size=5),
    layout=st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
def test_tar_files_are_read_as_tarfile_reads_them(
    tmp_path_factory: pytest.TempPathFactory, files: dict[str, bytes], layout: int
) -> None:
    """Three layouts, long names and padding: a wrong offset gives half of another image."""
    path = tar(tmp_path_factory.mktemp("tar") / "a.tar", files, layout)
    data = path.read_bytes()
    found = [data[member.offset : member.offset + member.size] for member in members(path)]
    assert found == list(files.values())
    names = [member.name for member in members(path)]
    assert names == [os.path.normpath(name.replace("\\", "/")) for name in files]


@pytest.mark.parametrize("layout", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_and_links(tmp_path: Path, layout: int) -> None:
    """ustar splits long names, the others put them before the file."""
    long = "/".join(["folder" * 5] * 6) + "/a.jpg"
    path = tar(tmp_path / "a.tar", {"./b.jpg": b"b", long: b"long", "c.jpg": b"c" * 513}, layout)
    with tarfile.open(path, "a", format=layout) as archive:
        link = tarfile.TarInfo("d.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "b.jpg"
        archive.addfile(link)
        archive.addfile(tarfile.TarInfo("../../etc/e.jpg"))
    found = list(members(path))
    assert [member.name for member in found] == ["b.jpg", long, "c.jpg", "d.jpg", "../../etc/e.jpg"]
    data = path.read_bytes()
    assert [data[m.offset :][: m.size] for m in found[:3]] == [b"b", b"long", b"c" * 513]
    assert [member.fault for member in found[3:]] == [
        "a link, in an archive",
        "its path leads out of the archive",
    ]


def test_damaged_archives(tmp_path: Path) -> None:
    """A download that broke off must not pack as a smaller data set."""
    path = tar(tmp_path / "a.tar", {"a.jpg": b"a" * 5000, "b.jpg": b"b" * 5000})
    whole = path.read_bytes()
    path.write_bytes(whole[:8000])
    assert [member.fault for member in members(path)] == ["", "the archive ends before it does"]
    path.write_bytes(b"x" * 2048)
    with pytest.raises(UserError, match="no header at byte 0"):
        list(members(path))
    (tmp_path / "a.zip").write_bytes(b"PK\3\4 and nothing")
    with pytest.raises(UserError, match="damaged zip file"):
        list(members(tmp_path / "a.zip"))
    for cut in range(0, len(whole), 700):
        path.write_bytes(whole[:cut])
        assert len(list(members(path))) <= 2


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_coco_zips_give_the_beton_of_the_folders(tmp_path: Path, method: int) -> None:
    """Unpacked or not is no difference that should show anywhere."""
    root = tmp_path / "in"
    fill(root, "train2017/b.jpg", "train2017/a.jpg", "unlabeled2017/c.jpg")
    other = tmp_path / "zips"
    other.mkdir()
    for name in ("train2017", "unlabeled2017"):
        files = {f"{name}/{file}": data for file, data in contents(root, name).items()}
        zipped(other / f"{name}.zip", {f"{name}/._x.jpg": b"", **files}, method)
    run("cocoplus", root, tmp_path / "a.beton")
    run("cocoplus", other, tmp_path / "b.beton")
    assert same(tmp_path, "a.beton", "b.beton")


def test_imagenet_as_it_is_downloaded(tmp_path: Path) -> None:
    """138 GB of tars need not be unpacked to 1.3 million files: per class, or all in one."""
    root = tmp_path / "in"
    fill(root, *(f"train/n0{i % 3}/n0{i % 3}_{i}.JPEG" for i in range(10)))
    run("imagenet", root, tmp_path / "a.beton")
    classes = {f"n0{i}": contents(root, f"train/n0{i}") for i in (2, 0, 1)}
    for name, files in classes.items():
        tar(tmp_path / f"classes/train/{name}.tar", dict(reversed(files.items())))
    run("imagenet", tmp_path / "classes", tmp_path / "b.beton")
    inner = contents(tmp_path / "classes/train")
    tar(tmp_path / "one/ILSVRC2012_img_train.tar", dict(reversed(inner.items())))
    run("imagenet", tmp_path / "one", tmp_path / "c.beton")
    assert same(tmp_path, "a.beton", "b.beton")
    assert same(tmp_path, "a.beton", "c.beton")


def test_a_folder_with_archives(tmp_path: Path) -> None:
    """Archives stand where a folder of their name would."""
    root = fill(tmp_path / "in", "b/1.jpg", "z.jpg")
    files = contents(root)
    tar(root / "c.tar", {"y/2.jpg": files["z.jpg"], "1.jpg": files["b/1.jpg"], "readme": b""})
    zipped(root / "a.zip", {"1.jpg": files["b/1.jpg"]}, zipfile.ZIP_DEFLATED)
    names = ["a.zip/1.jpg", "b/1.jpg", "c.tar/1.jpg", "c.tar/y/2.jpg", "z.jpg"]
    source = SOURCES["folder"](root)
    assert source.names == names
    expected = [files[name] for name in ("b/1.jpg", "b/1.jpg", "b/1.jpg", "z.jpg", "z.jpg")]
    assert [read_image(source, i) for i in range(5)] == expected
    (tmp_path / "gz").mkdir()
    (tmp_path / "gz" / "a.tar.gz").write_bytes(b"")
    with pytest.raises(UserError, match="compressed; gunzip it"):
        SOURCES["folder"](tmp_path / "gz")


def test_bad_members(tmp_path: Path) -> None:
    """What is wrong in an archive is a bad image among good ones, with its reason."""
    (tmp_path / "in").mkdir()
    path = zipped(tmp_path / "in" / "a.zip", {"a.jpg": b"x" * 99}, zipfile.ZIP_DEFLATED)
    data = bytearray(path.read_bytes())
    data[35] ^= 0xFF  # the kind of the first block
    path.write_bytes(data)
    with pytest.raises(BadImage, match="in the zip file"):
        read_image(SOURCES["folder"](tmp_path / "in"), 0)
    path = zipped(tmp_path / "in" / "a.zip", {"a.jpg": b"x" * 99}, zipfile.ZIP_STORED)
    data = bytearray(path.read_bytes())
    data[90] ^= 1
    path.write_bytes(data)
    with pytest.raises(BadImage, match="damaged in the zip file: its checksum differs"):
        read_image(SOURCES["folder"](tmp_path / "in"), 0)
    tar(tmp_path / "in" / "b.tar", {"a.jpg": b"1", "./a.jpg": b"2"})
    assert SOURCES["folder"](tmp_path / "in").faults == {2: "duplicate path"}


# --- other sources -------------------------------------------------------------------------------


def test_bdd100k_and_openimages(tmp_path: Path) -> None:
    """Their layouts, as published."""
    fill(tmp_path, "images/100k/train/b.jpg", "images/100k/train/a.jpg", "images/100k/val/c.jpg")
    fill(tmp_path, "train_1/b.jpg", "train_0/c.jpg", "validation/d.jpg")
    names = ["images/100k/train/a.jpg", "images/100k/train/b.jpg"]
    assert SOURCES["bdd100k"](tmp_path).names == names
    files = {f"bdd100k/{name}": b"1" for name in (*names[::-1], "images/100k/val/c.jpg")}
    for name, shorten in (("bdd100k_images_100k", 0), ("100k_images_train", len("bdd100k/"))):
        root = tmp_path / name
        inside = {path[shorten:]: data for path, data in files.items()}
        root.mkdir()
        zipped(root / f"{name}.zip", inside, zipfile.ZIP_STORED)
        assert SOURCES["bdd100k"](root).names == names
    assert SOURCES["openimages"](tmp_path).names == ["train_0/c.jpg", "train_1/b.jpg"]


def test_known_sets_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A download that is 12 images short trains without a word."""
    fill(tmp_path, "train2017/a.jpg")
    run("coco", tmp_path, tmp_path / "o.beton")
    assert "warning: coco has 118,287 images; here are 1" in capsys.readouterr().err


def lists(path: Path, text: str) -> Source:
    path.write_text(text)
    return listed(path)


def test_lists(tmp_path: Path) -> None:
    """The order is the list's own; labels are numbers or names."""
    fill(tmp_path, "a b.jpg", "c/d.jpg")
    text = lists(tmp_path / "l.txt", "c/d.jpg\r\n\na b.jpg\n./c//d.jpg\n")
    assert text.names == ["c/d.jpg", "a b.jpg", "c/d.jpg"]
    assert text.labels is None
    assert text.faults == {2: "duplicate path"}
    table = lists(tmp_path / "l.csv", 'path,label\n"a b.jpg",zebra\nc/d.jpg, cat\n')
    assert table.labels is not None
    assert (table.names, table.labels.tolist()) == (["a b.jpg", "c/d.jpg"], [1, 0])
    assert table.classes == ["cat", "zebra"]
    numbers = lists(tmp_path / "l.tsv", "a b.jpg\t7\nc/d.jpg\t3\n")
    assert numbers.labels is not None
    assert (numbers.labels.tolist(), numbers.classes) == ([7, 3], None)
    absolute = lists(tmp_path / "m.txt", f"{tmp_path}/c/d.jpg\n")
    assert read_image(absolute, 0) == (tmp_path / "c/d.jpg").read_bytes()


def test_a_list_is_packed(tmp_path: Path) -> None:
    """--root is where its paths begin; the beton holds its labels."""
    fill(tmp_path / "in", "a.jpg", "b.jpg")
    path = tmp_path / "l.csv"
    path.write_text("b.jpg,x\na.jpg,y\n")
    run("list", tmp_path / "in", tmp_path / "o.beton", "--list", str(path))
    manifest = Manifest.beside(tmp_path / "o.beton")
    assert (manifest.names, manifest.classes) == (["b.jpg", "a.jpg"], ["x", "y"])


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("l.txt", "\n\n", "names no files"),
        ("l.csv", "a.jpg,1\nb.jpg\n", "1 of 2 rows have no label"),
        ("l.csv", "a.jpg,1\nb.jpg,1,2\n", "line 2: expected path or path,label"),
        ("l.csv", ",1\n", "line 1: expected path"),
        ("none.txt", None, "No such file"),
    ],
)
def test_bad_lists(tmp_path: Path, name: str, text: str | None, message: str) -> None:
    """A column too many would shift labels silently."""
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError) as error:
        listed(tmp_path / name)
    assert message in str(error.value)


@given(text=st.text(max_size=80), suffix=st.sampled_from(["txt", "csv", "tsv"]))
def test_any_list_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, text: str, suffix: str
) -> None:
    """Lists come out of spreadsheets and scripts: no content may end in a traceback."""
    path = tmp_path_factory.getbasetemp() / f"any.{suffix}"
    path.write_text(text, encoding="utf-8", newline="")
    try:
        source = listed(path)
    except UserError:
        return
    assert source.names
    assert source.labels is None or len(source.labels) == len(source.names)
