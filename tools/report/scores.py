"""Scores against label maps, as tables."""

import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from tools.report.page import Table
from tools.report.schema import Score

METRICS = {"miou": "mIoU", "pixel_accuracy": "pixel accuracy"}


class Evaluation(NamedTuple):
    """The tables of one evaluation. A cell holds one value for each seed, or None."""

    title: str
    note: str
    scores: Table
    classes: Table | None = None
    """IoU of each class."""


def network_values(rows: Iterable[Score]) -> dict[tuple[str, str], list[float]]:
    """Values of each (network, metric) over the seeds; a class's IoU is the metric "iou CLASS"."""
    values: dict[tuple[str, str], list[float]] = defaultdict(list)
    for row in rows:
        metric = f"iou {row.name}" if row.metric == "iou" else row.metric
        values[row.network, metric].append(row.value)
    return dict(values)


def evaluation(title: str, rows: Sequence[Score]) -> Evaluation | None:
    """mIoU and accuracy, a row for each network; the classes, a column for each network."""
    values = network_values(rows)
    networks = list(dict.fromkeys(network for network, _ in values))
    metrics = [m for m in METRICS if any((network, m) in values for network in networks)]
    if not metrics:
        return None
    scores = [(network, *(values.get((network, m)) for m in metrics)) for network in networks]
    classes = list(dict.fromkeys(metric for _, metric in values if metric.startswith("iou ")))
    classes.sort(key=lambda metric: -statistics.mean(values.get((networks[0], metric), [0.0])))
    by_class = [
        (metric.removeprefix("iou "), *(values.get((network, metric)) for network in networks))
        for metric in classes
    ]
    return Evaluation(
        title,
        note(rows),
        Table(("", *(METRICS[metric] for metric in metrics)), scores),
        Table(("", *networks), by_class) if by_class else None,
    )


def note(rows: Sequence[Score]) -> str:
    """protocol picie, 300 images, 320 pixels, mean ± deviation over 3 seeds; how groups were
    made"""
    first, seeds = rows[0], max(map(len, network_values(rows).values()))
    parts = [] if first.protocol is None else [f"protocol {first.protocol}"]
    if first.images is not None:
        which = f" ({first.list})" if first.list not in (None, "all") else ""
        parts.append(f"{first.images:,} images{which}")
    if first.train_images is not None:
        parts.append(f"learnt from {first.train_images:,}")
    if first.size is not None:
        parts.append(f"{first.size} pixels")
    if first.flip:
        parts.append("averaged with their mirror images")
    parts.append(f"mean ± deviation over {seeds} seeds" if seeds > 1 else "one seed")
    made = dict.fromkeys(row.made for row in rows if row.made)
    return "; ".join([", ".join(parts), *made])
