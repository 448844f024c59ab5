"""Each JPEG decodes as if it were alone, whatever was decoded before it, by every reader."""

import io
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.beton import Beton, CorruptRecord
from pipeline.beton_writer import BetonWriter, Sample
from pipeline.decode import CanvasLoader, CropLoader, RecordLoader
from pipeline.errors import BadImage
from pipeline.images import read_rgb
from pipeline.jpeg_parts import HUFFMAN, QUANTISATION, SCANS, missing_parts
from pipeline.turbojpeg import Decoder
from pipeline.views import ViewConfig
from tests.helpers import jpegs
from tests.helpers.jpegs import HEIGHT, WIDTH, jpeg, pool, without
from tools.packing.check import verify
from tools.packing.images import Storage, pack_image

POOL = pool()
NAMES = sorted(POOL)


def write(path: Path, names: list[str]) -> Beton:
    with BetonWriter(path, len(names)) as writer:
        writer.append([Sample(POOL[n], HEIGHT, WIDTH, (i,)) for i, n in enumerate(names)])
    return Beton(path)


def pillow(data: bytes) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(data)).convert("RGB"))


@pytest.mark.parametrize("name", NAMES)
def test_alone_a_stream_is_refused_or_has_pillows_pixels(tmp_path: Path, name: str) -> None:
    """Without it the order of the other tests could be equally wrong for all."""
    beton = write(tmp_path / "one.beton", [name])
    if name.startswith("bad"):
        with pytest.raises(CorruptRecord):
            beton.decode(0)
    else:
        assert np.array_equal(beton.decode(0), pillow(POOL[name]))


@pytest.mark.parametrize("tiles", [False, True])
def test_a_sampling_that_turbojpeg_has_no_number_for(tmp_path: Path, tiles: bool) -> None:
    """Without it packing takes an image, also with --check decode, that training refuses."""
    packed = pack_image(jpegs.upright(), Storage(tiles=tiles))
    assert isinstance(packed.data, bytes)
    with BetonWriter(tmp_path / "one.beton", 1) as writer:
        writer.append([Sample(packed.data, packed.height, packed.width, (0,))])
    assert np.array_equal(Beton(tmp_path / "one.beton").decode(0), pillow(jpegs.upright()))


def early_end() -> bytes:
    """A progressive stream that ends after its first scan."""
    data = jpeg(3, progressive=True)
    first = data.index(b"\xff\xda")
    return data[: data.index(b"\xff\xc4", first)] + b"\xff\xd9"


def canvases(beton: Beton, workers: int) -> RecordLoader:
    return CanvasLoader(beton, workers, pin=False, on_corrupt="replace")


def crops(beton: Beton, workers: int) -> RecordLoader:
    views = ViewConfig(size=8)
    options = {"views": views, "seed": 1, "views_of": lambda epoch: views}
    return CropLoader(beton, workers, False, "replace", **options)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from(NAMES), min_size=1, max_size=12), st.sampled_from([1, 2]))
def test_order_and_damage_change_no_verdict_and_no_pixel(
    tmp_path_factory: pytest.TempPathFactory, names: list[str], workers: int
) -> None:
    """Without it a handle that has seen a damaged header refuses the good images after it, and a
    stream without its tables gets those of the image before it.
    """
    beton = write(tmp_path_factory.mktemp("order") / "some.beton", [*names, "plain"])
    names = [*names, "plain"]
    bad = {i for i, name in enumerate(names) if name.startswith("bad")}
    everything = np.arange(len(names))
    problems = verify(beton, None, workers).problems
    assert {name for name, _ in problems} == {f"record {i}" for i in bad}
    decoder, canvas = Decoder(int(beton.records[:, 1].max())), np.empty((1, HEIGHT, WIDTH, 3), "u1")
    for i, name in enumerate(names):
        _, reason = beton.try_decode(everything[i : i + 1], canvas, decoder)
        assert bool(reason) == (i in bad)
        if not reason:
            assert np.array_equal(canvas[0], pillow(POOL[name]))
    for reader in (canvases, crops):
        loader = reader(beton, workers)
        ((which, pixels),) = loader.decode([everything])
        assert set(loader.replacements.known) == bad
        axis = 0 if reader is canvases else 1
        for row, i in enumerate(which.tolist()):
            ((_, alone),) = reader(beton, 1).decode([np.array([i])])
            assert torch.equal(pixels.select(axis, row), alone.select(axis, 0))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(NAMES), min_size=1, max_size=12))
