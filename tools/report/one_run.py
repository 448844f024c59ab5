"""The report of one run: figures, charts and tables from the files in its folder."""

import contextlib
import math
import shlex
import statistics
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import yaml

from pipeline.commands import as_called
from pipeline.errors import UserError
from tools.report.charts import dot_chart, line_chart, short
from tools.report.page import Table, picture, render
from tools.report.parts import BENCHMARK, PICTURES, RESULTS, SCORES, Part
from tools.report.results import Run, slot_values, wait_share
from tools.report.schema import LARGEST, Measured, Rate
from tools.report.scores import METRICS, evaluation, network_values
from train.run.log import duration

STAGES = ("read", "decode", "params", "augment", "transfer", "step", "pipeline")
"""The order in which the page shows the stages of the benchmark."""

SHOWN_SCORES = {
    "evaluation": "grouping mIoU",
    "knn": "dense k-NN mIoU",
    "linear": "linear probe mIoU",
}
"""Evaluations whose mIoU is among the most important figures."""
BEFORE = ("untrained", "start")
"""So begin the names of networks before training: of new weights, of those that a run began from.
"""

ONLINE = {
    f"eval_{protocol}_{metric}": f"{title}: {METRICS[metric]}"
    for protocol, title in (
        ("knn", "dense k-NN"), ("kmeans", "k-means"), ("prototypes", "prototypes")
    )
    for metric in METRICS
}  # fmt: skip
"""The scores while training, by the names of `Run.scored`."""


def build(run: Run) -> str:
    """The page as HTML. Raises UserError for a given picture that cannot be read."""
    evaluations = (evaluation(part.title, run.scores(part)) for part in SCORES)
    return render(
        "one_run.html",
        name=run.settings.get("name", run.folder.name),
        summary=summary(run),
        figures=figures(run),
        chart=partial(chart, run),
        uniform=uniform_student(run),
        evaluations=list(filter(None, evaluations)),
        online=online(run),
        slots=slots(run),
        pictures=pictures(run),
        stages=stages(run),
        cost=cost(run),
        recipe=recipe(run),
        origins=origins(run),
        configuration=yaml.safe_dump(run.config, sort_keys=False),
        missing=missing(run),
        damaged=run.damaged,
    )


def summary(run: Run) -> str:
    """One line: network, data, length."""
    config, last = run.settings, run.lines[-1]
    arch, prototypes = config.get("model.arch", "?"), config.get("model.num_prototypes", "?")
    side, data = config.get("views.size", "?"), Path(str(config.get("data.path", "?"))).name
    parts = [f"{arch}, {prototypes} prototypes", f"{side}-pixel views of {data}"]
    if run.record and isinstance(images := run.record.data.get("images"), int):
        parts[-1] += f" ({images:,} images)"
    parts.append(f"{last['step']:,.0f} steps, {last.get('epoch', math.nan):.3g} epochs")
    if "seconds" in last:
        parts.append(f"{duration(last['seconds'])} of training")
    return " · ".join(parts)


def figures(run: Run) -> list[tuple[str, str, str]]:
    """The most important figures: (figure, title, note)."""
    last = run.lines[-1]
    shown = list(filter(None, (score(run, part) for part in SCORES if part.name in SHOWN_SCORES)))
    if "loss" in last:
        first = next(line["loss"] for line in run.lines if "loss" in line)
        shown.append((f"{last['loss']:.3f}", "loss", f"at the first log line: {first:.3f}"))
    if "active_slots" in last:
        total = run.settings.get("model.num_prototypes", "?")
        shown.append((f"{last['active_slots']:.1f}", "active slots an image", f"of {total}"))
    if "usage_entropy" in last:
        dead = f"{last.get('dead_prototypes', math.nan):.0f} dead prototypes"
        shown.append((f"{last['usage_entropy']:.2f}", "usage entropy", f"of 1; {dead}"))
    if "images_per_s" in last:
        shown.append((median_rate(run), "images a second", "median of training"))
    if "wait_share" in last:
        shown.append((f"{wait_share(run.lines):.1%}", "data wait", "share of training time"))
    return shown


