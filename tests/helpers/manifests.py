"""Manifests for betons of tests, and damage to files."""

import os
import zlib
from pathlib import Path
from typing import Any

from pipeline.beton import Beton, digest_of_sizes
from pipeline.manifest import ORIGINAL, Manifest, Record, manifest_path


def write_manifest(
    beton: Path, names: list[str] | None = None, how: str = ORIGINAL, **head: Any
) -> Manifest:
    """Write the manifest of a beton; the images are named photos/0.jpg, photos/1.jpg, …"""
    opened, content = Beton(beton), beton.read_bytes()
    names = names or [f"photos/{i}.jpg" for i in range(len(opened))]
    labels = [None] * len(opened) if opened.label is None else opened.label.tolist()
    records = []
    for name, label, (pointer, size, *_) in zip(
        names, labels, opened.records.tolist(), strict=True
    ):
        checksum = zlib.crc32(content[pointer : pointer + size])
        records.append(Record(name, size, f"{checksum:08x}", how, label))
    values = {"source": "folder", "options": {}, "count": len(opened), "bytes": opened.bytes}
    values["sizes"] = digest_of_sizes(opened.height, opened.width)
    manifest = Manifest(**(values | head))
    manifest.write(manifest_path(beton), records)
    return manifest


def damage(file: Path, offset: int, data: bytes) -> None:
    """Change bytes of a file as a failing disk does: its times stay."""
    before = file.stat()
    with file.open("r+b") as opened:
        opened.seek(offset)
        opened.write(data)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def names_of(manifest: Manifest) -> list[str]:
    """The names of all records."""
    return [record.name for record in manifest.records()]
