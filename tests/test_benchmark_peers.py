"""The comparison with peers: equal work, turns, failures as rows, one line on bad input."""

import json
import subprocess
import sys
import time
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage.data
from numpy.typing import NDArray
from PIL import Image

from pipeline.augment import IMAGENET_MEAN, IMAGENET_STD
from pipeline.errors import UserError
from pipeline.views import ViewConfig, sample_views
from tests import ROOT
from tests.benchmark_peers import __main__ as command
from tests.benchmark_peers import rounds, table
from tests.benchmark_peers.peers import PEERS, Job
from tests.benchmark_peers.turn import Turn
from tests.helpers.betons import varied, write_beton

WIDTH, HEIGHT, SIDE, BATCH, BATCHES = 320, 240, 64, 16, 8
OFF: dict[str, Any] = {"jitter": 0, "grey": 0, "blur": (0, 0), "solarize": (0, 0)}
NEEDS = {"lightly": "lightly", "dali": "nvidia", "slotstream-dali": "nvidia"}
OTHERS = ("authors", "torchvision", "lightly", "dali", "ffcv")

TAKE = """
import json, os, sys
import numpy as np
from tests.benchmark_peers.peers import Job, open_views
out, batches, *jobs = sys.argv[1:]
taken = []
for job in jobs:
    views = open_views(Job(**json.loads(job)))
    pairs = [next(views) for _ in range(int(batches))]
    taken.append(np.concatenate([np.stack([v.numpy() for v in pair]) for pair in pairs], axis=1))
np.savez(out, *taken)
os._exit(0)
"""


def ramp() -> NDArray[np.uint8]:
    """Red = x, green = y, over 0..255; blue = 128."""
    x = np.broadcast_to(np.linspace(0, 255, WIDTH), (HEIGHT, WIDTH))
    y = np.broadcast_to(np.linspace(0, 255, HEIGHT)[:, None], (HEIGHT, WIDTH))
    return np.stack([x, y, np.full_like(x, 128)], axis=-1).round().astype(np.uint8)


def job_on(images: list[NDArray[np.uint8]], folder: Path, **views: Any) -> Job:
    """A job on these images, as files and packed."""
    source = folder / "source"
    source.mkdir(parents=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(source / f"{i}.jpg", quality=97, subsampling=0)
    command.lay_out(source, 100, folder / "files")
    assert not command.pack(folder, [])
    return Job(
        "authors", str(folder / "files"), str(folder / "images.beton"), "",
        asdict(ViewConfig(size=SIDE, **views)), BATCH, 1, "cpu", 0.0, 0.1,
    )  # fmt: skip


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Job, Job]:
    """Ramps without colours; photographs, each one jittered."""
    folder = tmp_path_factory.mktemp("peers")
    photographs = [getattr(skimage.data, name)() for name in ("astronaut", "chelsea", "coffee")]
    return (
        job_on([ramp()] * BATCH, folder / "ramps", **OFF),
        job_on(photographs * 6, folder / "photographs", jitter=1),
    )


