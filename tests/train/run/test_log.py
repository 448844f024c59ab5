"""The log of a run: what a damaged or torn metrics.jsonl becomes, and what a power cut can take."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import UserError
from train.run.log import LONGEST_LINE, Journal

SCORES = {"step": 6, "results": [{"metric": "miou", "value": 0.5, "class": "red"}]}
LINES = [{"step": 3, "loss": 1.5}, {"step": 6, "loss": 1.25}, SCORES, {"step": 9, "loss": 1e-3}]
TEXTS = [json.dumps(line).encode() + b"\n" for line in LINES]


@pytest.fixture
def curve(tmp_path: Path) -> Path:
    """metrics.jsonl of a run that was killed after step 9."""
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"".join(TEXTS))
    return path


def rewound(curve: Path, step: int) -> bytes:
    Journal(curve.parent).rewind(step)
    return curve.read_bytes()


@pytest.mark.parametrize(
    ("step", "kept"), [(0, 0), (2, 0), (3, 1), (5, 1), (6, 3), (8, 3), (9, 4), (99, 4)]
)
def test_later_lines_are_cut(curve: Path, step: int, kept: int) -> None:
    """Without it the steps that a resumed run repeats appear twice."""
    assert rewound(curve, step) == b"".join(TEXTS[:kept])


@pytest.mark.parametrize(
    "tail",
    [
        b'{"step": 12, "lo', b"\0" * 5000, b"\n\n", b'{"step": 12}\n' + b"\0" * 9, b"\xff\xfe\n",
        b'{"step": "12"}\n', b'{"step": -1}\n', b'{"step": 1e300}\n', b'{"step": true}\n',
        b'{"step": ' + b"9" * 5000 + b"}\n", b"[" * 100_000, b'{"loss": 3}\n', b"null\n", b"3\n",
        b'{"step": 4, "loss": "0.3"}\n', b'{"step": 4, "loss": null}\n',
        b'{"step": 4, "results": 3}\n', b'{"step": 4, "loss": 1e999}\n', b'{"step": 4, "x": NaN}',
        b'{"step": 4, "x": ' + b"[" * 2 * LONGEST_LINE,
    ],
    ids=lambda tail: repr(tail[:26]),
)  # fmt: skip
def test_a_damaged_tail_is_cut(
    curve: Path, tail: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    """A power cut leaves half a line or zeros. Without it the resume ends in a traceback, or the
    report does."""
    curve.write_bytes(curve.read_bytes() + tail)
    assert rewound(curve, 9) == b"".join(TEXTS)
    assert not capsys.readouterr().err


@pytest.mark.parametrize("damage", [b"{\n", b"\n", b"\0\0\0\n", b'{"step": 99, "loss": 1}\n'])
def test_a_damaged_line_is_left_out_and_kept_beside(
    curve: Path, damage: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without it the good lines after the damage are lost, or the damage stays unnoticed."""
    before = b"".join([TEXTS[0], damage, *TEXTS[1:]])
    curve.write_bytes(before)
    assert rewound(curve, 6) == b"".join(TEXTS[:3])
    said = capsys.readouterr().err
    assert said.startswith(f"warning: {curve}: line 2 is damaged (1 in all)")
    assert said.count("\n") == 1 and "metrics.jsonl.damaged" in said
    assert curve.with_name("metrics.jsonl.damaged").read_bytes() == before


def test_a_whole_last_line_gets_its_line_feed(curve: Path) -> None:
    """Without it the next line is glued to the last one, and both are lost."""
    curve.write_bytes(curve.read_bytes()[:-1])
    journal = Journal(curve.parent)
    journal.rewind(9)
    journal.write({"step": 12}, "")
    assert curve.read_bytes() == b"".join([*TEXTS, b'{"step": 12}\n'])


