"""Images in tar and zip files, read in place."""

import io
import os
import tarfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import BadImage, UserError
from tests.tools.packing.test_build_dataset import fill, run
from tests.tools.packing.test_run import same
from tools.packing.archives import members
from tools.packing.read import read_image
from tools.packing.sources import SOURCES

FUZZ = int(os.environ.get("FUZZ", "200"))  # mutations of an archive


def tar(path: Path, files: Mapping[str, bytes], layout: int = tarfile.GNU_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=layout) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def contents(root: Path, below: str = "") -> dict[str, bytes]:
    """Names and bytes of all files in ROOT/below."""
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
    """Two layouts, long names and padding: a wrong offset would give a part of another image."""
    path = tar(tmp_path_factory.mktemp("tar") / "a.tar", files, layout)
    data = path.read_bytes()
    read = [data[member.offset : member.offset + member.size] for member in members(path)]
    assert read == list(files.values())
    names = [member.name for member in members(path)]
    assert names == [os.path.normpath(name) for name in files]


@pytest.mark.parametrize("layout", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_and_links(tmp_path: Path, layout: int) -> None:
    """ustar splits long names; GNU and pax store them before the file."""
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


@pytest.mark.parametrize("layout", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_tar_cut_anywhere_says_so(tmp_path: Path, layout: int) -> None:
    """An interrupted download must not be packed as a smaller data set, whether it ends between two
    members, in a header, or after a file that is not an image.
    """
    names = ("a.jpg", "x/" + "y" * 90 + ".txt", "b.jpg")
    path = tar(tmp_path / "a.tar", dict.fromkeys(names, b"a" * 700), layout)
    whole = path.read_bytes()
    end = -(-len(whole.rstrip(b"\0")) // 512) * 512  # of the last file
    for cut in (0, 4, *range(100, end, 206), *range(512, end + 1, 512)):
        path.write_bytes(whole[:cut])
        *before, last = members(path)
        assert (last.name, last.fault[:9]) == ("", "cut short")
        assert {member.name for member in before} <= set(names)
    path.write_bytes(whole[: end + 512])  # one zero block: only padding is gone
    assert [member.fault for member in members(path)] == ["", "", ""]
    hole = bytearray(whole)
    hole[1536:2048] = bytes(512)  # an unfinished download that has its full size
    path.write_bytes(hole)
    assert "after its end marker" in list(members(path))[-1].fault


def header(changes: Mapping[int, bytes]) -> bytes:
    """A ustar header with some bytes replaced, and its checksum corrected."""
    block = bytearray(tarfile.TarInfo("b.jpg").tobuf(tarfile.USTAR_FORMAT)[:512])
    for start, content in changes.items():
        block[start : start + len(content)] = content
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({124: b"\x80" + b"\xff" * 11}, "cut short"),  # a size above 2^63
        ({124: b"\xff" * 12}, "damaged header at byte 1024"),
        ({124: b"-1         \0"}, "damaged header at byte 1024"),
        ({124: b"99999999999\0"}, "damaged header at byte 1024"),
        ({124: b"00000001000\0", 156: b"x"}, "damaged: an extended header"),
        ({156: b"M"}, "of an unknown kind"),
        ({156: b"S"}, "sparse: unpack"),
    ],
)
def test_wrong_tar_headers(tmp_path: Path, changes: dict[int, bytes], fault: str) -> None:
    """A wrong header with a correct checksum is a fault; the files before it are used."""
    path = tar(tmp_path / "a.tar", {"a.jpg": b"1"})
    path.write_bytes(path.read_bytes()[:1024] + header(changes) + b"9" * 512 + bytes(1024))
    first, *others = members(path)
    assert (first.name, first.fault) == ("a.jpg", "")
    assert any(member.fault.startswith(fault) for member in others)


def test_one_bad_archive_is_one_bad_image(tmp_path: Path) -> None:
    """One damaged archive among a hundred must neither end the run nor stay unnoticed."""
    good = zipped(tmp_path / "a.zip", {"a.jpg": b"1"}, zipfile.ZIP_STORED).read_bytes()
    whole = tar(tmp_path / "b.tar", {"a.jpg": b"1", "b.jpg": b"2"}).read_bytes()
    (tmp_path / "b.tar").write_bytes(whole[:1024] + b"x" * 512)
    (tmp_path / "c.zip").write_bytes(good[:-30])
    (tmp_path / "d.zip").touch()
    (tmp_path / "e.tar").touch()
    (tmp_path / "f.tar").write_bytes(b"\x1f\x8b" + b"x" * 600)
    (tmp_path / "g.tar.gz").touch()
    os.mkfifo(tmp_path / "h.tar")
    zipped(tmp_path / "i.zip", {"c.tar": whole}, zipfile.ZIP_STORED)
    inner = {"a.zip": good, "b.tar.gz": b"", "c.tar": whole[:1100], "d.tar": b"", ".git/e.zip": b""}
    tar(tmp_path / "j.tar", inner)
    source = SOURCES["folder"](tmp_path)
    reasons = {source.names[position]: reason for position, reason in source.faults.items()}
    assert {name: reason.split(":")[0] for name, reason in reasons.items()} == {
        "b.tar": "damaged, or no tar file",
        "c.zip": "damaged zip file",
        "d.zip": "damaged zip file",
        "e.tar": "cut short",
        "f.tar": "damaged, or no tar file",
        "g.tar.gz": "compressed",
        "h.tar": "not a regular file",
        "i.zip/c.tar": "an archive in a zip file, which is not read",
        "j.tar/a.zip": "in a tar file, where only .tar is read",
        "j.tar/b.tar.gz": "in a tar file, where only .tar is read",
        "j.tar/c.tar": "cut short",
        "j.tar/d.tar": "cut short",
    }
    good_ones = [name for i, name in enumerate(source.names) if i not in source.faults]
    assert good_ones == ["a.zip/a.jpg", "b.tar/a.jpg", "j.tar/c.tar/a.jpg"]
    (tmp_path / "k").mkdir()
    (tmp_path / "k" / "train2017.zip").write_bytes(good[:-30])
    with pytest.raises(UserError, match=r"k/train2017.zip: damaged zip file: File is not"):
        SOURCES["coco"](tmp_path / "k")


def test_imagenet_with_bad_archives(tmp_path: Path) -> None:
    """A missing class would shift the labels of all later classes."""
    whole = tar(tmp_path / "n.tar", {"x.JPEG": b"1", "y.JPEG": b"2"}).read_bytes()
    classes = {"n0.tar": whole, "n1.tar": whole[:512], "n2.tar": b"junk" * 200, "n3.tar": whole}
    path = tar(tmp_path / "ILSVRC2012_img_train.tar", classes)
    last = path.read_bytes().rindex(b"y.JPEG")
    path.write_bytes(path.read_bytes()[:last])
    source = SOURCES["imagenet"](tmp_path)
    assert source.classes == ["n0", "n1", "n2", "n3"]
    assert source.labels is not None
    rows = list(zip(source.names, source.labels, strict=True))
    assert [row for i, row in enumerate(rows) if i not in source.faults] == [
        ("train/n0/x.JPEG", 0),
        ("train/n0/y.JPEG", 0),
        ("train/n3/x.JPEG", 3),
    ]
    top = "ILSVRC2012_img_train.tar"
    assert {rows[i] for i in source.faults} == {
        (top, -1),
        ("train/n1/x.JPEG", 1),
        (f"{top}/n1.tar", 1),
        (f"{top}/n2.tar", 2),
        (f"{top}/n3.tar", 3),
    }
    fill(tmp_path, "train/n1/a.JPEG")
    tar(tmp_path / "train" / "n0.tar", {"x.JPEG": b""})
    tar(tmp_path / "train" / "n1.tar", {"x.JPEG": b""})
    (tmp_path / "train" / "n2.tar.gz").touch()
    source = SOURCES["imagenet"](tmp_path)
    assert source.names[2:] == ["train/n1.tar", "train/n2.tar.gz"]
    assert [reason.split(":")[0] for reason in source.faults.values()] == [
        "class n1 is there twice",
        "compressed",
    ]
    assert source.labels is not None
    assert source.labels.tolist() == [0, 1, 1, 2]


def test_archives_have_the_names_of_their_unpacked_folders(tmp_path: Path) -> None:
    """The same names as unpacked: hidden folders, backslashes in Unix names, suffixes, depth."""
    names = ("a.jpg", ".git/b.jpg", "c/.d.jpg", "c/e\\f.jpg", "c/g.heic", "c/readme", "h.JFIF")
    for name in names:
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).touch()
    files = dict.fromkeys(names, b"")
    (tmp_path / "packed").mkdir()
    tar(tmp_path / "packed" / "t.tar", files)
    zipped(tmp_path / "packed" / "z.zip", files, zipfile.ZIP_STORED)
    source, packed = SOURCES["folder"](tmp_path / "in"), SOURCES["folder"](tmp_path / "packed")
    assert source.names == ["a.jpg", "c/e\\f.jpg", "h.JFIF"]
    assert packed.names == [f"{top}/{name}" for top in ("t.tar", "z.zip") for name in source.names]
    assert source.ignored == {".heic": 1, "of other names": 1}
    assert packed.ignored == {".heic": 2, "of other names": 2}
    windows = zipfile.ZipInfo("c\\x.jpg")
    windows.create_system = 0
    with zipfile.ZipFile(tmp_path / "w.zip", "w") as archive:
        archive.writestr(windows, b"")
    assert [member.name for member in members(tmp_path / "w.zip")] == ["c/x.jpg"]


