"""Reading: the pixels are PIL's, and no damaged record is read as an image."""

import hashlib
import io
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.beton import FINGERPRINTED, Beton, CorruptRecord
from pipeline.beton_writer import BetonWriter, Sample
from pipeline.errors import UserError
from pipeline.ffcv_format import HEADER
from pipeline.manifest import Manifest, manifest_path
from pipeline.turbojpeg import Decoder
from tests.helpers import betons
from tests.helpers.betons import photograph, pil_decode, varied, write_beton
from tests.helpers.manifests import damage, write_manifest
from tools.packing.check import verify


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


def test_tests_without_ffcv_have_the_same_betons(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without it tests on a GPU machine without ffcv would compare other images."""
    images = varied(3)
    monkeypatch.setattr(betons, "find_spec", lambda name: None)
    for mode, error in (("raw", 0), ("jpg", 40)):
        beton = Beton(write_beton(tmp_path / f"{mode}.beton", images, mode))
        assert beton.index.tolist() == [0, 1, 2]
        for i, image in enumerate(images):
            assert np.abs(beton.decode(i).astype(int) - image).max() <= error


def test_overwritten_record_is_named(damaged: Path) -> None:
    """A corrupt image must never be replaced silently by the one decoded before it."""
    write_manifest(damaged)
    pointer, size = Beton(damaged).records[5, :2]
    damage(damaged, pointer, bytes(size))
    with pytest.raises(CorruptRecord, match=r"photos/5\.jpg: not a JPEG"):
        Beton(damaged).decode(5)


def test_jpeg_cut_short_is_refused(damaged: Path) -> None:
    """libjpeg fills the missing rows with grey and only warns. Here this warning is an error."""
    pointer, size = Beton(damaged).records[4, :2]
    damage(damaged, pointer + size * 2 // 3, bytes(size - size * 2 // 3))
    with pytest.raises(CorruptRecord, match="record 4: the JPEG data are corrupt or cut short"):
        Beton(damaged).decode(4)


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
    """A memory map would end the process with SIGBUS here. Without it a file that another process
    writes is called damaged.
    """
    beton = Beton(damaged)
    os.truncate(damaged, int(beton.records[0, 0]) + 10)
    with pytest.raises(UserError, match="written to while it was in use") as refused:
        beton.decode(0)
    assert not isinstance(refused.value, CorruptRecord)


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


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    """Without it a pipe blocks the run for ever."""
    os.mkfifo(tmp_path / "pipe")
    for path, reason in (
        (tmp_path / "none.beton", "No such file"),
        (tmp_path, "Is a directory"),
        (tmp_path / "pipe", "not a regular file"),
        (Path("/dev/zero"), "not a regular file"),
    ):
        with pytest.raises(UserError, match=f"{path}: {reason}"):
            Beton(path)


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


# ---- The identity of the content ----


def raw_beton(path: Path, count: int = 100) -> Path:
    """Raw images of the same size: their tables do not depend on their pixels."""
    with BetonWriter(path, count) as writer:
        writer.append([Sample(photograph(i, 24, 40), 24, 40, (i,)) for i in range(count)])
    return path


@pytest.mark.parametrize("with_manifest", [False, True])
@pytest.mark.parametrize("limit", [FINGERPRINTED, 24 * 40 * 3 * 10])
def test_fingerprint_covers_every_image(
    tmp_path: Path, with_manifest: bool, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without it a run resumes on other pixels: of 100 raw images 36 could be replaced unseen. Each
    single image counts, also in a set of which only a part is read, if the manifest is repacked.
    """
    monkeypatch.setattr("pipeline.beton.FINGERPRINTED", limit)
    path = raw_beton(tmp_path / "raw.beton")
    if with_manifest:
        write_manifest(path)
    seen = {Beton(path).fingerprint()}
    for i in (0, 1, 2, 13, 50, 98, 99):
        damage(path, int(Beton(path).records[i, 0]) + 1400, photograph(200 + i, 8, 8).tobytes())
        if with_manifest:
            write_manifest(path)
        seen.add(Beton(path).fingerprint())
    assert len(seen) == 8


def test_fingerprint_does_not_depend_on_the_manifest_or_the_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without it a run cannot resume from a copy of the beton alone on a node's disk."""
    path = raw_beton(tmp_path / "raw.beton")
    copy = tmp_path / "copy.beton"
    copy.write_bytes(path.read_bytes())
    write_manifest(path)
    monkeypatch.setattr("pipeline.beton.FINGERPRINTED", 100_000)
    assert Beton(path).fingerprint() == Beton(copy).fingerprint()
    manifest_path(path).write_bytes(b"{}")
    assert Beton(path).fingerprint() == Beton(copy).fingerprint()


def test_fingerprint_of_an_earlier_run_is_still_known(tmp_path: Path) -> None:
    """Without it no run of an earlier slotstream can be resumed, although its data are the same."""
    path = raw_beton(tmp_path / "raw.beton")
    beton, content = Beton(path), path.read_bytes()
    digest = hashlib.sha256(beton.records.tobytes() + beton.index.tobytes())
    for i in np.linspace(0, 99, 64).astype(int):
        pointer, size = beton.records[i, :2]
        digest.update(content[pointer : pointer + min(size, 4096)])
    assert beton.has_fingerprint(digest.hexdigest())
    assert beton.has_fingerprint(beton.fingerprint()) and beton.fingerprint() != digest.hexdigest()
    assert not beton.has_fingerprint("0" * 64)


@pytest.mark.parametrize("mode", ["raw", "jpg"])
def test_record_must_have_its_checksum_when_that_is_required(tmp_path: Path, mode: str) -> None:
    """Without it the pixels of a raw record, or a whole JPEG put in the place of another, are
    believed.
    """
    path = write_beton(tmp_path / "some.beton", [photograph(i, 24, 40) for i in range(4)], mode)
    write_manifest(path)
    (one, size), (other, room) = Beton(path).records[:2, :2].tolist()
    damage(path, one, path.read_bytes()[other : other + min(size, room)])
    beton = Beton(path)
    beton.require_checksums()
    with pytest.raises(CorruptRecord, match=r"photos/0\.jpg: its bytes are not those"):
        beton.decode(0)
    assert np.array_equal(beton.decode(1), Beton(path).decode(1))


@pytest.mark.parametrize("damage_to", ["digest", "other", "syntax"])
def test_manifest_that_does_not_match_is_left_out_with_a_warning(
    tmp_path: Path, damage_to: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """Without it a wrong manifest makes good images bad, or is left out in silence."""
    path = raw_beton(tmp_path / "raw.beton", 5)
    write_manifest(path, bytes=7 if damage_to == "other" else path.stat().st_size)
    text = manifest_path(path).read_text()
    if damage_to != "other":
        new = "{" if damage_to == "syntax" else text.replace("photos/3", "photos/4")
        manifest_path(path).write_text(new)
    beton = Beton(path)
    beton.require_checksums()
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"warning: {manifest_path(path)}: ")
    assert line.endswith("no image is compared with it")
    assert (beton.checksums == -1).all() and beton.decode(0).shape == (24, 40, 3)


def swap_sides(path: Path, i: int) -> None:
    """Exchange height and width of record `i` in the table: its bytes, and their number, fit."""
    content, beton = bytearray(path.read_bytes()), Beton(path)
    pointer = int(beton.records[i, 0]).to_bytes(8, "little")
    at = content.index(pointer)  # in the metadata: width, height, pointer
    content[at - 4 : at] = content[at - 2 : at] + content[at - 4 : at - 2]
    path.write_bytes(content)


def test_exchanged_height_and_width_are_found(tmp_path: Path) -> None:
    """Without it a raw image of which no byte has changed is read in rows of a wrong length."""
    path = raw_beton(tmp_path / "raw.beton", 5)
    write_manifest(path)
    before = Beton(path).fingerprint()
    swap_sides(path, 2)
    beton = Beton(path)
    assert beton.decode(2).shape == (40, 24, 3)
    with pytest.raises(UserError, match=r"raw\.beton: the images' heights and widths are"):
        beton.require_checksums()
    assert beton.fingerprint() != before
    assert verify(beton, Manifest.beside(path), workers=1).problems == [
        (str(path), "the images' heights and widths are not those that were packed")
    ]


def test_file_that_is_written_to_is_noticed(tmp_path: Path) -> None:
    """Without it a beton overwritten in place is read by the tables of the old one. A file that is
    moved over the old one, or deleted, leaves the opened one as it is.
    """
    path, other = raw_beton(tmp_path / "raw.beton", 5), raw_beton(tmp_path / "other.beton", 6)
    beton = Beton(path)
    beton.require_unchanged()
    other.replace(path)
    beton.require_unchanged()
    beton = Beton(path)
    path.unlink()
    beton.require_unchanged()
    path = raw_beton(tmp_path / "new.beton", 5)
    beton = Beton(path)
    with path.open("r+b") as file:
        file.write(b"")
        file.truncate(beton.bytes - 1)
    with pytest.raises(UserError, match=r"new\.beton: the file was written to while it was in use"):
        beton.require_unchanged()
