"""The ids of a label map do not depend on how a program has stored them."""

import io
import struct
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from evaluation.datasets.label_maps import VOID, IdReader, table_of
from evaluation.datasets.stored_ids import voc_colours
from pipeline.errors import UserError
from pipeline.png import SIGNATURE

SHAPE = (6, 9)
COLOURS = [0, 0, 0, 200, 30, 30, 30, 200, 30, 30, 30, 200]


def grid(*values: int) -> np.ndarray:
    """uint8 [6, 9] of these values in turn."""
    return np.resize(np.array(values, np.uint8), SHAPE)


def chunk(kind: bytes, body: bytes) -> bytes:
    crc = struct.pack(">I", zlib.crc32(kind + body))
    return struct.pack(">I", len(body)) + kind + body + crc


def png(values: np.ndarray, bits: int, colour: int = 0, palette: Iterable[int] = ()) -> bytes:
    """A PNG of the numbers [H, W] or [H, W, C] in as many bits, as Pillow cannot write it."""
    height, width = values.shape[:2]
    samples = values.reshape(height, -1).astype(">u2")
    planes = np.unpackbits(samples.view(np.uint8).reshape(*samples.shape, 2), axis=2)
    packed = np.packbits(planes[..., 16 - bits :].reshape(height, -1), axis=1)
    head = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    plte = chunk(b"PLTE", bytes(palette)) if palette else b""
    rows = b"".join(b"\0" + row.tobytes() for row in packed)
    data = chunk(b"IDAT", zlib.compress(rows))
    return SIGNATURE + chunk(b"IHDR", head) + plte + data + chunk(b"IEND", b"")


def saved(image: Image.Image, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG", **options)
    return out.getvalue()


def coloured(ids: np.ndarray, palette: list[int]) -> Image.Image:
    image = Image.fromarray(ids)
    image.putpalette(palette)
    return image


def greys(values: Iterable[int]) -> list[int]:
    return [v for v in values for _ in range(3)]


def reader(classes: int | None = 12, **more: Any) -> IdReader:
    names = None if classes is None else [f"class {i}" for i in range(classes)]
    return IdReader(names, table_of(range(classes or VOID), [VOID]), **more)


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., np.ndarray]:
    def read_bytes(data: bytes, by: IdReader | None = None) -> np.ndarray:
        path = tmp_path / "label.png"
        path.write_bytes(data)
        by = by or reader()
        by.check_header(path, SHAPE[::-1])
        return by.read(path, *SHAPE)

    return read_bytes


Read = Callable[..., np.ndarray]
FOUR, GAPS = grid(0, 1, 2, 3), grid(0, 7, 11, 255)


def gaps_in_a_palette(order: list[int]) -> bytes:
    """`GAPS` as an optimiser stores it: a palette of the greys in use, in any order."""
    index = np.argsort(order)[np.searchsorted(np.sort(order), GAPS)]
    return png(index, 2, 3, greys(order))


STORED: dict[str, tuple[np.ndarray, bytes]] = {
    "grey": (GAPS, saved(Image.fromarray(GAPS))),
    "grey, optimised": (GAPS, saved(Image.fromarray(GAPS), optimize=True)),
    "16-bit grey": (FOUR, saved(Image.fromarray(FOUR.astype(np.uint16)))),
    "16-bit grey of 8-bit greys": (GAPS, saved(Image.fromarray(GAPS.astype(np.uint16) * 257))),
    "RGB": (GAPS, saved(Image.merge("RGB", [Image.fromarray(GAPS)] * 3))),
    "RGBA": (GAPS, saved(Image.fromarray(GAPS).convert("RGBA"))),
    "LA": (GAPS, saved(Image.fromarray(GAPS).convert("LA"))),
    "palette of colours": (FOUR, saved(coloured(FOUR, COLOURS))),
    **{
        f"palette of colours, {bits} bits": (FOUR, saved(coloured(FOUR, COLOURS), bits=bits))
        for bits in (2, 4, 8)
    },
    "palette of colours, optimised": (FOUR, saved(coloured(FOUR, COLOURS), optimize=True)),
    "palette of all greys": (GAPS, saved(Image.fromarray(GAPS).convert("P"))),
    "palette of quantised greys": (GAPS, saved(Image.fromarray(GAPS).quantize(4))),
    "palette of the greys in use": (GAPS, gaps_in_a_palette([0, 7, 11, 255])),
    "the same, by frequency": (GAPS, gaps_in_a_palette([11, 0, 255, 7])),
    "black palette": (FOUR, saved(coloured(FOUR, [0] * 12))),
    "palette of one grey": (grid(255), png(grid(0), 1, 3, greys([255]))),
    "trimap in a palette": (grid(0, 1, 2), png(grid(0, 1, 2), 2, 3, greys([0, 128, 255]))),
    "1-bit grey of zeros": (grid(0), saved(Image.fromarray(grid(0) > 0))),
    "2-bit grey": (FOUR, png(FOUR, 2)),
    "4-bit grey": (grid(0, 5, 11), png(grid(0, 5, 11), 4)),
    "4-bit grey of 0 and 255": (grid(0, 255), png(grid(0, 15), 4)),
}


