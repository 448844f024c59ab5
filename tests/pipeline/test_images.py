"""The one reader of image files: its pixels, its limits, and its words for damaged files."""

import io
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from pipeline.beton import Beton
from pipeline.errors import BadImage, UserError
from pipeline.images import (
    LIMITS,
    SLOW_PIXELS,
    Limits,
    load_rgb,
    load_size,
    open_stored,
    read_file,
    read_rgb,
)
from pipeline.orientation import exif_orientation
from tests import ROOT
from tests.fuzz.damage import damage
from tests.helpers.picture_files import (
    HEIGHT,
    WIDTH,
    chunk,
    exif,
    files,
    saved,
    shown,
    sixteen,
    stored_for,
    with_chunks,
)
from tools import build_dataset

FILES = files()
LOSSY = (".jpg", ".avif", ".jp2")


@pytest.mark.parametrize("store", ["original", "raw"])
def test_evaluation_reads_the_pixels_that_packing_stores(tmp_path: Path, store: str) -> None:
    """Without it the network is evaluated, or trained to detect, on other pixels than it was
    pre-trained on: turned, or white where 16 bits became 8.
    """
    (tmp_path / "in").mkdir()
    for name, data in FILES.items():
        (tmp_path / "in" / name).write_bytes(data)
    out = tmp_path / "o.beton"
    options = ["--root", f"{tmp_path}/in", "--out", str(out), "--workers", "1", "--store", store]
    build_dataset.main(["folder", *options])
    beton = Beton(out)
    assert len(beton) == len(FILES)
    for i in range(len(beton)):
        path = tmp_path / "in" / beton.name(i)
        pixels = load_rgb(path)
        np.testing.assert_array_equal(pixels, beton.decode(i), beton.name(i))
        assert load_size(path) == (pixels.shape[1], pixels.shape[0]), path


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("orientation")])
def test_pictures_are_read_upright(name: str) -> None:
    """Without it a phone's photographs lie on their side. Every viewer turns them."""
    pixels = read_rgb(FILES[name]).astype(int)
    assert pixels.shape == (HEIGHT, WIDTH, 3)
    error = np.abs(pixels - np.asarray(shown())).mean()
    assert error < (12 if name.endswith(LOSSY) else 0.01)


def test_sixteen_bits_keep_their_upper_eight() -> None:
    """Without it everything brighter than 255 of 65,535 is white."""
    grey = np.repeat((sixteen() >> 8).astype(np.uint8)[..., None], 3, axis=2)
    for name in ("sixteen.png", "sixteen.tif", "sixteen.ppm", "sixteen.jp2"):
        np.testing.assert_array_equal(read_rgb(FILES[name]), grey, name)
    np.testing.assert_array_equal(read_rgb(FILES["wide.png"]), np.asarray(shown()))


def test_what_has_no_known_range_is_refused() -> None:
    """Without it a height map in metres becomes white or black, without a word."""
    for mode in ("I", "F"):
        with pytest.raises(BadImage, match="32-bit pixels, whose range is not known"):
            read_rgb(saved(Image.new(mode, (8, 8)), "TIFF"))


