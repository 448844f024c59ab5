"""The comparison of runs: side by side what was measured, what differs, and nothing else."""

from pathlib import Path

import pytest

from pipeline.errors import UserError
from tests.tools.report.test_report import Page, write_measurements, write_run
from tools import compare


def make(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr("sys.argv", ["compare", *map(str, arguments)])
    compare.main()


def test_runs_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run without measurements must keep its column, or figures stand under the wrong run."""
    one, other = write_run(tmp_path / "one"), write_run(tmp_path / "other")
    write_measurements(one)
    config = other / "config.yaml"
    config.write_text(config.read_text().replace("resnet18", "resnet<50>"))
    make(monkeypatch, other, one, "--out", tmp_path / "compare.html")
    text = (tmp_path / "compare.html").read_text()
    page = Page(text)
    assert page.sources == []
    for part in ("model.arch", "resnet18", "resnet<50>", "30.0% ± 10.0", "4.25", "Dead prototypes"):
        assert part in page.text, part
    assert "views.size" not in page.text
    row = text.split("<th>trained: mIoU</th>")[1].split("</tr>")[0]
    assert row.startswith("<td>–</td>")
    assert "40.0%" in row


def test_runs_of_one_name_and_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two folders called `demo` must be told apart."""
    runs = [write_run(tmp_path / parent / "demo") for parent in ("a", "b")]
    make(monkeypatch, *runs, "--out", tmp_path / "compare.html")
    page = Page((tmp_path / "compare.html").read_text())
    assert all(str(run) in page.text for run in runs)
    assert "Nothing but their names" in page.text


def test_bad_input_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of these would otherwise be a traceback, or a page that compares nothing."""
    run, out = write_run(tmp_path / "run"), tmp_path / "compare.html"
    (tmp_path / "empty").mkdir()
    for folders, message in (
        ((run, tmp_path / "empty"), "not the folder of a run"),
        ((run, tmp_path / "nowhere"), "no such run folder"),
        ((run,), "2 to 8 runs"),
        ((run,) * 9, "2 to 8 runs"),
        ((run, tmp_path / "empty" / ".." / "run"), "given twice"),
    ):
        with pytest.raises(UserError, match=message):
            make(monkeypatch, *folders, "--out", out)
    assert not out.exists()