def test_roots_that_are_no_folders(tmp_path: Path) -> None:
    """One line each. A folder 600 levels deep must not exceed Python's recursion limit."""
    (tmp_path / "f").touch()
    for kind in ("folder", "openimages", "coco", "imagenet", "bdd100k"):
        with pytest.raises(UserError, match="not a folder"):
            SOURCES[kind](tmp_path / "f")
        with pytest.raises(UserError, match="File name too long"):
            SOURCES[kind](tmp_path / ("x" * 300))
    deep = tmp_path / "in"
    fill(deep, "a.jpg", "a/" * 600 + "b.jpg")
    assert SOURCES["folder"](deep).names == ["a.jpg", "a/" * 600 + "b.jpg"]


def mutations(whole: bytes, count: int) -> Iterator[bytes]:
    """`whole` with one to four changed bytes; one fifth of the results is also cut short."""
    random = np.random.default_rng(1)
    for _ in range(count):
        data = bytearray(whole)
        for position in random.integers(len(data), size=random.integers(1, 5)):
            data[position] = random.integers(256)
        yield bytes(data[: random.integers(len(data))] if random.random() < 0.2 else data)


@pytest.mark.parametrize("suffix", ["zip", "tar"])
def test_any_damage_is_a_fault(tmp_path: Path, suffix: str) -> None:
    """zipfile raises many types of error on damaged files. None may end in a traceback."""
    path = tmp_path / f"b.{suffix}"
    files = {"é" * 60 + ".jpg": b"1" * 40, "b/c.jpg": b"2" * 40, "d.jpg": b"3" * 600}
    if suffix == "zip":
        zipped(path, files, zipfile.ZIP_DEFLATED)
    else:
        inner = tar(path, {"i.jpg": b"i"}).read_bytes()[:2048]
        tar(path, files | {"e.tar": inner}, tarfile.PAX_FORMAT)
    (tmp_path / "a.jpg").touch()
    for data in mutations(path.read_bytes().rstrip(b"\0") + bytes(1024), FUZZ):
        path.write_bytes(data)
        source = SOURCES["folder"](tmp_path)
        assert source.names[0] == "a.jpg"
        assert all(0 <= i < len(source) for i in source.faults)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_coco_zips_give_the_beton_of_the_folders(tmp_path: Path, method: int) -> None:
    """The result must not depend on whether the files were unpacked."""
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
    """138 GB of tars are read without unpacking: a tar per class, or all in one tar."""
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
    """The images of an archive stand where a folder of its name would."""
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
    for name in ("a.tar.gz", "b.tgz"):
        (tmp_path / "gz" / name).touch()
    with pytest.raises(UserError, match=r"a.tar.gz: compressed: gunzip .* \(and 1 more like it"):
        SOURCES["folder"](tmp_path / "gz")


def test_bad_members(tmp_path: Path) -> None:
    """A fault in an archive is a bad image with a reason; the other images are good."""
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
    """The published layouts."""
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
    """Training on a download that lacks 12 images would show no error."""
    fill(tmp_path, "train2017/a.jpg")
    run("coco", tmp_path, tmp_path / "o.beton")
    assert "warning: coco has 118,287 images, but found 1" in capsys.readouterr().err
