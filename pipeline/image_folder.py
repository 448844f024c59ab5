"""The image files of a folder in the place of a beton, for a first hour without packing.

Its index is made each time it is opened: every file is read, checked and, unless it is a JPEG that
a beton would hold unchanged, decoded. It has the order, the sizes, the checksums and the positions
of the beton that `python -m tools.build_dataset folder` would write. So a run gets the same images,
views and order from either, and may go on with the other.
"""

import hashlib
import os
import shlex
import statistics
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm
from zlib_ng.zlib_ng import crc32

from pipeline.beton import Beton, read_records
from pipeline.beton_writer import BetonWriter, Sample
from pipeline.commands import as_called
from pipeline.errors import BadImage, UserError, printable
from pipeline.ffcv_format import JPEG, MAX_SIDE, RAW
from pipeline.files import open_file
from pipeline.folders import Left, is_folder, is_image, require_root, say_found, walk
from pipeline.formats import ARCHIVE_SUFFIXES
from pipeline.images import LIMITS, Pixels, decode, examine, read_file
from pipeline.jpeg import END_ADDED
from pipeline.turbojpeg import Decoder, is_harmless

CHANGED = "the file has changed since the folder was opened"
NAMED = 20
"""Bad files that a message names."""
SAMPLE, ROUNDS = 16, 3
"""Images that `saving` measures, and how often."""


class _Entry(NamedTuple):
    """A file as a beton would hold it."""

    size: int
    height: int
    width: int
    mode: int
    crc: int
    plain: bool
    """Whether a beton would hold the file's own bytes."""


