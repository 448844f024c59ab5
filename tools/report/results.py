"""The files of a run: its configuration, its log, and the results of measurements."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.errors import UserError
from train.pretrained import read_record
from train.run.checkpoint import Record, find
from train.run.provenance import read_json
from train.run.settings import flatten
from train.run.text import LARGEST_YAML, read_text, read_yaml

Line = Mapping[str, float]
"""A line of metrics.jsonl."""

LONGEST = 1e12
"""Steps or seconds; no run reaches this number."""


class Part(NamedTuple):
    """A part of a report: one command measures or draws it."""

    name: str
    """Of the part, and of the option that gives its file."""
    title: str
    file: str
    """Its usual name in the run's folder."""
    command: str
    """The command after `python -m`, with {run}, {config}, {data} and {out}."""

    @property
    def made_by(self) -> str:
        """The command without its options: evaluation.probe knn"""
        return self.command.split(" --")[0]


def _probe(name: str, title: str) -> Part:
    labels = "--train-images DIR --train-labels DIR --images DIR --labels DIR"
    command = f"evaluation.probe {name} --checkpoint {{run}} {labels} --json {{out}}"
    return Part(name, title, f"{name}.json", command)


def _picture(name: str, title: str, run: str = "--checkpoint") -> Part:
    command = f"evaluation.pictures {name} {run} {{run}} --data {{data}} --out {{out}}"
    return Part(name, title, f"{name}.png", command)


_SEGMENTATION = "evaluation.unsupervised_segmentation --checkpoint {run} --images DIR --labels DIR"
_SEGMENTATION_PICTURE = _SEGMENTATION + " --picture {out}"
_SLOTS = "evaluation.slots --checkpoint {run} --data {data} --json {out}"
_SLOTS_PICTURE = "evaluation.slots --checkpoint {run} --data {data} --picture {out}"
_STAGES = "tools.benchmark all --data {data} --json {out}"
_COST = "tools.benchmark cost --config {config} --data {data} --json {out}"

SCORES = (
    Part(
        "evaluation",
        "Clusters matched to classes",
        "eval.json",
        f"{_SEGMENTATION} --baseline untrained --json {{out}}",
    ),
    _probe("knn", "Dense k-NN retrieval"),
    _probe("linear", "Linear probe"),
    _probe("clusters", "Over-clustering"),
)
"""Scores against label maps."""

SLOTS = Part("slots", "Use of the prototypes", "slots.json", _SLOTS)
BENCHMARK = Part("benchmark", "Throughput of each stage alone", "bench.json", _STAGES)
COST = Part("cost", "Cost of the whole recipe", "cost.json", _COST)
RESULTS = (*SCORES, SLOTS, BENCHMARK, COST)

PICTURES = (
    _picture("prototypes", "Prototypes and their nearest segments"),
    Part("ends", "Prototypes of the most and the fewest images", "slots.png", _SLOTS_PICTURE),
    _picture("grouping", "Images under the colours of their prototypes"),
    _picture("attention", "Grouping over the training", "--run"),
    Part("segmentation", "Clusters beside label maps", "eval.png", _SEGMENTATION_PICTURE),
    _picture("views", "The two views that it trains on"),
)


@dataclass(frozen=True)
class Run:
    """The content of a run's files."""

    folder: Path
    config: dict[str, Any]
    lines: list[Line]
    record: Record | None
    """Of its newest checkpoint; None if it has none."""
    results: dict[str, dict[str, Any]]
    """Content of each --json file that exists, by the part's name."""
    pictures: dict[str, Path]
    """Each picture that exists, by the part's name."""

    @property
    def settings(self) -> dict[str, Any]:
        """The configuration as {"section.field": value}."""
        return flatten(self.config)

    def rows(self, part: Part) -> list[dict[str, Any]]:
        """The results of a part; empty if it was not measured."""
        return list(self.results.get(part.name, {"results": []})["results"])


def read_run(folder: Path, given: Mapping[str, Path | None]) -> Run:
    """Read the files of a run.

    Args:
        folder: of the run.
        given: files by the part's name. Any other part is read from its usual file in `folder`, if
            this file exists.

    Raises:
        UserError: a file is missing, damaged, or made by another command.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such run folder")
    config, lines = read_config(folder / "config.yaml"), read_lines(folder / "metrics.jsonl")
    try:
        record = read_record(find(folder))
    except UserError:
        record = None
    paths = {part: given.get(part.name) or folder / part.file for part in (*RESULTS, *PICTURES)}
    used = {part: path for part, path in paths.items() if given.get(part.name) or path.is_file()}
    return Run(
        folder,
        config,
        lines,
        record,
        {part.name: read_part(part, path) for part, path in used.items() if part in RESULTS},
        {part.name: path for part, path in used.items() if part in PICTURES},
    )


def read_config(path: Path) -> dict[str, Any]:
    """config.yaml of a run as nested values. Raises UserError."""
    if not path.exists():
        raise UserError(f"{path}: No such file or directory: not the folder of a run")
    content = read_yaml(read_text(path, LARGEST_YAML), path)
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds no configuration")
    return content


def read_lines(path: Path) -> list[Line]:
    """The lines of metrics.jsonl. Skips an incomplete last line: it shows that the run was killed.

    Raises UserError.
    """
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
                raise ValueError("impossible time")
            if not 0 <= line["step"] < LONGEST:
                raise ValueError("impossible step")
            lines.append(line)
        except (ValueError, TypeError, AttributeError, KeyError):
            if number < len(texts):
                raise UserError(f"{path}: line {number} is damaged") from None
    if not lines:
        raise UserError(f"{path}: nothing logged yet")
    return lines


def read_results(path: Path) -> dict[str, Any]:
    """The --json file of a command that measures. Raises UserError if it holds no results."""
    content = read_json(path)
    rows = content.get("results") if isinstance(content, dict) else None
    machine = [content.get(key) or {} for key in ("hardware", "versions")] if rows else []
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in [*rows, *machine]):
        raise UserError(f'{path}: no measurements ("results") in this file')
    return dict(content)


def read_part(part: Part, path: Path) -> dict[str, Any]:
    """The --json file of a part. Raises UserError if it is damaged or made by another command."""
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
    """Whether every row of an evaluation has a value, and at least one row is of `metric`."""
    return any(row.get("metric") == metric for row in rows) and all(
        is_number(row.get("value"))
        and is_number(row.get("images", 0))
        and ("class" in row or row.get("metric") != "iou")
        for row in rows
    )


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def slot_values(run: Run) -> dict[str, float]:
    """The figures of evaluation.slots over the whole data set, by metric."""
    return {
        str(row["metric"]): float(row["value"])
        for row in run.rows(SLOTS)
        if not {"prototype", "prototypes"} & set(row)
    }


def wait_share(lines: Sequence[Line]) -> float:
    """Share of the training time that was spent waiting for data, in 0..1.

    Each line's share is weighted by the seconds since the line before: `seconds` counts from the
    start of the run.
    """
    ends = [line.get("seconds", float(number)) for number, line in enumerate(lines, 1)]
    spans = [max(end - begin, 0.0) for begin, end in zip([0.0, *ends], ends, strict=False)]
    waited = sum(
        line.get("wait_share", 0.0) * span for line, span in zip(lines, spans, strict=True)
    )
    return waited / (sum(spans) or 1.0)
