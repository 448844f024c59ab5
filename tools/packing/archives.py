"""The names and positions of the files in .tar and .zip archives, to read images in place."""

import io
import os
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import closing
from typing import NamedTuple

from zlib_ng.zlib_ng import crc32

from pipeline.errors import BadImage
from pipeline.formats import ARCHIVE_SUFFIXES
from pipeline.images import Limits
from tools.packing.containers import Blob
from tools.packing.places import Place, open_blob

SUFFIXES = ARCHIVE_SUFFIXES
UNREAD = (
    *(".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tbz", ".tar.xz", ".txz", ".tar.zst", ".tzst"),
    *(".tar.lz4", ".7z", ".rar"),
)
"""Archives that are not read: finding a file would need to decompress all data before it."""
COMPRESSED = "compressed: gunzip or unpack it, a .tar is read in place"

MAX_FILES = 20_000_000
"""Files of an archive, images of a source; ImageNet-21k has 14 million. In memory each takes up to
500 bytes while the source is listed."""
MAX_DIRECTORY = 128 << 20
"""Bytes of a zip file's directory: more than a million files. It takes up to 16 times as much
memory while it is read."""
MAX_PATH = 4096
"""Bytes of a path in a tar file; with a longer one Linux could not unpack it."""
MAX_EXTENDED = 1 << 20
"""Bytes of a tar file's extended header, which holds a long path and attributes of up to 64 KiB."""
MAX_PADDING = 1 << 20
"""Bytes after a tar file's end marker; 10,240 unless `tar -b` was given."""
MAX_DEPTH = 8
"""Tar files in tar files."""

_BLOCK = 512
_EXTENDS = b"xgLKX"  # types of headers that describe the next header
_KINDS = {b"2": "a link, in an archive", b"S": "sparse: unpack the archive"}
_NO_DATA = b"123456"  # links, devices, folders: no data follows, whatever the size field says
_BAD_EXTENDED = "damaged: an extended header that cannot be read"
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


class _Extended(NamedTuple):
    """What extended headers say of the next member."""

    name: str = ""
    link: str = ""
    size: int = -1
    sparse: bool = False


class _Damage(Exception):
    """Damage that ends the reading of a tar file. The message says what is wrong."""


def is_archive(name: str) -> bool:
    """Whether a file of this name is an archive, whether its format is read or not."""
    return name.lower().endswith(SUFFIXES + UNREAD)


def members(path: Place) -> Iterator[Member]:
    """The files in an archive, as `OpenArchive.members`."""
    try:
        archive = Archive(path).open()
    except OSError as error:
        yield Member("", fault=error.strerror or str(error))
        return
    with closing(archive):
        yield from archive.members()


class Archive:
    """A .tar or .zip file as a container. An image's offset and size are those of its `Member`; the
    size of a deflated one is negative.
    """

    def __init__(self, path: Place) -> None:
        self.path = path

    def __str__(self) -> str:
        return str(self.path)

    def open(self) -> "OpenArchive":
        """Raises OSError."""
        return OpenArchive(open_blob(self.path), self.path.name.lower().endswith(".zip"))

    def expect(self, offsets: Iterable[int]) -> None:
        """Each image is read on its own."""


class OpenArchive:
    """An archive that is open."""

    def __init__(self, file: Blob, is_zip: bool) -> None:
        self._file, self._is_zip = file, is_zip

    def members(self) -> Iterator[Member]:
        """The files in the archive, and in the .tar files in it, in the archive's order.

        If an archive is damaged, cut short or unreadable, the last member is the archive itself,
        with a fault.
        """
        try:
            yield from _zip(self._file) if self._is_zip else _tar(self._file, 0, self._file.size)
        except OSError as error:
            yield Member("", fault=error.strerror or str(error))
        except _DAMAGE as error:
            yield Member("", fault=f"damaged zip file: {error}")

    def read(self, offset: int, size: int, crc: int, limits: Limits) -> bytes:
        """Raises BadImage."""
        limits.check_bytes(abs(size))
        try:
            data = self._file.pread(abs(size), offset)
            content = data if size >= 0 else inflate(data, limits.max_bytes)
        except OSError as error:
            raise BadImage(error.strerror or str(error)) from error
        except zlib.error as error:
            raise BadImage(f"in the zip file: {error}") from error
        if crc not in (-1, crc32(content)):
            raise BadImage("damaged in the zip file: its checksum differs")
        return content

    def close(self) -> None:
        self._file.close()


def inflate(data: bytes, limit: int) -> bytes:
    """Decompress a zip file's member to at most `limit` bytes. Raises zlib.error."""
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    content = inflater.decompress(data, limit)
    if not inflater.eof:
        raise zlib.error(f"damaged, or larger than {limit:,} bytes")
    return content


