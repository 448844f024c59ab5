"""Inspecting: the summary is true, and every damaged image is named."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.beton import Beton
from pipeline.errors import UserError
from pipeline.manifest import manifest_path
from tests.helpers.betons import photograph, varied, write_beton
from tests.helpers.manifests import damage, write_manifest
from tests.tools.packing.test_build_dataset import fill
from tests.tools.packing.test_build_dataset import run as pack
from tools.inspect_dataset import main
from tools.packing import check
from tools.packing.check import inner_path

IMAGES = 40
NAMES = [f"train2017/{i:012}.jpg" for i in range(IMAGES)]


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_beton(tmp_path_factory.mktemp("inspect") / "photos.beton", varied(IMAGES))
    write_manifest(path, NAMES)
    return path


@pytest.fixture
def beton(pristine: Path, tmp_path: Path) -> Path:
    """A copy to damage, with its manifest."""
    copy = tmp_path / "photos.beton"
    copy.write_bytes(pristine.read_bytes())
    manifest_path(copy).write_bytes(manifest_path(pristine).read_bytes())
    return copy


@pytest.fixture(autouse=True)
def short_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "RATE_SECONDS", 0.01)


def inspect(*arguments: object) -> int:
    """The command's exit code."""
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def bad_lines(captured: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in captured.readouterr().err.splitlines() if line.startswith("bad: ")]