def test_png_metadata_decide_nothing() -> None:
    """Without it a picture with a workflow, a profile or a bomb in its text is refused, and each
    reader finds another orientation.
    """
    png, pixels = FILES["rgb.png"], np.asarray(shown())
    bomb = zlib.compress(bytes(64 << 20), 9)
    metadata = {
        "a long text": chunk(b"zTXt", b"workflow\0\0" + zlib.compress(b"x" * (2 << 20))),
        "many texts": chunk(b"tEXt", b"k\0" + b"x" * (1 << 20)) * 80,
        "a bomb": chunk(b"zTXt", b"Raw profile type exif\0\0" + bomb),
        "a bomb for a profile": chunk(b"iCCP", b"icc\0\0" + bomb),
        "no profile": chunk(b"iCCP", b"icc\0\7"),
        "damaged exif": chunk(b"eXIf", b"II*\0\xff\xff\xff\xff"),
        "a wrong checksum": chunk(b"tEXt", b"k\0v")[:-1] + b"?",
        "no frames": chunk(b"acTL", bytes(8)),
        "a billion frames": chunk(b"acTL", struct.pack(">II", 10**9, 0)),
        "a second header of text": chunk(b"iTXt", b"XML:com.adobe.xmp"),
    }
    for what, extra in metadata.items():
        np.testing.assert_array_equal(read_rgb(with_chunks(png, extra)), pixels, what)
        np.testing.assert_array_equal(np.asarray(open_stored(with_chunks(png, extra))), pixels)
    sideways = saved(stored_for(6), "PNG")
    hexadecimal = b"\nexif\n  9\n" + exif(6).hex().encode()
    for extra in (
        chunk(b"eXIf", exif(6).removeprefix(b"Exif\0\0")),
        chunk(b"iTXt", b'XML:com.adobe.xmp\0\0\0\0\0<a tiff:Orientation="6"/>'),
        chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(hexadecimal)),
    ):
        np.testing.assert_array_equal(read_rgb(with_chunks(sideways, extra)), pixels)


def test_jpeg_metadata_decide_nothing() -> None:
    """Without it a photograph is refused, or stays on its side, for a malformed date in its EXIF
    block, which browsers skip.
    """
    photo = saved(stored_for(6), "JPEG", quality=95)
    good = [(0x0112, 3, 1, struct.pack("<HH", 6, 0))]
    far = struct.pack("<I", 0xFFFFFFFF)
    odd = {
        "resolution is text": (0x011A, 2, 3, b"72\0\0"),
        "resolution is longs": (0x011A, 4, 2, struct.pack("<I", 60)),
        "unit out of range": (0x0128, 4, 1, far),
        "date is a float": (0x0132, 11, 1, bytes(4)),
        "model points nowhere": (0x0110, 9, 2, far),
        "gps is a number": (0x8825, 6, 2, far),
        "an unknown type": (0x0131, 255, 0xFFFF, far),
    }
    for what, entry in odd.items():
        entries = sorted([*good, entry])
        tiff = b"II*\0" + struct.pack("<IH", 8, len(entries))
        tiff += b"".join(struct.pack("<HHI", *one[:3]) + one[3] for one in entries) + bytes(68)
        body = b"Exif\0\0" + tiff
        data = photo[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + photo[2:]
        error = np.abs(read_rgb(data).astype(int) - np.asarray(shown())).mean()
        assert error < 12, what
    for kind, body in ((b"\xe2", b"MPF\0" + bytes(9)), (b"\xed", b"Photoshop 3.0\0" + bytes(3))):
        data = photo[:2] + b"\xff" + kind + struct.pack(">H", len(body) + 2) + body + photo[2:]
        np.testing.assert_array_equal(read_rgb(data), read_rgb(photo))


def test_an_orientation_that_cannot_be_read_is_none() -> None:
    """Without it a damaged block turns a picture, or ends the command."""
    for block in (b"", b"II*\0", b"II*\0" + bytes(4), b"MM\0*\xff\xff\xff\xff", exif(6)[:20]):
        assert exif_orientation(block) == 0


# --- limits --------------------------------------------------------------------------------------


def header_of(name: str, width: int, height: int) -> bytes:
    """A small file whose header declares a size."""
    data = FILES[name]
    old, new = struct.pack(">II", WIDTH, HEIGHT), struct.pack(">II", width, height)
    if name.endswith(".jp2"):
        old, new = struct.pack(">II", HEIGHT, WIDTH), struct.pack(">II", height, width)
    if name.endswith(".ppm"):
        old, new = b"%d %d" % (WIDTH, HEIGHT), b"%d %d" % (width, height)
    if name.endswith((".bmp", ".gif")):
        form = "<ii" if name.endswith(".bmp") else "<HH"
        old, new = struct.pack(form, WIDTH, HEIGHT), struct.pack(form, width, height)
    assert old in data
    return data.replace(old, new, 1)


@pytest.mark.parametrize("name", ["rgb.png", "rgb.jp2", "rgb.ppm", "rgb.bmp", "plain.gif"])
def test_declared_pixels_are_bounded(name: str, tmp_path: Path) -> None:
    """Without it a file of some bytes takes gigabytes, and a minute."""
    data = header_of(name, 13_000, 13_000)
    with pytest.raises(BadImage, match="13000x13000 pixels: 169,000,000; the limit is 100,000,000"):
        read_rgb(data)
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=rf"{name}: 13000x13000 pixels.*limit is 100,000,000"):
        load_rgb(tmp_path / name)
    with pytest.raises(BadImage, match="the limit is 959"):
        read_rgb(FILES[name], Limits(max_pixels=HEIGHT * WIDTH - 1))
    assert read_rgb(FILES[name], Limits(max_pixels=HEIGHT * WIDTH)).shape == (HEIGHT, WIDTH, 3)


