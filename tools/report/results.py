"""What lies in a run's folder: its configuration, its log, and what was measured of it."""

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from pipeline.errors import UserError
from train.config import flatten
from train.pretrained import read_record
from train.run.checkpoint import Record, find
from train.run.provenance import read_json

Line = Mapping[str, float]

LONGEST = 1e12
"""Steps or seconds that no run has."""


class Part(NamedTuple):
    """A part of a report that a command of its own makes."""

    name: str
    """Of the option that gives its file."""
    title: str
    file: str
    """Its usual name in the run's folder."""
    command: str
    """With {run}, {data} and {out}."""

    @property
    def made_by(self) -> str:
        """The command without its options: evaluation.probe knn"""
        return self.command.removeprefix("python -m ").split(" --")[0]


_SEGMENTATION = "python -m evaluation.unsupervised_segmentation --checkpoint {run}"
_PROBE = " --checkpoint {run} --train-images DIR --train-labels DIR --images DIR --labels DIR"
_PICTURES = "python -m evaluation.pictures"

SCORES = (
    Part(
        "evaluation",
        "Clusters matched to classes",
        "eval.json",
        f"{_SEGMENTATION} --images DIR --labels DIR --baseline untrained --json {{out}}",
    ),
    Part(
        "knn",
        "Dense k-NN retrieval",
        "knn.json",
        f"python -m evaluation.probe knn{_PROBE} --json {{out}}",
    ),
    Part(
        "linear",
        "Linear probe",
        "linear.json",
        f"python -m evaluation.probe linear{_PROBE} --json {{out}}",
    ),
    Part(
        "clusters",
        "Over-clustering",
        "clusters.json",
        f"python -m evaluation.probe clusters{_PROBE} --json {{out}}",
    ),
)
"""Scores against label maps."""

SLOTS = Part(
    "slots",
    "Use of the prototypes",
    "slots.json",
    "python -m evaluation.slots --checkpoint {run} --data {data} --json {out}",
)
BENCHMARK = Part(
    "benchmark",
    "Throughput of each stage alone",
    "bench.json",
    "python -m tools.benchmark all --data {data} --json {out}",
)
COST = Part(
    "cost",
    "Cost of the whole recipe",
    "cost.json",
    "python -m tools.benchmark cost --config {config} --data {data} --json {out}",
)
RESULTS = (*SCORES, SLOTS, BENCHMARK, COST)

PICTURES = (
    Part(
        "prototypes",
        "Prototypes and their nearest segments",
        "prototypes.png",
        f"{_PICTURES} prototypes --checkpoint {{run}} --data {{data}} --out {{out}}",
    ),
    Part(
        "ends",
        "Prototypes of the most and the fewest images",
        "slots.png",
        "python -m evaluation.slots --checkpoint {run} --data {data} --picture {out}",
    ),
    Part(
        "grouping",
        "Images under the colours of their prototypes",
        "grouping.png",
        f"{_PICTURES} grouping --checkpoint {{run}} --data {{data}} --out {{out}}",
    ),
    Part(
        "attention",
        "Grouping over the training",
        "attention.png",
        f"{_PICTURES} attention --run {{run}} --data {{data}} --out {{out}}",
    ),
    Part(
        "segmentation",
        "Clusters beside label maps",
        "eval.png",
        f"{_SEGMENTATION} --images DIR --labels DIR --picture {{out}}",
    ),
    Part(
        "views",
        "The two views that it trains on",
        "views.png",
        f"{_PICTURES} views --checkpoint {{run}} --data {{data}} --out {{out}}",
    ),
)


@dataclass(frozen=True)
class Run:
    """Everything that is known of a run."""

    folder: Path
    config: dict[str, Any]
    lines: list[Line]
    record: Record | None
    """Of its newest checkpoint; None if there is none."""
    results: dict[str, dict[str, Any]]
    """Contents of the --json files that are there, by the part's name."""
    pictures: dict[str, Path]
    """Those that are there, by the part's name."""

    @property
    def settings(self) -> dict[str, Any]:
        """The configuration as {"section.field": value}."""
        return flatten(self.config)

    def rows(self, part: Part) -> list[dict[str, Any]]:
        """The results of a part; none if it was not measured."""
        return list(self.results.get(part.name, {"results": []})["results"])