def views_of(peer: str, jobs: tuple[Job, ...], folder: Path) -> list[NDArray[np.float64]]:
    """Levels of the peer's views [2, N, 3, S, S] for each job, from a process of its own."""
    words = [json.dumps(asdict(replace(job, peer=peer))) for job in jobs]
    out = folder / "views.npz"
    code = [sys.executable, "-c", TAKE, out, str(BATCHES), *words]
    subprocess.run(code, check=True, cwd=ROOT, timeout=280)
    mean, std = (np.array(v)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
    with np.load(out) as taken:
        return [(views * std + mean) * 255 for views in taken.values()]


def check_geometry(views: NDArray[np.float64]) -> None:
    """Crops, aspects and flips of a ramp's views are drawn as ours; nothing else changes them."""
    inner = slice(SIDE // 10, -SIDE // 10)  # a resize flattens the ramp at the border
    across, down = views[:, :, 0].mean(2)[..., inner], views[:, :, 1].mean(3)[..., inner]
    steps = np.arange(SIDE)[inner]
    slopes, shares = [], []
    for values, side in ((across, WIDTH), (down, HEIGHT)):
        fit = np.polynomial.polynomial.polyfit(steps, values.reshape(-1, len(steps)).T, 1)
        line = fit[0][:, None] + fit[1][:, None] * steps
        assert np.abs(line - values.reshape(line.shape)).max() < 4, "not a straight resize"
        slopes.append(fit[1])
        shares.append(np.abs(fit[1]) * SIDE * (side - 1) / side / 255)
    assert np.abs(views[:, :, 2] - 128).max() < 5
    assert (slopes[1] > 0).all() and 0.35 < (slopes[0] < 0).mean() < 0.65, "flips"
    areas, aspects = shares[0] * shares[1], shares[0] * WIDTH / (shares[1] * HEIGHT)
    assert 0.07 < areas.min() < 0.14 and 0.8 < areas.max() < 1.05
    assert 0.7 < aspects.min() < 0.8 and 1.25 < aspects.max() < 1.45
    many = np.ones(4000, np.int64)
    x0, y0, x1, y1 = np.moveaxis(
        sample_views(0, 0, np.arange(4000), many * HEIGHT, many * WIDTH, ViewConfig()).crops, -1, 0
    )
    ours = ((x1 - x0) * (y1 - y0)).mean() / WIDTH / HEIGHT
    assert areas.mean() == pytest.approx(ours, abs=0.06)
    first, second = areas.reshape(2, -1)
    assert np.abs(first - second).mean() > 0.1, "both views have the same crop"


def description(views: NDArray[np.float64]) -> dict[str, float]:
    """Of the views [2, N, 3, S, S]: what each operation of the recipe would change."""
    brightness = views.mean(axis=(2, 3, 4))
    colourful = (views.max(axis=2) - views.min(axis=2)).mean(axis=(2, 3))
    detail = np.abs(np.diff(views.mean(axis=2), axis=-1)).mean(axis=(1, 2, 3))
    return {
        "brightness": brightness.mean(),
        "its spread": brightness.std(),
        "contrast": views.std(axis=(2, 3, 4)).mean(),
        "colour": colourful.mean(),
        "its spread, grey views included": colourful.std(),
        "spread of red less green": (views[:, :, 0] - views[:, :, 1]).mean(axis=(2, 3)).std(),
        "blur of view 1": detail[0] / detail[1],
    }


@pytest.fixture(scope="module")
def ours(jobs: tuple[Job, Job], tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    folder = tmp_path_factory.mktemp("ours")
    return description(views_of("slotstream-reference", jobs[1:], folder)[0])


@pytest.mark.parametrize("peer", OTHERS)
def test_a_peer_does_the_same_work(
    peer: str, jobs: tuple[Job, Job], ours: dict[str, float], tmp_path: Path
) -> None:
    """Without it a peer that left out a crop or a colour would look faster than it is."""
    if peer in NEEDS and find_spec(NEEDS[peer]) is None:
        pytest.skip(f"{NEEDS[peer]} is not installed")
    ramps, photographs = views_of(peer, jobs, tmp_path)
    assert ramps.shape == photographs.shape == (2, BATCH * BATCHES, 3, SIDE, SIDE)
    check_geometry(ramps)
    theirs = description(photographs)
    for what, value in ours.items():
        assert theirs[what] == pytest.approx(value, rel=0.3), what


def test_the_authors_overlap_is_the_same_place_in_both_views(jobs: tuple[Job, Job]) -> None:
    """Without it the row that says "geometry known" would be wrong."""
    from tests.benchmark_peers.authors import Pair

    pair = Pair(jobs[0].recipe)
    path = next(Path(jobs[0].files).iterdir())
    seen = set()
    for _ in range(60):
        *views, overlap, flipped = pair(str(path))
        x1, y1, x2, y2 = (overlap * SIDE).T
        if (x2 - x1).min() < 8 or (y2 - y1).min() < 8:
            continue
        seen.add(tuple(flipped.tolist()))
        centres = [
            view[:2, int((y1[v] + y2[v]) / 2), int((x1[v] + x2[v]) / 2)]
            for v, view in enumerate(views)
        ]
        # Half a pixel of either view, in levels: a view's 64 pixels show at most 255 of them.
        assert (centres[0] - centres[1]).abs().max() < 6 / 255 / 0.22
    assert len(seen) == 4


def test_rounds_go_forth_and_back(monkeypatch: pytest.MonkeyPatch, jobs: tuple[Job, Job]) -> None:
    """Without it a machine that gets slower favours the first peer; a failure ends the run."""
    order: list[str] = []

    def run_turn(job: Job) -> Turn:
        order.append(job.peer)
        if job.peer == "ffcv":
            raise rounds.TurnFailed("not installed: ffcv")
        return Turn(1.0, 100.0 * len(order))

    monkeypatch.setattr(rounds, "run_turn", run_turn)
    reasons = {"slotstream-tiles": "no tiles"}
    peers = ["slotstream", "ffcv", "slotstream-tiles", "dali"]
    *_, turns = rounds.run_rounds(jobs[0], peers, 3, reasons)
    assert order == ["slotstream", "ffcv", "dali", "dali", "slotstream", "slotstream", "dali"]
    assert [turn.images_per_s for turn in turns["dali"]] == [300, 400, 700]
    assert reasons["ffcv"] == "not installed: ffcv" and not turns["ffcv"]


def test_a_turn_that_fails_says_why_in_a_line(jobs: tuple[Job, Job]) -> None:
    """Without it the table says only that something failed."""
    broken = replace(jobs[0], peer="slotstream-reference", beton="missing.beton")
    with pytest.raises(rounds.TurnFailed, match=r"^[^\n]*missing\.beton[^\n]*$"):
        rounds.run_turn(broken)
    missing = "Traceback:\n  File x\nModuleNotFoundError: No module named 'lightly'\n"
    assert rounds.reason_of(missing) == "not installed: 'lightly'"


def test_a_turn_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch, jobs: tuple[Job, Job]) -> None:
    """Without it one peer's deadlock is everybody's."""
    monkeypatch.setattr(rounds, "LONGEST", 0.1)
    began = time.monotonic()
    with pytest.raises(rounds.TurnFailed, match="did not end within"):
        rounds.run_turn(jobs[0])
    assert time.monotonic() - began < 30


def test_the_command_measures_and_writes(
    jobs: tuple[Job, Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Without it the parts work and the whole does not: a figure of zero, a file half written."""
    words = ["--peers", "authors", "slotstream-reference", "--rounds", "1", "--seconds", "0.2"]
    words += ["--batch", "4", "--size", "32", "--threads", "1"]
    outputs = ["--json", tmp_path / "p.json", "--markdown", tmp_path / "p.md"]
    whole = ["peers", "--images", jobs[1].beton, *words, *outputs]
    monkeypatch.setattr(sys, "argv", [str(word) for word in whole])
    command.main()
    content = json.loads((tmp_path / "p.json").read_text())
    assert content["settings"]["images"] == 18
    for result in content["results"]:
        assert not result["failed"]
        (turn,) = result["turns"]
        assert all(turn[figure] > 0 for figure in table.FIGURES), turn
        assert turn["std"] == pytest.approx(1.1, abs=0.5)
    shown = (tmp_path / "p.md").read_text()
    assert shown == capsys.readouterr().out
    assert shown.count("\n| ") == 3 and "1.00 ×" in shown


def test_the_table_says_who_is_ahead_and_who_is_missing() -> None:
    """Without it a reader must find out alone where slotstream is behind."""
    results = [
        {"peer": name, "about": "x", "geometry": False, "failed": failed, "ratio": 1.0,
         "turns": [asdict(Turn(first, rate, 5.0, memory)) for rate in rates]}
        for name, first, memory, rates, failed in (
            ("slotstream", 1.0, 1.0, (600, 500, 700), None),
            ("dali", 2.0, 0.5, (200, 190, 230), None),
            ("lightly", 0, 0, (), "not installed: 'lightly'"),
        )
    ]  # fmt: skip
    assert table.ahead(results) == "Ahead of slotstream in memory: dali."
    assert "| 600 (500 to 700) | 1.00 × | 5.0 (5.0 to 5.0) | 1.00" in table.row(results[0])
    assert table.row(results[2]) == "| lightly: x | not installed: 'lightly' | | | | | |"


def test_only_what_was_timed_is_called_so() -> None:
    """Without it a table of first batches says that each peer was timed for seconds."""
    settings = {"threads": 2, "images": 64, "batch": 8, "size": 96, "device": "cpu", "rounds": 3}
    hardware = {"cpu": "a processor", "memory_gib": 1.0}
    content = {"hardware": hardware, "versions": {}, "results": []}
    for first_batch, words in ((False, "rounds of 2 s: 3."), (True, "rounds: 3.")):
        settings |= {"first_batch": first_batch, "seconds": 2.0}
        assert f"cpu; {words}" in table.markdown(content | {"settings": settings})


def test_a_beton_gives_the_files_back(jobs: tuple[Job, Job], tmp_path: Path) -> None:
    """Without it the peers that read files decode other bytes than slotstream."""
    command.lay_out(Path(jobs[1].beton), 100, tmp_path / "files")
    packed, files = (sorted(Path(p).iterdir()) for p in (tmp_path / "files", jobs[1].files))
    assert len(packed) == len(files) == 18
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(packed, files, strict=True))
    assert command.lay_out(Path(jobs[1].files), 5, tmp_path / "few") == 5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--images", "nowhere"], "nowhere: no such folder"),
        (["--images", "pixels.beton"], "holds pixels"),
        (["--images", "."], r"\.: has 0 JPEG files, a batch needs 32"),
        (["--images", ".", "--count", "0"], "must be at least 1"),
        (["--images", ".", "--seconds", "nan"], "--seconds must be above 0"),
        (["--images", ".", "--threads", "5000"], "--threads 5000: this process may use"),
        (["--images", ".", "--json", "."], "--json .*is a folder"),
    ],
)
def test_bad_input_is_one_line(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without it a typing mistake ends in a traceback, after minutes."""
    monkeypatch.chdir(tmp_path)
    if "pixels.beton" in words:
        write_beton(tmp_path / "pixels.beton", varied(2), "raw")
    monkeypatch.setattr(sys, "argv", ["peers", *words])
    with pytest.raises(UserError, match=message):
        command.main()


def test_peers_are_explained() -> None:
    """Without it a new peer is measured and nobody knows what it is."""
    for peer in PEERS.values():
        assert peer.about
        assert (ROOT / "tests" / "benchmark_peers" / f"{peer.module}.py").is_file()
