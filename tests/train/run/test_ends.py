"""The ends of a run: one exit code and at most one line each."""

import pytest

from pipeline.errors import UserError
from train.run.command import run_training
from train.run.ends import Collapsed, Diverged, EndedElsewhere, LostProcess, Stopped, naming


@pytest.mark.parametrize(
    ("end", "code", "first", "other"),
    [
        (UserError("bad image"), 2, "error: bad image\n", "error: bad image\n"),
        (Diverged("a NaN"), 1, "error: a NaN\n", ""),
        (Collapsed("one slot"), 1, "error: one slot\n", ""),
        (Stopped("by a signal"), 75, "by a signal\n", ""),
        (LostProcess("rank 1"), 1, "error: rank 1\n", "error: rank 1\n"),
        (EndedElsewhere(), 2, "", ""),
        (KeyboardInterrupt(), 130, "error: interrupted\n", ""),
    ],
)
def test_each_end_has_a_code_and_a_line(
    end: BaseException,
    code: int,
    first: str,
    other: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Schedulers read the code. Users need the line once: not never, and not from each process."""

    def train() -> None:
        raise end

    def leave(status: int) -> None:
        raise SystemExit(status)

    monkeypatch.setattr("os._exit", leave)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, line in (("0", first), ("1", other)):
        monkeypatch.setenv("LOCAL_RANK", rank)
        with pytest.raises(SystemExit) as ended:
            run_training(lambda signals: train)
        assert ended.value.code == code and capsys.readouterr().err == line


def test_only_a_lost_process_is_reported_as_one() -> None:
    """An end with "gloo" in its message, or an error of our code, must stay what it is."""
    for error in (Diverged("gloo"), RuntimeError("shapes differ"), UserError("gloo")):
        with pytest.raises(type(error)) as raised, naming("runs/a"):
            raise error
        assert raised.value is error
    with (
        pytest.raises(LostProcess, match=r"^runs/a: another process .*\(\[gloo\] closed\), why$"),
        naming("runs/a", lambda: ", why"),
    ):
        raise RuntimeError("[gloo] closed")
