"""JPEGs with tiles: transcoding an altered JPEG loses nothing, and of an altered one with tiles the
crops are those of the whole image.
"""

from pathlib import Path

import numpy as np

from pipeline.errors import BadImage
from pipeline.images import examine
from pipeline.turbojpeg import Decoder, is_harmless
from tests.fuzz.damage import Random, damage
from tests.fuzz.readers.jpeg import DAMAGE
from tests.helpers.jpegs import SAMPLINGS, jpeg, pool, sampled
from tests.pipeline.test_tiles import beton_of, noise
from tools.packing.tiles import restored, tiled

LARGE = 1 << 21
"""Pixels: a stream that claims more is refused by this reader, so that an input stays fast."""
ROOM = 1 << 16  # bytes of an altered stream
HEIGHT, WIDTH = 60, 210


class Target:
    """Sources of each sampling and coding, and a beton with room for an altered record."""

    def __init__(self, folder: Path) -> None:
        kinds = [sampled(noise(i, HEIGHT, WIDTH), kind) for i, kind in enumerate(SAMPLINGS)]
        kinds += [jpeg(5, quality=85, progressive=True), jpeg(7, restart_marker_blocks=2)]
        self.sources = kinds + list(pool().values())
        self.tiles = [made.data for made in map(tiled, kinds[: len(SAMPLINGS)]) if made]
        path = folder / "tiles.beton"
        whole = self.tiles[0]
        self.beton = beton_of(path, [whole + bytes(ROOM - len(whole))])
        self.room = path.open("r+b")
        self.decoder = Decoder(ROOM)
        self.try_crops(whole, np.random.default_rng(0))  # compiles

    def try_one(self, random: Random) -> str:
        if random.integers(2):
            source = self.sources[random.integers(len(self.sources))]
            kind = DAMAGE[random.integers(len(DAMAGE))]
            return self.try_source(kind(source, random)[:ROOM])
        stream = self.tiles[random.integers(len(self.tiles))]
        scan = stream.index(b"\xff\xda")
        altered = stream[:scan] + damage(stream[scan:], random)
        kind = DAMAGE[random.integers(len(DAMAGE))]
        return self.try_crops((kind(stream, random), altered)[random.integers(2)][:ROOM], random)

    def try_source(self, source: bytes) -> str:
        """Transcode an altered source that packing would store."""
        try:
            data, header, reasons = examine(source, check="decode")
        except BadImage:
            return "refused"
        if not header or reasons or header.height * header.width > LARGE:
            return "other"
        made = tiled(data)
        if made is None:
            return "without tiles"
        shape = header.height, header.width, 3
        (pixels, complaint), (before, _) = (self._decode(d, shape) for d in (made.data, data))
        assert not complaint or is_harmless(complaint), complaint
        assert np.array_equal(pixels, before), "other pixels than the source's"
        assert not made.restorable or restored(made.data) == data
        return "with tiles"

    def try_crops(self, stream: bytes, random: Random) -> str:
        """Decode two crops of an altered stream whose checksum is right."""
        if not stream:
            return "empty"
        beton = self.beton
        self.room.seek(int(beton.records[0, 0]))
        self.room.write(stream)
        self.room.flush()
        beton.records[0, 1] = len(stream)
        beton.has_tiles[0] = True
        beton.checksums[0] = beton._crc32(*beton.records[0, :2].tolist())
        corners = np.sort(random.uniform(size=(2, 2, 2)), axis=1) * (WIDTH - 1, HEIGHT - 1)
        corners[:, 1] += 1
        boxes = corners.reshape(2, 4)
        whole, partly = (np.zeros((HEIGHT, WIDTH, 3), np.uint8) for _ in range(2))
        _, reason = beton.try_decode(np.array([0]), whole[None], self.decoder)
        problem = beton.try_crops(0, partly, boxes, self.decoder)
        if reason:
            assert problem in ("", reason)
            return "only the whole is bad" if not problem else "bad"
        assert not problem, "the whole decodes, and its crops do not"
        for x0, y0, x1, y1 in boxes:
            part = np.s_[int(y0) : int(np.ceil(y1)), int(x0) : int(np.ceil(x1))]
            assert np.array_equal(partly[part], whole[part]), "other pixels than the whole's"
        return "good"

    def _decode(self, stream: bytes, shape: tuple[int, ...]) -> tuple[np.ndarray, str]:
        pixels = np.zeros(shape, np.uint8)
        return pixels, Decoder(0).decompress(stream, pixels)
