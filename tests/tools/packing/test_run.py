"""Packing with interruptions, bad images and each storage."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from pipeline import beton_writer
from pipeline.beton import Beton
from pipeline.beton_writer import BetonWriter
from pipeline.errors import UserError
from pipeline.manifest import Manifest
from tests.helpers.manifests import names_of
from tests.pipeline.test_beton_writer import stored
from tests.tools.packing.test_build_dataset import fill, picture, run, save
from tools import build_dataset
from tools.packing import run as packing
from tools.packing.images import Storage
from tools.packing.job import job_of
from tools.packing.journal import Journal
from tools.packing.run import pack
from tools.packing.sources import SOURCES


def left(folder: Path) -> list[str]:
    """The files beside the folder of images, `in`."""
    return sorted(path.name for path in folder.iterdir() if path.name != "in")


def images(root: Path, count: int) -> Path:
    """`count` JPEGs and two PNGs; the PNGs are converted."""
    fill(root, *(f"{i:04d}.jpg" for i in range(count)))
    save(root / "0003.png")
    save(root / "z.png", picture(90, 70))
    return root


def same(folder: Path, one: str, other: str) -> bool:
    """Whether two betons and their manifests have the same bytes."""
    return all(
        (folder / f"{one}{suffix}").read_bytes() == (folder / f"{other}{suffix}").read_bytes()
        for suffix in ("", ".json")
    )


# --- interruptions -------------------------------------------------------------------------------


class Killed(BaseException):
    """Simulates SIGKILL."""


@pytest.mark.parametrize("at", [0, 1, 2, 5, 9])
@pytest.mark.parametrize("when", ["before", "after", "torn"])
def test_killed_between_data_and_journal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int, when: str
) -> None:
    """Wherever the run is killed, no image may be lost, doubled or incomplete."""
    monkeypatch.setattr(packing, "BATCH_IMAGES", 3)
    root = images(tmp_path / "in", 40)
    run("folder", root, tmp_path / "a.beton")
    append, count = Journal.append, 0

    def die(journal: Journal, rows: list) -> None:
        nonlocal count
        count += 1
        if count <= at:
            return append(journal, rows)
        if when != "before":
            append(journal, rows)
        if when == "torn":
            os.ftruncate(journal.file, journal.length() - 7)
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Journal, "append", die)
        run("folder", root, tmp_path / "b.beton")
    assert "b.beton" not in left(tmp_path)
    run("folder", root, tmp_path / "b.beton")
    assert same(tmp_path, "a.beton", "b.beton")
    assert left(tmp_path) == ["a.beton", "a.beton.json", "b.beton", "b.beton.json"]


@pytest.mark.parametrize(
    ("module", "function"),
    [
        (BetonWriter, "finish"),
        (BetonWriter, "publish"),
        (Manifest, "write"),
        (Path, "unlink"),
    ],
)
@pytest.mark.parametrize("done", [False, True])
def test_killed_at_the_end(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    module: type,
    function: str,
    done: bool,
) -> None:
    """After a kill at any of the last steps, the same command must complete the beton."""
    root = images(tmp_path / "in", 10)
    run("folder", root, tmp_path / "a.beton")
    original = getattr(module, function)

    def die(self: object, *args: object, **options: object) -> None:
        if function == "unlink" and not str(self).endswith(".journal"):
            return original(self, *args, **options)
        if done:
            original(self, *args, **options)
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(module, function, die)
        run("folder", root, tmp_path / "b.beton")
    if not (tmp_path / "b.beton").exists() or not done or function == "publish":
        run("folder", root, tmp_path / "b.beton")
    assert same(tmp_path, "a.beton", "b.beton")
    assert left(tmp_path) == ["a.beton", "a.beton.json", "b.beton", "b.beton.json"]


def test_another_command_does_not_end_what_was_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without it, the user would get an older command's file, reported as complete."""
    fill(tmp_path, "train2017/a.jpg")
    root = tmp_path / "train2017"

    def die(*_: object, **__: object) -> None:
        raise Killed

    out = tmp_path / "o.beton"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(packing, "Summary", die)
        patch.setattr(Path, "unlink", lambda path, missing_ok=False: None)
        run("folder", root, out)
    with pytest.raises(UserError, match="exists; --force replaces it"):
        run("coco", tmp_path, out)
    run("coco", tmp_path, out, "--force")
    assert Manifest.beside(out).source == "coco"


