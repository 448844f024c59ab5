"""A packing job: its images, its options, its digest, and the paths of its files."""

import hashlib
from array import array
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.images import LIMITS, Limits
from pipeline.manifest import Option, Shard
from pipeline.manifest import Source as SourceJpeg
from tools.packing.images import Packed, Storage
from tools.packing.read import load
from tools.packing.sources import Source


@dataclass
class Job:
    """The images to pack, numbered in the order in which they are stored."""

    kind: str
    """The source's name, for the manifest."""
    options: dict[str, Option]
    """All settings that decide the beton's content."""
    names: Sequence[str]
    load: Callable[[int, int], list[Packed | str]]
    """Reads images `start` to `stop`, or the first of them; for a bad image it returns the reason.
    Runs on threads."""
    digest: str
    """Covers everything that decides the beton's content, except the bytes of the images."""
    labels: Sequence[int] | None = None
    classes: list[str] | None = None
    shard: Shard | None = None
    skipped: list[tuple[str, str]] = field(default_factory=list)
    """Name and reason of each image that the shards already skipped, when shards are merged."""
    remedy: str = "--on-error skip excludes them"
    """How to deal with bad images, for the error message."""


class Sources:
    """The source of each image, or None, in 12 bytes."""

    def __init__(self) -> None:
        self._bytes, self._crc = array("Q"), array("I")

    def append(self, source: SourceJpeg | None) -> None:
        """Add the next image's."""
        self._bytes.append(source.bytes if source else 0)
        self._crc.append(int(source.crc32, 16) if source else 0)

    def __getitem__(self, i: int) -> SourceJpeg | None:
        return SourceJpeg(self._bytes[i], f"{self._crc[i]:08x}") if self._bytes[i] else None


def job_of(
    kind: str,
    source: Source,
    storage: Storage,
    shard: tuple[int, int] | None,
    limits: Limits = LIMITS,
) -> Job:
    """The job of packing a source, or shard i of n of it.

    Raises:
        UserError: if the shard is empty.
    """
    options = asdict(storage) | source.options
    if not storage.tiles:
        del options["tiles"]  # as earlier versions, whose shards and unfinished betons stay usable
    listing = _listing_digest(kind, source, options)
    number, shards = shard or (1, 1)
    first, last = len(source) * (number - 1) // shards, len(source) * number // shards
    if first == last:
        raise UserError(f"--shard {number}/{shards}: empty, there are {len(source)} images")
    return Job(
        kind,
        options,
        source.names[first:last] if shard else source.names,
        lambda start, stop: load(source, storage, first + start, first + stop, limits),
        f"{listing} {_location_digest(source)} {number}/{shards}",
        None if source.labels is None else source.labels[first:last],
        source.classes,
        Shard(number, shards, listing) if shard else None,
    )


def shard_path(out: Path, number: int, shards: int) -> Path:
    """FILE.shard-i-of-n.beton."""
    return out.with_name(f"{out.name.removesuffix('.beton')}.shard-{number}-of-{shards}.beton")


def partial_path(out: Path) -> Path:
    """The data of an unfinished `out`."""
    return out.with_name(out.name + ".partial")


def journal_path(out: Path) -> Path:
    """The journal of an unfinished `out`."""
    return out.with_name(out.name + ".partial.journal")


def _listing_digest(kind: str, source: Source, options: dict[str, Any]) -> str:
    """Digest of the images' names and labels and of how they are stored, wherever they are."""
    digest = hashlib.sha256(repr((kind, options, source.classes)).encode())
    for start in range(0, len(source), 1 << 14):
        names = "\0".join(source.names[start : start + (1 << 14)])
        digest.update(names.encode("utf-8", "surrogateescape") + b"\0")
    digest.update(memoryview(source.labels or array("q")).cast("B"))
    return digest.hexdigest()


def _location_digest(source: Source) -> str:
    """Digest of where the images are."""
    containers = [str(container) for container in source.containers]
    digest = hashlib.sha256(repr((str(source.root), containers, source.faults)).encode())
    for column in (source.container, source.offset, source.size, source.crc):
        digest.update(memoryview(column).cast("B"))
    return digest.hexdigest()
