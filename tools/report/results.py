"""The files of a run: its configuration, its log, and the results of measurements."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import msgspec

from pipeline.errors import UserError
from tools.report import schema
from tools.report.parts import BENCHMARK, COST, PICTURES, RESULTS, SLOTS, Part
from tools.report.schema import Cost, Costs, Measured, Rate, Rates, Score, Scores, Use, Uses
from train.pretrained import read_record
from train.run.checkpoint import Record, latest
from train.run.json_file import read_json
from train.run.settings import flatten
from train.run.text import LARGEST_YAML, read_text, read_yaml

Line = Mapping[str, float]
"""Values of a line of metrics.jsonl by name."""

LOG_BYTES, LOG_LINES = 256 << 20, 1_000_000
"""Bytes and lines of metrics.jsonl: so many lines take half a minute and 1 GB."""
MOST_NETWORKS, MOST_CLASSES = 32, 255
"""Networks and classes of an evaluation: its table has a cell for each pair."""


@dataclass(frozen=True)
class Run:
    """The content of a run's files."""

    folder: Path
    config: dict[str, Any]
    lines: list[Line]
    """Those of training."""
    scored: list[Line]
    """Those of evaluations while it trained: each score under its name, with eval_ before it."""
    record: Record | None
    """Of its newest checkpoint; None if it has none."""
    results: dict[str, Measured]
    """Content of each --json file that could be read, by the part's name."""
    pictures: dict[str, Path]
    """Each picture that exists, by the part's name."""
    given: frozenset[str] = frozenset()
    """The parts whose files were named by the user."""
    damaged: list[str] = field(default_factory=list)
    """Why a file in the folder is not shown, in a line that names it."""

    @property
    def settings(self) -> dict[str, Any]:
        """The configuration as {"section.field": value}."""
        return flatten(self.config)

    def scores(self, part: Part) -> list[Score]:
        """The results of an evaluation; empty if it was not measured, as the three below."""
        content = self.results.get(part.name)
        return content.results if isinstance(content, Scores) else []

    @property
    def uses(self) -> list[Use]:
        content = self.results.get(SLOTS.name)
        return content.results if isinstance(content, Uses) else []

    @property
    def rates(self) -> list[Rate]:
        content = self.results.get(BENCHMARK.name)
        return content.results if isinstance(content, Rates) else []

    @property
    def costs(self) -> list[Cost]:
        content = self.results.get(COST.name)
        return content.cost if isinstance(content, Costs) else []


def read_run(folder: Path, given: Mapping[str, Path | None]) -> Run:
    """Read the files of a run.

    Args:
        folder: of the run.
        given: files by the part's name. Any other part is read from its usual file in `folder`, if
            this file exists; if it is damaged, the page says so.

    Raises:
        UserError: configuration or log cannot be read; or a given file is missing, damaged, or made
            by another command.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such run folder")
    config = read_config(folder / "config.yaml")
    lines, scored = read_lines(folder / "metrics.jsonl")
    named = {name: path for name, path in given.items() if path}
    record, damaged = None, []
    if checkpoint := latest(folder):
        try:
            record = read_record(checkpoint)
        except UserError as error:
            damaged.append(str(error))
    run = Run(folder, config, lines, scored, record, {}, {}, frozenset(named), damaged)
    for part in (*RESULTS, *PICTURES):
        path = named.get(part.name) or folder / part.file
        if part.name not in named and not path.exists():
            continue
        if part in PICTURES:
            run.pictures[part.name] = path
            continue
        try:
            run.results[part.name] = read_part(part, path)
        except UserError as error:
            if part.name in named:
                raise
            run.damaged.append(str(error))
    return run


def read_config(path: Path) -> dict[str, Any]:
    """config.yaml of a run as nested values. Raises UserError."""
    _check_is_there(path)
    content = read_yaml(read_text(path, LARGEST_YAML), path)
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds no configuration")
    return content


def read_lines(path: Path) -> tuple[list[Line], list[Line]]:
    """The lines of metrics.jsonl: those of training, and those of evaluations. Skips an incomplete
    last line: it shows that the run was killed.

    Raises UserError.
    """
    _check_is_there(path)
    texts = read_text(path, LOG_BYTES).splitlines()
    if len(texts) > LOG_LINES:
        raise UserError(f"{path}: {len(texts):,} lines, at most {LOG_LINES:,} are read")
    lines: list[Line] = []
    scored: list[Line] = []
    for number, text in enumerate(texts, 1):
        try:
            line = _line(text)
            if "results" in line:
                values = {f"eval_{row['metric']}": row["value"] for row in line["results"]}
                scored.append({"step": line["step"], **values})
            else:
                lines.append(cast(Line, line))
        except (ValueError, RecursionError):
            if number < len(texts):
                raise UserError(f"{path}: line {number} is damaged") from None
    if not lines:
        raise UserError(f"{path}: nothing logged yet")
    return lines, scored


_LINES = msgspec.json.Decoder(schema.Line)


def _line(text: str) -> schema.Line:
    try:
        return _LINES.decode(text)
    except msgspec.ValidationError:
        raise
    except msgspec.DecodeError:  # NaN, which is no JSON
        return msgspec.convert(json.loads(text), schema.Line)


def _check_is_there(path: Path) -> None:
    if not path.exists():
        raise UserError(f"{path}: No such file: not the folder of a run")


def read_part(part: Part, path: Path) -> Measured:
    """The --json file of a part. Raises UserError if it is damaged or made by another command."""
    what = f"the --json file of: {part.made_by}"
    if part == COST:
        return read_json(path, Costs, what=what)
    if part == BENCHMARK:
        return read_json(path, Rates, what=what)
    if part == SLOTS:
        uses = read_json(path, Uses, what=what)
        if not any(row.metric == "active_slots" for row in uses.results):
            raise UserError(f"{path}: not {what}")
        return uses
    scores = read_json(path, Scores, what=what)
    probe = part.made_by.partition("probe ")[2] or None
    of_part = all(row.probe == probe for row in scores.results)
    if not of_part or not any(row.metric == "miou" for row in scores.results):
        raise UserError(f"{path}: not {what}")
    _check_scores(path, scores.results)
    return scores


def _check_scores(path: Path, rows: Sequence[Score]) -> None:
    """Shares in 0..1, in a table of sane size."""
    for number, row in enumerate(rows):
        where = f"{path}: results[{number}]"
        if row.metric == "iou" and row.name is None:
            raise UserError(f"{where}: an iou without class")
        if row.metric in ("iou", "miou", "pixel_accuracy") and not 0 <= row.value <= 1:
            raise UserError(f"{where}.value is {row.value}: expected 0 to 1")
    networks, classes = {row.network for row in rows}, {row.name for row in rows}
    for kind, found, most in (
        ("networks", networks, MOST_NETWORKS),
        ("classes", classes - {None}, MOST_CLASSES),
    ):
        if len(found) > most:
            raise UserError(f"{path}: results of {len(found):,} {kind}, at most {most}")


def slot_values(run: Run) -> dict[str, float]:
    """The figures of evaluation.slots over the whole data set, by metric."""
    return {
        row.metric: row.value
        for row in run.uses
        if row.prototype is None and row.prototypes is None
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
