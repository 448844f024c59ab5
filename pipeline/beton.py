"""Opens and validates an FFCV beton, and locates every record."""

import hashlib
import os
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
from zlib_ng.zlib_ng import crc32

from pipeline.errors import UserError, printable
from pipeline.ffcv_format import (
    ALLOCATION,
    DESCRIPTOR,
    FIELDS,
    HEADER,
    JPEG,
    MIN_PAGE,
    RAW,
    TYPE_ID,
    VERSION,
    metadata_type,
)
from pipeline.files import open_file
from pipeline.folders import as_url
from pipeline.formats import MAX_PIXELS
from pipeline.manifest import Manifest, has_tiles, manifest_path
from pipeline.tiles import decode_crops
from pipeline.turbojpeg import (
    BAD_HEADER,
    BAD_PIXELS,
    OK,
    REASONS,
    Decoder,
    decode_records,
    is_harmless,
)

BLOCK = 1 << 20  # bytes of the file that one read-ahead request covers
FINGERPRINTED = 1 << 30
"""Bytes that `Beton.fingerprint` reads of a beton with a manifest. It takes half a second from the
page cache."""
SIZES_CHANGED = "the images' heights and widths are not those that were packed"
_READ = 1 << 20  # bytes


class CorruptRecord(UserError):
    """A record whose bytes are not the image that the file's table describes."""


