"""Merging the shards of a data set into one beton."""

import os
import sys
from array import array
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from zlib_ng.zlib_ng import crc32

from pipeline.beton import SIZES_CHANGED, Beton
from pipeline.errors import UserError
from pipeline.ffcv_format import RAW
from pipeline.manifest import Manifest
from tools.packing.images import Packed
from tools.packing.job import Job


def merge_job(paths: Sequence[Path]) -> Job:
    """The job of merging all shards of a data set.

    Raises:
        UserError: if a shard is damaged, missing, given twice, or of another data set.
    """
    shards = _Shards(paths)
    first = shards.manifests[0]
    labels = [beton.label for beton in shards.betons if beton.label is not None]
    skip = any(manifest.options["on_error"] == "skip" for manifest in shards.manifests)
    return Job(
        first.source,
        first.options | {"on_error": "skip" if skip else "stop"},
        shards.names,
        shards.load,
        "merge " + " ".join(manifest.digest for manifest in shards.manifests),
        array("q", np.concatenate(labels).tobytes()) if labels else None,
        first.classes,
        skipped=[pair for manifest in shards.manifests for pair in manifest.skipped],
        remedy="pack or copy that shard again",
    )


class _Shards:
    """All shards of a data set in order, as one sequence of records."""

    def __init__(self, paths: Sequence[Path]) -> None:
        opened = sorted(
            ((Manifest.beside(path), Beton(path)) for path in paths),
            key=lambda pair: _number(*pair),
        )
        self.manifests, self.betons = [pair[0] for pair in opened], [pair[1] for pair in opened]
        self._check()
        self.names: list[str] = []
        self._how: list[str] = []
        self._crcs = array("I")
        for manifest, beton in opened:
            before = len(self.names)
            for record in manifest.records():
                self.names.append(record.name)
                self._crcs.append(int(record.crc32, 16))
                self._how.append(sys.intern(record.how))  # one string object for equal strings
            if beton.sizes_changed(manifest):
                raise UserError(f"{beton.path}: {SIZES_CHANGED}")
            if len(self.names) - before != len(beton):
                raise UserError(f"{beton.path}: its manifest belongs to another file")
        self._starts = np.cumsum([0, *map(len, self.betons)])

    def load(self, start: int, stop: int) -> list[Packed | str]:
        """Read records `start` to `stop`. A record whose checksum differs is a bad image."""
        packed: list[Packed | str] = []
        for i in range(start, stop):
            shard = int(np.searchsorted(self._starts, i, "right")) - 1
            beton = self.betons[shard]
            pointer, size, height, width, mode = beton.records[i - self._starts[shard]].tolist()
            data = os.pread(beton.file, size, pointer)
            if crc32(data) != self._crcs[i]:
                packed.append(f"its bytes in {beton.path} have changed")
                continue
            pixels = (
                np.frombuffer(data, np.uint8).reshape(height, width, 3) if mode == RAW else data
            )
            packed.append(Packed(pixels, height, width, self._crcs[i], self._how[i]))
        return packed

    def _check(self) -> None:
        """Raises UserError unless these are all shards of one data set, each of them once."""
        first = self.manifests[0]
        for manifest, beton in zip(self.manifests, self.betons, strict=True):
            if _common(manifest) != _common(first):
                raise UserError(
                    f"{beton.path}: of another data set or options than {self.betons[0].path}"
                )
        numbers = [_number(*pair) for pair in zip(self.manifests, self.betons, strict=True)]
        expected = list(range(1, first.shard["of"] + 1)) if first.shard else []
        if numbers != expected:
            missing = ", ".join(str(i) for i in expected if i not in numbers)
            raise UserError(
                f"missing shards of {len(expected)}: {missing}"
                if missing
                else "a shard is given twice"
            )


def _number(manifest: Manifest, beton: Beton) -> int:
    if not manifest.shard:
        raise UserError(f"{beton.path}: not a shard: it was packed without --shard")
    return int(manifest.shard["number"])


def _common(manifest: Manifest) -> tuple[object, ...]:
    """The properties that all shards of a data set share."""
    shard = manifest.shard or {}
    return (
        manifest.source,
        {key: value for key, value in manifest.options.items() if key != "on_error"},
        manifest.classes,
        shard.get("of"),
        shard.get("listing"),
    )
