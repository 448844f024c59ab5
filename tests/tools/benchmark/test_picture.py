"""The benchmark's charts show the measured rates and shares."""

import math
import re

import numpy as np
import pytest
from PIL import ImageColor

from tools.benchmark.picture import ceilings
from tools.benchmark.timing import Result
from tools.report.charts import SERIES, decades, dot_chart, histogram, image, share_chart

ROWS = [("slow", 20.0, 15.0, 30.0), ("fast", 200.0, 150.0, 210.0)]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (15, 210, [10, 20, 50, 100, 200, 500]),
        (11.3, 19.8, [10, 20]),
        (1, 1, [1, 2]),
        (0.3, 7000, [0.1, 1, 10, 100, 1000, 10000]),
    ],
)
def test_an_axis_has_round_ends_around_the_values(
    low: float, high: float, expected: list[float]
) -> None:
    """A rate outside the axis would be drawn over the names."""
    assert decades(low, high) == pytest.approx(expected)


def test_dots_and_ceilings_lie_at_their_rates() -> None:
    """Equal ratios of rates are equal distances, for dots, ranges and ceilings alike."""
    chart = dot_chart("rates", ROWS, unit="images/s", ceilings={"disk & cache": 200.0})
    slow, fast = (float(x) for x in re.findall(r'cx="([\d.]+)"', chart))
    low, high = (
        float(x)
        for x in re.search(r'x1="([\d.]+)"[^>]*x2="([\d.]+)"[^>]*/><circle', chart).groups()
    )
    (ceiling,) = (float(x) for x in re.findall(r'class="reference" x1="([\d.]+)"', chart))
    assert ceiling == fast
    assert (high - low) / (fast - slow) == pytest.approx(math.log10(2), abs=0.01)
    assert "disk &amp; cache 200" in chart


def test_bars_are_as_high_as_their_counts() -> None:
    """Each value lies in the bar above its mark; marks beyond the values are not drawn."""
    values = np.array([10.0] * 4 + [100.0] * 2 + [1000.0])
    chart = histogram("sizes", values, [1, 10, 100, 1000, 10000], str, logarithmic=True, width=800)
    bars = re.findall(r'<rect[^>]*x="([\d.]+)"[^>]*width="([\d.]+)" height="([\d.]+)"', chart)
    heights = [float(height) for *_, height in bars]
    assert [height / heights[2] for height in heights] == pytest.approx([4, 2, 1], rel=0.01)
    marks = re.findall(r'x="([\d.]+)"[^>]*middle">(\d+)<', chart)
    assert [label for _, label in marks] == ["10", "100", "1000"]
    for (left, wide, _), (at, _) in zip(bars, marks, strict=True):
        assert float(left) - 1 <= float(at) <= float(left) + float(wide) + 1


def test_a_picture_shows_each_part_in_its_share() -> None:
    """The colours' areas are the shares; a part that no row has is not listed."""
    rows = {"plain": {"a": 30.0, "b": 10.0, "none": 0.0}}
    chart = share_chart("shares", rows, unit="ms", width=800, names=200)
    assert "none" not in chart
    pixels = np.asarray(image(chart, "a caption"))
    areas = [(pixels == ImageColor.getrgb(colour)).all(axis=2).sum() for colour in SERIES[:2]]
    assert areas[0] / areas[1] == pytest.approx(3, rel=0.05)


def test_ceilings_are_whole_stages() -> None:
    """A single operation is no upper bound of training."""

    def result(stage: str, backend: str, rate: float, operation: str | None = None) -> Result:
        return Result(stage, backend, rate, rate, rate, 1.0, 1.0, 8, 1, 3, operation=operation)

    results = [
        result("transfer", "memory copy", 900),
        result("step", "fast", 50, "compile"),
        result("step", "fast", 40),
    ]
    assert ceilings(results) == {"copy bandwidth": 900, "cached-batch training": 40}
