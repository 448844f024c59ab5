"""Packing: the chosen files, their storage, and the messages for bad input."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps
from torchvision.datasets import ImageFolder

from pipeline.errors import BadImage, UserError
from pipeline.images import read_file
from pipeline.manifest import Manifest
from tests.helpers.betons import ffcv_reader, photograph
from tests.pipeline.test_beton_writer import jpeg, ramp, stored
from tools import build_dataset
from tools.packing.sources import SOURCES


def picture(height: int = 48, width: int = 64, shift: int = 0) -> Image.Image:
    """A smooth picture with four different corners, which shows rotations and reflections."""
    y, x = np.mgrid[:height, :width]
    channels = [4 * x + shift, 4 * y, np.full_like(x, 40 + shift)]
    return Image.fromarray(np.clip(np.stack(channels, axis=-1), 0, 255).astype(np.uint8))


def save(path: Path, image: Image.Image | None = None, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or picture()).save(path, **options)
    return path


def fill(root: Path, *names: str) -> Path:
    """A different JPEG under each name."""
    for shift, name in enumerate(names):
        save(root / name, picture(shift=10 * shift), format="JPEG", quality=95)
    return root


def ffcv_pixels(path: Path, index: int) -> np.ndarray:
    """Sample `index` [H, W, 3] as FFCV decodes it."""
    field = ffcv_reader(path).metadata["f0"][index]
    height, width = int(field["height"]), int(field["width"])
    data = np.frombuffer(stored(path)[index], np.uint8)
    if field["mode"] == 1:
        return data.reshape(height, width, 3)
    from ffcv.libffcv import imdecode

    pixels = np.zeros((height, width, 3), np.uint8)
    code = imdecode(data, pixels, height, width, height, width, 0, 0, 1, 1, False, False)
    assert code == 0
    return pixels


def run(kind: str, root: Path, out: Path, *options: str) -> None:
    build_dataset.main([kind, "--root", str(root), "--out", str(out), "--workers", "2", *options])


# --- sources -------------------------------------------------------------------------------------


def test_orders_and_labels(tmp_path: Path) -> None:
    """Views, resume and evaluation identify an image by its number in this order."""
    fill(tmp_path, "train2017/b.jpg", "train2017/a.jpg", "unlabeled2017/a.jpg", "train2017/.a.jpg")
    fill(tmp_path, "train/n02/x.JPEG", "train/n01/z.JPEG", "train/n01/y.JPEG")
    coco = ["train2017/a.jpg", "train2017/b.jpg"]
    assert SOURCES["coco"](tmp_path).names == coco
    assert SOURCES["cocoplus"](tmp_path).names == [*coco, "unlabeled2017/a.jpg"]
    imagenet = SOURCES["imagenet"](tmp_path)
    assert imagenet.names == ["train/n01/y.JPEG", "train/n01/z.JPEG", "train/n02/x.JPEG"]
    assert imagenet.labels is not None
    assert imagenet.labels.tolist() == [0, 0, 1]
    assert imagenet.classes == ["n01", "n02"]
    assert SOURCES["folder"](tmp_path).names == sorted(
        [*imagenet.names, *coco, "unlabeled2017/a.jpg"]
    )


@pytest.mark.parametrize(
    ("kind", "files", "message"),
    [
        ("coco", [], "train2017/*.jpg; {root} is empty"),
        ("coco", ["images/a.jpg"], "train2017/*.jpg; {root} holds images/"),
        (
            "coco",
            ["train2017/readme.txt"],
            "expected image files; {root}/train2017 holds readme.txt",
        ),
        ("cocoplus", ["train2017/a.jpg"], "expected {root}/unlabeled2017/*.jpg"),
        (
            "imagenet",
            ["train/a.JPEG"],
            "a folder per class, <wnid>/*.JPEG, or <wnid>.tar; {root}/train holds a.JPEG",
        ),
        ("imagenet", ["train/n01/a.JPEG", "train/n02/a.txt"], "{root}/train/n02: expected image"),
        ("folder", ["a.txt"], "expected image files"),
    ],
)
def test_a_wrong_layout_says_what_is_there(
    tmp_path: Path, kind: str, files: list[str], message: str
) -> None:
    """Without it, a wrong --root would silently pack nothing, or the wrong images."""
    fill(tmp_path, *files)
    with pytest.raises(UserError) as error:
        SOURCES[kind](tmp_path)
    assert message.format(root=tmp_path) in str(error.value)


def test_missing_root_and_loops(tmp_path: Path) -> None:
    """A link to a parent folder must not be followed for ever."""
    with pytest.raises(UserError, match="is missing"):
        SOURCES["coco"](tmp_path / "none")
    with pytest.raises(UserError, match="no such folder"):
        SOURCES["folder"](tmp_path / "none")
    fill(tmp_path, "a/b.jpg")
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    source = SOURCES["folder"](tmp_path)
    assert (source.names, source.faults) == (["a/b.jpg"], {})
    assert source.left == {"link to a folder that contains it": 1}


@pytest.mark.parametrize(
    ("kind", "name", "folder"),
    [
        ("coco", "train2017/a.jpg", "coco2017"),
        ("coco", "train2017/a.jpg", "train2017"),
        ("imagenet", "train/n01/a.JPEG", "ILSVRC/Data/CLS-LOC"),
        ("imagenet", "train/n01/a.JPEG", "train"),
    ],
)
def test_the_usual_roots(tmp_path: Path, kind: str, name: str, folder: str) -> None:
    """Kaggle's folders, or the folder of the images itself, as torchvision and ffcv want it. The
    names are those of the publisher's layout, so that the betons are equal.
    """
    inside = folder != name.split("/", maxsplit=1)[0]
    fill(tmp_path / "in" / (folder if inside else ""), name)
    plain = fill(tmp_path / "plain", name)
    root = tmp_path / "in" if inside else tmp_path / "in" / folder
    run(kind, root, tmp_path / "a.beton")
    run(kind, plain, tmp_path / "b.beton")
    assert (tmp_path / "a.beton.json").read_text() == (tmp_path / "b.beton.json").read_text()


def test_imagefolder_is_torchvisions(tmp_path: Path) -> None:
    """Without it labels differ from those of every other program that reads the same folder."""
    fill(tmp_path, "a/2.jpg", "a/10.jpg", "a-b/1.png", "B/deep/3.jpg", "B/4.jpg", "outside.jpg")
    theirs = ImageFolder(str(tmp_path))
    source = SOURCES["imagefolder"](tmp_path)
    assert source.labels is not None
    assert source.classes == theirs.classes
    ours = dict(zip(source.names, source.labels, strict=True))
    assert ours == {str(Path(p).relative_to(tmp_path)): label for p, label in theirs.samples}
    assert source.labels.tolist() == sorted(source.labels)
    assert source.left["images in no class"] == 1
    (tmp_path / "b.tar.gz").touch()
    assert SOURCES["imagefolder"](tmp_path).faults[5].startswith("compressed")


def test_imagefolder_without_classes(tmp_path: Path) -> None:
    """One line: `folder` is meant."""
    fill(tmp_path, "a.jpg")
    with pytest.raises(UserError, match="expected a folder per class"):
        SOURCES["imagefolder"](tmp_path)


# --- storage -------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}])
def test_a_jpeg_is_copied(tmp_path: Path, options: dict[str, Any]) -> None:
    """Encoding again would lose quality and time."""
    path = save(tmp_path / "in" / "a.jpg", quality=90, **options)
    run("folder", tmp_path / "in", tmp_path / "o.beton")
    assert stored(tmp_path / "o.beton") == [path.read_bytes()]


def test_a_grey_jpeg_is_copied_and_decodes_to_rgb(tmp_path: Path) -> None:
    """FFCV decodes to RGB: a grey file must give three equal channels."""
    path = save(tmp_path / "in" / "a.jpg", picture().convert("L"), quality=95)
    run("folder", tmp_path / "in", tmp_path / "o.beton")
    assert stored(tmp_path / "o.beton") == [path.read_bytes()]
    expected = np.asarray(Image.open(path).convert("RGB")).astype(int)
    assert np.abs(ffcv_pixels(tmp_path / "o.beton", 0) - expected).max() <= 4


def rotated(path: Path, orientation: int) -> Path:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return save(path, quality=95, exif=exif)


def sixteen_bit(path: Path) -> Path:
    values = (np.arange(48 * 64).reshape(48, 64) * 21).astype(np.uint16)
    return save(path, Image.fromarray(values))


def animated(path: Path) -> Path:
    return save(path, picture(), save_all=True, append_images=[picture(shift=50)])


CONVERTED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "a.png": (lambda path: save(path, picture().convert("RGBA")), "PNG, transparency dropped"),
    "b.png": (lambda path: save(path, picture().quantize(32)), "PNG"),
    "c.png": (sixteen_bit, "PNG, upper 8 of 16 bits"),
    "d.jpg": (lambda path: save(path, picture().convert("CMYK"), quality=95), "CMYK"),
    "e.webp": (lambda path: save(path, lossless=True), "WEBP"),
    "f.JPEG": (lambda path: save(path, format="PNG"), "PNG"),
    "g.gif": (animated, "GIF, first of several frames"),
    "h.jpg": (lambda path: rotated(path, 6), "orientation 6"),
    "i.jpg": (lambda path: rotated(path, 3), "orientation 3"),
}


def test_conversions_equal_pillow(tmp_path: Path) -> None:
    """Files that FFCV cannot decode must be stored as the picture that a viewer shows."""
    for name, (make, _) in CONVERTED.items():
        make(tmp_path / "in" / name)
    run("folder", tmp_path / "in", tmp_path / "o.beton")
    records = list(Manifest.beside(tmp_path / "o.beton").records())
    assert {record.name: record.how for record in records} == {
        name: f"converted: {reason}" for name, (_, reason) in sorted(CONVERTED.items())
    }
    for index, (name, *_) in enumerate(records):
        image = ImageOps.exif_transpose(Image.open(tmp_path / "in" / name))
        if name == "c.png":
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        np.testing.assert_array_equal(
            ffcv_pixels(tmp_path / "o.beton", index), np.asarray(image.convert("RGB")), name
        )


def test_max_side(tmp_path: Path) -> None:
    """Large images are scaled with their aspect ratio; small ones stay unchanged."""
    small = save(tmp_path / "in" / "a.jpg", picture(48, 64), quality=95)
    save(tmp_path / "in" / "b.jpg", picture(200, 300), quality=95)
    save(tmp_path / "in" / "c.png", picture(300, 200))
    options = "--store jpeg --max-side 64 --quality 90"
    run("folder", tmp_path / "in", tmp_path / "o.beton", *options.split())
    field = ffcv_reader(tmp_path / "o.beton").metadata["f0"]
    assert field["mode"].tolist() == [0, 0, 0]
    assert field["height"].tolist() == [48, 43, 64]
    assert field["width"].tolist() == [64, 64, 43]
    assert stored(tmp_path / "o.beton")[0] == small.read_bytes()
    full = Image.open(tmp_path / "in" / "b.jpg").resize((64, 43), Image.Resampling.BICUBIC)
    error = np.abs(ffcv_pixels(tmp_path / "o.beton", 1) - np.asarray(full).astype(int))
    assert error.mean() < 2


def test_packing_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    """A checksum compares copies of two machines, so the thread count must not matter."""
    fill(tmp_path / "in", *(f"{i}.jpg" for i in range(30)))
    save(tmp_path / "in" / "z.png")
    run("folder", tmp_path / "in", tmp_path / "a.beton")
    build_dataset.main(
        ["folder", "--root", f"{tmp_path}/in", "--out", f"{tmp_path}/b.beton", "--workers", "5"]
    )
    assert (tmp_path / "a.beton").read_bytes() == (tmp_path / "b.beton").read_bytes()


def test_labels_are_packed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Evaluation needs ImageNet's labels."""
    fill(tmp_path, "train/n02/x.JPEG", "train/n01/x.JPEG", "train/n01/y.JPEG")
    run("imagenet", tmp_path, tmp_path / "o.beton")
    reader = ffcv_reader(tmp_path / "o.beton")
    assert reader.field_names == ["image", "index", "label"]
    assert reader.metadata["f2"].tolist() == [0, 0, 1]
    assert json.loads((tmp_path / "o.beton.json").read_text())["classes"] == ["n01", "n02"]
    assert "3 images" in capsys.readouterr().out


