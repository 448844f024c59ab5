"""The report is one file, complete, and says which measurements are missing."""

import json
import math
import os
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
from tools.report import results
from tools.report.charts import MAX_POINTS, dot_chart, histogram, line_chart, short, thin, ticks
from tools.report.one_run import listed
from tools.report.parts import PICTURES, RESULTS
from tools.report.results import wait_share

VOID_ELEMENTS = {"meta", "img", "br", "line", "circle", "polyline", "rect"}
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
    for part in PICTURES:
        if part.name != "prototypes":
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


def test_groups_stand_beside_the_untrained(tmp_path: Path) -> None:
    """Without it merged groups have no figure, or one that hides what needs no training."""
    run, made = write_run(tmp_path / "run"), "9 prototypes merged to 3 groups"
    scores = [
        {"metric": "miou", "network": "trained, merged", "value": 0.41, "made": made},
        {"metric": "miou", "network": "untrained, k-means", "value": 0.13},
    ]
    (run / "eval.json").write_text(json.dumps({**MACHINE, "results": scores}))
    call(report.main, run)
    page = Page((run / "report.html").read_text())
    for part in ("41.0%", "grouping mIoU", "untrained, k-means: 13.0%", f"one seed; {made}"):
        assert part in page.text, part


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


def test_control_characters_of_files_are_escaped(tmp_path: Path) -> None:
    """Without it a page that is read in a terminal, with `cat` or a text browser, obeys a file."""
    run, evil = write_run(tmp_path / "run"), "a\x1b[31m\u202eb"
    config = {"name": evil, "data": {"path": evil}, "model": {"arch": evil}}
    (run / "config.yaml").write_text(json.dumps(config))
    rows = [{"metric": "miou", "network": evil, "value": 0.4}]
    (run / "eval.json").write_text(json.dumps({"results": rows, "command": evil}))
    call(report.main, run)
    call(compare.main, run, write_run(tmp_path / "other"), "--out", tmp_path / "compare.html")
    for path in (run / "report.html", tmp_path / "compare.html"):
        assert not {"\x1b", "\u202e"} & set(path.read_text())


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