@pytest.mark.parametrize("check", ["structure", "decode"])
def test_packing_judges_each_file_alone(check: str, names: list[str]) -> None:
    """Without it the verdict on a file depends on the files before it in the folder. What is packed
    unchanged decodes to Pillow's pixels; what is converted holds them.
    """
    storage = Storage(check=check)
    for name in names:
        try:
            packed = pack_image(POOL[name], storage)
        except BadImage:
            assert name.startswith("bad")
            continue
        if isinstance(packed.data, bytes):
            assert packed.data == POOL[name] and not missing_parts(packed.data)
        else:
            assert np.array_equal(packed.data, pillow(POOL[name]))


@pytest.mark.parametrize(
    ("stream", "missing"),
    [
        (jpeg, 0),
        (lambda: jpeg(mode="L", progressive=True, optimize=True), 0),
        (lambda: jpeg(mode="CMYK", restart_marker_blocks=1), 0),
        (lambda: jpeg(progressive=True, quality=3), 0),
        (lambda: without(jpeg(), jpegs.QUANTISATION), QUANTISATION),
        (lambda: without(jpeg(), jpegs.HUFFMAN), HUFFMAN),
        (lambda: without(jpeg(progressive=True), jpegs.HUFFMAN), HUFFMAN),
        (lambda: jpegs.moved(jpeg(), jpegs.QUANTISATION), QUANTISATION),
        (lambda: jpegs.moved(jpeg(), jpegs.HUFFMAN), HUFFMAN),
        (lambda: without(jpeg(), jpegs.HUFFMAN, jpegs.QUANTISATION), QUANTISATION | HUFFMAN),
        (early_end, SCANS),
        (lambda: b"", 0),
        (lambda: b"\xff\xd8\xff\xda\xff", 0),
    ],
)
def test_missing_parts_are_found(stream: Callable[[], bytes], missing: int) -> None:
    """Without it packing copies a stream that other readers decode with the last image's tables."""
    assert missing_parts(stream()) == missing


def test_stream_without_tables_is_named_or_made_whole() -> None:
    """Without it the message is Pillow's "broken data stream", or ffcv decodes wrong pixels."""
    with pytest.raises(BadImage, match=r"tables are missing \(Quantization table 0x00"):
        pack_image(without(jpeg(), jpegs.QUANTISATION), Storage())
    packed = pack_image(early_end(), Storage())
    assert packed.how == "converted: scans are missing"
    assert np.array_equal(packed.data, pillow(early_end()))
    packed = pack_image(without(jpeg(7), jpegs.HUFFMAN), Storage())
    assert packed.how == "converted: no Huffman tables"
    assert np.array_equal(packed.data, pillow(jpeg(7)))


BLOCK = b"\0\0\x01\x0a\x0e\0\0\0Image_UTC_Data1500000000000"
TRAILERS = {
    "nothing": b"",
    "Samsung": BLOCK + bytes(range(256)) * 9 + b"SEFHe\0\0\0SEFT",
    "with an end marker inside": BLOCK + b"\1\xff\xd9\2" + b"SEFHe\0\0\0SEFT",
    "with a picture inside": BLOCK + jpeg(8) + b"SEFHe\0\0\0SEFT",
    "with zeros inside": BLOCK + bytes(5000) + b"SEFHe\0\0\0SEFT",
    "a video": b"\0\0\0\x18ftypmp42" + bytes(range(256)) * 9,
}
PICTURES: list[dict[str, Any]] = [
    {}, {"progressive": True}, {"mode": "L"}, {"restart_marker_blocks": 2}, {"quality": 100},
]  # fmt: skip