@pytest.mark.parametrize("how", STORED)
def test_ids_do_not_depend_on_the_storage(how: str, read: Read) -> None:
    """Without it the ids change when an optimiser, ImageMagick, OpenCV or MATLAB saves the file."""
    ids, data = STORED[how]
    np.testing.assert_array_equal(read(data), ids)


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_bits_that_fit_one_reading_only(depth: int, read: Read) -> None:
    """Without it maps of few classes are refused also where 255 has no meaning."""
    ids = grid(*range(1 << depth))
    by = IdReader(["x"] * 16, table_of(range(16), []))
    np.testing.assert_array_equal(read(png(ids, depth), by), ids)


def test_interlaced_maps(read: Read) -> None:
    """Without it the greys of an interlaced file could be spread in another way."""
    passes = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2))
    rows = b""
    for top, left, down, right in (*passes, (1, 0, 2, 1)):
        for row in FOUR[top::down, left::right]:
            if len(row):
                bits = np.unpackbits(row[:, None], axis=1)[:, 6:].ravel()
                rows += b"\0" + np.packbits(bits).tobytes()
    head = struct.pack(">IIBBBBB", *SHAPE[::-1], 2, 0, 0, 0, 1)
    data = chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    np.testing.assert_array_equal(read(SIGNATURE + chunk(b"IHDR", head) + data), FOUR)


REFUSED: dict[str, tuple[int | None, bytes, str]] = {
    "1 bit": (2, png(grid(0, 1), 1), "1-bit grey, which can mean the ids 0 1 or 0 255: store"),
    "2 bits": (None, png(FOUR, 2), "2-bit grey, which can mean the ids 0 1 2 3 or 0 85 170 255: "),
    "4 bits": (16, png(grid(0, 15), 4), "4-bit grey, which can mean the ids 0 15 or 0 255: "),
    "a mask": (2, png(grid(0, 1), 1, 3, greys([0, 255])), "palette of greys, which can mean"),
    "a mask upside down": (2, png(grid(0, 1), 1, 3, greys([255, 0])), "ids 0 1 or 255 0: store"),
    "an unknown grey": (12, png(grid(0, 1), 1, 3, greys([0, 200])), "class id 200 is not in"),
    "colours": (12, saved(coloured(FOUR, COLOURS).convert("RGB")), "pixels are RGB colours"),
    "transparent": (12, saved(Image.new("LA", SHAPE[::-1], (1, 9))), "partly transparent"),
    "wide channels": (12, png(np.full((*SHAPE, 3), 3), 16, 2), "its pixels are 16-bit RGB"),
    "wide grey": (12, saved(Image.fromarray(FOUR.astype(np.uint16) * 300)), "class id 300 is"),
}


@pytest.mark.parametrize("how", REFUSED)
def test_what_can_mean_two_maps_is_refused(how: str, read: Read) -> None:
    """Without it a guess decides which ids are scored."""
    classes, data, message = REFUSED[how]
    with pytest.raises(UserError, match=rf"label\.png: .*{message}"):
        read(data, reader(classes))


def test_a_photograph_is_no_label_map(tmp_path: Path) -> None:
    """Without it a JPEG under the name of a PNG gives ids that its compression has blurred."""
    path = tmp_path / "label.png"
    Image.fromarray(FOUR).save(path, "JPEG")
    with pytest.raises(UserError, match="not a label map: a JPEG file, not a PNG"):
        reader().check_header(path, SHAPE[::-1])


def test_vocs_colours_say_the_ids(read: Read) -> None:
    """Without it an optimiser that sorts VOC's palette exchanges its classes."""
    ids = grid(0, 7, 15, 255)
    colours = voc_colours()
    assert colours[[1, 15, 20, 255]].tolist() == [
        [128, 0, 0], [192, 128, 128], [0, 64, 128], [224, 224, 192],
    ]  # fmt: skip
    official = saved(coloured(ids, colours.ravel().tolist()))
    order = [15, 0, 255, 7]
    index = np.argsort(order)[np.searchsorted(np.sort(order), ids)]
    sorted_ = png(index, 2, 3, colours[order].ravel().tolist())
    drawn = saved(coloured(ids, colours.ravel().tolist()).convert("RGB"))
    for data in (official, sorted_, drawn, saved(Image.fromarray(ids))):
        by = reader(21, colours=colours)
        np.testing.assert_array_equal(read(data, by), ids)
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(official))), ids)
    black = saved(coloured(FOUR, [0] * 12))
    np.testing.assert_array_equal(read(black, reader(21, colours=colours)), FOUR)


def test_palettes_of_a_set_agree(tmp_path: Path) -> None:
    """Without it the ids of maps whose palettes an optimiser has sorted are scored as they come."""
    by = reader()
    for name, palette in (("a", COLOURS), ("b", COLOURS), ("c", COLOURS[::-1])):
        (tmp_path / f"{name}.png").write_bytes(saved(coloured(FOUR, palette)))
    for name in "ab":
        by.read(tmp_path / f"{name}.png", *SHAPE)
    with pytest.raises(UserError, match=r"c\.png: palette colour 0 is .*, in a\.png .*renumbered"):
        by.read(tmp_path / "c.png", *SHAPE)