def test_summary_counts_what_is_there(
    beton: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert inspect(beton, "--json", tmp_path / "summary.json", "--workers", 2) == 0
    shown = capsys.readouterr().out
    content = json.loads((tmp_path / "summary.json").read_text())
    assert {"hardware", "versions", "command", "results"} <= content.keys()
    assert content["results"][0]["stage"] == "decode" and content["results"][0]["threads"] == 2
    data = content["dataset"]
    opened = Beton(beton)
    longest = np.maximum(opened.height, opened.width)
    assert (data["images"], data["jpeg"], data["raw"]) == (IMAGES, IMAGES, 0)
    assert (data["longest_side"][0], data["longest_side"][-1]) == (longest.min(), longest.max())
    assert data["bytes"] == beton.stat().st_size
    assert 0 < data["page_use"] <= 1
    assert "digest ok" in data["manifest"]
    for text in ("40 images", "40 JPEG, 0 raw", "digest ok", "images/s", "cache"):
        assert text in shown


def test_whole_beton_is_good(beton: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect(beton, "--verify", "--workers", 2) == 0
    captured = capsys.readouterr()
    assert "40 records verified" in captured.out and "all good" in captured.out
    assert "bad" not in captured.err


def test_every_flipped_bit_names_its_image(
    beton: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A flipped bit of the compressed data can decode to a wrong picture without an error: only the
    checksum shows it.
    """
    opened, content = Beton(beton), beton.read_bytes()
    decoded = 0
    for i in (0, 17, IMAGES - 1):
        pointer, size = opened.records[i, :2].tolist()
        for offset in (pointer, pointer + size - 30, pointer + size - 1):
            damage(beton, offset, bytes([content[offset] ^ 4]))
            assert inspect(beton, "--verify", "--json", tmp_path / "bad.json") == 1
            lines = bad_lines(capsys)
            assert len(lines) == 1 and lines[0].startswith(f"bad: {NAMES[i]}: its bytes are not")
            decoded += lines[0].endswith("were packed")
            problems = json.loads((tmp_path / "bad.json").read_text())["problems"]
            assert [name for name, _ in problems] == [NAMES[i]]
            damage(beton, offset, content[offset : offset + 1])
    assert decoded  # only the checksum finds these


def test_changed_byte_outside_of_the_records_is_found(
    beton: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(beton, Beton(beton).data + 5000, b"x")
    assert inspect(beton, "--verify") == 1
    assert "belongs to no image" in bad_lines(capsys)[0]


def test_every_flipped_bit_of_the_tables_is_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model would learn a changed label. The problem names the image, as far as it is known."""
    path = tmp_path / "classes.beton"
    fill(tmp_path, *(f"train/n{i}/{i}.JPEG" for i in range(3)))
    pack("imagenet", tmp_path, path)
    content, opened = path.read_bytes(), Beton(path)
    tables = [*range(opened.data), *range(opened.table, opened.bytes)]
    for offset in tables[::7]:
        damage(path, offset, bytes([content[offset] ^ 1 << offset % 8]))
        assert inspect(path, "--verify") in (1, 2), offset
        damage(path, offset, content[offset : offset + 1])
    capsys.readouterr()
    label = opened.data - 8  # of the last image
    damage(path, label, b"\1" if content[label] == 0 else b"\0")
    assert inspect(path, "--verify") == 1
    assert bad_lines(capsys)[0].startswith("bad: train/n2/2.JPEG: its label is")


def test_truncation_names_the_lost_images(beton: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without its table the beton cannot be opened, but the lost images are known."""
    pointers = Beton(beton).records[:, 0]
    os.truncate(beton, int(pointers[30]) + 3)
    lost = [NAMES[i] for i in np.flatnonzero(pointers >= pointers[30])]
    assert inspect(beton, "--verify") == 1
    lines = bad_lines(capsys)
    assert lines[0].startswith(f"bad: {beton}: truncated")
    assert [line.split(": ")[1] for line in lines[1:]] == lost
    os.truncate(beton, 100)
    assert inspect(beton, "--verify") == 1
    assert len(bad_lines(capsys)) == 1 + IMAGES


def test_without_manifest_what_does_not_decode_is_found(
    beton: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest_path(beton).unlink()
    assert inspect(beton, "--verify") == 0
    assert "no manifest: no checksums" in capsys.readouterr().out
    damage(beton, int(Beton(beton).records[9, 0]), bytes(9))
    assert inspect(beton, "--verify") == 1
    assert bad_lines(capsys)[0].startswith("bad: record 9: not a JPEG")


def test_every_changed_byte_of_the_manifest_is_found(
    beton: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The manifest names the class of each label and each image: a change would name wrong ones."""
    path = manifest_path(beton)
    content = path.read_bytes()
    for offset in range(0, len(content), 23):
        damage(path, offset, bytes([content[offset] ^ 2]))
        assert inspect(beton, "--verify") == 1, content[offset - 20 : offset + 20]
        damage(path, offset, content[offset : offset + 1])
    for changed in (content[:-3], content + b" "):
        path.write_bytes(changed)
        assert inspect(beton, "--verify") == 1
    path.write_bytes(content)
    assert inspect(beton, "--verify") == 0
    capsys.readouterr()


@pytest.mark.parametrize(
    "line",
    [
        '["a.jpg", 5e31, "00000000", "original"]',
        '["a.jpg", 1e999, "00000000", "original"]',
        '["a.jpg", 99999999999999999999, "00000000", "original"]',
        '["a.jpg", null, "00000000", "original"]',
        '["a.jpg", 5, "zz", "original"]',
        '["a.jpg", 5, "00000000", "original", "x"]',
        "[[], {}, [], {}]",
        '"abcd"',
        "[" * 100_000,
    ],
)
def test_a_damaged_line_of_the_manifest_is_a_problem(
    beton: Path, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also for a truncated beton, where the beton's problem is reported too."""
    path = manifest_path(beton)
    lines = path.read_text().splitlines(keepends=True)
    lines[-5] = line + ",\n"
    path.write_text("".join(lines))
    for _ in range(2):
        assert inspect(beton, "--verify") == 1
        assert any("is damaged" in bad for bad in bad_lines(capsys))
        os.truncate(beton, beton.stat().st_size - 100)


def test_a_manifest_that_is_no_file(beton: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without it a broken link reads like a beton without a manifest, and a pipe blocks."""
    path = manifest_path(beton)
    for make, reason in (
        (lambda: path.symlink_to("nowhere"), "No such file"),
        (lambda: os.mkfifo(path), "not a regular file"),
    ):
        path.unlink()
        make()
        assert inspect(beton, "--verify") == 1
        assert bad_lines(capsys)[0].startswith(f"bad: {path}: {reason}")


def test_a_truncated_beton_whose_manifest_lists_more(
    beton: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both files can be damaged: without it the list of lost images ends in a traceback."""
    path = manifest_path(beton)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:-2], *lines[-4:-3], *lines[-2:]]))
    os.truncate(beton, beton.stat().st_size - 100)
    assert inspect(beton, "--verify") == 1
    assert f"bad: {path}: it does not match its digest" in bad_lines(capsys)


def test_names_are_escaped(beton: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without it a manifest changes the terminal on which its summary is printed."""
    write_manifest(beton, NAMES, source="a\x1b[2J", tool="b\x1b[2J")
    assert inspect(beton) == 0
    said = capsys.readouterr().out
    assert said.replace("\n", "").isprintable()
    assert "packed from 'a\\x1b[2J'" in said


def test_inputs_are_not_replaced(beton: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """FILE.beton.json looks like a good path for --json, but it would replace the checksums."""
    before = beton.read_bytes(), manifest_path(beton).read_bytes()
    for path in (beton, manifest_path(beton), beton.parent / "x" / ".." / beton.name):
        with pytest.raises(UserError, match="would replace the beton, its manifest"):
            main([str(beton), "--json", str(path)])
    link = beton.parent / "link.beton"
    link.symlink_to(beton)
    with pytest.raises(UserError, match="would replace"):
        main([str(link), "--json", str(manifest_path(beton))])
    same = str(beton.parent / "same.png")
    with pytest.raises(UserError, match="another output"):
        main([str(beton), "--plot", same, "--sheet", same])
    with pytest.raises(UserError, match="is not a folder"):
        main([str(beton), "--sheet", str(beton / "sheet.png")])
    assert before == (beton.read_bytes(), manifest_path(beton).read_bytes())


def test_names_come_from_this_betons_manifest(beton: Path, tmp_path: Path) -> None:
    """The manifest of another file would name a good image."""
    assert Beton(beton).name(3) == NAMES[3]
    other = write_beton(tmp_path / "other.beton", varied(IMAGES + 1))
    write_manifest(other)
    manifest_path(other).replace(manifest_path(beton))
    assert Beton(beton).name(3) == "record 3"


def test_manifest_of_another_beton_and_damaged_manifest_are_found(
    beton: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = manifest_path(beton).read_text()
    manifest_path(beton).write_text(text.replace(NAMES[3], "other.jpg"))
    assert inspect(beton, "--verify") == 1
    assert "does not match its digest" in bad_lines(capsys)[0]
    manifest_path(beton).write_text(text[: len(text) // 2])
    assert inspect(beton, "--verify") == 1
    assert bad_lines(capsys)
    manifest_path(beton).write_text("{")
    assert inspect(beton, "--verify") == 1
    assert "not a manifest" in bad_lines(capsys)[0]
    other = write_beton(tmp_path / "other.beton", varied(3))
    write_manifest(other)
    manifest_path(other).replace(manifest_path(beton))
    assert inspect(beton, "--verify") == 1
    assert "lists 3 records; the beton holds 40" in "".join(bad_lines(capsys))


def test_extract_gives_back_identical_bytes(tmp_path: Path) -> None:
    """JPEG bytes unchanged, raw pixels as PNG, under the sources' names."""
    images = [photograph(i, 30, 50) for i in range(6)]
    jpeg = write_beton(tmp_path / "jpeg.beton", images)
    write_manifest(jpeg, [f"a/b {i}.JPEG" for i in range(6)])
    assert inspect(jpeg, "--extract", tmp_path / "jpeg", "--workers", 2) == 0
    opened, content = Beton(jpeg), jpeg.read_bytes()
    for i, (pointer, size, *_) in enumerate(opened.records.tolist()):
        assert (tmp_path / f"jpeg/a/b {i}.JPEG").read_bytes() == content[pointer : pointer + size]
    raw = write_beton(tmp_path / "raw.beton", images, mode="raw")
    write_manifest(raw, [f"{i}.png" if i % 2 else f"{i}.jpg" for i in range(6)])
    assert inspect(raw, "--extract", tmp_path / "raw") == 0
    for i, image in enumerate(images):
        name = f"{i}.png" if i % 2 else f"{i}.jpg.png"
        assert np.array_equal(np.asarray(Image.open(tmp_path / "raw" / name)), image)


def test_extract_stays_in_its_folder_and_overwrites_nothing(
    beton: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A manifest can come from anywhere: its names must not lead out of the folder."""
    inner = tmp_path / "a" / "b"
    names = ["../../up.jpg", f"{tmp_path}/absolute.jpg", "x/../../y.jpg", "twice.jpg", "/", ".."]
    names += ["./twice.jpg", "n\0ul.jpg", "line\nbreak.jpg", "twice.jpg/inner.jpg", "x" * 300, ""]
    write_manifest(beton, names + NAMES[len(names) :])
    before = {path for path in tmp_path.rglob("*") if inner not in path.parents}
    assert inspect(beton, "--extract", inner) == 1
    after = {path for path in tmp_path.rglob("*") if inner not in path.parents}
    assert after - before == {inner, inner.parent}
    written = [path for path in inner.rglob("*") if path.is_file()]
    bad = bad_lines(capsys)
    assert len(written) + len(bad) == IMAGES and len(bad) >= 3
    assert all(line.isprintable() for line in bad)
    assert (inner / "__/__/up.jpg").is_file()
    with pytest.raises(UserError, match="not empty; nothing is overwritten"):
        main([str(beton), "--extract", str(inner)])


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../x", "a/../../../x", "//x", "..", "", "\0", "./"]
)
def test_inner_path_never_leaves(name: str) -> None:
    path = inner_path(name, ".jpg")
    assert not path.is_absolute() and ".." not in path.parts and path.name


def test_damaged_record_is_not_extracted(
    beton: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(beton, int(Beton(beton).records[2, 0]) + 200, b"\1\2\3")
    assert inspect(beton, "--extract", tmp_path / "out") == 1
    assert not (tmp_path / "out" / NAMES[2]).exists()
    assert len(list((tmp_path / "out/train2017").iterdir())) == IMAGES - 1
    assert NAMES[2] in bad_lines(capsys)[0]


def test_pictures_are_drawn(beton: Path, tmp_path: Path) -> None:
    """Also of a damaged beton: users look at the pictures to understand damage."""
    damage(beton, int(Beton(beton).records[0, 0]), bytes(9))
    plot, sheet = tmp_path / "plot.png", tmp_path / "sheet.png"
    assert inspect(beton, "--plot", plot, "--sheet", sheet) == 0
    for path in (plot, sheet):
        with Image.open(path) as picture:
            assert picture.width > 2000 and len(picture.getcolors(1 << 24) or []) > 50
    alike = write_beton(tmp_path / "one.beton", [photograph(0, 32, 32)])
    assert inspect(alike, "--plot", plot, "--sheet", sheet) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.beton"], "No such file"),
        (["none.beton", "--verify"], "No such file"),
        (["photos.beton", "--plot", "plot.svg"], "must end in .png"),
        (["photos.beton", "--workers", "0"], "at least 1"),
        (["notes.beton", "--verify"], ""),
    ],
)
def test_impossible_requests_end_in_one_line(
    beton: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (beton.parent / "notes.beton").write_text("no beton at all")
    try:
        code = inspect(beton.parent / arguments[0], *arguments[1:])
        assert code == 1 and len(bad_lines(capsys)) == 1  # --verify reports it as a problem
    except UserError as error:
        assert message in str(error) and "\n" not in str(error)
