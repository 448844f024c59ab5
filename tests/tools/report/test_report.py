"""The report is one file, complete, and says which measurements are missing."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipeline.errors import UserError
from tests.helpers.exported import call
from tools import compare
from tools.report import __main__ as report
from tools.report.charts import MAX_POINTS, line_chart, short, thin, ticks
from tools.report.one_run import listed
from tools.report.results import PICTURES, RESULTS, wait_share

VOID_ELEMENTS = {"meta", "img", "br", "line", "circle", "polyline"}
MACHINE = {
    "hardware": {"cpu": "Fast & <Cheap>", "cores": 2, "memory_gib": 8.0, "gpus": []},
    "versions": {"python": "3.12.1"},
}


class Page(HTMLParser):
    """Collects what a browser would load, and checks that elements close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [value or "" for name, value in attrs if name in ("src", "href", "srcset")]
        if tag not in VOID_ELEMENTS:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in VOID_ELEMENTS

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def log_line(step: int) -> str:
    """A line of metrics.jsonl."""
    names = ("loss", "grouping_12", "grouping_21", "slot_12", "slot_21", "active_slots")
    values = {"step": step, "epoch": step / 10, **dict.fromkeys(names, 50 / (10 + step))}
    timing = {"images_per_s": 80.0, "wait_share": 0.25, "seconds": 2.0 * step}
    health = {"usage_entropy": 0.75, "dead_prototypes": 3, "near_duplicates": 1}
    return json.dumps({**values, "active_pairs": 2.5, "lr": 0.1, **health, **timing}) + "\n"