def test_results_are_written_once(curve: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A finished run that is resumed scores again. Without it the curve has the scores twice."""
    journal = Journal(curve.parent)
    journal.rewind(6)
    assert journal.scored == 6
    journal.write(SCORES, "scores")
    assert curve.read_bytes() == b"".join(TEXTS[:3]) and capsys.readouterr().out == "scores\n"
    journal.rewind(5)
    journal.write(SCORES, "scores")
    assert curve.read_bytes() == b"".join([TEXTS[0], TEXTS[2]]) and journal.scored == 6


class Disk:
    """Records what a process asks of the disk. `lost` says what a power cut may leave then: the
    content of a file is safe only after its fsync, whatever name it has.
    """

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.safe: dict[int, bytes] = {}  # content that is on the disk, by the file's number
        self.names: dict[str, int] = {}  # the folder on the disk
        self.seen: list[dict[str, bytes | None]] = []
        self.sync_all()
        fsync, replace = os.fsync, os.replace

        def synced(handle: int) -> None:
            fsync(handle)
            content = os.stat(handle)
            if os.path.samestat(content, folder.stat()):
                self.names = {path.name: path.stat().st_ino for path in folder.iterdir()}
            for path in folder.iterdir():
                if path.stat().st_ino == content.st_ino:
                    self.safe[content.st_ino] = path.read_bytes()
            self.note()

        def replaced(self_: Any, target: Any) -> Any:
            replace(self_, target)
            # A journal may write the new name before the content: the worse order counts.
            self.names[Path(target).name] = Path(target).stat().st_ino
            self.note()
            return Path(target)

        monkeypatch.setattr(os, "fsync", synced)
        monkeypatch.setattr(Path, "replace", replaced)

    def sync_all(self) -> None:
        for path in self.folder.iterdir():
            self.safe[path.stat().st_ino] = path.read_bytes()
            self.names[path.name] = path.stat().st_ino

    def note(self) -> None:
        self.seen.append({name: self.safe.get(number) for name, number in self.names.items()})


@pytest.mark.parametrize("damage", [b"", b"{\n"])
def test_no_power_cut_takes_a_line(
    curve: Path, damage: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """XFS and ext4 may give a renamed file its name before its content: 2,000 lines became none.
    Without it the lines before the checkpoint are lost."""
    curve.write_bytes(b"".join([TEXTS[0], damage, *TEXTS[1:]]))
    disk = Disk(curve.parent, monkeypatch)
    Journal(curve.parent).rewind(6)
    kept = b"".join(TEXTS[:3])
    assert disk.seen, "nothing was synced"
    for state in disk.seen:
        content = state["metrics.jsonl"]
        assert content is not None and all(line in content for line in TEXTS[:3])
    assert disk.seen[-1]["metrics.jsonl"] == kept == curve.read_bytes()


def test_a_new_curve_has_its_name_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without it the checkpoint of step 1000 may stand beside no curve after a power cut."""
    disk = Disk(tmp_path, monkeypatch)
    Journal(tmp_path).rewind(0)
    assert "metrics.jsonl" in disk.names


def gone(folder: Path) -> None:
    folder.rename(folder.with_name("moved"))


def replaced(folder: Path) -> None:
    gone(folder)
    folder.mkdir()


def deleted(folder: Path) -> None:
    (folder / "metrics.jsonl").unlink()
    folder.rmdir()


def deleted_and_made(folder: Path) -> None:
    """The new folder may get the number of the old one, unless that is still open."""
    deleted(folder)
    folder.mkdir()


@pytest.mark.parametrize("act", [gone, replaced, deleted, deleted_and_made])
def test_a_folder_that_is_gone_is_not_made_again(
    tmp_path: Path, act: Callable[[Path], None]
) -> None:
    """Without it a renamed run leaves a second folder of its name, or writes into another run."""
    folder = tmp_path / "run"
    folder.mkdir()
    journal = Journal(folder)
    journal.rewind(0)
    assert journal.problem() is None
    act(folder)
    journal.write({"step": 3}, "")
    problem = journal.problem()
    assert problem and str(problem).startswith(f"{folder}: deleted, renamed or replaced")
    assert not folder.exists() or not list(folder.iterdir())
    with pytest.raises(UserError, match="deleted, renamed or replaced"):
        journal.rewind(0)


def test_a_deleted_curve_begins_anew(curve: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without it a run of days ends because of a file that it only appends to, or hides it."""
    journal = Journal(curve.parent)
    journal.rewind(9)
    curve.unlink()
    journal.write({"step": 12}, "")
    assert curve.read_bytes() == b'{"step": 12}\n' and journal.problem() is None
    assert "was deleted: it begins anew at step 12" in capsys.readouterr().err
    curve.unlink()
    Journal(curve.parent).rewind(12)
    assert "is missing: it begins anew after step 12" in capsys.readouterr().err


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    """A FIFO would hang the run at its start."""
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(UserError, match=r"metrics\.jsonl: is not a file"):
        Journal(tmp_path).rewind(3)


@pytest.fixture
def full_terminal() -> Iterator[int]:
    """Standard output on a full disk."""
    before, full = os.dup(1), os.open("/dev/full", os.O_WRONLY)
    yield full
    os.dup2(before, 1)


def test_a_full_terminal_does_not_end_a_run(
    curve: Path, full_terminal: int, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Its output may go to a file on another disk, or to a pipe that ends. Without it the run ends
    in a traceback."""
    os.dup2(full_terminal, 1)
    monkeypatch.setattr("sys.stdout", os.fdopen(1, "w", closefd=False))
    journal = Journal(curve.parent)
    journal.rewind(9)
    for step in (12, 15):
        journal.write({"step": step}, f"step {step}")
    assert [json.loads(line)["step"] for line in curve.read_text().splitlines()[4:]] == [12, 15]
    assert capfd.readouterr().err.count("standard output: No space left on device") == 1