def score(run: Run, part: Part) -> tuple[str, str, str] | None:
    """The mIoU of the first network of an evaluation, with that of the untrained one as note; None
    if it was not measured.
    """
    values = network_values(run.scores(part))
    miou = {name: statistics.mean(each) for (name, m), each in values.items() if m == "miou"}
    networks = [name for name in miou if not name.startswith(BEFORE)]
    if not networks:
        return None
    before = [f"{name}: {miou[name]:.1%}" for name in miou if name.startswith(BEFORE)]
    note = before[0] if before else "no baseline"
    return f"{miou[networks[0]]:.1%}", SHOWN_SCORES[part.name], note


def median_rate(run: Run) -> str:
    """Images a second in training: the median over the log lines."""
    rates = (line.get("images_per_s", math.nan) for line in run.lines)
    return short(round(statistics.median(rates), 1))


def uniform_student(run: Run) -> tuple[str, float] | None:
    """The grouping loss of a student that gives each prototype the same share, with its label."""
    prototypes = run.settings.get("model.num_prototypes")
    if not isinstance(prototypes, int) or not 1 <= prototypes < LARGEST:
        return None
    return f"ln {prototypes}: uniform student", math.log(prototypes)


def chart(
    run: Run,
    title: str,
    *,
    reference: tuple[str, float] | None = None,
    from_zero: bool = False,
    percent: bool = False,
    **labels: str,
) -> str:
    """Logged values over the steps as SVG, each under its label; empty if none is logged."""
    lines = {
        label: [(line["step"], line[name]) for line in [*run.lines, *run.scored] if name in line]
        for name, label in labels.items()
    }
    if not any(lines.values()):
        return ""
    return line_chart(title, lines, reference=reference, from_zero=from_zero, percent=percent)


def online(run: Run) -> Table:
    """Scores of the teacher while it trained: of the untrained network, the highest and the last.
    The highest one of eval.metric is that of checkpoints/best.
    """
    rows = []
    for metric, name in ONLINE.items():
        points = [(line[metric], line["step"]) for line in run.scored if metric in line]
        after = [point for point in points if point[1] > 0]
        if not after:
            continue
        before = "".join(f"{value:.1%}" for value, step in points if step == 0)
        highest, step = max(after, key=lambda point: point[0])
        rows.append(
            (name, before or "–", f"{highest:.1%} (step {step:.0f})", f"{after[-1][0]:.1%}")
        )
    return Table(("", "before training", "highest", "last"), rows)


def slots(run: Run) -> tuple[list[str], Table] | None:
    """How the prototypes are used over whole images: figures, and the share of each prototype."""
    values, rows = slot_values(run), run.uses
    if not values:
        return None
    total = run.settings.get("model.num_prototypes", "?")
    spread = f" ± {values['active_slots_sd']:.2f}" if "active_slots_sd" in values else ""
    shown = {
        "active_slots": ("active slots an image", f"{{:.2f}}{spread}"),
        "usage_entropy": ("usage entropy (1: all win equally often)", "{:.3f}"),
        "dead_prototypes": ("dead prototypes", f"{{:.0f}} of {total}"),
        "near_duplicates": ("pairs of near-duplicates", "{:.0f}"),
    }
    table = Table(
        ("", f"{rows[0].images:,} whole images"),
        [(name, form.format(values[key])) for key, (name, form) in shown.items() if key in values],
    )
    shares = {
        label: list(enumerate(sorted(row.value for row in rows if row.metric == key)[::-1]))
        for key, label in (("image_share", "of images"), ("cell_share", "of cells"))
    }
    curve = line_chart(
        "Share in which each prototype is active",
        shares,
        x_name="prototypes, each curve from often to seldom",
        from_zero=True,
        percent=True,
    )
    return [curve], table


