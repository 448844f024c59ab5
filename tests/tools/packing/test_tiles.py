"""Packing with tiles: the same coefficients, the source given back, and what cannot have tiles."""

import base64
import io
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline import turbojpeg
from pipeline.beton import Beton
from pipeline.errors import BadImage, UserError
from pipeline.manifest import Manifest, Record, manifest_path
from pipeline.tiles import find_tiles, frame_of, grid_of
from tests import ROOT
from tests.helpers.jpegs import SAMPLINGS, jpeg, pool, sampled, without
from tests.helpers.manifests import damage
from tests.pipeline.test_tiles import noise
from tests.tools.packing.test_build_dataset import picture, run, save
from tools import build_dataset, inspect_dataset
from tools.packing.images import Storage, pack_image
from tools.packing.tiles import interval_of, restored, tiled


def pixels_of(stream: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(stream)) as image:
        return np.array(image.convert("RGB"))


def scan_of(stream: bytes) -> bytes:
    """The entropy-coded data and what follows."""
    return stream[frame_of(np.frombuffer(stream, np.uint8)).data :]


def tiles_in(stream: bytes) -> int:
    """The number of tiles, all of which must be there."""
    data = np.frombuffer(stream, np.uint8)
    frame = frame_of(data)
    grid = grid_of(frame)
    assert find_tiles(data, frame.data, np.empty(grid.rows * grid.columns + 1, np.int64))
    return grid.rows * grid.columns


GOLDEN = json.loads((ROOT / "tests/golden/jpegtran.json").read_text())


@pytest.mark.parametrize("name", GOLDEN)
def test_bytes_are_those_of_jpegtran(name: str) -> None:
    """Without it a wrong coefficient or table may still decode to similar pixels."""
    source, expected = (base64.b64decode(GOLDEN[name][key]) for key in ("source", "jpegtran"))
    assert interval_of(frame_of(np.frombuffer(source, np.uint8))) == GOLDEN[name]["interval"]
    made = tiled(source)
    assert made
    assert scan_of(made.data) == scan_of(expected)
    assert np.array_equal(pixels_of(made.data), pixels_of(source))


@pytest.mark.skipif(not shutil.which("jpegtran"), reason="needs jpegtran of libjpeg-turbo")
@pytest.mark.parametrize("kind", SAMPLINGS)
def test_bytes_are_those_of_the_installed_jpegtran(kind: str) -> None:
    """As above, for every sampling and a large range of codes."""
    for quality in (20, 75, 100):
        source = sampled(noise(quality), kind, quality)
        made = tiled(source)
        assert made
        interval = interval_of(frame_of(np.frombuffer(source, np.uint8)))
        command = ["jpegtran", "-optimize", "-restart", f"{interval}B"]
        done = subprocess.run(command, input=source, capture_output=True, check=True)
        assert scan_of(made.data) == scan_of(done.stdout)


@settings(max_examples=40)
@given(
    kind=st.sampled_from(list(SAMPLINGS)),
    height=st.integers(6, 90),
    width=st.integers(6, 300),
    quality=st.integers(1, 100),
    seed=st.integers(0, 99),
)
def test_nothing_is_lost(kind: str, height: int, width: int, quality: int, seed: int) -> None:
    """Without it training sees other images than those of the data set."""
    source = sampled(noise(seed, height, width), kind, quality)
    made = tiled(source)
    assert made
    assert restored(made.data) == source
    assert made.restorable
    assert np.array_equal(pixels_of(made.data), pixels_of(source))
    assert tiles_in(made.data) >= 1