# --- bad input -----------------------------------------------------------------------------------


def truncated() -> bytes:
    stream = jpeg(ramp(256, 256))
    return stream[: len(stream) // 2]


def bad_entropy() -> bytes:
    stream = bytearray(jpeg(ramp(256, 256)))
    stream[-800:-700] = b"\xfe" * 100
    return bytes(stream)


def holed() -> bytes:
    """An interrupted download of a file whose space was allocated at once."""
    stream = jpeg(photograph(1, 256, 256))
    third = len(stream) // 3
    return stream[:third] + bytes(third) + stream[2 * third :]


def half_and_another() -> bytes:
    stream = jpeg(photograph(1, 256, 256))
    return stream[: len(stream) // 2] + stream


BAD: dict[str, tuple[bytes, str]] = {
    "zero bytes": (b"", "empty file"),
    "text": (b"not an image", "not an image of a known format"),
    "truncated": (truncated(), "truncated JPEG: its end-of-image marker is missing"),
    "padded with zeros": (truncated() + bytes(5000), "truncated JPEG"),
    "a hole": (holed(), ""),
    "another file run into it": (half_and_another(), ""),
    "truncated header": (jpeg(ramp(8, 8))[:100], "truncated or damaged JPEG header"),
    "truncated PNG": (b"\x89PNG\r\n\x1a\n" + b"\0" * 30, ""),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_named_and_nothing_is_left(tmp_path: Path, case: str) -> None:
    """libjpeg fills the missing part with grey, and FFCV ignores its warning."""
    content, reason = BAD[case]
    fill(tmp_path / "in", "a.jpg", "z.jpg")
    (tmp_path / "in" / "bad.jpg").write_bytes(content)
    with pytest.raises(UserError) as error:
        run("folder", tmp_path / "in", tmp_path / "o.beton")
    prefix = f"1 of 3 images is bad, {tmp_path}/o.beton is not written: bad.jpg: "
    assert str(error.value).startswith(prefix + reason)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "o.beton").exists()
    assert not (tmp_path / "o.beton.json").exists()


def test_flipped_bits_are_found_by_decoding(tmp_path: Path) -> None:
    """Without --check decode, flipped bits in the compressed data stay unnoticed."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "bad.jpg").write_bytes(bad_entropy())
    run("folder", tmp_path / "in", tmp_path / "a.beton")
    with pytest.raises(UserError, match=r"bad\.jpg: Corrupt JPEG data"):
        run("folder", tmp_path / "in", tmp_path / "b.beton", "--check", "decode")


def test_files_that_cannot_be_opened(tmp_path: Path) -> None:
    """A broken link must not end in a traceback, and a pipe must not block for ever."""
    (tmp_path / "link.jpg").symlink_to(tmp_path / "gone.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "loop.jpg").symlink_to(tmp_path / "loop.jpg")
    (tmp_path / "folder.jpg").mkdir()
    for name, reason in (
        ("link.jpg", "broken symbolic link"),
        ("none.jpg", "No such file"),
        ("pipe.jpg", "not a regular file"),
        ("loop.jpg", "Too many levels of symbolic links"),
        ("folder.jpg", "Is a directory"),
    ):
        with pytest.raises(BadImage, match=reason):
            read_file(str(tmp_path / name))


def test_every_bad_file_is_named(tmp_path: Path) -> None:
    """If each run named only one bad file, finding all would take days."""
    fill(tmp_path / "in", "a.jpg")
    for i in range(25):
        (tmp_path / "in" / f"b{i:02d}.jpg").write_bytes(b"")
    with pytest.raises(UserError) as error:
        run("folder", tmp_path / "in", tmp_path / "o.beton")
    lines = str(error.value).splitlines()
    assert lines[0].startswith(f"25 of 26 images are bad, {tmp_path}/o.beton is not written")
    assert lines[1].endswith("b00.jpg: empty file")
    assert lines[-1].strip() == f"and 5 more: {tmp_path}/o.beton.bad.txt lists all"
    assert len(lines) == 22
    listed = (tmp_path / "o.beton.bad.txt").read_text().splitlines()
    assert listed == [f"b{i:02d}.jpg: empty file" for i in range(25)]
    run("folder", tmp_path / "in", tmp_path / "o.beton", "--on-error", "skip")
    assert not (tmp_path / "o.beton.bad.txt").exists()


def test_outputs_that_cannot_be_written(tmp_path: Path) -> None:
    """The error must come before hours of work, and an older file must not be replaced."""
    root, out = fill(tmp_path / "in", "a.jpg"), tmp_path / "o.beton"
    with pytest.raises(UserError, match="is not a folder"):
        run("folder", root, root / "a.jpg" / "o.beton")
    with pytest.raises(UserError, match="is a folder"):
        run("folder", root, root)
    run("folder", root, out)
    before = out.read_bytes()
    with pytest.raises(UserError, match="exists; --force replaces it"):
        run("folder", root, out)
    fill(root, "b.jpg")
    run("folder", root, out, "--force")
    assert out.read_bytes() != before
    assert json.loads((tmp_path / "o.beton.json").read_text())["count"] == 2


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk is common in a long run: one line, no traceback, no half-written file."""
    from pipeline.beton_writer import BetonWriter

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    root = fill(tmp_path / "in", "a.jpg")
    with monkeypatch.context() as patch:
        patch.setattr(BetonWriter, "append", full)
        message = r"cannot write .*o\.beton: No space left on device; finished work is kept"
        with pytest.raises(UserError, match=message):
            run("folder", root, tmp_path / "o.beton")
    assert not (tmp_path / "o.beton").exists()
    run("folder", root, tmp_path / "o.beton")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "o.beton", "o.beton.json"]


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *arguments], capture_output=True, text=True, check=False
    )