def test_the_stream_of_a_jpeg_2000_is_bounded_too() -> None:
    """Without it a modest box hides a stream of billions of pixels."""
    data = FILES["rgb.jp2"]
    at = data.index(b"\xff\x4f\xff\x51") + 8
    with pytest.raises(BadImage, match="60000x60000 pixels"):
        read_rgb(data[:at] + struct.pack(">II", 60000, 60000) + data[at + 8 :])


def test_bytes_are_bounded(tmp_path: Path) -> None:
    """Without it a sparse file of 900 MB takes as much memory in each thread."""
    with (tmp_path / "a.jpg").open("wb") as file:
        file.write(FILES["rgb.jpg"])
        os.ftruncate(file.fileno(), 900_000_000)
    for read in (load_rgb, load_size):
        with pytest.raises(
            UserError, match=r"a\.jpg: a file of 900,000,000 bytes; the limit is 100,000,000"
        ):
            read(tmp_path / "a.jpg")
    with pytest.raises(BadImage, match="the limit is 10"):
        read_file(tmp_path / "a.jpg", Limits(max_bytes=10))
    with pytest.raises(BadImage, match="the limit is 10"):
        read_rgb(FILES["rgb.png"], Limits(max_bytes=10))


def test_slow_files_are_bounded() -> None:
    """Without it Pillow's Python loops read a file for minutes, or take gigabytes for its lists."""
    side = int(SLOW_PIXELS**0.5) + 1
    with pytest.raises(BadImage, match="PPM of decimal numbers or an odd maximum; the limit"):
        read_rgb(b"P5 %d %d 127\n" % (side, side) + bytes(side * side))
    strips = struct.pack("<4sIHHHII", b"II*\0", 8, 1, 273, 4, 2_000_000, 8)
    with pytest.raises(BadImage, match="a TIFF of 2,000,000 strips; the limit is 1,000,000"):
        read_rgb(strips + bytes(100))


@pytest.mark.parametrize("shift", range(12))
def test_pixels_of_a_tiff_are_no_directory(shift: int, tmp_path: Path) -> None:
    """Without it a picture is refused for millions of strips that its colours seem to list."""
    entry = struct.pack("<HHII", 273, 4, 2_000_000, 8)
    pixels = np.frombuffer((entry * 17)[shift : shift + 192], np.uint8).reshape(8, 8, 3)
    Image.fromarray(pixels).save(tmp_path / "a.tif")
    assert (load_rgb(tmp_path / "a.tif") == pixels).all()
    with pytest.raises(BadImage, match="more than 200,000 chunks"):
        read_rgb(with_chunks(FILES["rgb.png"], chunk(b"tEXt", b"") * 200_000))
    gif = saved(Image.new("L", (1, 1)), "GIF")
    frame = gif[gif.rindex(b",") : -1]
    assert read_rgb(gif[:-1] + frame * 1_000_000 + b";").shape == (1, 1, 3)


