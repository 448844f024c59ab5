"""A folder of images in the place of a beton: the same records, pixels, views and messages."""

import io
import os
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import slotstream
from pipeline.beton import Beton
from pipeline.errors import UserError
from pipeline.image_folder import CHANGED, ImageFolder, open_beton
from pipeline.loader import make_loader
from pipeline.turbojpeg import Decoder
from pipeline.views import ViewConfig
from tests.helpers.betons import photograph, varied
from tools import build_dataset


def jpeg(pixels: np.ndarray, **options: object) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", **options)
    return stream.getvalue()


def write_odd(folder: Path) -> Path:
    """Photographs as people have them, in an order that depends on how paths are compared."""
    turned = Image.Exif()
    turned[0x0112] = 6
    stream = io.BytesIO()
    Image.fromarray(photograph(3, 40, 50)).convert("CMYK").save(stream, "JPEG")
    content = {
        "a-b/x.jpg": jpeg(photograph(0, 60, 70)),
        "a/x.JPEG": jpeg(photograph(1, 70, 60), progressive=True),
        "a/turned.jpg": jpeg(photograph(2, 40, 50), exif=turned),
        "cmyk.jpg": stream.getvalue(),
        "grey.jpg": jpeg(photograph(4, 60, 50)[..., 0]),
        "no end.jpg": jpeg(photograph(5, 50, 60))[:-2],
        "large.jpg": jpeg(photograph(6, 600, 900)),  # decoded at a fraction of its size
        "liar.jpg": None,
        "ü\nb.png": None,
    }
    for number, (name, data) in enumerate(content.items()):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if data is None:
            Image.fromarray(photograph(number, 45, 55)).save(path, "PNG")
        else:
            path.write_bytes(data)
    (folder / "notes.txt").write_text("no image")
    (folder / "IMG_1.HEIC").write_bytes(b"no image either")
    return folder


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_odd(tmp_path_factory.mktemp("odd") / "photos")


@pytest.fixture(scope="module")
def packed(odd: Path) -> Path:
    path = odd.parent / "photos.beton"
    build_dataset.main(["folder", "--root", str(odd), "--out", str(path), "--workers", "1"])
    return path


def test_its_index_is_the_table_of_the_beton(odd: Path, packed: Path) -> None:
    """Without it a run from the folder sees other images, or cannot go on with the beton."""
    folder, beton = ImageFolder(odd), Beton(packed)
    beton.require_checksums()
    for name in ("records", "index", "height", "width", "checksums", "has_tiles"):
        np.testing.assert_array_equal(getattr(folder, name), getattr(beton, name), name)
    assert [folder.name(i) for i in range(len(folder))] == [
        beton.name(i) for i in range(len(beton))
    ]
    assert folder.fingerprint() == beton.fingerprint() and len(folder) == 9
    assert folder.has_fingerprint(beton.fingerprint()) and not folder.has_fingerprint("")
    for i in range(len(folder)):
        np.testing.assert_array_equal(folder.decode(i), beton.decode(i), beton.name(i))


@pytest.mark.parametrize(("crops", "backend"), [("host", "compiled"), ("device", "compiled")])
@pytest.mark.parametrize("order", ["random", "quasi-random", "sequential"])
def test_its_batches_are_those_of_the_beton(
    order: str, crops: str, backend: str, odd: Path, packed: Path
) -> None:
    """Without it a first hour is no part of the run that follows."""
    made = []
    for path in (odd, packed):
        loader = make_loader(
            open_beton(path), ViewConfig(size=32), 4, crops=crops, backend=backend, seed=3,
            device=torch.device("cpu"), threads=2, order=order,
        )  # fmt: skip
        made.append([batch for epoch in range(3) for batch in loader.epoch(epoch)])
    for one, other in zip(*made, strict=True):
        assert torch.equal(one.index, other.index) and torch.equal(one.views, other.views)
        assert torch.equal(one.overlap, other.overlap) and torch.equal(one.flipped, other.flipped)


