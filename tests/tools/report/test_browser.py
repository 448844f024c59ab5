"""The pages in a real browser: they load nothing from outside, every chart and picture has a size,
and nothing is wider than the window.
"""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.exported import call
from tests.tools.report.test_report import write_measurements, write_run
from tools import compare
from tools.report import __main__ as report
from tools.report.parts import PICTURES

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="neither chromium nor google-chrome here")

PROBE = """<script>
const errors = [];
addEventListener("error", event => errors.push(String(event.message || event.target.src)), true);
addEventListener("securitypolicyviolation", event => errors.push(event.blockedURI));
addEventListener("load", () => setTimeout(() => {
  document.querySelectorAll("details").forEach(element => { element.open = true; });
  const sizes = name => [...document.querySelectorAll(name)].map(element => {
    const box = element.getBoundingClientRect();
    return [box.width, box.height];
  });
  const texts = [...document.querySelectorAll("svg text")].map(element => {
    const svg = element.ownerSVGElement, frame = svg.getBoundingClientRect();
    const box = element.getBoundingClientRect(), scale = frame.width / svg.viewBox.baseVal.width;
    return {
      text: element.textContent, size: parseFloat(getComputedStyle(element).fontSize) * scale,
      cut: Math.max(frame.left - box.left, box.right - frame.right, box.bottom - frame.bottom),
    };
  });
  const cells = [...document.querySelectorAll("th, td")].map(element =>
    [element.textContent, element.scrollWidth - element.clientWidth,
     element.getBoundingClientRect().right]);
  const found = {
    errors, texts, cells, charts: sizes("svg"), pictures: sizes("img"), tables: sizes("table"),
    loaded: performance.getEntriesByType("resource").map(entry => entry.name),
    natural: [...document.images].map(image => image.naturalWidth),
    width: [document.documentElement.scrollWidth, innerWidth],
    paper: getComputedStyle(document.body).backgroundColor,
  };
  parent.postMessage(JSON.stringify(found), "*");
}, 100));
</script>
"""

FRAME = """<script>
onmessage = event => document.body.setAttribute("data-probe", event.data)
</script>
<body><iframe src="{}" style="border: 0; width: {}px; height: 900px"></iframe></body>
"""
"""The browser's own window cannot be as narrow as a phone."""


def look(page: Path, width: int = 1280, *, dark: bool = False) -> dict[str, Any]:
    """Load a page of this width in the browser and measure it. The script runs in a copy that
    allows it.
    """
    text = page.read_text()
    probed = page.with_suffix(".probed.html")
    policy = "default-src 'none'; script-src 'unsafe-inline'"
    assert "default-src 'none'" in text
    probed.write_text(
        text.replace("default-src 'none'", policy, 1).replace("<title>", PROBE + "<title>", 1)
    )
    frame = page.with_suffix(".frame.html")
    frame.write_text(FRAME.format(probed.name, width))
    done = subprocess.run(
        [
            str(BROWSER),
            *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
            *("--enable-logging=stderr", "--virtual-time-budget=5000", "--dump-dom"),
            *(f"--user-data-dir={page.parent / 'browser'}", f"--window-size={width + 20},920"),
            f"--blink-settings=preferredColorScheme={0 if dark else 1}",
            frame.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    found = re.search(r'data-probe="([^"]*)"', done.stdout)
    assert found, done.stderr
    result: dict[str, Any] = json.loads(found[1].replace("&quot;", '"').replace("&amp;", "&"))
    return result | {"console": [s for s in done.stderr.splitlines() if "CONSOLE" in s]}


def check_page(seen: dict[str, Any]) -> None:
    assert seen["errors"] == []
    assert seen["console"] == []
    assert [url for url in seen["loaded"] if not url.startswith("data:")] == []
    assert all(width > 240 and height > 50 for width, height in seen["charts"])
    assert all(width > 240 and height > 50 for width, height in seen["pictures"])
    assert all(width > 0 for width in seen["natural"])
    assert seen["width"][0] <= seen["width"][1]
    smallest = 11 if seen["width"][1] >= 400 else 10  # pixels
    assert [t for t in seen["texts"] if t["size"] < smallest or t["cut"] > 1] == []


@pytest.fixture(scope="module")
def measured_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with all measurements and its report."""
    run = write_run(tmp_path_factory.mktemp("runs") / "run")
    write_measurements(run)
    call(report.main, run)
    return run


@pytest.mark.parametrize("width", [320, 400, 660, 980, 1280])
def test_texts_and_numbers_are_whole_at_any_width(measured_run: Path, width: int) -> None:
    """Without it names of stages lose their first letters, axes have letters of 7 pixels, and
    tables end within a number.
    """
    run = measured_run.parent / "long_names"
    if not run.exists():
        write_run(run)
        write_measurements(run)
        row = {"images_per_s": 12_345.6, "slowest": 9999.0, "fastest": 1.9e6, "batch": 512}
        names = ("pipeline", "kornia"), ("augment", "triton"), ("step", "a very long name " * 9)
        rows = [row | {"stage": s, "backend": b, "crops": "device"} for s, b in names]
        (run / "bench.json").write_text(json.dumps({"results": rows}))
        call(report.main, run)
    seen = look(run / "report.html", width)
    check_page(seen)
    shown = [t["text"] for t in seen["texts"]]
    assert "pipeline · kornia · crops device" in shown
    if width < 640:
        assert [cell for cell in seen["cells"] if cell[1] > 0 or cell[2] > width] == []


def test_report_in_a_browser(measured_run: Path) -> None:
    """Valid markup may still show nothing: a chart without a size, a picture that does not decode,
    a table that makes a phone scroll sideways, white text on white.
    """
    page = measured_run / "report.html"
    wide, narrow = look(page), look(page, 500, dark=True)
    for seen in (wide, narrow):
        check_page(seen)
        assert len(seen["charts"]) == 10
        assert len(seen["pictures"]) == len(PICTURES)
    assert wide["paper"] == "rgb(255, 255, 255)"
    assert narrow["paper"] == "rgb(20, 23, 27)"


def test_comparison_in_a_browser(measured_run: Path) -> None:
    """The same for several runs. Wide tables must scroll in their own box."""
    others = [write_run(measured_run.parent / f"a_long_name_of_a_run_{n}") for n in range(7)]
    page = measured_run.parent / "compare.html"
    call(compare.main, measured_run, *others, "--out", page)
    seen = look(page, 500)
    check_page(seen)
    assert len(seen["charts"]) == 7


def test_a_page_that_asks_a_server_is_noticed(measured_run: Path) -> None:
    """Otherwise the tests above could not fail."""
    page = measured_run / "asking.html"
    text = (measured_run / "report.html").read_text()
    page.write_text(text.replace("</h1>", '</h1><img src="http://127.0.0.1:9/pixel.png">', 1))
    seen = look(page)
    assert any("127.0.0.1" in error for error in seen["errors"])
