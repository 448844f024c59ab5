"""Archives that lie about their files: links, names, sizes, nesting, counts."""

import os
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.errors import UserError
from tests.tools.packing.test_archives import header, tar, zipped
from tests.tools.packing.test_build_dataset import fill, run
from tests.tools.packing.test_run import same
from tools.packing import archives, files
from tools.packing.archives import inflate, members
from tools.packing.read import read_image
from tools.packing.sources import SOURCES

JPEG = b"\xff\xd8\xff"


def test_hard_links_are_the_files_that_they_name(tmp_path: Path) -> None:
    """tar stores a file once. Without it a folder with hard links cannot be packed from its tar."""
    root = tmp_path / "in/train/n01"
    fill(root, "a.JPEG", "d.JPEG")
    os.link(root / "a.JPEG", root / "b.JPEG")
    os.link(root / "a.JPEG", root / "c.JPEG")
    (tmp_path / "tar/train").mkdir(parents=True)
    for layout in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        path = tmp_path / "tar/train/n01.tar"
        with tarfile.open(path, "w", format=layout) as archive:
            archive.add(root, ".")
        run("imagenet", tmp_path / "in", tmp_path / "a.beton", "--force")
        run("imagenet", tmp_path / "tar", tmp_path / "b.beton", "--force")
        assert same(tmp_path, "a.beton", "b.beton")


