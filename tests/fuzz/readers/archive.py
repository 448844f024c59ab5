"""Archives: each image that is accepted has the bytes that tarfile or zipfile give for its name."""

import contextlib
import io
import os
import struct
import tarfile
import zipfile
import zlib
from collections import defaultdict
from pathlib import Path

from pipeline.errors import BadImage, UserError
from tests.fuzz.damage import NUMBERS, Random, damage
from tools.packing.read import read_image
from tools.packing.sources import SOURCES

NAMES = (
    b"", b"/", b"/a.jpg", b"../a.jpg", b"x/../../a.jpg", b"a\0b.jpg", b"a.jpg/", b".", b"b.jpg",
    b"a\x1b[2J\n.jpg", b"\xff\xfe.jpg", b"c.tar", b"c.zip", b"x/" * 300 + b"a.jpg", b"./d/./a.jpg",
)  # fmt: skip
FIELDS = {
    "name": (0, 100), "size": (124, 12), "type": (156, 1), "link": (157, 100), "magic": (257, 8),
    "prefix": (345, 155),
}  # fmt: skip
"""Offset and bytes of the fields of a tar header that say what a member is."""
SIZES = (
    b"", b"-1", b"777", b"00000001000", b"77777777777", b"\x80" + bytes(10) + b"\x07", b"\xff" * 12,
    b"\x80" + b"\xff" * 11, b"1 2", b"0o7", b"1_0", b"+7", b"9",
)  # fmt: skip
PAX = (
    b"path=e.jpg", b"path=", b"path=a\0b.jpg", b"size=3", b"size=-1", b"size=99999999999999999999",
    b"size=0", b"linkpath=a.jpg", b"GNU.sparse.major=1", b"GNU.sparse.realsize=9", b"comment=x",
    b"path=" + b"y" * 5000 + b".jpg", b"hdrcharset=BINARY", b"mtime=nan",
)  # fmt: skip
ZIP_FIELDS = {
    b"PK\1\2": [(6, 2), (8, 2), (10, 2), (16, 4), (20, 4), (24, 4), (28, 2), (30, 2), (42, 4)],
    b"PK\3\4": [(6, 2), (8, 2), (14, 4), (18, 4), (22, 4), (26, 2), (28, 2)],
    b"PK\5\6": [(8, 2), (10, 2), (12, 4), (16, 4), (20, 2)],
}
"""Offset and bytes of the numbers in the three kinds of a zip file's entries."""

_LAYOUTS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)

Contents = dict[str, set[bytes]]


