"""What a packing job is: its description, the images of its part, its digest and its paths."""

import hashlib
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from tools.packing.images import Storage
from tools.packing.read import Packed, load
from tools.packing.sources import Source


@dataclass
class Job:
    """What is to be packed. The images are numbered in the order in which they are stored."""

    kind: str
    """The source's name, for the manifest."""
    options: dict[str, Any]
    """Everything that decides the beton's content but the images."""
    names: Sequence[str]
    load: Callable[[int, int], list[Packed]]
    """Reads images number `start` to `stop`; runs on threads."""
    digest: str
    """Of everything that decides the beton's content but the bytes of the images."""
    labels: Sequence[int] | None = None
    classes: list[str] | None = None
    shard: dict[str, Any] | None = None
    skipped: list[tuple[str, str]] = field(default_factory=list)
    """Images left out already, when shards are merged."""
    remedy: str = "--on-error skip leaves them out"
    """Of bad images."""


def job_of(kind: str, source: Source, storage: Storage, shard: tuple[int, int] | None) -> Job:
    """The job of packing a source, or the i-th of n parts of it.

    Raises:
        UserError: where that part is empty.
    """
    options = {
        "store": storage.store,
        "max_side": storage.max_side,
        "quality": storage.quality,
        "check": storage.check,
    }
    listing = _listing(kind, source, options)
    number, parts = shard or (1, 1)
    first, last = len(source) * (number - 1) // parts, len(source) * number // parts
    if first == last:
        raise UserError(f"--shard {number}/{parts}: empty, there are {len(source)} images")
    return Job(
        kind,
        options,
        source.names[first:last] if shard else source.names,
        lambda start, stop: load(source, storage, first + start, first + stop),
        f"{listing} {_places(source)} {number}/{parts}",
        None if source.labels is None else source.labels[first:last],
        source.classes,
        {"number": number, "of": parts, "listing": listing} if shard else None,
    )


def shard_path(out: Path, number: int, parts: int) -> Path:
    """FILE.shard-i-of-n.beton."""
    return out.with_name(f"{out.name.removesuffix('.beton')}.shard-{number}-of-{parts}.beton")


def _listing(kind: str, source: Source, options: dict[str, Any]) -> str:
    """Digest of the list of images and of how they are stored, wherever they are."""
    digest = hashlib.sha256(repr((kind, options, source.classes)).encode())
    for start in range(0, len(source), 1 << 14):
        names = "\0".join(source.names[start : start + (1 << 14)])
        digest.update(names.encode("utf-8", "surrogateescape") + b"\0")
    digest.update(memoryview(source.labels or array("q")).cast("B"))
    return digest.hexdigest()


def _places(source: Source) -> str:
    """Digest of where the images are."""
    containers = [str(path) for path in source.containers]
    digest = hashlib.sha256(repr((str(source.root), containers, source.faults)).encode())
    for column in (source.container, source.offset, source.size, source.crc):
        digest.update(memoryview(column).cast("B"))
    return digest.hexdigest()


def partial_path(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


def journal_path(out: Path) -> Path:
    return out.with_name(out.name + ".partial.journal")
