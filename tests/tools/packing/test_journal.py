"""Packing resumes from its journal, or says that it is damaged and starts anew."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.errors import UserError
from tests.tools.packing.test_build_dataset import run
from tests.tools.packing.test_run import images, left, same, start_of_a_job
from tools.packing.job import journal_path, partial_path
from tools.packing.journal import Journal, Row, read_done, read_head

ANEW = "o.beton.partial.journal: the journal of an earlier run is damaged: starting anew\n"
GOOD = Row(700, 20, 30, 0, 0xABCDEF01, "original")


@pytest.fixture
def killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The output of a killed run, five batches in its journal; whole.beton is the right file."""
    root = images(tmp_path / "in", 20)
    run("folder", root, tmp_path / "whole.beton")
    start_of_a_job(root, tmp_path / "o.beton", monkeypatch, 5)
    return tmp_path / "o.beton"


def again(killed: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Run the same command; what it says. The result must have the bytes of a whole run."""
    capsys.readouterr()
    run("folder", killed.parent / "in", killed)
    assert same(killed.parent, "whole.beton", "o.beton")
    assert not [name for name in left(killed.parent) if "partial" in name]
    return capsys.readouterr().err


@pytest.mark.parametrize(
    "line",
    [
        b"[[1]]", b"[null]", b"[" * 100_000, b'[["a",1,1,0,0,"original"]]', b"{}", b"7", b"\xff",
        b'{"synced":"all"}', b'{"synced":1e400}', b"x" * (1 << 21), b"",
    ],
)  # fmt: skip
@pytest.mark.parametrize("at", [0, 4])
def test_a_line_of_another_content(
    killed: Path, capsys: pytest.CaptureFixture[str], line: bytes, at: int
) -> None:
    """Without it the command ends in a traceback, and so does each further run of it."""
    lines = journal_path(killed).read_bytes().split(b"\n")
    lines[at] = line
    journal_path(killed).write_bytes(b"\n".join(lines))
    said = again(killed, capsys)
    rest = "resuming after 9 of 22; the rest of its journal is damaged\n"
    assert said.endswith(rest if at else ANEW)


ORDERS: list[Callable[[list[bytes]], list[bytes]]] = [
    lambda lines: [*lines[:2], lines[3], lines[2], *lines[4:]],  # exchanged
    lambda lines: [*lines[:3], *lines[2:]],  # repeated
    lambda lines: [*lines[:2], *lines[3:]],  # left out
]


@pytest.mark.parametrize("order", ORDERS)
def test_lines_in_another_order(
    killed: Path, capsys: pytest.CaptureFixture[str], order: Callable[[list[bytes]], list[bytes]]
) -> None:
    """Without it images get the place of others: each line alone is well-formed."""
    path = journal_path(killed)
    path.write_bytes(b"".join(order(path.read_bytes().splitlines(keepends=True))))
    assert "the rest of its journal is damaged" in again(killed, capsys)


@pytest.mark.parametrize(("old", "new"), [(b",48,64,", b",64,48,"), (b"original", b"originaL")])
def test_a_value_that_the_data_do_not_contradict(
    killed: Path, capsys: pytest.CaptureFixture[str], old: bytes, new: bytes
) -> None:
    """Without it the packed file has another table or manifest, and nothing says so."""
    path = journal_path(killed)
    content = path.read_bytes()
    at = content.rindex(old)
    path.write_bytes(content[:at] + new + content[at + len(old) :])
    assert "the rest of its journal is damaged" in again(killed, capsys)


def test_a_torn_last_line_is_no_damage(killed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without it each kill within a write would read like a faulty disk."""
    os.truncate(journal_path(killed), journal_path(killed).stat().st_size - 5)
    assert again(killed, capsys).endswith("resuming after 12 of 22\n")


@pytest.mark.parametrize("place", ["an image", "no image"])
def test_synced_data_that_have_changed(
    killed: Path, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    """Data that were synced are not read before the end. Without the check there, a faulty disk
    would change the file, or keep every further run from finishing it.
    """
    *_, last = read_done(journal_path(killed))
    journal = Journal.resume(journal_path(killed), last)
    journal.synced(journal.length())
    journal.close()
    data = bytearray(partial_path(killed).read_bytes())
    data[-1500 if place == "an image" else 4 << 20] ^= 1
    partial_path(killed).write_bytes(data)
    message = {"an image": "are not those that were written", "no image": "belongs to no image"}
    with pytest.raises(UserError, match=f"{message[place]}.*nothing is kept") as error:
        again(killed, capsys)
    assert "o.beton.partial" in str(error.value)
    assert "resuming" not in again(killed, capsys)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    """Reasons can hold names that are not UTF-8, which not every JSON parser reads."""
    path = tmp_path / "j"
    batches = [[GOOD], [Row(0, 0, 0, 0, 0, "\udc80\n")], []]
    journal = Journal.create(path, "job")
    journal.append(batches[0])
    journal.synced(length := journal.length())
    journal.append(batches[1])
    journal.append(batches[2])
    journal.close()
    assert read_head(path) == ("job", length, False)
    done = list(read_done(path))
    assert [batch.rows for batch in done] == batches
    again = Journal.resume(path, done[0])
    again.append(batches[0])
    again.close()
    assert [batch.rows for batch in read_done(path)] == [[GOOD], [GOOD]]


@pytest.mark.parametrize(
    "row",
    [
        GOOD._replace(size=-1), GOOD._replace(size=1 << 40), GOOD._replace(height=70_000),
        GOOD._replace(height=0), GOOD._replace(mode=2), GOOD._replace(crc=1 << 32),
        GOOD._replace(how=None),  # type: ignore[arg-type]
    ],
)  # fmt: skip
def test_impossible_rows(tmp_path: Path, row: Row) -> None:
    """Without it a writer that was wrong, with correct checksums, ends in a traceback."""
    journal = Journal.create(tmp_path / "j", "job")
    journal.append([GOOD])
    journal.append([row])
    journal.close()
    head = read_head(tmp_path / "j")
    assert head is not None
    assert head.damaged
    assert [batch.rows for batch in read_done(tmp_path / "j")] == [[GOOD]]


def test_no_journal(tmp_path: Path) -> None:
    """A pipe in its place must not block the command for ever."""
    assert read_head(tmp_path / "none") is None
    os.mkfifo(tmp_path / "pipe")
    assert read_head(tmp_path / "pipe") is None
    (tmp_path / "empty").touch()
    assert read_head(tmp_path / "empty") == ("", 0, False)


def test_nothing_is_kept_where_nothing_can_be_written(tmp_path: Path) -> None:
    """Without it the message promises finished work that does not exist."""
    root = images(tmp_path / "in", 3)
    with pytest.raises(UserError) as error:
        run("folder", root, Path("/proc/x.beton"))
    assert str(error.value).startswith("cannot write /proc/x.beton: ")
    assert "kept" not in str(error.value)
    (tmp_path / "o.beton.partial.journal").mkdir()
    with pytest.raises(UserError, match=r"o\.beton: Is a directory$"):
        run("folder", root, tmp_path / "o.beton")