@pytest.mark.parametrize("trailer", TRAILERS)
@pytest.mark.parametrize("options", PICTURES, ids=str)
def test_a_trailer_in_place_of_the_end_marker(trailer: str, options: dict[str, Any]) -> None:
    """Without it whole photographs of phones are refused as truncated, or copied with a trailer
    that training's decoder refuses.
    """
    whole = jpeg(1, **options)
    packed = pack_image(whole[:-2] + TRAILERS[trailer], Storage())
    assert (packed.data, packed.how) == (whole, "converted: end-of-image marker added")
    after = pack_image(whole + TRAILERS[trailer], Storage())
    assert (after.data, after.how) == (whole + TRAILERS[trailer], "original")
    assert np.array_equal(read_rgb(whole[:-2] + TRAILERS[trailer]), pillow(whole))
    raw = pack_image(whole[:-2] + TRAILERS[trailer], Storage(store="raw"))
    assert np.array_equal(raw.data, pillow(whole))


def test_bytes_of_a_picture_that_look_like_a_trailer() -> None:
    """Without it a progressive JPEG that has such bytes in a scan, as some have, counts as cut
    short where every JPEG is decoded, which --tiles does too, and stops the packing of a set.
    """
    whole = jpeg(1, progressive=True)
    at = whole.rindex(b"\xff\xda")
    other = whole[:at] + b"\xff\xfe\0\x0d" + BLOCK[:11] + whole[at:]  # in a comment, to be sure
    assert pack_image(other, Storage(check="decode")).data == other


def test_frames_of_webcams() -> None:
    """Without it frames of a Motion JPEG that lack their tables and the marker are refused, or one
    that ends within the marker.
    """
    packed = pack_image(without(jpeg(7), jpegs.HUFFMAN)[:-2], Storage())
    assert packed.how == "converted: end-of-image marker added, no Huffman tables"
    assert np.array_equal(packed.data, pillow(jpeg(7)))
    assert pack_image(jpeg(7)[:-1], Storage()).how == "converted: end-of-image marker added"
    with pytest.raises(BadImage):
        pack_image(without(jpeg(7), jpegs.QUANTISATION)[:-2], Storage())


@pytest.mark.parametrize("trailer", TRAILERS)
@pytest.mark.parametrize("options", PICTURES, ids=str)
def test_a_truncated_picture_with_a_trailer_is_refused(
    trailer: str, options: dict[str, Any]
) -> None:
    """Without it the lower part of a picture is grey, or the phone's video as pixels."""
    whole = jpeg(1, **options)
    for cut in [*range(1, 40), *range(40, len(whole) - whole.rindex(b"\xff\xda"), 17)]:
        try:
            packed = pack_image(whole[: -2 - cut] + TRAILERS[trailer], Storage())
        except BadImage:
            continue
        assert np.array_equal(pillow(bytes(packed.data)), pillow(whole)), cut


@pytest.mark.parametrize("workers", [1, 2])
def test_verify_names_only_the_damaged_record(tmp_path: Path, workers: int) -> None:
    """Without it one damaged header makes --verify name nearly all images after it."""
    names = ["plain"] * 64
    names[5] = "bad: a flipped bit in a table"
    problems = verify(write(tmp_path / "x.beton", names), None, workers).problems
    assert [name for name, _ in problems] == ["record 5"]


def test_scans_and_fill_bytes_are_bounded() -> None:
    """Without it a small file holds packing, or a decoding thread, for minutes."""
    whole = jpegs.jpeg(progressive=True)
    last = whole.rindex(b"\xff\xda")
    many = whole[:last] + whole[last:-2] * 600 + whole[-2:]
    with pytest.raises(BadImage, match="more than 500 scans"):
        pack_image(many, Storage())
    pixels = np.empty((jpegs.HEIGHT, jpegs.WIDTH, 3), np.uint8)
    assert "500 scans" in Decoder(0).decompress(many, pixels)
    start = time.process_time()
    with pytest.raises(BadImage):
        pack_image(b"\xff\xd8" + b"\xff" * 20_000_000, Storage())
    assert time.process_time() - start < 2
