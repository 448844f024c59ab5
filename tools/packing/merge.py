"""Merging the shards of a data set into one beton."""

import itertools
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
from pipeline.manifest import Manifest, Shard
from tools.packing.images import Packed
from tools.packing.job import Job, Sources

MAX_NAMED = 20  # missing shards in a message


def merge_job(paths: Sequence[Path]) -> Job:
    """The job of merging all shards of a data set.

    Raises:
        UserError: if a shard is damaged, missing, given twice, or of another data set.
    """
    shards = _Shards(paths)
    first = shards.manifests[0]
    skip = any(manifest.options.get("on_error") == "skip" for manifest in shards.manifests)
    return Job(
        first.source,
        first.options | {"on_error": "skip" if skip else "stop"},
        shards.names,
        shards.load,
        "merge " + " ".join(manifest.digest for manifest in shards.manifests),
        shards.labels,
        first.classes,
        skipped=[pair for manifest in shards.manifests for pair in manifest.skipped],
        remedy="pack or copy that shard again",
    )


class _Shards:
    """All shards of a data set in order, as one sequence of records."""

    def __init__(self, paths: Sequence[Path]) -> None:
        opened = [(Manifest.beside(path), Beton(path)) for path in paths]
        opened.sort(key=lambda pair: _shard(*pair).number)
        self.manifests, self.betons = [pair[0] for pair in opened], [pair[1] for pair in opened]
        self._check()
        self.names: list[str] = []
        self.labels = None if self.betons[0].label is None else array("q")
        self._how: list[str] = []
        self._crcs = array("I")
        self._sources = Sources()
        for manifest, beton in opened:
            self._read(manifest, beton)
        self._starts = np.cumsum([0, *map(len, self.betons)])

    def _read(self, manifest: Manifest, beton: Beton) -> None:
        """Note a shard's records. Raises UserError if its beton is not the one of its manifest."""
        other = UserError(f"{beton.path}: its manifest belongs to another file")
        if (manifest.count, manifest.bytes) != (len(beton), beton.bytes):
            raise other
        labels = itertools.repeat(None) if beton.label is None else beton.label.tolist()
        sizes = beton.records[:, 1].tolist()
        # `records` comes first in zip, so that it is read to its end and compares its digest.
        for record, size, label in zip(manifest.records(), sizes, labels, strict=False):
            if (record.bytes, record.label) != (size, label):
                raise other
            self.names.append(record.name)
            self._crcs.append(int(record.crc32, 16))
            self._sources.append(record.source)
            self._how.append(sys.intern(record.how))  # one string object for equal strings
            if self.labels is not None:
                self.labels.append(label)
        if beton.sizes_changed(manifest):
            raise UserError(f"{beton.path}: {SIZES_CHANGED}")

    def load(self, start: int, stop: int) -> list[Packed | str]:
        """Read records `start` to `stop`. A record whose checksum differs is a bad image."""
        packed: list[Packed | str] = []
        for i in range(start, stop):
            shard = int(np.searchsorted(self._starts, i, "right")) - 1
            beton = self.betons[shard]
            pointer, size, height, width, mode = beton.records[i - self._starts[shard]].tolist()
            try:
                data = os.pread(beton.file, size, pointer)
            except OSError as error:
                packed.append(f"cannot be read from {beton.path}: {error.strerror}")
                continue
            if crc32(data) != self._crcs[i]:
                packed.append(f"its bytes in {beton.path} have changed")
                continue
            pixels = (
                np.frombuffer(data, np.uint8).reshape(height, width, 3) if mode == RAW else data
            )
            facts = self._crcs[i], self._how[i], self._sources[i]
            packed.append(Packed(pixels, height, width, *facts))
        return packed

    def _check(self) -> None:
        """Raises UserError unless these are all shards of one data set, each of them once."""
        first = self.manifests[0]
        for manifest, beton in zip(self.manifests, self.betons, strict=True):
            if _common(manifest) != _common(first):
                raise UserError(
                    f"{beton.path}: of another data set or options than {self.betons[0].path}"
                )
        numbers = [_shard(*pair).number for pair in zip(self.manifests, self.betons, strict=True)]
        count, present = _shard(first, self.betons[0]).of, set(numbers)
        missing = (str(i) for i in range(1, count + 1) if i not in present)
        if named := ", ".join(itertools.islice(missing, MAX_NAMED)):
            more = ", …" if next(missing, None) else ""
            raise UserError(f"missing shards of {count}: {named}{more}")
        if len(numbers) > len(present):
            raise UserError("a shard is given twice")
        if numbers[-1] > count:
            raise UserError(f"{self.betons[-1].path}: shard {numbers[-1]} of {count}")


def _shard(manifest: Manifest, beton: Beton) -> Shard:
    if not manifest.shard:
        raise UserError(f"{beton.path}: not a shard: it was packed without --shard")
    return manifest.shard


def _common(manifest: Manifest) -> tuple[object, ...]:
    """The properties that all shards of a data set share."""
    shard = manifest.shard
    return (
        manifest.source,
        {key: value for key, value in manifest.options.items() if key != "on_error"},
        manifest.classes,
        shard and (shard.of, shard.listing),
    )
