"""Manifests: an altered one beside a shard is refused in one line by `merge`, found by `--verify`,
and never gives an image another name, label or checksum.

A manifest whose digest fits its altered content is only read or refused: a digest is no signature.
"""

import contextlib
import hashlib
import io
import json
import re
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.beton import Beton
from pipeline.errors import UserError
from pipeline.manifest import manifest_path
from tests.fuzz.damage import NUMBERS, Random, damage
from tools import inspect_dataset
from tools.packing.images import Storage
from tools.packing.job import job_of, shard_path
from tools.packing.merge import merge_job
from tools.packing.run import pack
from tools.packing.sources import SOURCES

ODD = (
    None, True, -1, 1.5, 1e308, "", "a\x1b[2J\n", "\udc80", [], {}, [[[[[]]]]], *NUMBERS, 10**40,
)  # fmt: skip
"""Values of each JSON type."""
LINES = (
    b"", b"\n", b"\0", b"\xff\xfe", b"[" * 10**5, b'"\\ud800', b"]}\n", b'"records": [\n', b",\n",
    b'"digest": "' + b"0" * 64 + b'",\n', b'"count": 1,\n', b'["a",1,"00000000","original"],\n',
)  # fmt: skip


class Target:
    """Two shards with labels and a skipped image; the manifest of the first is altered."""

    def __init__(self, folder: Path) -> None:
        for i in range(6):
            path = folder / f"in/train/n{i % 2}/{i}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((9 + i, 12, 3), 20 * i, np.uint8)).save(path)
        (folder / "in/train/n0/2.JPEG").write_bytes(b"")
        source, out = SOURCES["imagenet"](folder / "in"), folder / "o.beton"
        self.shards = [shard_path(out, number, 2) for number in (1, 2)]
        for number, shard in enumerate(self.shards, 1):
            with contextlib.redirect_stderr(io.StringIO()):
                pack(job_of("imagenet", source, Storage(), (number, 2)), shard, "skip")
        self.path = manifest_path(self.shards[0])
        self.content, self.truth = self.path.read_bytes(), self._merged()
        assert not _finds_damage(self.shards[0])  # compiles the decoder, before any input is timed
        self.cut = folder / "cut.beton"
        self.cut.write_bytes(self.shards[0].read_bytes()[:-100])

    def try_one(self, random: Random) -> str:
        forged = False
        match random.integers(3):
            case 0:
                altered = damage(self.content, random)
            case 1:
                altered = _with_another_line(self.content, random)
            case _:
                forged = bool(random.integers(2))
                altered = _with_odd_value(self.content, random, forged)
        self.path.write_bytes(altered)
        beton = Beton(self.shards[0])
        names = [beton.name(i) for i in range(len(beton))]
        assert all(isinstance(name, str) for name in names)
        manifest_path(self.cut).write_bytes(altered)
        assert _finds_damage(self.cut)
        found = _finds_damage(self.shards[0])
        assert found or forged or altered == self.content, "--verify finds nothing"
        try:
            assert self._merged() == self.truth or forged
        except UserError as error:
            text = str(error)
            assert text.isprintable(), repr(text)
            assert "o.shard-" in text or "missing shards" in text, text
            return "refused"
        return "read"

    def _merged(self) -> tuple[object, ...]:
        job = merge_job(self.shards)
        packed = job.load(0, len(job.names))
        return job.names, job.labels, job.classes, job.skipped, job.options, packed


def _finds_damage(beton: Path) -> bool:
    """Whether --verify finds damage or refuses the file."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            inspect_dataset.main([str(beton), "--workers", "1", "--verify"])
            damaged = False
        except (UserError, SystemExit):
            damaged = True
    assert said.getvalue().replace("\n", "").isprintable(), repr(said.getvalue())
    return damaged


def _with_another_line(content: bytes, random: Random) -> bytes:
    """Lines exchanged, repeated, left out, or replaced by odd ones."""
    lines = content.splitlines(keepends=True)
    at, other = (int(random.integers(len(lines))) for _ in range(2))
    match random.integers(4):
        case 0:
            lines[at], lines[other] = lines[other], lines[at]
        case 1:
            lines.insert(other, lines[at])
        case 2:
            del lines[at]
        case 3:
            lines[at] = LINES[random.integers(len(LINES))]
    return b"".join(lines)


def _with_odd_value(content: bytes, random: Random, forged: bool) -> bytes:
    """One value replaced or removed; `forged` computes the digest anew."""
    document = _changed(json.loads(content), random)
    if not isinstance(document, dict):
        return json.dumps(document).encode()
    records = document.pop("records", [])
    rows = records if isinstance(records, list) else [records]
    text = "".join(f"{json.dumps(key)}: {json.dumps(document[key])},\n" for key in document)
    text = "{" + text + '"records": [\n' + ",\n".join(map(json.dumps, rows)) + "\n]}\n"
    altered = text.encode()
    if forged:
        blank = re.sub(rb'"digest": "[^"]*"', b'"digest": "%b"' % (b"0" * 64), altered)
        digest = hashlib.sha256(blank).hexdigest().encode()
        altered = blank.replace(b"0" * 64, digest, 1)
    return altered


def _changed(content: object, random: Random) -> object:
    if random.integers(4) == 0 or not isinstance(content, list | dict) or not content:
        return ODD[random.integers(len(ODD))]
    keys = list(content) if isinstance(content, dict) else list(range(len(content)))
    key = keys[random.integers(len(keys))]
    if random.integers(6) == 0:
        del content[key]
    else:
        content[key] = _changed(content[key], random)  # type: ignore[call-overload]
    return content