def test_killed_while_replacing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An older beton keeps its manifest until the new beton is complete. The same command completes
    the rest.
    """
    root, out = images(tmp_path / "in", 3), tmp_path / "o.beton"
    run("folder", root, out)
    older = [out.read_bytes(), (tmp_path / "o.beton.json").read_bytes()]
    fill(root, "new.jpg")
    run("folder", root, tmp_path / "new.beton")

    def die(*_: object) -> None:
        raise Killed

    for name, published in (("publish", False), ("sync_folder", True)):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(BetonWriter if not published else beton_writer, name, die)
            run("folder", root, out, "--force")
        if not published:
            assert older == [out.read_bytes(), (tmp_path / "o.beton.json").read_bytes()]
    run("folder", root, out)
    assert same(tmp_path, "o.beton", "new.beton")


def test_killed_for_real(tmp_path: Path) -> None:
    """After SIGKILL at any moment the same command resumes, and ends with the same bytes."""
    root = tmp_path / "in"
    photograph = np.random.default_rng(0).integers(0, 255, (300, 300, 3), np.uint8)
    from PIL import Image

    for i in range(12):
        save(root / f"{i}.png", Image.fromarray(np.roll(photograph, i, axis=0)))
    for i in range(1200):  # more than SYNC_BYTES
        os.link(root / f"{i % 12}.png", root / f"copy{i}.png")
    command = f"-m tools.build_dataset folder --root {root} --workers 2 --out".split()
    once = [sys.executable, *command, f"{tmp_path}/a.beton"]
    subprocess.run(once, check=True, capture_output=True, timeout=60)
    again = [sys.executable, *command, f"{tmp_path}/b.beton"]
    partial, journal = tmp_path / "b.beton.partial", tmp_path / "b.beton.partial.journal"
    total, resumed = (tmp_path / "a.beton").stat().st_size, 0
    for share in (0.0, 0.2, 0.5, 0.9):
        process = subprocess.Popen(again, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and not (
            journal.exists() and partial.exists() and partial.stat().st_size > share * total
        ):
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
        resumed += journal.exists()
    assert resumed
    subprocess.run(again, check=True, capture_output=True, timeout=60)
    assert same(tmp_path, "a.beton", "b.beton")


def start_of_a_job(root: Path, out: Path, monkeypatch: pytest.MonkeyPatch, batches: int) -> None:
    """Pack `batches` batches of 3 images, then simulate SIGKILL."""
    append, count = Journal.append, 0

    def die(journal: Journal, rows: list) -> None:
        nonlocal count
        append(journal, rows)
        count += 1
        if count == batches:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(packing, "BATCH_IMAGES", 3)
        patch.setattr(Journal, "append", die)
        run("folder", root, out)


def test_finished_work_is_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The journal saves finished work, and a beton must not mix two sets of options."""
    root, out = images(tmp_path / "in", 40), tmp_path / "b.beton"
    start_of_a_job(root, out, monkeypatch, 8)
    run("folder", root, out)
    assert "resuming after" in capsys.readouterr().err
    start_of_a_job(root, tmp_path / "c.beton", monkeypatch, 8)
    run("folder", root, tmp_path / "c.beton", "--store", "raw")
    assert "starting over" in capsys.readouterr().err
    assert set(Beton(tmp_path / "c.beton").records[:, 4]) == {1}
    start_of_a_job(root, tmp_path / "d.beton", monkeypatch, 8)
    save(root / "0000.png")
    run("folder", root, tmp_path / "d.beton")
    assert "starting over" in capsys.readouterr().err
    assert len(Beton(tmp_path / "d.beton")) == 43


@pytest.mark.parametrize("damage", ["flip", "cut", "delete"])
def test_data_lost_after_a_power_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    """The journal may reach the disk before the data that it lists."""
    root, out = images(tmp_path / "in", 40), tmp_path / "b.beton"
    run("folder", root, tmp_path / "a.beton")
    start_of_a_job(root, out, monkeypatch, 8)
    partial = tmp_path / "b.beton.partial"
    if damage == "delete":
        partial.unlink()
    else:
        data = partial.read_bytes()
        data = data[:-900] if damage == "cut" else data[:-900] + bytes(900)
        partial.write_bytes(data)
    run("folder", root, out)
    assert same(tmp_path, "a.beton", "b.beton")