def test_scores_while_it_trained(tmp_path: Path) -> None:
    """A curve and the last values. Their lines hold no loss and no time: without it they become
    the last log line, whose values the page shows, or a run without them has empty tables."""
    run, other = (write_run(tmp_path / name) for name in ("run", "other"))
    call(report.main, other)
    page = Page((other / "report.html").read_text())
    assert "Scores while it trained" not in page.text
    scores = {"knn_miou": (0.123, 0.345, 0.234), "active_slots": (9.0, 5.0, 4.0)}
    lines = [
        {"step": 13 * n, "results": [{"metric": m, "value": v[n]} for m, v in scores.items()]}
        for n in range(3)
    ] + [{"step": 39, "results": [{"metric": "not_finite", "value": 1.0}]}]
    texts = [json.dumps(line | {"eval_seconds": 3.2}) + "\n" for line in lines]
    whole = "".join([texts[0], *map(log_line, range(1, 40)), *texts[1:]])
    (run / "metrics.jsonl").write_text(whole)
    call(report.main, run)
    text = Page((run / "report.html").read_text()).text
    shown = text.partition("Scores while it trained")[2].partition("Speed")[0]
    for part in (
        "mIoU on held-out images",
        "dense k-NN: mIoU",
        "12.3%",
        "34.5% (step 13)",
        "23.4%",
    ):
        assert part in shown, part
    assert "k-means: mIoU" not in shown
    plain = page.text.partition("Cost")[2]
    assert (
        plain.partition("How it was run")[0]
        == text.partition("Cost")[2].partition("How it was run")[0]
    )
    call(compare.main, run, other, "--out", tmp_path / "compare.html")
    assert "mIoU of dense k-NN, while training" in (tmp_path / "compare.html").read_text()
    (run / "metrics.jsonl").write_text(texts[0])
    with pytest.raises(UserError, match="nothing logged yet"):
        call(report.main, run)


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
    with pytest.raises(UserError, match="results is 3: expected array, got int"):
        call(report.main, run, "--benchmark", tmp_path / "bad.json")
    (tmp_path / "other.json").write_text('{"results": [{"stage": "read"}]}')
    for option in ("--evaluation", "--knn", "--slots", "--cost"):
        with pytest.raises(UserError, match=r"other.json: .*missing required field"):
            call(report.main, run, option, tmp_path / "other.json")
    (tmp_path / "other.json").write_text('{"results": [{"metric": "a", "value": 0.5}]}')
    for option in ("--evaluation", "--knn", "--slots"):
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
        b"\xfd\xfe",
        b'{"loss": 1.0}',
        b'{"step": NaN}',
        b'{"step": 1, "seconds": NaN}',
        b"[1, 2]",
        b'{"step": "one"}',
        b'{"step": true}',
        b'{"step": 1, "loss": "2"}',
        b'{"step": 1' + b"0" * 5000 + b"}",
        b'{"step": 1, "x": ' + b"[" * 10**5,
    ],
)
def test_damaged_log_is_one_line(line: bytes, tmp_path: Path) -> None:
    """Disks and editors damage files. A page made from the other lines would hide that."""
    run = write_run(tmp_path / "run")
    (run / "metrics.jsonl").write_bytes(line + b"\n" + log_line(2).encode())
    with pytest.raises(UserError, match=r"metrics\.jsonl: (line 1 is damaged|not UTF-8)"):
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
    ("name", "content", "message"),
    [
        ("knn.json", '{"results": [{"metric": "miou", "value": 0.5}]}', "not the --json file of"),
        (
            "eval.json",
            '{"results": [{"metric": "miou", "value": 0.5, "probe": "knn"}]}',
            "not the --json file of: evaluation.unsupervised_segmentation",
        ),
        (
            "eval.json",
            '{"results": [{"metric": "miou", "value": 0.5}, {"metric": "iou", "value": 0.5}]}',
            "results[1]: an iou without class",
        ),
        (
            "eval.json",
            '{"results": [{"metric": "miou", "value": 0.5, "images": "many"}]}',
            'results[0].images is "many": expected int',
        ),
        (
            "linear.json",
            '{"results": [{"metric": "miou", "value": 1.5, "probe": "linear"}]}',
            "results[0].value is 1.5: expected 0 to 1",
        ),
        (
            "clusters.json",
            '{"results": [{"metric": "miou", "value": NaN, "probe": "clusters"}]}',
            "results[0].value is NaN: expected float",
        ),
        ("bench.json", '{"results": [{"metric": "miou"}]}', "missing required field stage"),
        (
            "bench.json",
            '{"results": [{"stage": "read", "images_per_s": -1}]}',
            "images_per_s is -1: expected float >= 0.0",
        ),
        ("cost.json", '{"results": [], "cost": [3]}', "cost[0] is 3: expected object, got int"),
        ("cost.json", '{"cost": [{"hours": 1e400}]}', "hours is Infinity: number out of range"),
        (
            "slots.json",
            '{"results": [{"metric": "active_slots", "value": 2}], "hardware": "fast"}',
            'hardware is "fast": expected object',
        ),
        ("slots.json", "{", "not JSON"),
        ("slots.json", '{"results": ' + "[" * 10**5, "nested too deeply"),
        ("prototypes.png", "{", "not an image"),
    ],
)
def test_damaged_files_of_the_folder_are_named(
    name: str, content: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without it one bad file of ten costs the whole page, or its section shows nonsense."""
    run = write_run(tmp_path / "run")
    (run / name).write_text(content)
    call(report.main, run)
    text = Page((run / "report.html").read_text()).text
    printed = capsys.readouterr().err
    for place in (text, printed):
        assert f"{run / name}: " in place and message in place
    call(compare.main, run, write_run(tmp_path / "other"), "--out", tmp_path / "c.html")
    if name != "prototypes.png":
        assert message in Page((tmp_path / "c.html").read_text()).text
    option = {"eval.json": "evaluation", "bench.json": "benchmark"}.get(
        name, name.split(".", maxsplit=1)[0]
    )
    with pytest.raises(UserError, match=re.escape(message)):
        call(report.main, run, f"--{option}", run / name)


def test_what_is_no_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without it a pipe that nobody writes to hangs the report."""
    run = write_run(tmp_path / "run")
    os.mkfifo(run / "knn.json")
    os.mkfifo(run / "views.png")
    (run / "eval.json").mkdir()
    call(report.main, run)
    said = capsys.readouterr().err
    assert said.count("not a regular file") == 2 and said.count("Is a directory") == 1


@pytest.mark.parametrize("count", [33, 256])
def test_tables_have_a_limit(count: int, tmp_path: Path) -> None:
    """Without it a file of 30 MB makes a table of 10^10 cells."""
    run = write_run(tmp_path / "run")
    key = "network" if count == 33 else "class"
    rows = [{"metric": "miou", "value": 0.5, key: str(number)} for number in range(count)]
    (run / "eval.json").write_text(json.dumps({"results": rows}))
    with pytest.raises(UserError, match=f"results of {count} (networks|classes), at most"):
        call(report.main, run, "--evaluation", run / "eval.json")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("a: " + "1" * 5000, "no integer of 64 bits"),
        ("a: !!bool x", "only plain values are read"),
        ("[" * 5000, "more than 20 lists and mappings"),
        ("a: " + "b" * 300_000, "too large: 300,003 bytes, at most 262,144"),
        ("[]", "holds no configuration"),
    ],
)
def test_configurations_that_are_refused(config: str, message: str, tmp_path: Path) -> None:
    """Without it a damaged or hostile config.yaml ends in a traceback, or takes all memory."""
    run = write_run(tmp_path / "run")
    (run / "config.yaml").write_text(config)
    with pytest.raises(UserError, match=message):
        call(report.main, run)


