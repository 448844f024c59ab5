"""The comparison of runs shows measurements and differing settings side by side."""

from pathlib import Path

import pytest

from pipeline.errors import UserError
from tests.helpers.exported import call
from tests.tools.report.test_report import Page, write_measurements, write_run
from tools import compare


def test_runs_side_by_side(tmp_path: Path) -> None:
    """A run without measurements must keep its column: else figures stand under the wrong run."""
    one, other = write_run(tmp_path / "one"), write_run(tmp_path / "other")
    write_measurements(one)
    config = other / "config.yaml"
    config.write_text(config.read_text().replace("resnet18", "resnet<50>"))
    call(compare.main, other, one, "--out", tmp_path / "compare.html")
    text = (tmp_path / "compare.html").read_text()
    page = Page(text)
    assert page.sources == []
    for part in ("model.arch", "resnet18", "resnet<50>", "30.0% ± 10.0", "4.25", "Dead prototypes"):
        assert part in page.text, part
    assert "views.size" not in page.text
    row = text.split("<th>trained: mIoU</th>")[1].split("</tr>")[0]
    assert row.startswith('<td data-title="other"><span>–</span></td>')
    assert "40.0%" in row


def test_runs_of_one_name_and_configuration(tmp_path: Path) -> None:
    """Two folders called `demo` need different names."""
    runs = [write_run(tmp_path / parent / "demo") for parent in ("a", "b")]
    call(compare.main, *runs, "--out", tmp_path / "compare.html")
    page = Page((tmp_path / "compare.html").read_text())
    assert all(str(run) in page.text for run in runs)
    assert "Nothing but their names" in page.text


def test_bad_input_is_one_clear_line(tmp_path: Path) -> None:
    """Without these checks the user would get a traceback, or a page that compares nothing."""
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
            call(compare.main, *folders, "--out", out)
    assert not out.exists()