class Target:
    """Archives of three small files in several layouts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tars = [_tar(layout) for layout in _LAYOUTS]
        self.tars.append(_nested())
        self.zips = [_zip(zipfile.ZIP_STORED), _zip(zipfile.ZIP_DEFLATED), _zip(8, zip64=True)]

    def try_one(self, random: Random) -> str:
        suffix, originals = [("tar", self.tars), ("zip", self.zips)][random.integers(2)]
        content = originals[random.integers(len(originals))]
        if random.integers(3) == 0:
            content = damage(content, random)
        elif suffix == "tar":
            content = _altered_tar(content, random)
        else:
            content = _altered_zip(content, random)
        path = self.folder / f"a.{suffix}"
        path.write_bytes(content)
        try:
            return _outcome(path, content)
        finally:
            path.unlink()


def _outcome(path: Path, content: bytes) -> str:
    try:
        source = SOURCES["folder"](path.parent)
    except UserError as error:
        assert str(error).isprintable(), repr(str(error))
        assert str(path.parent) in str(error)
        return "refused"
    expected = _of_tar(content) if path.suffix == ".tar" else _of_zip(path)
    accepted = 0
    for i, name in enumerate(source.names):
        assert name.startswith(path.name), name
        assert ".." not in name.split("/") or i in source.faults, name
        try:
            data = read_image(source, i)
        except BadImage as error:
            assert str(error).isprintable(), repr(str(error))
            continue
        accepted += 1
        inner = name.removeprefix(f"{path.name}/")
        unread = "" in expected and inner not in expected
        assert unread or data in expected[inner], f"{inner!r} has other bytes"
    return "read" if accepted else "listed"


def _files() -> dict[str, bytes]:
    return {"a.jpg": b"1" * 700, "y" * 70 + "/" + "z" * 70 + ".jpg": b"2" * 30, "d/e.jpg": b""}


def _tar(layout: int) -> bytes:
    """A tar file with a long name, a symbolic link, a hard link and a folder."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=layout) as archive:
        for name, content in _files().items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        for kind, name in ((tarfile.LNKTYPE, "h.jpg"), (tarfile.SYMTYPE, "s.jpg")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "a.jpg"
            archive.addfile(info)
    return _cut(stream)


def _cut(stream: io.BytesIO) -> bytes:
    """A tar file with an end marker of 1,024 bytes."""
    content = stream.getvalue().rstrip(b"\0")
    return content + bytes(-len(content) % 512 + 1024)


def _nested() -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, content in (("n.tar", _tar(tarfile.USTAR_FORMAT)), ("m.jpg", b"3")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return _cut(stream)


def _zip(method: int, zip64: bool = False) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive:
        for name, content in _files().items():
            with archive.open(name, "w", force_zip64=zip64) as file:
                file.write(content)
    return stream.getvalue()


# --- damage --------------------------------------------------------------------------------------


def _altered_tar(content: bytes, random: Random) -> bytes:
    """Fields of headers replaced, headers added, exchanged or left out; with right checksums."""
    blocks = [bytearray(content[at : at + 512]) for at in range(0, len(content), 512)]
    heads = [i for i, block in enumerate(blocks) if _is_header(block)]
    at = heads[random.integers(len(heads))]
    for _ in range(random.integers(1, 4)):
        match random.integers(8):
            case 0:
                blocks.insert(at, blocks[heads[random.integers(len(heads))]])
            case 1:
                del blocks[at]
            case 2:
                record = PAX[random.integers(len(PAX))]
                blocks[at:at] = _pax(record, b"xgX"[random.integers(3)])
            case 3:
                blocks[at:at] = _pax(PAX[0], b"LK"[random.integers(2)])
            case _:
                _set_field(blocks[at], random)
        heads = [i for i, block in enumerate(blocks) if _is_header(block)]
        if not heads:
            break
        at = heads[random.integers(len(heads))]
    return b"".join(blocks)


def _is_header(block: bytearray) -> bool:
    return block[257:262] == b"ustar"


def _set_field(block: bytearray, random: Random) -> None:
    start, length = FIELDS[list(FIELDS)[random.integers(len(FIELDS))]]
    if length == 12:
        value = SIZES[random.integers(len(SIZES))]
    elif length == 1:
        value = bytes([b"01234567LKxgXSDMVA\0\xff"[random.integers(20)]])
    else:
        value = (*NAMES, b"ustar  \0", b"ustar\x0000", bytes(8))[random.integers(len(NAMES) + 3)]
    block[start : start + length] = value[:length].ljust(length, b"\0")
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)


def _pax(record: bytes, kind: int) -> list[bytearray]:
    """An extended header with one record; of kind L or K with its value."""
    text = b"%d " % 0 + record + b"\n"
    while int(text.split(b" ", 1)[0]) != len(text):
        text = b"%d " % len(text) + record + b"\n"
    text = record.partition(b"=")[2] + b"\0" if kind in b"LK" else text
    info = tarfile.TarInfo("h")
    info.type, info.size = bytes([kind]), len(text)
    data = text.ljust(-(-len(text) // 512) * 512, b"\0")
    parts = info.tobuf(tarfile.USTAR_FORMAT) + data
    return [bytearray(parts[at : at + 512]) for at in range(0, len(parts), 512)]


def _altered_zip(content: bytes, random: Random) -> bytes:
    """Numbers and names of its entries replaced."""
    changed = bytearray(content)
    for _ in range(random.integers(1, 4)):
        signature = list(ZIP_FIELDS)[random.integers(3)]
        places = [i for i in range(len(changed)) if changed[i : i + 4] == signature]
        if not places:
            continue
        at = places[random.integers(len(places))]
        start, size = ZIP_FIELDS[signature][random.integers(len(ZIP_FIELDS[signature]))]
        old = int.from_bytes(changed[at + start : at + start + size], "little")
        near = old + int(random.integers(-40, 41))
        value = NUMBERS[random.integers(len(NUMBERS))] if random.integers(2) else max(0, near)
        changed[at + start : at + start + size] = (value % 256**size).to_bytes(size, "little")
        if random.integers(4) == 0:
            name = NAMES[random.integers(len(NAMES))]
            found = changed.find(b"a.jpg", int(random.integers(len(changed))))
            if found >= 0:
                changed[found : found + len(name)] = name
    return bytes(changed)


# --- what the standard library reads -------------------------------------------------------------


def _of_tar(content: bytes, above: str = "") -> Contents:
    """All contents by path, also those of nested tar files.

    tarfile ends without a word at a header with a damaged owner or time, or at a damaged map of a
    sparse file. The path "" is then in the result.
    """
    found: Contents = defaultdict(set)
    earlier: dict[str, bytes] = {}  # for hard links
    end = 0
    with contextlib.suppress(tarfile.TarError):
        archive = tarfile.open(fileobj=io.BytesIO(content))  # noqa: SIM115
        with contextlib.suppress(tarfile.TarError, ValueError, OverflowError):
            archive.getmembers()
        end = archive.offset
        for info in archive.members:
            data = content[info.offset_data : info.offset_data + info.size]
            if info.islnk():
                data = earlier.get(_tidy(info.linkname), data)
            for name in map(_tidy, _names(info, content)):
                found[above + name].add(data)
                if name.lower().endswith(".tar"):
                    for inner, others in _of_tar(data, f"{above}{name}/").items():
                        found[inner] |= others
            if (info.isreg() and not info.name.endswith("/")) or info.islnk():
                earlier[name] = data
    if content[end : end + 512].strip(b"\0"):
        found[""] = set()
    return found


def _tidy(name: str) -> str:
    return os.path.normpath(name.lstrip("/"))


def _names(info: tarfile.TarInfo, content: bytes) -> list[str]:
    """The name of a member. GNU's times, which tarfile takes for a part of it, are left out."""
    header = content[info.offset_data - 512 : info.offset_data]
    times = header[345:500].split(b"\0")[0].decode("utf-8", "surrogateescape")
    if header[257:263] == b"ustar " and times:
        return [info.name, info.name.removeprefix(f"{times}/")]
    return [info.name]


def _of_zip(path: Path) -> Contents:
    """All contents by path. Where zipfile reads none: what has the checksum of the directory."""
    found: Contents = defaultdict(set)
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            name = info.filename
            if info.create_system == 0 and "/" not in name:
                name = name.replace("\\", "/")
            data = found[_tidy(name)]
            with contextlib.suppress(
                zipfile.BadZipFile, NotImplementedError, RuntimeError, ValueError, EOFError,
                OSError, zlib.error, struct.error,
            ):  # fmt: skip
                data.add(archive.read(info))
            data |= {known for known in _files().values() if zlib.crc32(known) == info.CRC}
    return found