# --- damage --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rgb.avif", "rgb.jp2", "rgb.tif", "rgb.webp", "rgb.png"])
def test_any_error_of_the_library_is_one_line(name: str, tmp_path: Path) -> None:
    """Without it a damaged picture ends in a traceback, or in prose that names no file."""
    random = np.random.default_rng(0)
    path = tmp_path / name
    for _ in range(40):
        path.write_bytes(damage(FILES[name], random))
        for read in (load_rgb, load_size):
            try:
                read(path)
            except UserError as error:
                assert str(error).startswith(f"{path}: ")
                assert str(error).isprintable()


def test_programs_are_not_run_for_a_picture(tmp_path: Path) -> None:
    """Without it a PostScript file called .jpg is given to Ghostscript."""
    with pytest.raises(BadImage, match="not an image of a known format"):
        read_rgb(saved(shown(), "EPS"))


def test_warnings_do_not_reach_the_terminal(tmp_path: Path) -> None:
    """Without it Pillow's warnings stand between the lines of a command, and name no file."""
    tiff = bytearray(FILES["sixteen.tif"])
    (tmp_path / "a.tif").write_bytes(tiff[: len(tiff) - 9])
    exif_cut = saved(shown(), "WEBP", exif=exif(6)[:-9])
    (tmp_path / "b.webp").write_bytes(exif_cut)
    code = "from pathlib import Path; from pipeline.images import load_rgb\n"
    code += "for path in sorted(Path(__import__('sys').argv[1]).iterdir()):\n"
    code += "    try: load_rgb(path)\n    except ValueError: pass"
    done = subprocess.run(
        [sys.executable, "-W", "default", "-c", code, tmp_path],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "PIL" not in done.stderr, done.stderr


def test_memory_of_a_picture() -> None:
    """Without it the documented bound, 30 bytes a pixel and the file, is a guess."""
    code = """
import io, resource, sys
from PIL import Image
from pipeline.images import read_rgb
stream = io.BytesIO()
Image.new("RGBA", (200, 150)).save(stream, sys.argv[1])
read_rgb(stream.getvalue())
Image.new("RGBA", (4000, 3000)).convert(sys.argv[2]).save(stream, sys.argv[1])
peak = lambda: 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
read_rgb(stream.getvalue())
print((peak() - before) / 12e6)
"""
    for form, mode in (("PNG", "RGBA"), ("WEBP", "RGBA")):
        done = subprocess.run(
            [sys.executable, "-c", code, form, mode],
            cwd=ROOT, capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert float(done.stdout) < 30, form
    assert LIMITS.max_pixels == LIMITS.max_bytes == 100_000_000


def test_zero_is_white_in_a_grey_tiff_of_any_depth(tmp_path: Path) -> None:
    """Without it scans of 16 bits are negatives, while those of 8 bits are not."""
    values = np.array([[0, 20_000], [40_000, 65_535]], np.uint16)
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[262] = 0
    Image.fromarray(values).save(tmp_path / "a.tif", tiffinfo=tags)
    with Image.open(tmp_path / "a.tif") as stored:
        assert stored.tag_v2[262] == 0 and stored.mode == "I;16"
    expected = 255 - (values >> 8)
    assert np.array_equal(load_rgb(tmp_path / "a.tif")[..., 0], expected)


def test_a_label_map_that_is_turned_is_refused(tmp_path: Path) -> None:
    """Without it its labels lie upside down on a photograph with the same orientation."""
    tag = Image.Exif()
    tag[0x0112] = 3
    stream = io.BytesIO()
    Image.fromarray(np.eye(4, dtype=np.uint8)).save(stream, "PNG", exif=tag)
    with pytest.raises(BadImage, match="orientation 3"):
        open_stored(stream.getvalue())