def read_run(folder: Path, given: Mapping[str, Path | None]) -> Run:
    """Read a run, the files `given` by their part's name, and what lies in the run's folder under
    its usual name. Raises UserError.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such run folder")

    def found(parts: Iterable[Part]) -> dict[str, Path]:
        paths = {part.name: given.get(part.name) or folder / part.file for part in parts}
        return {name: path for name, path in paths.items() if given.get(name) or path.is_file()}

    config, lines = read_config(folder / "config.yaml"), read_lines(folder / "metrics.jsonl")
    try:
        record = read_record(find(folder))
    except UserError:
        record = None
    paths = found(RESULTS)
    results = {
        part.name: read_part(part, paths[part.name]) for part in RESULTS if part.name in paths
    }
    return Run(folder, config, lines, record, results, found(PICTURES))


def read_config(path: Path) -> dict[str, Any]:
    """config.yaml of a run as nested values. Raises UserError."""
    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}: not the folder of a run") from None
    except (yaml.YAMLError, UnicodeDecodeError):
        raise UserError(f"{path}: not YAML") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds no configuration")
    return content


def read_lines(path: Path) -> list[Line]:
    """The lines of metrics.jsonl; a torn last one, of a run that was killed, is left out."""
    try:
        texts = path.read_text().splitlines()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}: not the folder of a run") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file") from None
    lines: list[Line] = []
    for number, text in enumerate(texts, 1):
        try:
            line = {name: float(value) for name, value in json.loads(text).items()}
            if not all(abs(line.get(name, 0.0)) < LONGEST for name in ("seconds", "epoch")):
                raise ValueError("no time of a training")
            if not 0 <= line["step"] < LONGEST:
                raise ValueError("no step of a training")
            lines.append(line)
        except (ValueError, TypeError, AttributeError, KeyError):
            if number < len(texts):
                raise UserError(f"{path}: line {number} is damaged") from None
    if not lines:
        raise UserError(f"{path}: nothing logged yet")
    return lines


def read_results(path: Path) -> dict[str, Any]:
    """A measuring command's --json file. Raises UserError unless it holds a list of results."""
    content = read_json(path)
    rows = content.get("results") if isinstance(content, dict) else None
    about = [content.get(key) or {} for key in ("hardware", "versions")] if rows else []
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in [*rows, *about]):
        raise UserError(f'{path}: no measurements ("results") in this file')
    return dict(content)


def read_part(part: Part, path: Path) -> dict[str, Any]:
    """The --json file of a part. Raises UserError if it is another command's, or damaged."""
    content = read_results(path)
    rows = content["results"]
    if part == COST:
        costs = content.get("cost")
        fits = isinstance(costs, list) and all(isinstance(cost, dict) for cost in costs)
    elif part == BENCHMARK:
        fits = all("stage" in row and is_number(row.get("images_per_s")) for row in rows)
    elif part == SLOTS:
        fits = has_values(rows, "active_slots")
    else:
        probe = part.made_by.partition("probe ")[2] or None
        fits = has_values(rows, "miou") and all(row.get("probe") == probe for row in rows)
    if not fits:
        raise UserError(f"{path}: not the --json file of: {part.made_by}")
    return content


def has_values(rows: Sequence[Mapping[str, Any]], metric: str) -> bool:
    """Every row of an evaluation has a value, and one is of `metric`."""
    return any(row.get("metric") == metric for row in rows) and all(
        is_number(row.get("value"))
        and is_number(row.get("images", 0))
        and ("class" in row or row.get("metric") != "iou")
        for row in rows
    )


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def network_values(rows: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str], list[float]]:
    """Values of each (network, metric) over the seeds; a class's IoU is the metric "iou CLASS"."""
    values: dict[tuple[str, str], list[float]] = defaultdict(list)
    for row in rows:
        metric = f"iou {row['class']}" if row.get("metric") == "iou" else str(row.get("metric"))
        values[str(row.get("network", "trained")), metric].append(float(row["value"]))
    return dict(values)


def share(values: list[float]) -> str:
    """The mean as a percentage, ± its deviation over the seeds: 40.0% ± 1.2"""
    deviation = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1%}{deviation}"


def slot_values(run: Run) -> dict[str, float]:
    """The whole-set figures of evaluation.slots by their metric."""
    return {
        str(row["metric"]): float(row["value"])
        for row in run.rows(SLOTS)
        if not {"prototype", "prototypes"} & set(row)
    }


def wait_share(lines: Sequence[Line]) -> float:
    """Share of the whole training time that was spent waiting for data, in 0..1.

    `seconds` counts from the start of the run, so a line's share weighs as long as its own stretch.
    """
    ends = [line.get("seconds", float(number)) for number, line in enumerate(lines, 1)]
    spans = [max(end - begin, 0.0) for begin, end in zip([0.0, *ends], ends, strict=False)]
    waited = sum(
        line.get("wait_share", 0.0) * span for line, span in zip(lines, spans, strict=True)
    )
    return waited / (sum(spans) or 1.0)
