"""The benchmark as a picture: the rate of each stage, and where the time of a step goes."""

from collections.abc import Sequence

from PIL import Image

from tools.benchmark.profile import PARTS
from tools.benchmark.timing import Result
from tools.benchmark.verdict import find, plain_copy
from tools.report.charts import dot_chart, image, share_chart, stacked

WIDTH, NAMES = 1005, 310
"""Of the charts and of the column of names; CSS pixels."""


def draw(results: Sequence[Result], caption: str) -> Image.Image:
    """The stages' rates and, below, where the time of profiled training steps goes."""
    charts = [image(rate_chart(results), caption)]
    steps = {
        r.operation or r.backend: {part: r.detail.parts.get(part, 0.0) for part in PARTS}
        for r in results
        if r.detail and r.detail.parts
    }
    if steps:
        title = "where the time of a step goes"
        about = "shares of a step in the profiler, each part with its backward; ms beside the names"
        shares = share_chart(title, steps, unit="ms", width=WIDTH, names=NAMES)
        charts.append(image(shares, about))
    return stacked(charts)


def rate_chart(results: Sequence[Result]) -> str:
    """Whole stages, from the lowest to the highest repeat. Only the table shows single operations,
    and decoding with fewer threads.
    """
    most = max((r.threads for r in results if r.stage == "decode"), default=0)
    rows = [r for r in results if r.operation in (None, "overlap") or r.stage == "step"]
    rows = [r for r in rows if r.stage != "decode" or r.threads == most]
    return dot_chart(
        "images a second, by stage",
        [(r.name, r.images_per_s, r.slowest, r.fastest) for r in rows],
        unit="images/s",
        ceilings=ceilings(results),
        width=WIDTH,
        names=NAMES,
    )


def ceilings(results: Sequence[Result]) -> dict[str, float]:
    """The measured rates that no data path can exceed; images/s."""
    limits = {
        "disk": find(results, "read", "disk"),
        "page cache": find(results, "read", "page cache"),
        "bare decoding": find(results, "decode", "libjpeg-turbo"),
        "copy bandwidth": plain_copy(results),
        "cached-batch training": find(results, "step", "fast"),
    }
    return {name: result.images_per_s for name, result in limits.items() if result}