class Beton:
    """An opened beton of N images: sizes and locations of all records; pixels only on demand.

    Attributes: `path`; `index` int64 [N], each image's number in its source; `label` int64 [N] or
    None; `height` and `width` int64 [N] in pixels; `records` int64 [N, 5] (pointer, bytes, height,
    width, mode); `bytes`, the size of the file; `page_size` in bytes; `data` and `table`, the
    offsets at which the records begin and end; `checksums` int64 [N], the CRC-32 that each record
    must have when it is read, or -1, and `has_tiles` bool [N], whether it is a JPEG with tiles, see
    `require_checksums`. The file stays open, so a beton that
    is renamed or deleted while a loader runs stays readable.

    Raises UserError, naming the file, if it is not a beton that slotstream can read completely.
    Every pointer, count and size in the file is checked before it is used.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            with open_file(self.path) as file:
                self.file = os.dup(file.fileno())
        except OSError as error:
            url = as_url(str(path))
            reason = "a URL; give a file on this machine" if url else error.strerror
            raise UserError(f"{url or self.path}: {reason}") from None
        self.bytes = os.fstat(self.file).st_size
        self._written = os.fstat(self.file).st_mtime_ns
        self._fingerprint = ""
        header = self._read(HEADER, 0, 1)[0]
        if header["version"] != VERSION:
            raise UserError(
                f"{self.path}: not a beton of format version {VERSION}"
                f" (its header says {header['version']})"
            )
        samples, self.table = int(header["num_samples"]), int(header["alloc_table_ptr"])
        if not samples or self.table < HEADER.itemsize:
            raise UserError(f"{self.path}: incomplete beton: its writer did not finish")
        self.page_size = int(header["page_size"])
        if self.page_size < MIN_PAGE or self.page_size.bit_count() != 1:
            raise UserError(f"{self.path}: damaged header: pages of {self.page_size} bytes")
        columns = self._read_samples(int(header["num_fields"]), samples)
        self.index = columns["index"].astype(np.int64)
        if self.index.min() < 0 or _repeats(self.index):
            raise UserError(f"{self.path}: damaged table: the images' numbers are not unique")
        self.label = columns["label"].astype(np.int64) if "label" in columns else None
        self.height = columns["image"]["height"].astype(np.int64)
        self.width = columns["image"]["width"].astype(np.int64)
        table = self._read(ALLOCATION, self.table, samples)
        if self.table + table.nbytes != self.bytes:
            raise UserError(
                f"{self.path}: has {self.bytes - self.table - table.nbytes} bytes after its end"
            )
        self.records = self._locate(columns["image"], table)
        self.checksums = np.full(samples, -1, np.int64)
        self.has_tiles = np.zeros(samples, bool)

    def __len__(self) -> int:
        return len(self.records)

    def __del__(self) -> None:
        if hasattr(self, "file"):
            os.close(self.file)

    def name(self, i: int) -> str:
        """The source file of record `i` by the manifest beside the beton, else its number."""
        try:
            manifest = Manifest.beside(self.path)
            if (manifest.count, manifest.bytes) == (len(self.index), self.bytes):
                return manifest.name(i)
        except UserError:
            pass
        return f"record {i}"

    def require_checksums(self) -> None:
        """From now on, each record that is read must have the checksum in the manifest beside the
        beton. A manifest that is damaged or of another file is left out, with a warning.

        Raises UserError if the images' heights and widths are not those that were packed.
        """
        if self.checksums[0] >= 0 or not manifest_path(self.path).exists():
            return
        try:
            manifest = Manifest.beside(self.path)
            self.checksums, self.has_tiles = self._known(manifest)
        except UserError as error:
            print(f"warning: {error}: no image is compared with it", file=sys.stderr, flush=True)
            return
        if self.sizes_changed(manifest):
            raise UserError(f"{self.path}: {SIZES_CHANGED}")

    def sizes_changed(self, manifest: Manifest) -> bool:
        """Whether the table has other heights and widths than were packed, if that is known."""
        return manifest.sizes not in ("", digest_of_sizes(self.height, self.width))

    def require_unchanged(self) -> None:
        """Raises UserError if anyone has written to the file since it was opened."""
        now = os.fstat(self.file)
        if (now.st_size, now.st_mtime_ns) != (self.bytes, self._written):
            raise UserError(
                f"{self.path}: the file was written to while it was in use: put a new beton under"
                " a new name, or move it over the old one"
            )

    def fingerprint(self) -> str:
        """A SHA-256 that identifies this beton: of its tables and the CRC-32 of every record.

        In a beton of up to `FINGERPRINTED` bytes, or without a manifest, each record is read. Of a
        larger one as many are read, evenly spread, and the others' CRC-32 is the manifest's.
        """
        if not self._fingerprint:
            known = self.checksums.copy()
            if known[0] < 0:
                with suppress(UserError, OSError):
                    known, _ = self._known(Manifest.beside(self.path))
            step = -(-int(self.records[:, 1].sum()) // FINGERPRINTED)
            read = np.flatnonzero((np.arange(len(self)) % step == 0) | (known < 0))
            for i in read.tolist():
                known[i] = self._crc32(*self.records[i, :2].tolist())
            digest = hashlib.sha256(self.records.tobytes() + self.index.tobytes())
            digest.update(known.tobytes())
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def has_fingerprint(self, fingerprint: str) -> bool:
        """Whether this is the beton's fingerprint, or the one that slotstream's first runs noted:
        of the tables and the first bytes of 64 records.
        """
        digest = hashlib.sha256(self.records.tobytes() + self.index.tobytes())
        for i in np.linspace(0, len(self) - 1, min(64, len(self))).astype(int):
            pointer, size = self.records[i, :2]
            digest.update(os.pread(self.file, min(size, 4096), pointer))
        return fingerprint in (self.fingerprint(), digest.hexdigest())

    def decode(self, i: int) -> np.ndarray:
        """Record `i` as uint8 [H, W, 3] RGB. Raises CorruptRecord."""
        canvas = np.empty((1, self.height[i], self.width[i], 3), np.uint8)
        _, reason = self.try_decode(np.array([i]), canvas, Decoder(int(self.records[i, 1])))
        if reason:
            raise self.corrupt(i, reason)
        return canvas[0]

    def try_decode(
        self, which: np.ndarray, canvas: np.ndarray, decoder: Decoder, scale: int = 1
    ) -> tuple[int, str]:
        """Decode records `which` int64 [B] into `canvas` uint8 [B, Hmax, Wmax, 3] until one fails.

        Returns the failed record's position in `which` and the reason, or (-1, ""). With `scale` 2,
        4 or 8, JPEGs are decoded at 1/`scale` of their sides, rounded up.
        """
        records, checksums = self.records[which], self.checksums[which]
        return read_records(self.file, records, checksums, decoder, canvas, scale)

    def try_crops(
        self, i: int, canvas: np.ndarray, boxes: np.ndarray, decoder: Decoder, scale: int = 1
    ) -> str:
        """Decode those pixels of record `i` to their place in `canvas` uint8 [H, W, 3] that two
        crops `boxes` float64 [2, 4] need, x0 y0 x1 y1 in pixels of the whole image; at 1/`scale` as
        `try_decode`. The others may be anything. Returns the reason if it fails, or "".

        Only of a JPEG with tiles, whose checksum is known, less than the whole image is decoded. So
        damage outside of the crops is found like any other.
        """
        tiles = self.has_tiles[i] and decode_crops(
            self.file, self.records[i], int(self.checksums[i]),
            decoder.handle, decoder.scratch, decoder.part, canvas, scale, boxes,
        )  # fmt: skip
        return "" if tiles else self.try_decode(np.array([i]), canvas[None], decoder, scale)[1]

    def advise(self, blocks: np.ndarray) -> None:
        """Ask the kernel to read these blocks (by number) into memory, and do not wait for it."""
        for block in blocks.tolist():
            os.posix_fadvise(self.file, block * BLOCK, BLOCK, os.POSIX_FADV_WILLNEED)

    def corrupt(self, i: int, reason: str) -> CorruptRecord:
        """The error that names record `i`. Raises UserError if the file was written to: then that
        is the reason.
        """
        self.require_unchanged()
        return CorruptRecord(f"{self.path}: {printable(self.name(i))}: {reason}")

    def _known(self, manifest: Manifest) -> tuple[np.ndarray, np.ndarray]:
        """By the manifest: each record's CRC-32, int64 [N], and whether it has tiles, bool [N].
        Raises UserError if the manifest does not match.
        """
        sizes: list[int] = []
        digits: list[str] = []
        how: list[str] = []
        for record in manifest.records():
            sizes.append(record.bytes)
            digits.append(record.crc32)
            how.append(record.how)
        if manifest.bytes != self.bytes or not np.array_equal(sizes, self.records[:, 1]):
            raise UserError(f"{manifest.path}: belongs to another beton: sizes differ")
        checksums = np.frombuffer(bytes.fromhex("".join(digits)), ">u4").astype(np.int64)
        return checksums, np.fromiter(map(has_tiles, how), bool, len(how))

    def _crc32(self, pointer: int, size: int) -> int:
        """The CRC-32 of bytes of the file; 0 of those after its end."""
        value = 0
        for offset in range(0, size, _READ):
            value = crc32(os.pread(self.file, min(_READ, size - offset), pointer + offset), value)
        return value

    def _read(self, dtype: np.dtype, offset: int, count: int) -> np.ndarray:
        """`count` entries of a table. Raises UserError if the file ends before them."""
        size = count * dtype.itemsize
        data = b"" if offset + size > self.bytes else os.pread(self.file, size, offset)
        if len(data) < size:
            raise UserError(
                f"{self.path}: truncated, or no beton: it has {self.bytes} bytes,"
                f" and tables that end at byte {offset + size}"
            )
        return np.frombuffer(data, dtype, count)

    def _read_samples(self, fields: int, samples: int) -> dict[str, np.ndarray]:
        """The metadata column [N] of each field; refuses fields that slotstream does not pack."""
        described = self._read(DESCRIPTOR, HEADER.itemsize, fields)
        names = [bytes(name).split(b"\0")[0].decode(errors="replace") for name in described["name"]]
        for name, type_id in zip(names, described["type_id"], strict=True):
            if type_id != TYPE_ID.get(name):
                raise UserError(f"{self.path}: unknown field {name!r} (known: {', '.join(FIELDS)})")
        if len(set(names)) != fields or not {"image", "index"} <= set(names):
            raise UserError(f"{self.path}: has fields {', '.join(names)}; needs image and index")
        dtype = metadata_type(names)
        metadata = self._read(dtype, HEADER.itemsize + described.nbytes, samples)
        self.data = HEADER.itemsize + described.nbytes + metadata.nbytes
        return {name: metadata[f"f{column}"] for column, name in enumerate(names)}

    def _locate(self, image: np.ndarray, table: np.ndarray) -> np.ndarray:
        """int64 [N, 5] pointer, bytes, height, width, mode of each image; refuses bad pointers."""
        found = np.ascontiguousarray(table["ptr"])
        if (found[1:] < found[:-1]).any():
            order = np.argsort(found, kind="stable")
            table, found = table[order], found[order]
        wanted = np.ascontiguousarray(image["data_ptr"])
        row = np.searchsorted(found, wanted).clip(max=len(table) - 1)
        columns = (wanted, table["size"][row], self.height, self.width, image["mode"])
        records = np.stack([column.astype(np.int64) for column in columns], axis=1)
        pointer, size, height, width, mode = records.T
        wrong = (found[row] != wanted) | (table["sample_id"][row] != np.arange(len(row)))
        wrong |= (pointer < self.data) | (size < 1) | (size > self.bytes)
        wrong |= pointer > self.table - size
        wrong |= (height < 1) | (width < 1) | (height * width > MAX_PIXELS)
        wrong |= ((mode != JPEG) & (mode != RAW)) | ((mode == RAW) & (size != height * width * 3))
        wrong |= pointer // self.page_size != (pointer + size - 1) // self.page_size
        order = np.argsort(pointer, kind="stable")
        wrong[order[1:]] |= pointer[order[1:]] < (pointer + size)[order[:-1]]  # an overlap
        if wrong.any():
            first = printable(self.name(int(np.flatnonzero(wrong)[0])))
            raise UserError(f"{self.path}: {first}: its entry in the table is damaged")
        return records


def read_records(
    file: int,
    records: np.ndarray,
    checksums: np.ndarray,
    decoder: Decoder,
    canvas: np.ndarray,
    scale: int,
) -> tuple[int, str]:
    """`decode_records` until one fails: its position and the reason, or (-1, "")."""
    begin = 0
    while begin < len(records):
        bad, code = decode_records(
            file, records[begin:], checksums[begin:], decoder.handle, decoder.scratch,
            canvas[begin:], scale,
        )  # fmt: skip
        if code == OK:
            break
        begin += bad
        complaint = decoder.error() if code in (BAD_HEADER, BAD_PIXELS) else ""
        if code != BAD_PIXELS or not is_harmless(complaint):
            return begin, REASONS[code] + (f" ({complaint})" if complaint else "")
        begin += 1  # only a warning: the pixels are complete
    return -1, ""


def _repeats(numbers: np.ndarray) -> bool:
    """Whether a number occurs twice."""
    ordered = np.sort(numbers)
    return bool((ordered[1:] == ordered[:-1]).any())


def digest_of_sizes(height: np.ndarray, width: np.ndarray) -> str:
    """A SHA-256 of all heights and widths [N], which the manifest notes."""
    sizes = np.stack([height, width], axis=1).astype("<i8")
    return hashlib.sha256(sizes.tobytes()).hexdigest()