def write_run(folder: Path) -> Path:
    """The folder of a run that was killed while it wrote a log line."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(
        "name: a<b>c\ndata: {path: my data.beton}\nviews: {size: 96}\n"
        "model: {arch: resnet18, num_prototypes: 32}\n"
    )
    lines = "".join(log_line(step) for step in range(1, 40))
    (folder / "metrics.jsonl").write_text(lines + '{"step": 40, "lo')
    return folder


def write_measurements(folder: Path) -> None:
    """All results and pictures, in the folder of the run."""
    rates = [("decode", "loader", 500.0), ("step", "plain", 90.0)]
    bench = [
        {"stage": s, "backend": b, "images_per_s": r, "slowest": r / 2, "fastest": r, "batch": 8}
        for s, b, r in rates
    ]
    (folder / "bench.json").write_text(json.dumps({**MACHINE, "command": "b", "results": bench}))
    scores = [
        {"metric": metric, "network": network, "value": value, **more}
        for network, value in (("trained", 0.4), ("untrained", 0.1))
        for metric, more in (("miou", {}), ("pixel_accuracy", {}), ("iou", {"class": "sky & sea"}))
    ]
    (folder / "eval.json").write_text(json.dumps({**MACHINE, "command": "e", "results": scores}))
    for probe in ("knn", "linear", "clusters"):
        rows = [
            {"metric": "miou", "network": "teacher", "seed": seed, "value": value, "probe": probe}
            for seed, value in enumerate((0.2, 0.3, 0.4))
        ]
        (folder / f"{probe}.json").write_text(json.dumps({**MACHINE, "results": rows}))
    use: list[dict[str, object]] = [
        {"metric": "active_slots", "value": 4.25},
        {"metric": "active_slots_sd", "value": 1.5},
        {"metric": "dead_prototypes", "value": 7},
    ]
    use += [{"metric": "image_share", "prototype": k, "value": 1 / (1 + k)} for k in range(32)]
    (folder / "slots.json").write_text(json.dumps({**MACHINE, "results": use}))
    cost = {"backend": "fast", "gpus": 8, "measured": False, "images_per_s": 99.0, "hours": 12.5}
    (folder / "cost.json").write_text(json.dumps({**MACHINE, "results": [], "cost": [cost]}))
    noise = np.random.default_rng(0).integers(0, 256, (2100, 2200, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "prototypes.png", compress_level=0)
    for part in PICTURES[1:]:
        Image.new("RGB", (400, 300), "green").save(folder / part.file)


def test_page_is_complete_and_self_contained(tmp_path: Path) -> None:
    """A page that loads from a server is incomplete offline; a page of many MB is hard to share."""
    run = write_run(tmp_path / "run")
    write_measurements(run)
    call(report.main, run)
    text = (run / "report.html").read_text()
    page = Page(text)
    assert len(text) < 3e6
    assert all(source.startswith("data:image/webp;base64,") for source in page.sources)
    assert not re.search(r"https?:|@import|url\(|<script|<link", text)
    for part in ("a<b>c", "40.0%", "10.0%", "sky & sea", "decode · loader", "Fast & <Cheap>"):
        assert part in page.text, part
    for part in ("30.0% ± 10.0", "4.25 ± 1.50", "7 of 32", "12.5", "scaled", "Usage entropy"):
        assert part in page.text, part
    assert len(page.sources) == len(PICTURES)
    assert "Not here yet" not in text
    assert "prefers-color-scheme: dark" in text


def test_texts_are_not_markup(tmp_path: Path) -> None:
    """Without escaping, a name or a label in a file could put a script into the page."""
    evil = '"><script src=x></script>'
    run, other = (write_run(tmp_path / name) for name in ("run", "<script>"))
    config = {"name": evil, "data": {"path": evil}, "model": {"arch": evil}}
    (run / "config.yaml").write_text(json.dumps(config))
    row = {"metric": "miou", "network": evil, "value": 0.4}
    rows = [row, row | {"metric": "iou", "class": evil}]
    machine = {"hardware": {evil: evil}, "command": evil}
    (run / "eval.json").write_text(json.dumps({"results": rows} | machine))
    stage = {"stage": evil, "images_per_s": 1.0, "batch": evil}
    (run / "bench.json").write_text(json.dumps({"results": [stage]}))
    (run / "cost.json").write_text(json.dumps({"results": [], "cost": [{"backend": evil}]}))
    call(report.main, run)
    call(compare.main, run, other, "--out", tmp_path / "compare.html")
    for path, least in ((run / "report.html", 10), (tmp_path / "compare.html", 2)):
        page = Page(path.read_text())
        assert page.sources == []
        assert page.text.count(evil) >= least
        assert "<script" not in path.read_text()


def test_missing_parts_name_the_command_that_adds_them(tmp_path: Path) -> None:
    """A run without measurements has a page too, which shows a newcomer how to add them."""
    run = write_run(tmp_path / "run")
    call(report.main, run, "--out", tmp_path / "page.html")
    page = Page((tmp_path / "page.html").read_text())
    for command in (
        f"tools.benchmark all --data 'my data.beton' --json {run}/bench.json",
        f"evaluation.unsupervised_segmentation --checkpoint {run}",
        f"evaluation.pictures prototypes --checkpoint {run}",
    ):
        assert command in page.text
    assert all(f"{run}/{part.file}" in page.text for part in (*RESULTS, *PICTURES))


def test_image_level_loss_is_shown_where_there_is_one(tmp_path: Path) -> None:
    """The curve of this ablation must not be missing, nor must other pages have an empty chart."""
    run = write_run(tmp_path / "run")
    call(report.main, run)
    assert "Image-level loss" not in (run / "report.html").read_text()
    metrics = run / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"lr"', '"image": 1.5, "lr"'))
    call(report.main, run)
    assert "Image-level loss" in (run / "report.html").read_text()


def test_bad_input_is_one_clear_line(tmp_path: Path) -> None:
    """Without these checks the user would get a traceback, or a page that lacks the given file."""
    run = write_run(tmp_path / "run")
    (tmp_path / "bad.json").write_text('{"results": 3}')
    with pytest.raises(UserError, match="no such run folder"):
        call(report.main, tmp_path / "nowhere")
    with pytest.raises(UserError, match="not the folder of a run"):
        call(report.main, tmp_path)
    with pytest.raises(UserError, match="no measurements"):
        call(report.main, run, "--benchmark", tmp_path / "bad.json")
    (tmp_path / "other.json").write_text('{"results": [{"stage": "read"}]}')
    for option in ("--evaluation", "--knn", "--slots", "--cost"):
        with pytest.raises(UserError, match="not the --json file of"):
            call(report.main, run, option, tmp_path / "other.json")
    with pytest.raises(UserError, match="No such file"):
        call(report.main, run, "--evaluation", tmp_path / "none.json")
    with pytest.raises(UserError, match="No such file"):
        call(report.main, run, "--prototypes", tmp_path / "none.png")
    (run / "metrics.jsonl").write_text("nonsense\n" + log_line(1))
    with pytest.raises(UserError, match="line 1 is damaged"):
        call(report.main, run)
    (run / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="nothing logged yet"):
        call(report.main, run)
    assert not (run / "report.html").exists()


@pytest.mark.parametrize(
    "line",
    [
        b"\xff\xfe",
        b'{"loss": 1.0}',
        b'{"step": NaN}',
        b'{"step": 1, "seconds": NaN}',
        b"[1, 2]",
        b'{"step": "one"}',
    ],
)
def test_damaged_log_is_one_line(line: bytes, tmp_path: Path) -> None:
    """Disks and editors damage files. A page made from the other lines would hide that."""
    run = write_run(tmp_path / "run")
    (run / "metrics.jsonl").write_bytes(line + b"\n" + log_line(2).encode())
    with pytest.raises(UserError, match=r"metrics\.jsonl: (line 1 is damaged|not a text file)"):
        call(report.main, run)


def test_a_diverged_run_has_a_page(tmp_path: Path) -> None:
    """A user wants to look at exactly this run."""
    run = write_run(tmp_path / "run")
    line = json.loads(log_line(90)) | {"usage_entropy": math.nan}
    lines = [json.dumps(line | {"loss": loss}) for loss in (1e308, -1e308, math.inf, math.nan)]
    (run / "metrics.jsonl").write_text(log_line(1) + "\n".join(lines) + "\n")
    call(report.main, run)
    assert "nan" in Page((run / "report.html").read_text()).text
    call(compare.main, run, write_run(tmp_path / "b"), "--out", tmp_path / "c.html")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("knn.json", {"results": [{"metric": "miou", "value": 0.5, "network": "trained"}]}),
        ("eval.json", {"results": [{"metric": "miou", "value": 0.5, "probe": "knn"}]}),
        (
            "eval.json",
            {"results": [{"metric": "miou", "value": 0.5}, {"metric": "iou", "value": 0.5}]},
        ),
        ("eval.json", {"results": [{"metric": "miou", "value": 0.5, "images": "many"}]}),
        ("bench.json", {"results": [{"metric": "miou", "value": 0.5}]}),
        ("bench.json", {"results": [{"stage": "read", "images_per_s": None}]}),
        ("cost.json", {"results": [], "cost": [3]}),
        ("slots.json", {"results": [{"metric": "active_slots", "value": 2}], "hardware": "fast"}),
    ],
)
def test_results_of_another_command_are_refused(
    name: str, content: dict[str, object], tmp_path: Path
) -> None:
    """A reader would take scores under a wrong title for scores of that measure."""
    run = write_run(tmp_path / "run")
    (run / name).write_text(json.dumps(content))
    with pytest.raises(UserError, match=name):
        call(report.main, run)


def test_wait_share_weighs_lines_by_their_time() -> None:
    """A short last log line must not count as much as a long one: (0.5 · 2 + 0.1 · 8) / 10."""
    lines = [{"seconds": 2.0, "wait_share": 0.5}, {"seconds": 10.0, "wait_share": 0.1}]
    assert wait_share(lines) == pytest.approx(0.18)


@given(
    st.floats(-1e6, 1e6, allow_subnormal=False),
    st.floats(1e-3, 1e6, allow_subnormal=False),
    st.integers(2, 8),
)
def test_ticks_are_few_and_inside(low: float, span: float, count: int) -> None:
    """Ticks outside the axis, or hundreds of them, would make a chart unreadable."""
    found = ticks(low, low + span, count)
    assert len(found) <= count + 1
    slack = 1e-6 * (abs(low) + span)
    assert all(low - slack <= tick <= low + span + slack for tick in found)


def test_charts_of_odd_data() -> None:
    """One point, no point, a NaN, a constant: a run that has just begun, or has diverged."""
    for points in ([(5.0, 1.0)], [], [(1.0, float("nan")), (2.0, 3.0)], [(1.0, 2.0), (9.0, 2.0)]):
        svg = line_chart("title", {"a": points, "b": points})
        Page(svg)
        assert "nan" not in svg
    many = [(float(x), 1.0) for x in range(10 * MAX_POINTS + 3)]
    assert len(thin(many)) <= MAX_POINTS


def test_numbers_and_lists_as_text() -> None:
    """The form that they have on axes and in tables."""
    assert [short(v) for v in (0.123456, 12.0, 1234.5, 35_000, 1_200_000)] == [
        "0.123",
        "12",
        "1,234",
        "35 k",
        "1.2 M",
    ]
    assert listed({"cores": 2, "memory_gib": 8.0, "gpus": []}) == "cores 2, memory in GiB 8.0"