def stages(run: Run) -> tuple[list[str], Table] | None:
    """Throughput of each stage alone."""
    measured = [row for row in run.rates if row.images_per_s > 0 and not row.operation]
    if not measured:
        return None
    order = {stage: number for number, stage in enumerate(STAGES)}
    measured.sort(key=lambda row: order.get(row.stage, len(order)))
    dots, rows = [], []
    for row in measured:
        name, rate = stage_name(row), row.images_per_s
        dots.append((name, rate, row.slowest or rate, row.fastest or rate))
        numbers = (f"{rate:,.1f}", f"{1e3 / rate:,.3g}")
        amounts = ("–" if n is None else str(n) for n in (row.batch, row.threads))
        rows.append((name, *numbers, *amounts))
    head = ("stage", "images/s", "ms an image", "batch", "threads")
    return [dot_chart(BENCHMARK.title, dots, unit="images/s")], Table(head, rows)


def stage_name(row: Rate) -> str:
    """decode · loader, or pipeline · kornia · crops host"""
    crops = f"crops {row.crops}" if row.crops else None
    return " · ".join(part for part in (row.stage, row.backend, crops) if part)


def cost(run: Run) -> Table:
    """Training time so far, and the time that is left at this speed."""
    last, epochs = run.lines[-1], run.settings.get("train.epochs")
    rows = []
    if "seconds" in last:
        rows.append(("training so far", duration(last["seconds"])))
        if isinstance(epochs, int | float) and 1e-6 < last.get("epoch", 0) < epochs < LARGEST:
            rest = last["seconds"] * (epochs / last["epoch"] - 1)
            rows.append(("left at this pace", f"{duration(rest)} to epoch {epochs}"))
    if "images_per_s" in last:
        rows.append(("images a second (median)", median_rate(run)))
    return Table(("", "this run"), rows)


def recipe(run: Run) -> Table:
    """Hours, energy and CO2e of the whole recipe on several numbers of GPUs."""
    rows = [
        (
            cost.backend,
            "?" if cost.gpus is None else cost.gpus,
            *(
                "unknown" if value is None else short(value)
                for value in (cost.images_per_s, cost.hours, cost.kwh, cost.co2_kg)
            ),
            "yes" if cost.measured else "scaled",
        )
        for cost in run.costs
    ]
    return Table(("", "GPUs", "images/s", "hours", "kWh", "kg CO2e", "measured"), rows)


def origins(run: Run) -> tuple[Table, Table]:
    """Where the numbers come from: hardware and versions (one row for each machine), commands."""
    contents = dict(run.results)
    if run.record:
        with contextlib.suppress(msgspec.ValidationError):
            contents = {"training": msgspec.convert(run.record.provenance, Measured)} | contents
    machines: dict[tuple[str, ...], list[str]] = {}
    for name, content in contents.items():
        machine = (listed(content.hardware or {}), listed(content.versions or {}))
        machines.setdefault(machine, []).append(name)
    rows = [(", ".join(names), *machine) for machine, names in machines.items()]
    commands = [(name, content.command) for name, content in contents.items()]
    return Table(("", "hardware", "versions"), rows), Table(("", "command"), commands)


def listed(values: Mapping[str, Any]) -> str:
    """{"cores": 2, "gpus": []} as "cores 2"."""
    parts = []
    for name, value in values.items():
        text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        if text:
            parts.append(f"{name.replace('_gib', ' in GiB').replace('_', ' ')} {text}")
    return ", ".join(parts)


def missing(run: Run) -> list[tuple[str, str]]:
    """The missing parts of the page: (title, the command that makes it)."""
    paths = {
        "run": run.folder,
        "data": run.settings.get("data.path", "FILE.beton"),
        "config": run.folder / "config.yaml",
    }

    def command(part: Part) -> str:
        values = {**paths, "out": run.folder / part.file}
        quoted = {name: shlex.quote(str(path)) for name, path in values.items()}
        return as_called(f"python -m {part.command}").format(**quoted)

    present = run.results.keys() | run.pictures.keys()
    return [
        (part.title, command(part)) for part in (*RESULTS, *PICTURES) if part.name not in present
    ]


def pictures(run: Run) -> list[tuple[str, tuple[int, int, str]]]:
    """Titles and pictures. Raises UserError for one that the user named and that cannot be read."""
    shown = []
    for part in PICTURES:
        if part.name in run.pictures:
            try:
                shown.append((part.title, picture(run.pictures[part.name])))
            except UserError as error:
                if part.name in run.given:
                    raise
                run.damaged.append(str(error))
    return shown
