"""The names and positions of the files in .tar and .zip archives, to read images in place."""

import os
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

SUFFIXES = (".tar", ".zip")
UNREAD = (
    *(".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tbz", ".tar.xz", ".txz", ".tar.zst", ".tzst"),
    *(".tar.lz4", ".7z", ".rar"),
)
"""Archives that are not read: finding a file would need to decompress all data before it."""
COMPRESSED = "compressed: gunzip or unpack it, a .tar is read in place"

_BLOCK = 512
_MAX_NAME = 1 << 20  # of a long name or a pax header, in bytes
_MAX_PADDING = 1 << 20  # after the end marker, in bytes; 10,240 unless `tar -b` was given
_MAX_DEPTH = 8  # of archives in archives
_EXTENDS = b"xgLKX"  # types of headers that describe the next header
_NO_DATA = b"123456"  # links, devices, folders: no data follows, whatever the size field says
_BAD_PAX = "damaged: an extended header that cannot be read"
_DAMAGE = (  # all errors that zipfile was seen to raise on damaged files
    zipfile.BadZipFile, NotImplementedError, ValueError, IndexError, OverflowError, struct.error,
)  # fmt: skip


class Member(NamedTuple):
    """A file in an archive."""

    name: str
    """Its path in the archive, with forward slashes. The path of a file in a nested archive begins
    with that archive's path. Empty if the fault is the archive's."""
    offset: int = 0
    """Where its bytes begin in the outermost archive, in bytes."""
    size: int = 0
    """Its bytes in the archive: the compressed size if `deflated`."""
    deflated: bool = False
    crc: int = -1
    """The archive's CRC-32 of the content; -1 in a tar file, which has none."""
    fault: str = ""
    """Why it cannot be read; empty if it can."""


class _Damage(Exception):
    """Damage that ends the reading of a tar file. The message says what is wrong."""


def is_archive(name: str) -> bool:
    """Whether a file of this name is an archive, whether its format is read or not."""
    return name.lower().endswith(SUFFIXES + UNREAD)


def members(path: Path) -> Iterator[Member]:
    """The files in an archive, and in the .tar files in it, in the archive's order.

    If an archive is damaged, cut short or unreadable, the last member is the archive itself, with
    a fault.
    """
    try:
        # Without O_NONBLOCK a pipe would block for ever. Regular files ignore the flag.
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with os.fdopen(file, "rb") as stream:
            status = os.fstat(file)
            if not stat.S_ISREG(status.st_mode):
                yield Member("", fault="not a regular file")
            elif path.name.lower().endswith(".zip"):
                with zipfile.ZipFile(stream) as archive:
                    for info in archive.infolist():
                        if not info.is_dir():
                            yield _zip_member(info, file, status.st_size)
            else:
                yield from _tar(file, 0, status.st_size)
    except OSError as error:
        yield Member("", fault=error.strerror or str(error))
    except _DAMAGE as error:
        yield Member("", fault=f"damaged zip file: {error}")


def inflate(data: bytes, limit: int) -> bytes:
    """Decompress a zip file's member to at most `limit` bytes. Raises zlib.error."""
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    content = inflater.decompress(data, limit)
    if not inflater.eof:
        raise zlib.error(f"damaged, or larger than {limit:,} bytes")
    return content


def _zip_member(info: zipfile.ZipInfo, file: int, end: int) -> Member:
    """One file of a zip file of `end` bytes."""
    name = info.filename
    if info.create_system == 0 and "/" not in name:  # by old .NET; Unix names may have backslashes
        name = name.replace("\\", "/")
    offset = _zip_data(info, file, end)
    deflated = info.compress_type == zipfile.ZIP_DEFLATED
    fault = ""
    if info.flag_bits & 1:
        fault = "encrypted"
    elif info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        fault = "compressed by a method other than deflate"
    elif stat.S_ISLNK(info.external_attr >> 16):
        fault = "a link, in an archive"
    elif is_archive(name):
        fault = "an archive in a zip file, which is not read: unpack it"
    elif offset is None:
        fault = "damaged zip file: its data are not where the directory says"
    if fault or offset is None:
        return _tidy(Member(name, fault=fault))
    return _tidy(Member(name, offset, info.compress_size, deflated, info.CRC))


def _zip_data(info: zipfile.ZipInfo, file: int, end: int) -> int | None:
    """Where the data of a file begins; None if the position is impossible or another file's."""
    if not 0 <= info.header_offset <= end:
        return None
    local = os.pread(file, 30, info.header_offset)
    if len(local) < 30 or local[:4] != b"PK\3\4":
        return None
    length, extra = (int.from_bytes(local[i : i + 2], "little") for i in (26, 28))
    name = info.orig_filename.encode("utf-8" if info.flag_bits & 0x800 else "cp437")
    if os.pread(file, length, info.header_offset + 30) != name:
        return None
    offset = info.header_offset + 30 + length + extra
    return offset if offset + info.compress_size <= end else None


