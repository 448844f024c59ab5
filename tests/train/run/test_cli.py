"""What leaves for a terminal: nothing of a file's text moves its cursor or changes its colours."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline.errors import UserError
from tests import ROOT
from train.run.cli import CommandParser, check_writable, escape_output, run
from train.run.command import run_training
from train.run.launch import lock

HOSTILE = "a\x1b[2Jb\x07\x08\x7f\x9b31m\u202egpj.\u2066\u2028\x85\rover\x00"
ESCAPED = r"a\x1b[2Jb\x07\x08\x7f\x9b31m\u202egpj.\u2066\u2028\x85\rover\x00"


@pytest.fixture(autouse=True)
def _streams() -> Iterator[None]:
    """The streams that a test found, without our escapes."""
    yield
    for stream in (sys.stdout, sys.stderr):
        vars(stream).pop("write", None)


def ended(main: Callable[[], None]) -> None:
    with pytest.raises(SystemExit):
        run(main)


def test_texts_of_files_reach_a_terminal_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    """Without it a key of a file clears the terminal, or hides the line that complains about it."""

    def main() -> None:
        print(f"table: {HOSTILE}\tcell\nnext")
        sys.stdout.writelines([HOSTILE, "\n"])
        print(HOSTILE, file=sys.stderr)
        raise UserError(f"{HOSTILE}\nsecond")

    ended(main)
    out, err = capsys.readouterr()
    assert out == f"table: {ESCAPED}\tcell\nnext\n{ESCAPED}\n"
    assert err == f"{ESCAPED}\nerror: {ESCAPED}\\nsecond\n"


def test_errors_stay_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """Without it the line feed of a file's name begins a line that looks like ours."""

    def main() -> None:
        raise UserError("x\ny", ["first\nhalf", "second"])

    ended(main)
    assert capsys.readouterr().err == "error: x\\ny\n  first\\nhalf\n  second\n"

    def missing() -> None:
        Path("no\nfile\x1b").read_text()

    ended(missing)
    assert capsys.readouterr().err == "error: no\\nfile\\x1b: No such file or directory\n"
    with pytest.raises(SystemExit):
        CommandParser(prog="x").parse_args(["--a\nb"])
    assert capsys.readouterr().err.count("\n") == 1


def test_errors_of_runs_stay_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without it training prints what other commands escape."""
    monkeypatch.setattr("os._exit", sys.exit)

    def train() -> None:
        print(HOSTILE)
        raise UserError(f"{HOSTILE}\nx")

    with pytest.raises(SystemExit):
        run_training(lambda signals: train)
    out, err = capsys.readouterr()
    assert out == f"{ESCAPED}\n" and err == f"error: {ESCAPED}\\nx\n"


def test_progress_bars_still_move(capsys: pytest.CaptureFixture[str]) -> None:
    """Without it a progress bar fills the terminal with lines."""
    escape_output()
    escape_output()
    sys.stderr.write("\r 50%")
    sys.stderr.write("\r100%\r")
    print("\rover", end="")
    assert capsys.readouterr() == ("\\rover", "\r 50%\r100%\\r")


def test_outputs_are_files(tmp_path: Path) -> None:
    """Without it an output over a device, written beside it and renamed, replaces the device."""
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/null")):
        with pytest.raises(UserError, match="is a pipe, socket or device"):
            check_writable("--out", path)


def test_no_path_is_a_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it `--out s3://bucket/a.beton` and `--log.dir s3://bucket/runs` write to a folder
    called "s3:" here, and a message about a file shows https:/host."""
    monkeypatch.chdir(tmp_path)
    parser = CommandParser()
    parser.add_argument("--out", type=Path)
    parser.add_argument("files", type=Path, nargs="*")
    for words in (["--out", "s3://b//c"], ["a", "https://h/c"], ["gs:/b"], ["file:///a"]):
        with pytest.raises(UserError, match=r"^[a-z0-9]+://\S+: a URL; give a path"):
            parser.parse_args(words)
    with pytest.raises(UserError, match=r"^s3://b/run: a URL; give a path"):
        lock(Path("s3://b") / "run")
    assert not list(tmp_path.iterdir())
    Path("exp:").mkdir()
    assert parser.parse_args(["exp:/a.json", "C:/a", "/b"]).files[0] == Path("exp:/a.json")


def test_a_command_with_a_hostile_name(tmp_path: Path) -> None:
    """Without it the above holds for our functions, but for no command."""
    name = tmp_path / "w\x1b[31m\nerror: all is well\u202e.pth"
    name.write_bytes(b"x")
    command = [
        sys.executable,
        "-m",
        "tools.export",
        name,
        "--to",
        "mmseg",
        "--out",
        tmp_path / "o.pth",
    ]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 2 and not ended.stdout
    assert ended.stderr.startswith(f"error: {tmp_path}/w\\x1b[31m\\nerror: all is well")
    assert ended.stderr[:-1].isprintable()