def test_scaled_decoding_is_that_of_the_beton(odd: Path, packed: Path) -> None:
    """Without it large photographs, of which less is decoded, differ."""
    folder, beton = ImageFolder(odd), Beton(packed)
    decoder = Decoder(int(folder.records[:, 1].max()))
    jpegs = [i for i in range(len(folder)) if folder.records[i, 4] == beton.records[:, 4].min()]
    assert len(jpegs) >= 5
    for i in jpegs:
        sides = [-(-int(side) // 4) for side in folder.records[i, 2:4]]
        found = [np.zeros((1, *sides, 3), np.uint8) for _ in range(2)]
        for source, pixels in zip((folder, beton), found, strict=True):
            assert source.try_decode(np.array([i]), pixels, decoder, 4) == (-1, "")
        np.testing.assert_array_equal(*found)
        assert found[0].any()


def test_a_changed_file_is_named(tmp_path: Path) -> None:
    """Without it another picture silently takes the place of the one that was indexed."""
    for number, pixels in enumerate(varied(4)):
        (tmp_path / f"{number}.jpg").write_bytes(jpeg(pixels, quality=90))
    Image.fromarray(varied(5)[4]).save(tmp_path / "4.png")
    folder = ImageFolder(tmp_path)
    files = [tmp_path / folder.name(i) for i in range(5)]
    before = [file.read_bytes() for file in files]
    files[0].write_bytes(before[1])  # of another size
    flipped = bytearray(before[1])
    flipped[len(flipped) // 2] ^= 1
    files[1].write_bytes(flipped)
    files[2].unlink()
    files[3].write_bytes(b"")
    Image.fromarray(varied(1)[0]).save(files[4])
    for i, reason in enumerate([CHANGED, CHANGED, "No such file", CHANGED, CHANGED]):
        with pytest.raises(UserError, match=f"{files[i].name}: {reason}"):
            folder.decode(i)
    for file, content in zip(files, before, strict=True):
        file.write_bytes(content)
    os.utime(files[0])  # a copy of the same bytes is no change
    assert all(folder.decode(i).any() for i in range(5))


def test_bad_files_are_named_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without it the first of them ends a run after hours, one each time."""
    (tmp_path / "good.jpg").write_bytes(jpeg(varied(1)[0]))
    (tmp_path / "cut.jpg").write_bytes(jpeg(varied(1)[0])[:200])
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "gone.png").symlink_to("nowhere")
    with pytest.raises(UserError, match="3 of 4 files cannot be used") as error:
        ImageFolder(tmp_path)
    assert [line.partition(":")[0] for line in error.value.lines[1:]] == [
        "cut.jpg", "empty.png", "gone.png",
    ]  # fmt: skip
    assert "found 4 images in" in capsys.readouterr().err
    (tmp_path / "more.tar").write_bytes(b"")
    with pytest.raises(UserError, match=r"more\.tar: an archive, which is read when it is packed"):
        ImageFolder(tmp_path)
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="no images in this folder"):
        open_beton(tmp_path / "none")


def test_what_packing_would_save_is_measured(odd: Path) -> None:
    """Without it nobody learns what the folder costs."""
    said = ImageFolder(odd).saving()
    assert "9 of the images took" in said and "tools.build_dataset folder" in said


def test_dali_is_refused(odd: Path) -> None:
    """Without it DALI reads bytes at positions of a file that does not exist."""
    with pytest.raises(UserError, match=r"data\.crops: dali reads betons"):
        make_loader(
            open_beton(odd), ViewConfig(size=32), 4, crops="dali", backend="compiled", seed=0,
            device=torch.device("cpu"),
        )  # fmt: skip


def test_a_loader_goes_on_with_the_beton(odd: Path, packed: Path) -> None:
    """Without it whoever packs in the meantime begins anew."""
    first = slotstream.Loader(odd, 2, size=32, device="cpu", threads=1)
    batches = iter(first)
    next(batches)
    state = first.state_dict()
    left = [batch.views for batch in batches]
    second = slotstream.Loader(packed, 2, size=32, device="cpu", threads=1)
    second.load_state_dict(state)
    assert all(map(torch.equal, left, (batch.views for batch in second))) and len(left) == 3


def test_photographs_of_phones_are_pointed_at(
    odd: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without it the photographs of a phone are missing, and nobody says what to do."""
    ImageFolder(odd)
    said = capsys.readouterr().err
    assert "1 .heic" in said
    assert "note: 1 photographs of phones (.heic) cannot be read: convert them to JPEG" in said


def test_the_command_that_packs_can_be_copied(tmp_path: Path) -> None:
    """Without it a folder with a blank in its name gives a command that fails."""
    (tmp_path / "my photos").mkdir()
    (tmp_path / "my photos/a.jpg").write_bytes(jpeg(varied(1)[0]))
    said = ImageFolder(tmp_path / "my photos").saving()
    words = shlex.split(said.partition("to pack: ")[2])
    assert words[-3:] == [str(tmp_path / "my photos"), "--out", "FILE.beton"]