def test_odd_settings_have_a_page(tmp_path: Path) -> None:
    """Without it a value of another type than the trainer's ends in a traceback."""
    run = write_run(tmp_path / "run")
    (run / "config.yaml").write_text(
        'name: "\\ud800"\n1: {2: 2020-01-01}\ntrain: {epochs: ten}\ndata: {path: [3]}\n'
        "model: {num_prototypes: 18446744073709551615, arch: [{}]}\n"
    )
    (run / "metrics.jsonl").write_text('{"step": 1, "epoch": 1e-300, "seconds": 9e11}\n')
    call(report.main, run)
    (run / "config.yaml").write_text("train: {epochs: 1e300}")
    call(report.main, run)


def test_logs_have_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it a log of gigabytes fills the memory."""
    run = write_run(tmp_path / "run")
    monkeypatch.setattr(results, "LOG_LINES", 20)
    with pytest.raises(UserError, match="40 lines, at most 20 are read"):
        call(report.main, run)
    monkeypatch.setattr(results, "LOG_BYTES", 100)
    with pytest.raises(UserError, match=r"too large: .* at most 100 are read"):
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
    extremes = [1e308, -1e308, 1e29, -1e29, 5e-324, 1e-320, 0.0, 1.0, math.inf, math.nan, -3.0]
    for one in extremes:
        for other in extremes:
            for from_zero in (False, True):
                points = [(1.0, one), (2.0, other)]
                Page(
                    line_chart("title", {"a": points}, reference=("b", other), from_zero=from_zero)
                )
                Page(line_chart("title", {"a": [(x, y) for y, x in points]}))
            Page(dot_chart("title", [("a", one, other, 1.0)], unit="b", ceilings={"c": other}))
            values = np.array([one, other])
            for logarithmic in (False, True):
                with np.errstate(all="ignore"):
                    Page(histogram("a", values, [1], str, logarithmic=logarithmic, width=300))
    many = [(float(x), 1.0) for x in range(10 * MAX_POINTS + 3)]
    (thinned,) = thin(many)
    assert len(thinned) <= MAX_POINTS


def test_curves_have_gaps_and_dots() -> None:
    """Without it a straight line bridges the steps whose loss was NaN, and the first log line of a
    run, or one between two gaps, is not drawn at all."""
    values = [1.0, 2.0, math.nan, 3.0, math.inf, 1.0, 2.0, 3.0]
    chart = line_chart("", {"loss": list(enumerate(values, start=1))})
    lines = re.findall(r'<polyline class="line s0" points="([^"]*)"', chart)
    assert [line.count(",") for line in lines] == [2, 3]
    assert chart.count('<circle class="dot s0"') == 1
    assert line_chart("", {"loss": [(1.0, 2.5)]}).count("<circle") == 1
    many = [(float(x), math.nan if 1000 <= x < 1100 else 1.0) for x in range(2400)]
    assert [part[-1][0] < 1000 or part[0][0] >= 1100 for part in thin(many)] == [True, True]


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


def test_a_damaged_checkpoint_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without it the page leaves out machine and data without a word."""
    run = write_run(tmp_path / "run")
    (run / "checkpoints/step_1").mkdir(parents=True)
    (run / "checkpoints/step_1/run.json").write_text("{}")
    call(report.main, run)
    for place in (Page((run / "report.html").read_text()).text, capsys.readouterr().err):
        assert "step_1/run.json: " in place
