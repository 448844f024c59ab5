"""Checking and converting the bytes of one image."""

import io
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipeline.beton import Beton
from pipeline.errors import BadImage, UserError
from pipeline.jpeg import jpeg_header
from tests import ROOT
from tests.pipeline.test_beton_writer import jpeg, ramp
from tests.tools.packing.test_build_dataset import picture
from tools import build_dataset
from tools.packing.images import Storage, pack_image
from tools.packing.read import MAX_BATCH


def test_further_exif_blocks_continue_the_first() -> None:
    """Cameras split long EXIF blocks. Unreadable or further blocks must not rotate the picture."""
    exif = Image.Exif()
    exif[0x0112] = 6
    stream = io.BytesIO()
    picture().save(stream, "JPEG", exif=exif)
    data = stream.getvalue()
    body = b"Exif\0\0junk"
    block = b"\xff\xe1" + (len(body) + 2).to_bytes(2) + body
    end = data.index(b"\xff\xdb")  # of the first block
    header = jpeg_header(data[:end] + block + data[end:])
    assert header is not None
    assert header.orientation == 6


def with_xmp(orientation: int, exif: Image.Exif | None = None) -> bytes:
    """A JPEG with an orientation in its XMP block, and in an EXIF block if `exif` is given."""
    stream = io.BytesIO()
    xmp = f'<x:xmpmeta><rdf:Description tiff:Orientation="{9 - orientation}"/></x:xmpmeta>'
    picture().save(stream, "JPEG", xmp=xmp.encode(), **({"exif": exif} if exif else {}))
    return stream.getvalue()


@given(orientation=st.integers(1, 8), big_endian=st.booleans(), tags=st.integers(0, 3))
def test_orientation_is_read_as_pillow_reads_it(
    orientation: int, big_endian: bool, tags: int
) -> None:
    """Training would see rotated images if a rotation were missed."""
    exif = Image.Exif()
    exif.endian = ">" if big_endian else "<"
    for tag in (0x010E, 0x010F, 0x0131)[:tags]:
        exif[tag] = "text"
    exif[0x0112] = orientation
    stream = io.BytesIO()
    picture().save(stream, "JPEG", exif=exif)
    for data in (stream.getvalue(), with_xmp(orientation, exif), with_xmp(orientation)):
        header = jpeg_header(data)
        assert header is not None
        assert header.orientation == Image.open(io.BytesIO(data)).getexif().get(0x0112, 1)
        assert (header.width, header.height, header.components) == (64, 48, 3)


@given(data=st.binary(max_size=64), cut=st.integers(0, 700))
def test_the_header_parser_never_fails_otherwise(data: bytes, cut: int) -> None:
    """An IndexError on garbage would end the packing of a million files."""
    for garbage in (b"\xff\xd8\xff" + data, jpeg(ramp(8, 8))[:cut] + data):
        try:
            jpeg_header(garbage)
        except BadImage as error:
            assert "header" in str(error)


@pytest.mark.parametrize("rest", [b"\0", b"\0" * 4096, jpeg(ramp(8, 8)) + b"\0\0", b"MotionPhoto"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 2}])
def test_bytes_after_the_image_are_kept(rest: bytes, options: dict[str, Any]) -> None:
    """Padding, previews and video after the image are no damage; libjpeg does not read them."""
    stream = io.BytesIO()
    picture(200, 300).save(stream, "JPEG", quality=95, **options)
    whole = stream.getvalue()
    assert pack_image(whole + rest, Storage()).data == whole + rest
    with pytest.raises(BadImage, match="end-of-image"):
        pack_image(whole[:-40], Storage())


def test_a_huge_claim_is_refused_before_memory_is_taken() -> None:
    """A header of a few bytes can declare 65,500 x 65,500 pixels."""
    stream = bytearray(jpeg(ramp(8, 8)))
    position = stream.index(b"\xff\xc0")
    stream[position + 5 : position + 9] = (65500).to_bytes(2) * 2
    with pytest.raises(BadImage, match="65500x65500 pixels: 4,290,250,000; the limit"):
        pack_image(bytes(stream), Storage())
    bomb = io.BytesIO()
    Image.new("1", (20000, 20000)).save(bomb, "PNG")
    with pytest.raises(BadImage, match="20000x20000 pixels: 400,000,000; the limit"):
        pack_image(bomb.getvalue(), Storage())


def test_a_side_beyond_the_format() -> None:
    """65,536 would be stored as 0."""
    stream = io.BytesIO()
    Image.new("L", (65536, 1)).save(stream, "PNG")
    with pytest.raises(BadImage, match="a side of 65536 pixels; 65535 can be stored"):
        pack_image(stream.getvalue(), Storage())
    assert pack_image(stream.getvalue(), Storage("raw", 1000)).width == 1000


def test_memory_of_packing_is_bounded(tmp_path: Path) -> None:
    """Without it a batch of small images that ends in large ones takes them all at once: workers ×
    (30 bytes a pixel + 2 × (16 MiB + the stored image)) is what docs/datasets.md promises.
    """
    workers, large, width, height = 2, 40, 2000, 1500
    stored = 3 * width * height
    root = tmp_path / "in"
    root.mkdir()
    for i in range(64):
        picture(8, 8).save(root / f"a{i:02}.png")
    Image.new("RGB", (width, height), "red").save(root / "b00.png", compress_level=1)
    for i in range(1, large):
        (root / f"b{i:02}.png").hardlink_to(root / "b00.png")
    code = """
import resource, sys
from tools import build_dataset
peak = lambda: 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
root, out, workers = sys.argv[1:]
options = ["--workers", workers, "--force"]
build_dataset.main(["list", "--list", f"{root}/few.txt", "--root", root, "--out", out, *options])
before = peak()
build_dataset.main(["folder", "--root", root, "--out", out, *options])
print(peak() - before)
"""
    (root / "few.txt").write_text("a00.png\na01.png\n")
    done = subprocess.run(
        [sys.executable, "-c", code, root, tmp_path / "o.beton", str(workers)],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    taken = int(done.stdout.split()[-1])
    assert taken < workers * (30 * width * height + 2 * (MAX_BATCH + stored))
    assert large * stored > 1.5 * taken, "not red where all large images are in memory"


def test_limits_are_options(tmp_path: Path) -> None:
    """Without it whoever has larger scans cannot pack them, and nobody can be stricter."""
    root = tmp_path / "in"
    root.mkdir()
    picture().save(root / "a.png")
    with (root / "b.jpg").open("wb") as file:
        file.truncate(900_000_000)  # sparse
    with zipfile.ZipFile(root / "c.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb.jpg", bytes(2_000_000))
    out = ["--out", str(tmp_path / "o.beton"), "--root", str(root)]
    with pytest.raises(UserError) as error:
        build_dataset.main(["folder", *out, "--max-pixels", "3071", "--max-bytes", "1MB"])
    for line in (
        "a.png: 64x48 pixels: 3,072; the limit is 3,071",
        "b.jpg: a file of 900,000,000 bytes; the limit is 1,000,000",
        "c.zip/bomb.jpg: in the zip file: damaged, or larger than 1,000,000 bytes",
    ):
        assert line in str(error.value)
    (root / "b.jpg").unlink()
    (root / "c.zip").unlink()
    build_dataset.main(["folder", *out, "--max-pixels", "3072"])
    assert len(Beton(tmp_path / "o.beton")) == 1