def test_the_command_ends_with_one_line_and_2(tmp_path: Path) -> None:
    """Scripts read the exit code, users the line."""
    none = str(tmp_path / "none")
    result = command("tools.build_dataset", "coco", "--root", none, "--out", f"{tmp_path}/o.beton")
    assert result.returncode == 2
    line = f"error: expected {none}/train2017/*.jpg; {none} is missing\n"
    assert result.stderr == line


@pytest.mark.parametrize("arguments", [["tools.build_dataset"], ["tools.packing.scenes"]])
def test_help(arguments: list[str]) -> None:
    """Help must work without data."""
    result = command(*arguments, "--help")
    assert result.returncode == 0
    assert "example" in result.stdout


@pytest.mark.parametrize("kind", [*SOURCES, "list", "sample"])
def test_help_of_each_source(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    """For example, a percent sign in a help text makes argparse fail."""
    with pytest.raises(SystemExit, match="0"):
        build_dataset.main([kind, "--help"])
    assert "--root" in capsys.readouterr().out


@pytest.mark.parametrize(
    "option",
    [
        ["--quality", "0"],
        ["--max-side", "-1"],
        ["--workers", "x"],
        ["--budget", "40 apples"],
        ["--shard", "0/4"],
        ["--shard", "5/4"],
        ["--shard", "1/" + "9" * 5000],
        ["--budget", "9" * 400 + "GB"],
        ["--workers", "1000000"],
        ["--max-side", "9" * 5000],
    ],
)
def test_impossible_options(option: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Without it Pillow silently clips a quality of 0, a long number ends in a traceback, and a
    million threads have all images in memory.
    """
    with pytest.raises(SystemExit, match="2"):
        build_dataset.main(["coco", "--root", ".", "--out", "x", *option])
    assert option[0] in capsys.readouterr().err


@pytest.mark.parametrize("option", [["--seed", "-1"], ["--seed", "x"], ["--count", "9" * 20]])
def test_impossible_options_of_the_sample(
    option: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Without it these end in a traceback of the random generator or of the progress bar."""
    with pytest.raises(SystemExit, match="2"):
        build_dataset.main(["sample", "--out", "x", *option])
    assert option[0] in capsys.readouterr().err
