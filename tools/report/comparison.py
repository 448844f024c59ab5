"""The comparison of several runs: charts and tables from the files in their folders."""

from collections.abc import Sequence
from pathlib import Path

from pipeline.errors import UserError
from tools.report.charts import line_chart, short
from tools.report.page import Table, render
from tools.report.parts import SCORES, Part
from tools.report.results import Run, read_run, slot_values
from tools.report.scores import METRICS, Evaluation, network_values, note
from train.run.log import duration

MOST = 8
"""The largest number of runs whose curves are still distinct in a chart."""
CURVES = (
    ("Total loss", ("loss",), False),
    ("Grouping loss, both directions", ("grouping_12", "grouping_21"), False),
    ("Loss of hidden patches, both views", ("masked_1", "masked_2"), False),
    ("Slot loss, both directions", ("slot_12", "slot_21"), False),
    ("Loss of relations, both directions", ("relations",), False),
    ("Active slots per image", ("active_slots",), True),
    ("Usage entropy of the prototypes", ("usage_entropy",), True),
    ("Dead prototypes", ("dead_prototypes",), True),
    ("Images a second", ("images_per_s",), True),
    ("mIoU of dense k-NN, while training", ("eval_knn_miou",), True),
    ("mIoU of k-means, while training", ("eval_kmeans_miou",), True),
    ("mIoU of the prototypes, while training", ("eval_prototypes_miou",), True),
)
"""Title, the logged values whose mean is drawn, whether the axis starts at 0."""
LAST = {
    "steps": "step",
    "epochs": "epoch",
    "loss": "loss",
    "active slots": "active_slots",
    "usage entropy": "usage_entropy",
    "dead prototypes": "dead_prototypes",
}
"""Title and logged value of each row of the table of last values."""
NAMES = {"name", "log.dir"}
"""Settings that differ between any two runs and do not affect the training."""

Runs = dict[str, Run]


def read_runs(folders: Sequence[Path]) -> Runs:
    """The runs by the names of their folders, or by their paths if two names are the same.

    Raises UserError.
    """
    if not 2 <= len(folders) <= MOST:
        raise UserError(f"compares 2 to {MOST} runs, not {len(folders)}")
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UserError("the same run is given twice")
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    return {name: read_run(folder, {}) for name, folder in zip(names, folders, strict=True)}


def build(runs: Runs) -> str:
    """The page as HTML."""
    evaluations = (evaluation(runs, part) for part in SCORES)
    return render(
        "comparison.html",
        name=f"{len(runs)} runs",
        summary=" · ".join(runs),
        drawn=charts(runs),
        last=last_values(runs),
        evaluations=list(filter(None, evaluations)),
        slots=slots(runs),
        differences=differences(runs),
        damaged=[line for run in runs.values() for line in run.damaged],
    )


def charts(runs: Runs) -> list[str]:
    """A chart for each value that a run logs, as SVG; a line for each run."""
    return [
        line_chart(title, lines, from_zero=from_zero)
        for title, names, from_zero in CURVES
        if any((lines := {name: curve(run, names) for name, run in runs.items()}).values())
    ]


def curve(run: Run, names: Sequence[str]) -> list[tuple[float, float]]:
    """(step, mean of the values `names`) of the lines that have all these values."""
    return [
        (line["step"], sum(line[name] for name in names) / len(names))
        for line in [*run.lines, *run.scored]
        if all(name in line for name in names)
    ]


def last_values(runs: Runs) -> Table:
    """Length, last logged values and time of each run."""
    rows = [
        (title, *(text(run.lines[-1].get(name)) for run in runs.values()))
        for title, name in LAST.items()
    ]
    spent = (run.lines[-1].get("seconds") for run in runs.values())
    rows.append(("time", *("–" if seconds is None else duration(seconds) for seconds in spent)))
    return Table(("", *runs), rows)


def evaluation(runs: Runs, part: Part) -> Evaluation | None:
    """The scores of one evaluation: a row for each network and metric, a column for each run."""
    results = [run.scores(part) for run in runs.values()]
    values = [network_values(rows) for rows in results]
    keys = dict.fromkeys(key for scores in values for key in scores if key[1] in METRICS)
    if not keys:
        return None
    rows = [
        (f"{network}: {METRICS[metric]}", *(scores.get((network, metric)) for scores in values))
        for network, metric in keys
    ]
    notes = dict.fromkeys(note(rows) for rows in results if rows)
    return Evaluation(part.title, "; ".join(notes), Table(("", *runs), rows))


def slots(runs: Runs) -> Table:
    """The figures of evaluation.slots over a whole data set."""
    values = [slot_values(run) for run in runs.values()]
    keys = dict.fromkeys(key for figures in values for key in figures)
    rows = [
        (key.replace("_", " ").replace(" sd", ", deviation"), *(text(f.get(key)) for f in values))
        for key in keys
    ]
    return Table(("", *runs), rows)


def differences(runs: Runs) -> Table:
    """The settings that differ between the runs."""
    settings = [run.settings for run in runs.values()]
    names = dict.fromkeys(name for one in settings for name in one if name not in NAMES)
    rows = [(name, *(str(one.get(name, "–")) for one in settings)) for name in names]
    return Table(("", *runs), [row for row in rows if len(set(row[1:])) > 1])


def text(value: float | None) -> str:
    """A short number, or – if it was not measured."""
    return "–" if value is None else short(value)
