"""Only the tiles that crops need: the pixels of the whole image, and what happens to damage."""

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.beton import Beton
from pipeline.beton_writer import BetonWriter, Sample
from pipeline.decode import CropLoader
from pipeline.tiles import MOST_RECTANGLES, Grid, find_tiles, frame_of, grid_of, rectangles_of
from pipeline.turbojpeg import Decoder
from pipeline.views import ViewConfig
from tests.helpers.jpegs import SAMPLINGS, sampled
from tests.helpers.manifests import damage, write_manifest
from tools.packing.tiles import tiled

HEIGHT, WIDTH = 150, 330


def noise(seed: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """Pixels [height, width, 3] of which each is unlike its neighbours."""
    small = np.random.default_rng(seed).integers(0, 256, (height // 3, width // 3, 3), np.uint8)
    return np.array(Image.fromarray(small).resize((width, height), Image.Resampling.BILINEAR))


def with_tiles(jpeg: bytes) -> bytes:
    made = tiled(jpeg)
    assert made
    return made.data


def beton_of(path: Path, streams: list[bytes]) -> Beton:
    """A beton of JPEGs, opened."""
    sizes = [Image.open(io.BytesIO(stream)).size for stream in streams]
    with BetonWriter(path, len(streams)) as writer:
        for i, (stream, (width, height)) in enumerate(zip(streams, sizes, strict=True)):
            writer.append([Sample(stream, height, width, (i,))])
    return Beton(path)


def known(path: Path, streams: list[bytes]) -> Beton:
    """A beton of JPEGs with tiles and their manifest, opened as a loader does."""
    beton = beton_of(path, streams)
    write_manifest(path, how="tiles")
    beton.require_checksums()
    assert beton.has_tiles.all()
    return beton


@pytest.fixture(scope="module")
def samplings(tmp_path_factory: pytest.TempPathFactory) -> Beton:
    """An image with tiles of each sampling."""
    streams = [with_tiles(sampled(noise(i), kind)) for i, kind in enumerate(SAMPLINGS)]
    return known(tmp_path_factory.mktemp("samplings") / "a.beton", streams)


def decode(beton: Beton, i: int, scale: int, boxes: np.ndarray | None, fill: int = 0) -> np.ndarray:
    shape = -(-beton.height[i] // scale), -(-beton.width[i] // scale), 3
    canvas = np.full(shape, fill, np.uint8)
    decoder = Decoder(int(beton.records[i, 1]))
    if boxes is None:
        assert beton.try_decode(np.array([i]), canvas[None], decoder, scale) == (-1, "")
    else:
        assert not beton.try_crops(i, canvas, boxes, decoder, scale)
    return canvas


@st.composite
def crops(draw: st.DrawFn) -> np.ndarray:
    """Two crops [2, 4], often with an edge on a border of MCUs or of the image, whole or not."""
    boxes = np.empty((2, 4))
    for v in range(2):
        for k, side in ((0, WIDTH), (1, HEIGHT)):
            edge = st.one_of(
                st.integers(0, side).map(float),
                st.integers(0, side // 8).map(lambda n: 8.0 * n),
                st.floats(0, side),
            )
            low, high = sorted((draw(edge), draw(edge)))
            boxes[v, k], boxes[v, k + 2] = (low, high) if high - low >= 1 else (0.0, side)
    return boxes


@pytest.mark.parametrize("kind", SAMPLINGS)
@settings(max_examples=40)
@given(boxes=crops(), scale=st.sampled_from([1, 1, 2, 4, 8]), fill=st.integers(0, 255))
def test_pixels_of_the_crops(
    samplings: Beton, kind: str, boxes: np.ndarray, scale: int, fill: int
) -> None:
    """Without it chroma is interpolated with neighbours that are not there, up to 42 levels off in
    the outermost column, or a crop shows another image's pixels.
    """
    i = list(SAMPLINGS).index(kind)
    whole, partly = decode(samplings, i, scale, None), decode(samplings, i, scale, boxes, fill)
    for x0, y0, x1, y1 in boxes / scale:
        rows = slice(int(np.floor(y0)), int(np.ceil(y1)))
        columns = slice(int(np.floor(x0)), int(np.ceil(x1)))
        assert np.array_equal(partly[rows, columns], whole[rows, columns])


@pytest.mark.parametrize("kind", SAMPLINGS)
def test_a_small_crop_needs_few_tiles(samplings: Beton, kind: str) -> None:
    """Without it all pixels could be right because the whole image is always decoded."""
    box = np.array([[70.0, 40.0, 120.0, 60.0]] * 2)
    pixels = decode(samplings, list(SAMPLINGS).index(kind), 1, box, fill=77)
    assert (pixels == 77).all(axis=-1).mean() > 0.7


GRIDS = Grid(19, 7, 8, 48, 0), Grid(10, 7, 16, 48, 1)


@given(boxes=crops(), margin=st.integers(0, 1))
def test_rectangles_cover_both_crops_once(boxes: np.ndarray, margin: int) -> None:
    """Without it tiles are decoded twice, or a band between two crops is left out."""
    grid = GRIDS[margin]
    rectangles = np.empty((MOST_RECTANGLES, 4), np.int64)
    covered = np.zeros((grid.rows, grid.columns), int)
    for x0, y0, x1, y1 in rectangles[: rectangles_of(grid, boxes, 1, rectangles)]:
        assert x0 < x1
        assert y0 < y1
        covered[y0:y1, x0:x1] += 1
    assert covered.max() == 1
    for x0, y0, x1, y1 in boxes:
        rows = slice(int(y0 // grid.height), int(-(-y1 // grid.height)))
        columns = slice(int(x0 // grid.width), int(-(-x1 // grid.width)))
        assert covered[rows, columns].all()


def test_markers_must_be_exactly_the_images() -> None:
    """Without it a lost or repeated marker moves every tile behind it."""
    stream = with_tiles(sampled(noise(0), "4:2:0"))
    data = np.frombuffer(stream, np.uint8).copy()
    frame = frame_of(data)
    grid = grid_of(frame)
    starts = np.empty(grid.rows * grid.columns + 1, np.int64)
    assert find_tiles(data, frame.data, starts)
    assert all(stream[end - 2 : end - 1] == b"\xff" for end in starts[1:])
    third = starts[3] - 1
    for value in (0x00, 0xD0, 0xD1, 0xD9, 0xFF, 0xC4):
        other = data.copy()
        other[third] = value
        assert not find_tiles(other, frame.data, starts.copy()), hex(value)
    assert not find_tiles(data, frame.data, np.append(starts, 0))
    assert not find_tiles(data, frame.data, starts[:-1].copy())
    assert not find_tiles(data[: starts[-1] - 2], frame.data, starts.copy())


TOP = np.array([[0.0, 0.0, 40.0, 20.0]] * 2)


@pytest.mark.parametrize("manifest", [True, False])
def test_damage_outside_of_the_crops_is_found(tmp_path: Path, manifest: bool) -> None:
    """Without it a damaged image is replaced in one epoch and used in another, by its crops."""
    path, stream = tmp_path / "a.beton", with_tiles(sampled(noise(0), "4:4:4"))
    beton = known(path, [stream]) if manifest else beton_of(path, [stream])
    canvas, decoder = np.zeros((HEIGHT, WIDTH, 3), np.uint8), Decoder(len(stream))
    assert not beton.try_crops(0, canvas, TOP, decoder)
    last = int(beton.records[0, 0]) + stream.rindex(b"\xff\xd3")
    damage(path, last + 4, b"\xff\xc4\xff\xc4\xff\xc4")
    reason = beton.try_crops(0, canvas, TOP, decoder)
    assert ("not those that were packed" if manifest else "corrupt") in reason


@pytest.mark.parametrize("part", [b"\xff\xd3", b"\xff\xdd", b"\xff\xdb"])
def test_a_record_that_is_no_tiles(tmp_path: Path, part: bytes) -> None:
    """Without it a manifest that says so of any bytes leads to wrong pixels, or out of memory."""
    stream = bytearray(with_tiles(sampled(noise(0), "4:4:4")))
    stream[stream.index(part) + 1] = 0xFE
    beton = known(tmp_path / "a.beton", [bytes(stream)])
    canvas, decoder = np.zeros((HEIGHT, WIDTH, 3), np.uint8), Decoder(len(stream))
    whole = beton.try_decode(np.array([0]), canvas.copy()[None], decoder)
    assert beton.try_crops(0, canvas, TOP, decoder) == whole[1]


@pytest.mark.parametrize("size", [16, 64])
def test_views_are_those_of_the_original(tmp_path: Path, size: int) -> None:
    """Without it the option that packs for speed changes what a run sees. Small views of large
    images are decoded at a part of the size.
    """
    kinds = list(SAMPLINGS)
    streams = [sampled(noise(i, 120 + 40 * i, 520 - 40 * i), kinds[i % 6]) for i in range(9)]
    originals = beton_of(tmp_path / "originals.beton", streams)
    tiles = known(tmp_path / "tiles.beton", [with_tiles(stream) for stream in streams])
    seen = []
    views = ViewConfig(size=size)
    for beton in (originals, tiles):
        options = {"views": views, "seed": 1, "views_of": lambda epoch: views}
        loader = CropLoader(beton, 2, False, **options)  # type: ignore[arg-type]
        batches = [np.arange(5), np.arange(5, 9)]
        seen += [[pixels.clone() for _, pixels in loader.decode(batches, e)] for e in range(4)]
    for one, other in zip(seen[:4], seen[4:], strict=True):
        assert all(map(np.array_equal, one, other))