@pytest.mark.parametrize("layout", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_hard_links_with_long_names(tmp_path: Path, layout: int) -> None:
    """Both names can stand in extended headers. A link can name a link, or the first of two."""
    long = "/".join(["folder" * 5] * 6) + "/a.jpg"
    path = tar(tmp_path / "a.tar", {f"./{long}": b"1", "x.txt": b"2"}, layout)
    link(path, layout, {f"{long}.b.jpg": f"/{long}", "c.jpg": f"{long}.b.jpg", "d.jpg": "x.txt"})
    data = path.read_bytes()
    read = [data[member.offset : member.offset + member.size] for member in members(path)]
    assert read == [b"1", b"2", b"1", b"1", b"2"]
    assert not [member for member in members(path) if member.fault]


def link(path: Path, layout: int, links: dict[str, str]) -> None:
    """Add hard links to a tar file."""
    with tarfile.open(path, "a", format=layout) as archive:
        for name, target in links.items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.LNKTYPE, target
            archive.addfile(info)


def test_hard_links_to_nothing(tmp_path: Path) -> None:
    """A link to a later file, to itself or out of the archive must not give another image."""
    path = tar(tmp_path / "a.tar", {"a.jpg": b"1"})
    link(path, tarfile.GNU_FORMAT, {"b.jpg": "c.jpg", "c.jpg": "c.jpg", "d.jpg": "../a.jpg"})
    with tarfile.open(path, "a") as archive:
        archive.addfile(tarfile.TarInfo("../out.jpg"))
    link(path, tarfile.GNU_FORMAT, {"e.jpg": "../out.jpg", "../f.jpg": "a.jpg"})
    faults = [member.fault for member in members(path)]
    nothing = "a hard link to a file that is not before it in the archive"
    out = "its path leads out of the archive"
    assert faults == ["", nothing, nothing, nothing, out, out, out]


def pax(*records: bytes, kind: bytes = b"x") -> bytes:
    """An extended header."""
    text = b""
    for record in records:
        size = len(record) + 3
        size = len(b"%d" % (size + len(b"%d" % size) - 1)) + len(record) + 2
        text += b"%d %b\n" % (size, record)
    if kind in b"LK":
        text = records[0] + b"\0"
    head = header({124: b"%011o\0" % len(text), 156: kind})
    return head + text.ljust(-(-len(text) // 512) * 512, b"\0")


SPARSE = header({156: b"S", 482: b"\1"}) + bytes(504) + b"\1" + bytes(7) + bytes(512)


@pytest.mark.parametrize(
    ("before", "fault"),
    [
        (pax(b"GNU.sparse.major=1"), "sparse: unpack the archive"),
        (pax(b"path=a\0b.jpg"), "damaged: an extended header"),
        (pax(b"path="), "damaged: an extended header"),
        (pax(b"\0", kind=b"L"), "damaged: an extended header"),
        (pax(b"path=x.jpg") * 2, "two extended headers say the same"),
        (pax(b"path=x.jpg") + pax(b"y.jpg", kind=b"L"), "two extended headers say the same"),
        (pax(b"path=x.jpg", kind=b"g"), "a global header that names"),
        (pax(b"size=0", kind=b"g"), "a global header that names"),
        (pax(b"path=" + b"x" * 5000), "a path of 5,000 bytes; at most 4,096"),
        (header({124: b"00004000001\0", 156: b"x"}) + bytes(2 << 20), "an extended header of"),
        (header({257: b"USTAR\0", 345: b"b"}), "damaged header at byte 1024"),
        (SPARSE, "sparse: unpack the archive"),
    ],
)
def test_headers_that_would_name_another_file(tmp_path: Path, before: bytes, fault: str) -> None:
    """Without it a file gets a wrong name or wrong bytes, where programs read them differently."""
    path = tar(tmp_path / "a.tar", {"a.jpg": b"1"})
    path.write_bytes(path.read_bytes()[:1024] + before + header({}) + bytes(1024))
    first, second, *_ = members(path)
    assert (first.name, first.fault) == ("a.jpg", "")
    assert second.fault.startswith(fault)


def test_harmless_extended_headers(tmp_path: Path) -> None:
    """git writes a global comment; macOS writes attributes. The map of a sparse file is skipped."""
    path = tar(tmp_path / "a.tar", {"a.jpg": b"1"})
    parts = pax(b"comment=0123", kind=b"g") + pax(b"SCHILY.xattr.com.apple=x", b"path=c.jpg")
    path.write_bytes(path.read_bytes()[:1024] + SPARSE + parts + header({}) + bytes(1024))
    assert [(member.name, member.fault) for member in members(path)] == [
        ("a.jpg", ""),
        ("b.jpg", "sparse: unpack the archive"),
        ("c.jpg", ""),
    ]


def test_nested_archives(tmp_path: Path) -> None:
    """A path that leads out of the archive must not come back through a nested archive's name."""
    inner = tar(tmp_path / "a.tar", {"a.jpg": b"1"}).read_bytes()
    path = tar(tmp_path / "a.tar", {"../n.tar": inner, "m.tar": inner})
    assert [(member.name, member.fault) for member in members(path)] == [
        ("../n.tar", "its path leads out of the archive"),
        ("m.tar/a.jpg", ""),
    ]
    for _ in range(archives.MAX_DEPTH):
        inner = tar(tmp_path / "a.tar", {"n.tar": inner}).read_bytes()
    (deepest,) = members(tmp_path / "a.tar")
    assert deepest.fault == "more than 8 tar files in each other: unpack it"
    assert deepest.name.count("n.tar") == archives.MAX_DEPTH


def two_entries(path: Path, change: Callable[[bytearray, int, int], None]) -> list[str]:
    """The faults of a zip file of two files, its directory entries at two offsets changed."""
    zipped(path, {"a.jpg": b"1" * 40, "b.jpg": b"2" * 40}, zipfile.ZIP_STORED)
    data = bytearray(path.read_bytes())
    first = data.index(b"PK\1\2")
    change(data, first, data.index(b"PK\1\2", first + 1))
    path.write_bytes(data)
    return [member.fault for member in members(path)]


def test_zip_directories_that_lie(tmp_path: Path) -> None:
    """Overlapping files are how a small zip file becomes terabytes; other lies give wrong bytes."""

    def same_place(data: bytearray, one: int, other: int) -> None:
        data[other + 42 : other + 46] = data[one + 42 : one + 46]
        data[other + 46 : other + 51] = b"a.jpg"

    def longer(data: bytearray, one: int, other: int) -> None:
        data[one + 20 : one + 28] = (80).to_bytes(4, "little") * 2

    def two_sizes(data: bytearray, one: int, other: int) -> None:
        data[one + 24 : one + 28] = (7).to_bytes(4, "little")

    def nul(data: bytearray, one: int, other: int) -> None:
        data[one + 47] = 0

    nowhere = "damaged zip file: its data are not where the directory says"
    path = tmp_path / "a.zip"
    assert nowhere in two_entries(path, same_place)
    assert two_entries(path, longer) == [nowhere, ""]
    assert two_entries(path, two_sizes)[0].startswith("damaged zip file: two sizes")
    assert two_entries(path, nul)[0] == "a NUL in its name"


def test_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without them archives and lists of tiny names fill the memory. The message says the limit."""
    monkeypatch.setattr(archives, "MAX_FILES", 3)
    names = dict.fromkeys([f"{i}.jpg" for i in range(4)], b"1")
    path = tar(tmp_path / "a/a.tar", names)
    assert list(members(path))[-1].fault == "more than 3 files"
    path.unlink()
    zipped(tmp_path / "a/a.zip", names, zipfile.ZIP_STORED)
    with pytest.raises(UserError, match=r"a/a.zip: more than 3 files"):
        SOURCES["folder"](tmp_path / "a")
    (tmp_path / "b").mkdir()
    for name in names:
        (tmp_path / "b" / name).write_bytes(JPEG)
    with pytest.raises(UserError, match=r"/b: more than 3 files"):
        SOURCES["folder"](tmp_path / "b")
    monkeypatch.setattr(archives, "MAX_DIRECTORY", 200)
    (fault,) = (member.fault for member in members(tmp_path / "a/a.zip"))
    assert fault == "damaged zip file: a directory of 204 bytes; at most 200 are read"


def test_folders_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten links on each of twenty levels make more paths than any disk has folders."""
    monkeypatch.setattr(files, "MAX_FOLDERS", 500)
    for level in range(20):
        (tmp_path / f"in/{level}").mkdir(parents=True)
        for i in range(10):
            (tmp_path / f"in/{level}/{i}").symlink_to(f"../{level + 1}")
    with pytest.raises(UserError, match="/in: more than 500 folders"):
        SOURCES["folder"](tmp_path / "in")


def test_a_deflated_bomb(tmp_path: Path) -> None:
    """Without it a megabyte becomes a gigabyte of memory before anything looks at it."""
    path = zipped(tmp_path / "a.zip", {"a.jpg": bytes(1 << 20)}, zipfile.ZIP_DEFLATED)
    (member,) = members(path)
    data = path.read_bytes()[member.offset : member.offset + member.size]
    assert len(data) < 2000
    with pytest.raises(Exception, match="larger than 1,000 bytes"):
        inflate(data, 1000)
    assert len(read_image(SOURCES["folder"](tmp_path), 0)) == 1 << 20