def _tar(file: int, start: int, end: int, depth: int = 1) -> Iterator[Member]:
    """The members of the tar file at bytes `start` to `end`, and its fault if it has one."""
    try:
        yield from _tar_members(file, start, end, depth)
    except _Damage as error:
        yield Member("", fault=str(error))


def _tar_members(file: int, start: int, end: int, depth: int) -> Iterator[Member]:
    """The members of a tar file: ustar, GNU and pax. Raises _Damage.

    The standard library's tarfile takes 23 µs a member instead of 9 µs. It also ignores a damaged
    pax header, and reads the times in some GNU headers as a part of the name.
    """
    position = start
    name, size = "", -1  # from an extended header
    while position + _BLOCK <= end:
        header = os.pread(file, _BLOCK, position)
        if not header.strip(b"\0"):
            _check_end(file, position, end)
            return
        _check_header(header, position)
        kind, data = header[156:157], position + _BLOCK
        length = _number(header[124:136]) if size < 0 or kind in _EXTENDS else size
        if length < 0:
            raise _Damage(f"damaged header at byte {position}")
        length = 0 if kind in _NO_DATA else length
        position = data + -(-length // _BLOCK) * _BLOCK
        if kind not in _EXTENDS:
            yield from _tar_member(
                file, name or _ustar_name(header), kind, data, length, end, depth
            )
            name, size = "", -1
        if data + length > end:
            raise _Damage(f"cut short: it ends at byte {end}, within the data of a file")
        if kind in b"xXL":
            text = os.pread(file, min(length, _MAX_NAME), data)
            name, size = (_text(text), size) if kind == b"L" else _pax(text, name, size)
    raise _Damage("cut short: it has no end marker")


def _tar_member(
    file: int, name: str, kind: bytes, data: int, length: int, end: int, depth: int
) -> Iterator[Member]:
    """The members of one header: a file, the files in a nested tar, or a member with a fault."""
    entry = _tidy(Member(name, data, length))
    if kind in b"3456DV" or name.endswith("/"):  # devices, folders, a volume's label
        return
    fault = ""
    if kind not in b"0\0007":
        fault = {b"1": "a link, in an archive", b"2": "a link, in an archive"}.get(
            kind, "sparse, or of an unknown kind"
        )
    elif entry.name.lower().endswith(".tar") and depth < _MAX_DEPTH:
        for inner in _tar(file, data, min(data + length, end), depth + 1):
            yield inner._replace(name=f"{entry.name}/{inner.name}".rstrip("/"))
        return
    elif is_archive(entry.name):
        fault = "in a tar file, where only .tar is read: unpack it"
    elif data + length > end:
        fault = "the archive ends before it does"
    yield entry._replace(offset=0, size=0, fault=fault) if fault else entry


def _check_end(file: int, position: int, end: int) -> None:
    """Refuse further data after the end marker at `position`.

    A hole in an unfinished download looks like an end marker, and the second of two joined tar
    files would be missed.
    """
    if end - position > _MAX_PADDING or os.pread(file, end - position, position).strip(b"\0"):
        raise _Damage(f"damaged: {end - position:,} bytes after its end marker at byte {position}")


def _check_header(header: bytes, position: int) -> None:
    if len(header) < _BLOCK:
        raise _Damage("cut short while it was read")
    field = header[148:156]
    if sum(header) - sum(field) + 8 * ord(" ") != _number(field):
        raise _Damage(f"damaged, or no tar file: no header at byte {position}")


def _tidy(member: Member) -> Member:
    """The member with the path that it would have if the archive were unpacked."""
    name = os.path.normpath(member.name.lstrip("/"))
    if name.split("/", 1)[0] == "..":
        return member._replace(name=name, fault="its path leads out of the archive")
    return member._replace(name=name)


def _number(field: bytes) -> int:
    """The value of octal digits, or of binary digits after a byte 0x80; else -1."""
    if field[0] & 0x80:
        return int.from_bytes(field[1:]) if field[0] == 0x80 else -1
    try:
        return int(field.split(b"\0", 1)[0].strip() or b"0", 8)
    except ValueError:
        return -1


def _ustar_name(header: bytes) -> str:
    prefix = _text(header[345:500]) if header[257:263] == b"ustar\0" else ""
    name = _text(header[:100])
    return f"{prefix}/{name}" if prefix else name


def _pax(text: bytes, name: str, size: int) -> tuple[str, int]:
    """Path and size of the next member, from lines of "length key=value". Raises _Damage."""
    start = 0
    while start < len(text) and text[start]:
        digits, space, _ = text[start : start + 20].partition(b" ")
        stop = start + int(digits) if space and digits.isdigit() else start
        if stop == start or text[stop - 1 : stop] != b"\n":
            raise _Damage(_BAD_PAX)
        key, _, value = text[start + len(digits) + 1 : stop - 1].partition(b"=")
        start = stop
        if key == b"path":
            name = _text(value)
        elif key == b"size":
            if not value.isdigit() or len(value) > 19:
                raise _Damage(_BAD_PAX)
            size = int(value)
    return name, size


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")