class _Stream(io.BufferedReader):
    """A zip file. zipfile reads its directory with one call, if it is not too large."""

    def read(self, size: int | None = -1) -> bytes:
        if size is not None and size > MAX_DIRECTORY:
            raise zipfile.BadZipFile(
                f"a directory of {size:,} bytes; at most {MAX_DIRECTORY:,} are read"
            )
        return super().read(size)


def _zip(file: Blob) -> Iterator[Member]:
    """The files of a zip file in the order of their data. None reaches into the next."""
    with zipfile.ZipFile(_Stream(file)) as archive:
        infos = sorted(archive.infolist(), key=lambda info: info.header_offset)
        ends = [info.header_offset for info in infos[1:]] + [archive.start_dir]
        for info, end in zip(infos, ends, strict=False):
            if not info.is_dir():
                yield _zip_member(info, file, end)


def _zip_member(info: zipfile.ZipInfo, file: Blob, end: int) -> Member:
    """One file of a zip file, whose data end at byte `end` or before."""
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
    elif "\0" in info.orig_filename:
        fault = "a NUL in its name"
    elif not deflated and info.compress_size != info.file_size:
        fault = "damaged zip file: two sizes of a file that is not compressed"
    elif offset is None:
        fault = "damaged zip file: its data are not where the directory says"
    if fault or offset is None:
        return _tidy(Member(name, fault=fault))
    return _tidy(Member(name, offset, info.compress_size, deflated, info.CRC))


def _zip_data(info: zipfile.ZipInfo, file: Blob, end: int) -> int | None:
    """Where the data of a file begins; None if the position is impossible or another file's."""
    if not 0 <= info.header_offset <= end:
        return None
    local = file.pread(30, info.header_offset)
    if len(local) < 30 or local[:4] != b"PK\3\4":
        return None
    length, extra = (int.from_bytes(local[i : i + 2], "little") for i in (26, 28))
    name = info.orig_filename.encode("utf-8" if info.flag_bits & 0x800 else "cp437")
    if file.pread(length, info.header_offset + 30) != name:
        return None
    offset = info.header_offset + 30 + length + extra
    return offset if offset + info.compress_size <= end else None


def _tar(file: Blob, start: int, end: int, depth: int = 1) -> Iterator[Member]:
    """The members of the tar file at bytes `start` to `end`, and its fault if it has one."""
    try:
        yield from _tar_members(file, start, end, depth)
    except _Damage as error:
        yield Member("", fault=str(error))


