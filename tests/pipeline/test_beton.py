"""Reading: the pixels are PIL's, and no damaged record is read as an image."""

import io
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.beton import Beton, CorruptRecord
from pipeline.beton_writer import BetonWriter, Sample
from pipeline.errors import UserError
from pipeline.ffcv_format import HEADER
from pipeline.turbojpeg import Decoder
from tests.helpers.betons import photograph, pil_decode, varied, write_beton
from tests.helpers.manifests import write_manifest


@pytest.fixture(scope="module")
def beton_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_beton(tmp_path_factory.mktemp("beton") / "photos.beton", varied(12))


@pytest.fixture
def damaged(beton_file: Path, tmp_path: Path) -> Path:
    """A copy that the test damages."""
    copy = tmp_path / "damaged.beton"
    copy.write_bytes(beton_file.read_bytes())
    return copy


def test_jpeg_pixels_are_those_of_pil(beton_file: Path) -> None:
    """Breaks with the fast DCT, a wrong stride, BGR, or a wrong record."""
    beton = Beton(beton_file)
    for i in range(len(beton)):
        assert np.array_equal(beton.decode(i), pil_decode(beton_file, beton.records[i]))
    assert beton.index.tolist() == list(range(12))
    assert beton.label is None


def test_raw_pixels_come_back_unchanged(tmp_path: Path) -> None:
    """Breaks if raw records go through the JPEG decoder or lose their shape."""
    images = varied(3)
    beton = Beton(write_beton(tmp_path / "raw.beton", images, mode="raw"))
    for i, image in enumerate(images):
        assert np.array_equal(beton.decode(i), image)


def test_overwritten_record_is_named(damaged: Path) -> None:
    """A corrupt image must never be replaced silently by the one decoded before it."""
    beton = Beton(damaged)
    write_manifest(damaged)
    pointer, size = beton.records[5, :2]
    with damaged.open("r+b") as file:
        file.seek(pointer)
        file.write(bytes(size))
    with pytest.raises(CorruptRecord, match=r"photos/5\.jpg: not a JPEG"):
        beton.decode(5)


def test_jpeg_cut_short_is_refused(damaged: Path) -> None:
    """libjpeg fills the missing rows with grey and only warns. Here this warning is an error."""
    beton = Beton(damaged)
    pointer, size = beton.records[4, :2]
    with damaged.open("r+b") as file:
        file.seek(pointer + size * 2 // 3)
        file.write(bytes(size - size * 2 // 3))
    with pytest.raises(CorruptRecord, match="record 4: the JPEG data are corrupt or cut short"):
        beton.decode(4)


def test_a_few_extra_bytes_are_no_damage(tmp_path: Path) -> None:
    """Some writers pad before the last marker. Packing accepts such files, so reading must too."""
    stream = io.BytesIO()
    Image.fromarray(photograph(3, 40, 56)).save(stream, "JPEG")
    good = stream.getvalue()
    padded = good[:-2] + b"\1\2\3" + good[-2:]
    with BetonWriter(tmp_path / "padded.beton", 2) as writer:
        writer.append([Sample(padded, 40, 56, (0,)), Sample(good, 40, 56, (1,))])
    beton = Beton(tmp_path / "padded.beton")
    canvas = np.empty((2, 40, 56, 3), np.uint8)
    decoder = Decoder(int(beton.records[:, 1].max()))
    assert beton.try_decode(np.array([0, 1]), canvas, decoder) == (-1, "")
    assert np.array_equal(canvas[0], canvas[1])


def test_file_that_shrinks_while_open_is_an_error(damaged: Path) -> None:
    """A memory map would end the process with SIGBUS here."""
    beton = Beton(damaged)
    os.truncate(damaged, int(beton.records[0, 0]) + 10)
    with pytest.raises(CorruptRecord, match="ends before the record does"):
        beton.decode(0)


@pytest.mark.parametrize("size", [0, 3, 24, 1000])
def test_stub_of_a_file_is_refused(damaged: Path, size: int) -> None:
    """An interrupted copy must not be read in part."""
    os.truncate(damaged, size)
    with pytest.raises(UserError, match=r"damaged\.beton"):
        Beton(damaged)


def test_truncated_file_is_refused_on_opening(damaged: Path) -> None:
    """The allocation table is at the end: without it no record can be trusted."""
    os.truncate(damaged, damaged.stat().st_size - 8)
    with pytest.raises(UserError, match="truncated"):
        Beton(damaged)


def test_missing_file_and_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        Beton(tmp_path / "none.beton")
    with pytest.raises(UserError, match="not a file"):
        Beton(tmp_path)


def test_other_version_is_refused(damaged: Path) -> None:
    header = np.fromfile(damaged, HEADER, 1)
    header["version"] = 3
    with damaged.open("r+b") as file:
        file.write(header.tobytes())
    with pytest.raises(UserError, match=r"version 2 \(its header says 3\)"):
        Beton(damaged)


def test_bytes_after_the_end_are_refused(damaged: Path) -> None:
    """Such bytes show two joined files, or an old longer file that was only partly overwritten."""
    with damaged.open("ab") as file:
        file.write(bytes(24))
    with pytest.raises(UserError, match="24 bytes after its end"):
        Beton(damaged)


@pytest.mark.parametrize(
    ("pointer", "reason"),
    [
        (lambda beton: 24, "inside the header"),
        (lambda beton: beton.data - 1, "inside the metadata"),
        (lambda beton: beton.records[3, 0] + 1, "over another image"),
        (lambda beton: beton.records[3, 0], "the same as another image's"),
        (lambda beton: beton.table - 1, "inside the table"),
        (lambda beton: beton.bytes, "at the end of the file"),
        (lambda beton: 2**63, "negative in int64"),
    ],
)
def test_bad_pointers_are_refused(
    damaged: Path, pointer: Callable[[Beton], int], reason: str
) -> None:
    """Breaks if a bad pointer is accepted because both tables of the file agree on it."""
    beton, content = Beton(damaged), bytearray(damaged.read_bytes())
    true = int(beton.records[6, 0]).to_bytes(8, "little")
    assert content.count(true) >= 2
    content = content.replace(true, int(pointer(beton)).to_bytes(8, "little"))
    damaged.write_bytes(content)
    with pytest.raises(UserError, match=r"record [67]: its entry in the table is damaged"):
        Beton(damaged)