OPTIONS: list[dict[str, Any]] = [
    {"optimize": True, "quality": 95}, {"restart_marker_blocks": 3}, {"restart_marker_rows": 1},
    {"mode": "L"}, {"mode": "L", "optimize": True}, {"exif": b"Exif\0\0MM\0*\0\0\0\x08" + bytes(6)},
    {"comment": b"\xff\xd9 in a comment"}, {"subsampling": "4:2:2"}, {"keep_rgb": True},
]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids="-".join)
def test_sources_of_all_kinds_are_given_back(options: dict[str, Any]) -> None:
    """Without it `--extract` gives other files than those that were packed."""
    for rest in (b"", b"a trailer \xff\xd9"):
        source = jpeg(3, **options) + rest
        made = tiled(source)
        assert made
        assert made.restorable
        assert restored(made.data) == source
        assert np.array_equal(pixels_of(made.data), pixels_of(source))


def test_progressive_becomes_baseline() -> None:
    """Without it the JPEGs that take 3.2 times as long to decode keep doing so."""
    for options in ({}, {"mode": "L"}, {"subsampling": 0, "quality": 95}):
        source = jpeg(5, progressive=True, **options)
        made = tiled(source)
        assert made
        assert not made.restorable
        assert frame_of(np.frombuffer(made.data, np.uint8)).height
        assert np.array_equal(pixels_of(made.data), pixels_of(source))