# --- bad images ----------------------------------------------------------------------------------


def test_skipping(tmp_path: Path) -> None:
    """One bad image in a million must not exclude the others or shift their labels."""
    fill(tmp_path, "train/n01/a.JPEG", "train/n01/c.JPEG", "train/n02/e.JPEG")
    (tmp_path / "train/n01/b.JPEG").write_bytes(b"")
    (tmp_path / "train/n02/d.JPEG").symlink_to("nowhere")
    with pytest.raises(UserError, match="2 of 5 images are bad"):
        run("imagenet", tmp_path, tmp_path / "o.beton")
    run("imagenet", tmp_path, tmp_path / "o.beton", "--on-error", "skip")
    beton, manifest = Beton(tmp_path / "o.beton"), Manifest.beside(tmp_path / "o.beton")
    assert names_of(manifest) == ["train/n01/a.JPEG", "train/n01/c.JPEG", "train/n02/e.JPEG"]
    assert manifest.skipped == [
        ("train/n01/b.JPEG", "empty file"),
        ("train/n02/d.JPEG", "broken symbolic link"),
    ]
    assert manifest.options["on_error"] == "skip"
    assert beton.label is not None
    assert beton.label.tolist() == [0, 0, 1]
    assert beton.index.tolist() == [0, 1, 2]
    for i, name in enumerate(names_of(manifest)):
        assert stored(tmp_path / "o.beton")[i] == (tmp_path / name).read_bytes()


def test_mended_after_a_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is downloaded again takes its old number, as in a run without a stop."""
    monkeypatch.setattr(packing, "BATCH_IMAGES", 3)
    root = images(tmp_path / "in", 30)
    run("folder", root, tmp_path / "a.beton")
    good = (root / "0020.jpg").read_bytes()
    (root / "0020.jpg").write_bytes(good[:-100])
    with pytest.raises(UserError, match=r"0020\.jpg: truncated JPEG"):
        run("folder", root, tmp_path / "b.beton")
    (root / "0020.jpg").write_bytes(good)
    run("folder", root, tmp_path / "b.beton")
    assert same(tmp_path, "a.beton", "b.beton")


def test_mended_before_skipping(tmp_path: Path) -> None:
    """Repaired images must be packed; images that are still bad must be skipped."""
    root, out = images(tmp_path / "in", 9), tmp_path / "o.beton"
    content = (root / "0002.jpg").read_bytes()
    for name in ("0002.jpg", "0005.jpg"):
        (root / name).write_bytes(b"")
    with pytest.raises(UserError, match="2 of 11 images are bad"):
        run("folder", root, out)
    (root / "0002.jpg").write_bytes(content)
    run("folder", root, out, "--on-error", "skip")
    assert Manifest.beside(out).skipped == [("0005.jpg", "empty file")]
    run("folder", root, tmp_path / "once.beton", "--on-error", "skip")
    assert same(tmp_path, "o.beton", "once.beton")


def test_inputs_are_not_replaced(tmp_path: Path) -> None:
    """--force with a wrong --out must not replace a photograph or the list."""
    root = fill(tmp_path / "in", "a.jpg")
    before = (root / "a.jpg").read_bytes()
    with pytest.raises(UserError, match=r"--force replaces only files called \.beton"):
        run("folder", root, root / "a.jpg", "--force")
    assert (root / "a.jpg").read_bytes() == before
    for out in ("", ".", "x" * 245 + ".beton"):
        with pytest.raises(UserError, match=r"is a folder|too long"):
            build_dataset.main(["folder", "--root", str(root), "--out", out])


def test_names_that_break_the_line(tmp_path: Path) -> None:
    """A name with a line feed would look like two files; an escape could change the terminal."""
    root = fill(tmp_path / "in", "a.jpg")
    for name in ("new\nline.jpg", "es\x1b[31mcape.jpg"):
        (root / name).write_bytes(b"")
    with pytest.raises(UserError) as error:
        run("folder", root, tmp_path / "o.beton")
    lines = str(error.value).splitlines()
    assert lines[1:] == ["  'es\\x1b[31mcape.jpg': empty file", "  'new\\nline.jpg': empty file"]


def test_nothing_good(tmp_path: Path) -> None:
    """Without it, an empty beton would fail only in training."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(b"")
    with pytest.raises(UserError, match="no good image remains"):
        run("folder", tmp_path / "in", tmp_path / "o.beton", "--on-error", "skip")