def _tar_members(file: Blob, start: int, end: int, depth: int) -> Iterator[Member]:
    """The members of a tar file: ustar, GNU and pax. Raises _Damage.

    The standard library's tarfile takes 23 µs a member instead of 9 µs. It also ignores a damaged
    pax header, and reads the times in some GNU headers as a part of the name.
    """
    position, extended = start, _Extended()
    files: dict[str, Member] = {}  # for hard links
    while position + _BLOCK <= end:
        header = file.pread(_BLOCK, position)
        if not header.strip(b"\0"):
            _check_end(file, position, end)
            return
        _check_header(header, position)
        kind, data = header[156:157], position + _BLOCK
        if kind == b"S":
            data = _after_sparse_map(file, header, data)
        own = extended.size < 0 or kind in _EXTENDS
        length = _number(header[124:136]) if own else extended.size
        if length < 0:
            raise _Damage(f"damaged header at byte {position}")
        length = 0 if kind in _NO_DATA else length
        cut = data + length > end
        if kind in _EXTENDS and not cut:
            extended = _extended(file, kind, data, length, extended)
        elif kind not in _EXTENDS:
            name = extended.name or _ustar_name(header, position)
            entry = _tidy(Member(name, data, length))
            kind = b"5" if name.endswith("/") else b"S" if extended.sparse else kind
            if kind == b"1":
                entry = _hard_link(entry, extended.link or _text(header[157:257]), files)
            yield from _tar_member(file, entry, kind, end, depth, files)
            extended = _Extended()
        if cut:
            raise _Damage(f"cut short: it ends at byte {end}, within the data of a file")
        position = data + -(-length // _BLOCK) * _BLOCK
    raise _Damage("cut short: it has no end marker")


def _tar_member(
    file: Blob, entry: Member, kind: bytes, end: int, depth: int, files: dict[str, Member]
) -> Iterator[Member]:
    """The members of one header: a file, the files in a nested tar, or a member with a fault.

    Adds the file to `files`. The tar file ends at byte `end`.
    """
    if kind in b"3456DV":  # devices, folders, a volume's label
        return
    fault, stop = entry.fault, entry.offset + entry.size
    nested = entry.name.lower().endswith(".tar") and kind != b"1"
    if kind not in b"0\00017":
        fault = _KINDS.get(kind, "of an unknown kind")
    elif nested and not fault and depth < MAX_DEPTH:
        for inner in _tar(file, entry.offset, min(stop, end), depth + 1):
            yield inner._replace(name=f"{entry.name}/{inner.name}".rstrip("/"))
        return
    elif is_archive(entry.name) and not fault:
        fault = "in a tar file, where only .tar is read: unpack it"
        if nested and depth == MAX_DEPTH:
            fault = f"more than {MAX_DEPTH} tar files in each other: unpack it"
    elif stop > end:
        fault = "the archive ends before it does"
    if len(files) == MAX_FILES:
        raise _Damage(f"more than {MAX_FILES:,} files")
    files[entry.name] = entry._replace(offset=0, size=0, fault=fault) if fault else entry
    yield files[entry.name]


def _after_sparse_map(file: Blob, header: bytes, data: int) -> int:
    """Where the data of GNU's sparse file begin: after the blocks that continue its header."""
    more = header[482]
    while more:
        block = file.pread(_BLOCK, data)
        data += _BLOCK
        more = block[504] if len(block) == _BLOCK else 0
    return data


def _hard_link(entry: Member, link: str, files: dict[str, Member]) -> Member:
    """A hard link as the earlier file that it names."""
    target = files.get(_tidy(Member(link)).name)
    if not target:
        return entry._replace(fault="a hard link to a file that is not before it in the archive")
    return target._replace(name=entry.name, fault=target.fault or entry.fault)


def _check_end(file: Blob, position: int, end: int) -> None:
    """Refuse further data after the end marker at `position`.

    A hole in an unfinished download looks like an end marker, and the second of two joined tar
    files would be missed.
    """
    if end - position > MAX_PADDING or file.pread(end - position, position).strip(b"\0"):
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


def _ustar_name(header: bytes, position: int) -> str:
    prefix, name = "", _text(header[:100])
    if header[257:263] == b"ustar\0":
        prefix = _text(header[345:500])
    elif header[257:263] != b"ustar " and header[345:500].strip(b"\0"):  # GNU has times there
        raise _Damage(f"damaged header at byte {position}")
    return f"{prefix}/{name}" if prefix else name


def _extended(file: Blob, kind: bytes, data: int, length: int, before: _Extended) -> _Extended:
    """`before` and what the extended header at byte `data` says. Raises _Damage."""
    if length > MAX_EXTENDED:
        raise _Damage(f"an extended header of {length:,} bytes; at most {MAX_EXTENDED:,} are read")
    text = file.pread(length, data)
    if kind in b"LK":
        path = _text(text)
        new = _Extended(name=path) if kind == b"L" else _Extended(link=path)
        if not path:
            raise _Damage(_BAD_EXTENDED)
    else:
        new = _pax(text)
    if kind == b"g" and new != _Extended():
        raise _Damage("a global header that names or resizes all files, which is not read")
    if (size := len(os.fsencode(new.name))) > MAX_PATH:
        raise _Damage(f"a path of {size:,} bytes; at most {MAX_PATH:,} are read")
    if any(one != none != two for one, two, none in zip(before, new, _Extended(), strict=True)):
        raise _Damage("two extended headers say the same of one file")
    return _Extended(
        before.name or new.name,
        before.link or new.link,
        max(before.size, new.size),
        before.sparse or new.sparse,
    )


def _pax(text: bytes) -> _Extended:
    """The content of a pax header: lines of "length key=value". Raises _Damage."""
    start, found = 0, _Extended()
    while start < len(text) and text[start]:
        digits, space, _ = text[start : start + 20].partition(b" ")
        stop = start + int(digits) if space and digits.isdigit() else start
        if stop == start or text[stop - 1 : stop] != b"\n":
            raise _Damage(_BAD_EXTENDED)
        key, _, value = text[start + len(digits) + 1 : stop - 1].partition(b"=")
        start = stop
        if key in (b"path", b"linkpath"):
            if not value or b"\0" in value:
                raise _Damage(_BAD_EXTENDED)
            path = _text(value)
            found = found._replace(name=path) if key == b"path" else found._replace(link=path)
        elif key == b"size":
            if not value.isdigit() or len(value) > 19:
                raise _Damage(_BAD_EXTENDED)
            found = found._replace(size=int(value))
        elif key.startswith(b"GNU.sparse."):
            found = found._replace(sparse=True)
    return found


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")
