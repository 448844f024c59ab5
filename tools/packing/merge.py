"""Joining the parts of a data set."""

import os
from array import array
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from zlib_ng.zlib_ng import crc32

from pipeline.beton import Beton
from pipeline.errors import UserError
from pipeline.manifest import Manifest
from tools.packing.job import Job
from tools.packing.read import Packed


def merge_job(paths: Sequence[Path]) -> Job:
    """The job of joining all parts of a data set.

    Raises:
        UserError: where a part is damaged, missing, given twice, or of another data set.
    """
    shards = sorted(
        ((Manifest.beside(path), Beton(path)) for path in paths), key=lambda pair: _number(*pair)
    )
    manifests, betons = [pair[0] for pair in shards], [pair[1] for pair in shards]
    first = manifests[0]
    for manifest, beton in shards:
        if _alike(manifest) != _alike(first):
            raise UserError(f"{beton.path}: of another data set or options than {betons[0].path}")
    have = [_number(*pair) for pair in shards]
    wanted = list(range(1, first.shard["of"] + 1)) if first.shard else []
    if have != wanted:
        missing = ", ".join(str(i) for i in wanted if i not in have)
        raise UserError(
            f"missing parts of {len(wanted)}: {missing}" if missing else "a part is given twice"
        )
    names: list[str] = []
    how: list[str] = []
    crcs = array("I")
    known: dict[str, str] = {}
    for manifest, beton in shards:
        before = len(names)
        for record in manifest.records():
            names.append(record.name)
            crcs.append(int(record.crc32, 16))
            how.append(known.setdefault(record.how, record.how))
        if len(names) - before != len(beton):
            raise UserError(f"{beton.path}: its manifest is of another file")
    starts = np.cumsum([0, *map(len, betons)])

    def load(start: int, stop: int) -> list[Packed]:
        packed = []
        for i in range(start, stop):
            part = int(np.searchsorted(starts, i, "right")) - 1
            beton = betons[part]
            pointer, size, height, width, mode = beton.records[i - starts[part]].tolist()
            data = os.pread(beton.file, size, pointer)
            if crc32(data) != crcs[i]:
                reason = f"its bytes in {beton.path} have changed"
                packed.append(Packed(None, 0, 0, 0, reason))
                continue
            pixels = np.frombuffer(data, np.uint8).reshape(height, width, 3) if mode else data
            packed.append(Packed(pixels, height, width, crcs[i], how[i]))
        return packed

    labels = [beton.label for beton in betons if beton.label is not None]
    skip = any(manifest.options["on_error"] == "skip" for manifest in manifests)
    return Job(
        first.source,
        first.options | {"on_error": "skip" if skip else "stop"},
        names,
        load,
        "merge " + " ".join(manifest.digest for manifest in manifests),
        array("q", np.concatenate(labels).tobytes()) if labels else None,
        first.classes,
        skipped=[pair for manifest in manifests for pair in manifest.skipped],
        remedy="pack or copy that part again",
    )


def _number(manifest: Manifest, beton: Beton) -> int:
    if not manifest.shard:
        raise UserError(f"{beton.path}: not a part of a data set: it was packed without --shard")
    return int(manifest.shard["number"])


def _alike(manifest: Manifest) -> tuple[object, ...]:
    """What all parts of a data set have in common."""
    shard = manifest.shard or {}
    return (
        manifest.source,
        {key: value for key, value in manifest.options.items() if key != "on_error"},
        manifest.classes,
        shard.get("of"),
        shard.get("listing"),
    )