# --- storage -------------------------------------------------------------------------------------


def test_stores(tmp_path: Path) -> None:
    """The images that each store keeps, scales and encodes, and their manifest."""
    root = tmp_path / "in"
    save(root / "a.jpg", picture(48, 64), quality=95)
    save(root / "b.jpg", picture(200, 300), quality=95)
    save(root / "c.png", picture(40, 30))
    expected = {
        "raw": [(48, 64), (200, 300), (40, 30), "converted: decoded", "converted: decoded"],
        "raw --max-side 64": [(48, 64), (43, 64), (40, 30), "converted: decoded", "scaled"],
        "jpeg --max-side 64": [(48, 64), (43, 64), (40, 30), "original", "scaled"],
        "jpeg --quality 50": [(48, 64), (200, 300), (40, 30), "original", "original"],
    }
    for options, (*sizes, first, second) in expected.items():
        out = tmp_path / f"{options.replace(' ', '_')}.beton"
        run("folder", root, out, *f"--store {options}".split())
        beton, manifest = Beton(out), Manifest.beside(out)
        assert list(zip(beton.height, beton.width, strict=True)) == sizes
        how = [record.how for record in manifest.records()]
        assert how[:2] == [first, second]
        if options.startswith("jpeg"):
            assert how[2] == "converted: PNG"
            assert set(beton.records[:, 4]) == {0}
        else:
            assert set(beton.records[:, 4]) == {1}
            assert manifest.stored == {"original": 0, "tiles": 0, "jpeg": 0, "raw": 3}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--max-side 64", "--max-side cannot be used with --store original"),
        ("--quality 64", "--quality cannot be used with --store original"),
        ("--store auto", "--store auto and --budget need each other"),
        ("--budget 1GB", "--store auto and --budget need each other"),
        ("--store auto --budget 1GB --max-side 5", "it chooses the side"),
        ("--store auto --budget 1kB", "--budget: 3 images of 128 pixels still take"),
    ],
)
def test_options_that_contradict(tmp_path: Path, options: str, message: str) -> None:
    """If they were ignored, the beton would differ from what the user expects."""
    fill(tmp_path / "in", "a.jpg", "b.jpg", "c.jpg")
    with pytest.raises(UserError) as error:
        run("folder", tmp_path / "in", tmp_path / "o.beton", *options.split())
    assert message in str(error.value)


def test_a_budget_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The estimate decides the storage: the beton must fit, and not waste half the space."""
    root = tmp_path / "in"
    rng = np.random.default_rng(0)
    from PIL import Image

    for i in range(24):
        noise = Image.fromarray(rng.integers(0, 255, (40, 50, 3), np.uint8))
        save(root / f"{i:02d}.jpg", noise.resize((1000, 800)), quality=95)
    used = {}
    for budget in (90, 40, 20):
        out = tmp_path / f"{budget}.beton"
        run("folder", root, out, "--store", "auto", "--budget", f"{budget}MB")
        used[budget] = out.stat().st_size / 1e6
        options = Manifest.beside(out).options
        assert used[budget] <= budget
        assert f"--store {options['store']}" in capsys.readouterr().out
    assert Manifest.beside(tmp_path / "90.beton").options["store"] == "raw"
    assert used[90] > 55


def test_json_of_a_manifest(tmp_path: Path) -> None:
    """Other programs read the manifest with any JSON library."""
    root = images(tmp_path / "in", 3)
    job = job_of("folder", SOURCES["folder"](root), Storage(), None)
    pack(job, tmp_path / "o.beton")
    content = json.loads((tmp_path / "o.beton.json").read_text())
    assert content["count"] == len(content["records"]) == 5
    assert content["bytes"] == (tmp_path / "o.beton").stat().st_size
    assert content["stored"] == {"original": 3, "tiles": 0, "jpeg": 0, "raw": 2}