def test_the_colour_profile_stays_with_every_libjpeg(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it the bytes of a packed progressive JPEG depend on the machine's libjpeg-turbo:
    from 2.1.90 on it leaves the profile out.
    """
    profile = bytes(range(256)) * 300  # two segments
    for options in ({}, {"exif": b"Exif\0\0II*\0\x08\0\0\0\0\0\0\0\0\0"}, {"comment": b"x"}):
        source = jpeg(5, progressive=True, icc_profile=profile, **options)
        made = tiled(source)
        copied = turbojpeg.baseline
        with monkeypatch.context() as patch:
            patch.setattr(turbojpeg, "baseline", lambda data: without(copied(data), 0xE2))  # noqa: B023
            assert tiled(source) == made
        assert made and Image.open(io.BytesIO(made.data)).info["icc_profile"] == profile


def test_codings_that_cannot_be_repeated() -> None:
    """Without it a coding that no encoder repeats counts as damage when it is verified: here the
    last byte is filled up with zeros.
    """
    source = jpeg(4)
    for last in range(256):
        other = source[:-3] + bytes([last]) + source[-2:]
        made = tiled(other)
        if made and not made.restorable:
            assert np.array_equal(pixels_of(made.data), pixels_of(other))
            return
    pytest.fail("no last byte of another filling")


@pytest.mark.parametrize("name", [name for name in pool() if name.startswith("bad")])
def test_damage_gets_no_tiles(name: str) -> None:
    """Without it markers are put into what decoders only guess, and damage looks whole."""
    with pytest.raises(BadImage):
        pack_image(pool()[name], Storage(tiles=True))


def test_what_has_no_tiles_stays_as_it_is() -> None:
    """Without it four components, or bytes that belong to nothing, end the packing of a set."""
    for stream in (
        jpeg(1, "CMYK"),
        jpeg(1)[:-2] + bytes(12) + b"\xff\xd9",
        b"",
        b"\xff\xd8\xff\xd9",
    ):
        assert tiled(stream) is None


# --- betons --------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images of each kind of storage."""
    root = tmp_path / "in"
    save(root / "a.jpg", picture(60, 200), quality=90)
    save(root / "b.jpg", picture(100, 120), quality=90, progressive=True)
    save(root / "c.png", picture(30, 40))
    exif = Image.Exif()
    exif[0x0112] = 6
    save(root / "d.jpg", picture(50, 70), exif=exif)
    (root / "e.jpg").write_bytes(jpeg(1)[:-2])  # no end-of-image marker
    (root / "f.jpg").write_bytes(jpeg(2)[:-2] + b"\1" * 12 + b"\xff\xd9")
    (root / "g.jpg").write_bytes(jpeg(3, restart_marker_blocks=2) + b"trailer")
    return root


def records_of(path: Path) -> list[Record]:
    return list(Manifest.beside(path).records())


def test_beton_with_tiles(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without it the option has no effect on some files, or the manifest does not tell on which."""
    plain, tiles = folder.parent / "plain.beton", folder.parent / "tiles.beton"
    run("folder", folder, plain)
    run("folder", folder, tiles, "--tiles")
    assert "4 with tiles, 0 copied unchanged, 3 converted" in capsys.readouterr().out
    before, after = records_of(plain), records_of(tiles)
    assert [record.how for record in after] == [
        "tiles", "converted: coded anew, tiles", "converted: PNG", "converted: orientation 6",
        "converted: end-of-image marker added, tiles",
        "converted: Corrupt JPEG data: 9 extraneous bytes before marker 0xd9", "tiles",
    ]  # fmt: skip
    for old, new in zip(before, after, strict=True):
        content = (folder / new.name).read_bytes()
        if new.how.endswith("tiles"):
            assert new.source
            assert new.source.bytes == len(content)
        elif old.how != "original":
            assert new == old
    for i in (0, 6):
        assert after[i].source == (before[i].bytes, before[i].crc32)
    one, other = Beton(plain), Beton(tiles)
    for i in range(len(one)):
        assert np.array_equal(one.decode(i), other.decode(i))
    assert Manifest.beside(tiles).stored == {"original": 0, "tiles": 4, "jpeg": 0, "raw": 3}
    other.require_checksums()
    assert other.has_tiles.tolist() == [r.how.endswith("tiles") for r in after]


def test_verify_and_extract_give_the_sources_back(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without it nobody can tell that a beton with tiles holds the published data set."""
    out = folder.parent / "o.beton"
    run("folder", folder, out, "--tiles")
    inspect_dataset.main([str(out), "--verify", "--extract", str(folder.parent / "x")])
    assert "all good" in capsys.readouterr().out
    for name in ("a.jpg", "g.jpg"):
        assert (folder.parent / "x" / name).read_bytes() == (folder / name).read_bytes()
    manifest = Manifest.beside(out)
    records = list(manifest.records())
    assert records[0].source
    other = records[0]._replace(source=records[0].source._replace(crc32="00000000"))
    manifest.write(manifest_path(out), [other, *records[1:]])
    with pytest.raises(SystemExit):
        inspect_dataset.main([str(out), "--verify"])
    assert "a.jpg: its coefficients are not those of its source" in capsys.readouterr().err


def test_encoded_images_get_tiles_too(folder: Path) -> None:
    """Without it `--store jpeg` would silently store JPEGs that are always decoded whole."""
    out = folder.parent / "o.beton"
    run("folder", folder, out, "--tiles", "--store", "jpeg", "--max-side", "80")
    records, beton = records_of(out), Beton(out)
    how = [record.how for record in records[:3]]
    assert how == ["scaled, tiles", "scaled, tiles", "converted: PNG, tiles"]
    assert not any(r.source for r in records[:3])
    data = out.read_bytes()
    for pointer, size, *_ in beton.records[:3].tolist():
        assert tiles_in(data[pointer : pointer + size])
    plain = pack_image((folder / "c.png").read_bytes(), Storage("jpeg"))
    assert isinstance(plain.data, bytes)
    assert np.array_equal(beton.decode(2), pixels_of(plain.data))


def test_shards_and_kills_give_the_same_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it the sources are lost in a merge or a resumed run."""
    whole, out = folder.parent / "whole.beton", folder.parent / "o.beton"
    run("folder", folder, whole, "--tiles")
    for number in (1, 2):
        run("folder", folder, out, "--tiles", "--shard", f"{number}/2")
    shards = sorted(folder.parent.glob("o.shard-*.beton"))
    build_dataset.main(["merge", *map(str, shards), "--out", str(out)])
    assert out.read_bytes() == whole.read_bytes()
    assert manifest_path(out).read_bytes() == manifest_path(whole).read_bytes()
    again = folder.parent / "again.beton"
    with monkeypatch.context() as patch:
        patch.setattr("tools.packing.run._Run.finish", _killed)
        with pytest.raises(KeyboardInterrupt):
            run("folder", folder, again, "--tiles")
    run("folder", folder, again, "--tiles")
    assert again.read_bytes() == whole.read_bytes()
    assert manifest_path(again).read_bytes() == manifest_path(whole).read_bytes()


def _killed(*_: Any) -> None:
    raise KeyboardInterrupt


def test_other_readers(folder: Path) -> None:
    """Without it a beton with tiles is no standard file any more: ffcv, OpenCV and torchvision read
    it as they read the source.
    """
    cv2 = pytest.importorskip("cv2", reason="needs OpenCV, which ffcv brings")
    (folder / "f.jpg").unlink()  # pixels in one of the two
    out = folder.parent / "o.beton"
    run("folder", folder, out, "--tiles")
    beton, data = Beton(out), out.read_bytes()
    for i, (pointer, size, height, width, mode) in enumerate(beton.records.tolist()):
        if mode != 0:
            continue
        stream = np.frombuffer(data, np.uint8)[pointer : pointer + size]
        expected = beton.decode(i)
        assert np.array_equal(cv2.imdecode(stream, cv2.IMREAD_COLOR)[..., ::-1], expected)
        mode_rgb = torchvision.io.ImageReadMode.RGB
        image = torchvision.io.decode_jpeg(torch.from_numpy(stream.copy()), mode=mode_rgb)
        assert np.array_equal(image.permute(1, 2, 0).numpy(), expected)
        assert expected.shape == (height, width, 3)
    plain = folder.parent / "plain.beton"
    run("folder", folder, plain)
    assert all(map(np.array_equal, _by_ffcv(plain), _by_ffcv(out)))


def _by_ffcv(path: Path) -> list[np.ndarray]:
    """What ffcv's own loader reads: a square of each image."""
    loaders = pytest.importorskip("ffcv.loader", reason="needs ffcv")
    from ffcv.fields.decoders import CenterCropRGBImageDecoder, IntDecoder

    pipelines = {"image": [CenterCropRGBImageDecoder((32, 32), 0.5)], "index": [IntDecoder()]}
    loader = loaders.Loader(
        str(path),
        batch_size=1,
        num_workers=1,
        order=loaders.OrderOption.SEQUENTIAL,
        pipelines=pipelines,
    )
    return [images.copy() for images, _ in loader]


def test_tiles_of_pixels_are_refused(folder: Path) -> None:
    """Without it the option says nothing and does nothing."""
    with pytest.raises(UserError, match="--tiles cannot be used with --store raw"):
        run("folder", folder, folder.parent / "o.beton", "--tiles", "--store", "raw")


def test_a_damaged_beton_is_found(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without it a flipped bit in a tile that no crop needs stays."""
    out = folder.parent / "o.beton"
    run("folder", folder, out, "--tiles")
    pointer, size, *_ = Beton(out).records[0].tolist()
    damage(out, pointer + size - 9, b"\x55")
    with pytest.raises(SystemExit):
        inspect_dataset.main([str(out), "--verify"])
    assert "a.jpg: its bytes are not those that were packed" in capsys.readouterr().err


def test_dali_reads_them() -> None:
    """Without it data.crops dali fails on a beton with tiles, or shows other pixels."""
    pytest.importorskip("nvidia.dali", reason="needs DALI")
    from nvidia.dali import fn, pipeline_def, types

    sources = [sampled(noise(i), kind) for i, kind in enumerate(SAMPLINGS)]
    streams = sources + [made.data for made in map(tiled, sources) if made]

    @pipeline_def(batch_size=len(streams), num_threads=1, device_id=None)
    def decoded() -> Any:
        arrays = [np.frombuffer(stream, np.uint8) for stream in streams]
        data = fn.external_source(lambda: arrays)
        return fn.decoders.image(data, device="cpu", output_type=types.RGB)

    pipeline = decoded()
    pipeline.build()
    images = [np.array(image) for image in pipeline.run()[0]]
    for one, other in zip(images[: len(sources)], images[len(sources) :], strict=True):
        assert np.array_equal(one, other)
