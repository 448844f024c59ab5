"""Images in tar and zip files, read in place; and lists of files."""

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

from pipeline.beton import Beton
from pipeline.errors import UserError
from pipeline.manifest import Manifest
from tests.helpers.manifests import names_of
from tests.tools.packing.test_build_dataset import fill, run
from tests.tools.packing.test_run import same
from tools.packing.archives import members
from tools.packing.jpeg import BadImage
from tools.packing.lists import listed
from tools.packing.read import read_image
from tools.packing.sources import SOURCES, Source

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
    assert names == [os.path.normpath(name) for name in files]


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


@pytest.mark.parametrize("layout", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_tar_cut_anywhere_says_so(tmp_path: Path, layout: int) -> None:
    """A download that broke off must not pack as a smaller data set: not at a member's boundary,
    not in a header, and not where no file is an image.
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
    """A ustar header with bytes replaced and the checksum that goes with them."""
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
        ({156: b"M"}, "sparse, or of an unknown kind"),
    ],
)
def test_what_a_tar_header_may_say(tmp_path: Path, changes: dict[int, bytes], fault: str) -> None:
    """Its sum is right, its content is not: a fault, and what comes before is used."""
    path = tar(tmp_path / "a.tar", {"a.jpg": b"1"})
    path.write_bytes(path.read_bytes()[:1024] + header(changes) + b"9" * 512 + bytes(1024))
    first, *others = members(path)
    assert (first.name, first.fault) == ("a.jpg", "")
    assert any(member.fault.startswith(fault) for member in others)


def test_one_bad_archive_is_one_bad_image(tmp_path: Path) -> None:
    """Of a hundred archives, one that is damaged must neither end the run nor go unnoticed."""
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
    """A class that vanishes shifts the labels of all after it."""
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


def test_archives_hold_what_a_walk_of_them_unpacked_would_find(tmp_path: Path) -> None:
    """Hidden folders, backslashes in Unix names, other suffixes, depth: the names are the same."""
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
    """One line each; a folder 600 deep took more frames than Python has."""
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
    """`whole` with one to four bytes changed, a fifth of them cut as well."""
    random = np.random.default_rng(1)
    for _ in range(count):
        data = bytearray(whole)
        for position in random.integers(len(data), size=random.integers(1, 5)):
            data[position] = random.integers(256)
        yield bytes(data[: random.integers(len(data))] if random.random() < 0.2 else data)


@pytest.mark.parametrize("suffix", ["zip", "tar"])
def test_any_damage_is_a_fault(tmp_path: Path, suffix: str) -> None:
    """zipfile raises many kinds of errors on damaged files; none may end in a traceback."""
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
    for name in ("a.tar.gz", "b.tgz"):
        (tmp_path / "gz" / name).touch()
    with pytest.raises(UserError, match=r"a.tar.gz: compressed: gunzip .* \(and 1 more like it"):
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
    assert "warning: coco has 118,287 images, but found 1" in capsys.readouterr().err


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
    names = f"{tmp_path}/c/d.jpg\nc/d.jpg\n../{tmp_path.name}/c/d.jpg\n"
    absolute = lists(tmp_path / "m.txt", names)
    assert read_image(absolute, 0) == (tmp_path / "c/d.jpg").read_bytes()
    assert absolute.faults == {1: "duplicate path", 2: "duplicate path"}
    (tmp_path / "w.csv").write_text("c/d.jpg,é\r\na b.jpg,a\r\n", encoding="utf-16")
    assert listed(tmp_path / "w.csv").classes == ["a", "é"]


@pytest.mark.parametrize(
    ("labels", "stored", "classes"),
    [
        (("-1", "10", "2"), [-1, 10, 2], None),
        (("007", str(2**63 - 1), str(-(2**63))), [7, 2**63 - 1, -(2**63)], None),
        (("10", "2", "cat"), [0, 1, 2], ["10", "2", "cat"]),
        (("1e5", "n01", "2"), [0, 2, 1], ["1e5", "2", "n01"]),
    ],
)
def test_labels(
    tmp_path: Path, labels: tuple[str, ...], stored: list[int], classes: list[str] | None
) -> None:
    """Numbers taken for names would be renumbered: "10" comes before "2"."""
    source = lists(tmp_path / "l.csv", "".join(f"{i}.jpg,{x}\n" for i, x in enumerate(labels)))
    assert source.labels is not None
    assert (source.labels.tolist(), source.classes) == (stored, classes)


def test_a_list_is_packed(tmp_path: Path) -> None:
    """--root is where its paths begin; the beton holds its labels."""
    fill(tmp_path / "in", "a.jpg", "b.jpg")
    path = tmp_path / "l.csv"
    path.write_text("b.jpg,x\na.jpg,y\n")
    run("list", tmp_path / "in", tmp_path / "o.beton", "--list", str(path))
    path.write_text("b.jpg,-5\na.jpg,7\n")
    run("list", tmp_path / "in", tmp_path / "n.beton", "--list", str(path))
    assert Beton(tmp_path / "n.beton").label.tolist() == [-5, 7]  # type: ignore[union-attr]
    manifest = Manifest.beside(tmp_path / "o.beton")
    assert (names_of(manifest), manifest.classes) == (["b.jpg", "a.jpg"], ["x", "y"])


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("l.txt", "\n\n", "names no files"),
        ("l.csv", "a.jpg,1\nb.jpg\n", "1 of 2 rows have no label"),
        ("l.csv", "a.jpg,1\nb.jpg,1,2\n", "line 2: expected path or path,label"),
        ("l.csv", ",1\n", "line 1: expected path"),
        ("l.csv", "a.jpg,1\nb.jpg,\n", "line 2: an empty label"),
        ("l.csv", "a.jpg,1.0\nb.jpg,2\n", "label 1.0: numbers must be whole and fit 64 bits"),
        ("l.csv", f"a.jpg,1\nb.jpg,{10**20}\n", f"label {10**20}: numbers must be whole"),
        ("l.txt", "a.jpg\nb\0.jpg\n", "line 2: a NUL byte"),
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