class ImageFolder(Beton):
    """The images below a folder, with the attributes of `Beton`; `file` and the places of tables
    are missing. Says on stderr what it found.

    Raises UserError if `folder` is none, holds an archive or no images, and, naming them, for files
    that cannot be packed.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path, began = Path(folder), time.perf_counter()
        self._names, self._fingerprint = _names(self.path), ""
        entries = self._index()
        count = len(entries)
        self.index, self.label = np.arange(count), None
        sizes, height, width, mode, crc, plain = (np.array(c) for c in zip(*entries, strict=True))
        self.height, self.width, self.checksums = height, width, crc
        pointers = BetonWriter(self.path, count).pointers(sizes.tolist())
        columns = (pointers, sizes, height, width, mode)
        self.records = np.stack([np.array(column, np.int64) for column in columns], axis=1)
        self.has_tiles, self._plain = np.zeros(count, bool), plain
        self.seconds = time.perf_counter() - began
        """That the index took."""

    def name(self, i: int) -> str:
        return self._names[i]

    def require_checksums(self) -> None:
        """They are those of the index."""

    def require_unchanged(self) -> None:
        """Each file is compared with the index whenever it is read."""

    def fingerprint(self) -> str:
        """As that of the beton that packing would write."""
        if not self._fingerprint:
            digest = hashlib.sha256(self.records.tobytes() + self.index.tobytes())
            digest.update(self.checksums.tobytes())
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def has_fingerprint(self, fingerprint: str) -> bool:
        return fingerprint == self.fingerprint()

    def advise(self, blocks: np.ndarray) -> None:
        """Nothing is read ahead of single files."""

    def try_decode(
        self, which: np.ndarray, canvas: np.ndarray, decoder: Decoder, scale: int = 1
    ) -> tuple[int, str]:
        for b, i in enumerate(which.tolist()):
            try:
                if reason := self._decode(i, canvas[b : b + 1], decoder, scale):
                    return b, reason
            except BadImage as error:
                return b, str(error)
            except OSError as error:
                return b, error.strerror or "cannot be read"
        return -1, ""

    def _decode(self, i: int, canvas: np.ndarray, decoder: Decoder, scale: int) -> str:
        """Image `i` into the corner of `canvas` [1, Hmax, Wmax, 3]; why it fails, or ""."""
        path, record = self.path / self._names[i], self.records[i : i + 1].copy()
        if self._plain[i]:
            with open_file(path) as file:
                if os.fstat(file.fileno()).st_size != record[0, 1]:
                    return CHANGED
                record[0, 0] = 0  # its bytes are the file
                checksum = self.checksums[i : i + 1]
                reason = read_records(file.fileno(), record, checksum, decoder, canvas, scale)[1]
                return CHANGED if reason and _crc(file.fileno()) != checksum[0] else reason
        stored, _, _ = _stored(read_file(path))
        if crc32(stored) != self.checksums[i]:
            return CHANGED
        height, width = (-(-int(side) // scale) for side in record[0, 2:4])
        complaint = ""
        if isinstance(stored, bytes):  # it got an end-of-image marker
            pixels = np.empty((height, width, 3), np.uint8)
            complaint = decoder.decompress(stored, pixels)
            stored = pixels
        canvas[0, :height, :width] = stored
        return "" if is_harmless(complaint) else complaint

    def _index(self) -> list[_Entry]:
        """Reads all files. Raises UserError."""
        threads = len(os.sched_getaffinity(0))
        alone = os.environ.get("RANK", "0") == "0"
        bar = tqdm(total=len(self._names), desc="index", unit="image", disable=not alone)
        with bar, ThreadPoolExecutor(threads, "index") as pool:
            found: list[_Entry | str] = []
            for entry in pool.map(self._examine, self._names):
                found.append(entry)
                bar.update()
        bad = [
            f"{printable(name)}: {entry}"
            for name, entry in zip(self._names, found, strict=True)
            if isinstance(entry, str)
        ]
        if bad:
            more = [f"and {len(bad) - NAMED:,} more"] * (len(bad) > NAMED)
            raise UserError(
                f"{self.path}: {len(bad):,} of {len(found):,} files cannot be used; remove them, or"
                f" pack the others ({_packing(self.path)} --on-error skip):",
                [*bad[:NAMED], *more],
            )
        return [entry for entry in found if not isinstance(entry, str)]

    def _examine(self, name: str) -> _Entry | str:
        """What a beton would hold of a file, or why it cannot be packed."""
        try:
            data = read_file(self.path / name)
            stored, height, width = _stored(data)
        except BadImage as error:
            return str(error)
        if isinstance(stored, bytes):
            return _Entry(len(stored), height, width, JPEG, crc32(stored), stored == data)
        return _Entry(stored.nbytes, height, width, RAW, crc32(stored), False)

    def saving(self) -> str:
        """What packing would save, measured on a few of the images, in a sentence."""
        which = np.linspace(0, len(self) - 1, min(SAMPLE, len(self))).astype(int)
        with tempfile.TemporaryDirectory() as folder:
            packed = Beton(self._pack(which, Path(folder, "sample.beton")))
            turns = [
                (_seconds(self, which), _seconds(packed, np.arange(len(which))))
                for _ in range(ROUNDS + 1)
            ]
        files, beton = (statistics.median(turn) for turn in zip(*turns[1:], strict=True))
        each, other = (1e3 * seconds / len(which) for seconds in (files, beton))
        return as_called(
            f"a folder: its index took {self.seconds:.1f} s, at each start; reading and decoding"
            f" {len(which)} of the images took {each:.2f} ms each, from a beton {other:.2f} ms (in"
            f" memory, one thread); to pack: {_packing(self.path)}"
        )

    def _pack(self, which: np.ndarray, path: Path) -> Path:
        with BetonWriter(path, len(which)) as writer:
            for number, i in enumerate(which.tolist()):
                stored, height, width = _stored(read_file(self.path / self._names[i]))
                writer.append([Sample(stored, height, width, (number,))])
        return path


def open_beton(path: str | Path) -> Beton:
    """A beton, or a folder of images in its place. Raises UserError."""
    return ImageFolder(path) if is_folder(Path(path)) else Beton(path)


def _names(folder: Path) -> list[str]:
    """The images below a folder, sorted as packing sorts them. Raises UserError."""
    require_root(folder)
    left, names = Left(), []
    for name, fault in walk(folder, left):
        if fault:
            raise UserError(f"{printable(str(folder / name))}: {fault}")
        if name.lower().endswith(ARCHIVE_SUFFIXES):
            raise UserError(
                f"{printable(str(folder / name))}: an archive, which is read when it is packed:"
                f" {_packing(folder)}"
            )
        if is_image(name, left):
            names.append(name)
    say_found(len(names), folder, left)
    if not names:
        raise UserError(f"{folder}: no images in this folder")
    return sorted(names)


def _stored(data: bytes) -> tuple[bytes | Pixels, int, int]:
    """What a beton holds of a file with --store original: a JPEG stream or upright pixels; height
    and width. Raises BadImage.
    """
    data, header, reasons = examine(data)
    if header and reasons in ([], [END_ADDED]):
        return data, header.height, header.width
    pixels = np.ascontiguousarray(decode(data, header, LIMITS)[0])
    height, width, _ = pixels.shape
    if max(height, width) > MAX_SIDE:
        raise BadImage(f"a side of {max(height, width)} pixels; {MAX_SIDE} can be stored")
    return pixels, height, width


def _packing(folder: Path) -> str:
    """The command that packs a folder."""
    root = shlex.quote(str(folder))
    return f"python -m tools.build_dataset folder --root {root} --out FILE.beton"


def _crc(file: int) -> int:
    return crc32(os.pread(file, os.fstat(file).st_size, 0))


def _seconds(beton: Beton, which: Sequence[int] | np.ndarray) -> float:
    began = time.perf_counter()
    for i in which:
        beton.decode(int(i))
    return time.perf_counter() - began
