"""One self-contained HTML page of several runs: their curves in one chart each, what differs in
their configurations, their scores side by side.
"""

import argparse
import html
import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline.errors import UserError
from tools.report.charts import line_chart, short
from tools.report.page import PAGE
from tools.report.parts import METRICS, score_note, section, share_table, text_table
from tools.report.results import (
    SCORES,
    SLOTS,
    Line,
    Part,
    Run,
    network_values,
    read_run,
    slot_values,
)
from train.run.cli import CommandParser, check_writable, run
from train.run.log import duration
from train.run.provenance import write_bytes

EXAMPLES = """examples:
  python -m tools.compare runs/demo runs/demo_no_geometry --out compare.html
"""
MOST = 8
"""Runs that a chart tells apart."""
CURVES = (
    ("Total loss", ("loss",), False),
    ("Grouping loss, both directions", ("grouping_12", "grouping_21"), False),
    ("Slot loss, both directions", ("slot_12", "slot_21"), False),
    ("Active slots per image", ("active_slots",), True),
    ("Usage entropy of the prototypes", ("usage_entropy",), True),
    ("Dead prototypes", ("dead_prototypes",), True),
    ("Images a second", ("images_per_s",), True),
)
"""Title, the logged values whose mean is drawn, whether the axis starts at 0."""
NAMES = {"name", "log.dir"}
"""Settings that always differ and say nothing."""

Runs = dict[str, Run]


def read_runs(folders: Sequence[Path]) -> Runs:
    """The runs, each under its folder's name, or its path where names are the same. Raises
    UserError.
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
    """The whole page."""
    differing = differences(runs)
    return PAGE.substitute(
        name=f"{len(runs)} runs",
        summary=html.escape(" · ".join(runs)),
        body="\n".join(
            (
                section("Training", f'<div class="charts">{charts(runs)}</div>'),
                section("At the end of the log", last_table(runs)),
                section("Against label maps", *(scores(runs, part) for part in SCORES)),
                section(SLOTS.title, slots_table(runs)),
                section(
                    "What differs in their configurations",
                    text_table("", ("", *runs), differing)
                    if differing
                    else "<p>Nothing but their names.</p>",
                ),
            )
        ),
    )


def charts(runs: Runs) -> str:
    """A chart a value that any of the runs logs, a line a run."""
    return "".join(
        line_chart(title, lines, from_zero=from_zero)
        for title, names, from_zero in CURVES
        if any((lines := {name: curve(run.lines, names) for name, run in runs.items()}).values())
    )


def curve(lines: Sequence[Line], names: Sequence[str]) -> list[tuple[float, float]]:
    """(step, mean of the values `names`) of the lines that log them all."""
    return [
        (line["step"], sum(line[name] for name in names) / len(names))
        for line in lines
        if all(name in line for name in names)
    ]


def last_table(runs: Runs) -> str:
    """Length, time and the last logged values."""
    shown = {
        "steps": "step",
        "epochs": "epoch",
        "loss": "loss",
        "active slots": "active_slots",
        "usage entropy": "usage_entropy",
        "dead prototypes": "dead_prototypes",
    }
    rows = [
        (title, *(text(run.lines[-1].get(name)) for run in runs.values()))
        for title, name in shown.items()
    ]
    spent = (run.lines[-1].get("seconds") for run in runs.values())
    rows.append(("time", *("–" if seconds is None else duration(seconds) for seconds in spent)))
    return text_table("", ("", *runs), rows)


def scores(runs: Runs, part: Part) -> str:
    """One measure's figures: a row a network and metric, a column a run."""
    values = [network_values(run.rows(part)) for run in runs.values()]
    keys = dict.fromkeys(key for found in values for key in found if key[1] in METRICS)
    if not keys:
        return ""
    rows = [
        (f"{network}: {METRICS[metric]}", [found.get((network, metric)) for found in values])
        for network, metric in keys
    ]
    notes = dict.fromkeys(score_note(own) for run in runs.values() if (own := run.rows(part)))
    return (
        f'<h3>{html.escape(part.title)}</h3><p class="note">{html.escape("; ".join(notes))}</p>'
        f"{share_table(('', *runs), rows)}"
    )


def slots_table(runs: Runs) -> str:
    """The whole-set figures of evaluation.slots, where there are any."""
    values = [slot_values(run) for run in runs.values()]
    keys = dict.fromkeys(key for found in values for key in found)
    rows = [
        (key.replace("_", " ").replace(" sd", ", deviation"), *(text(f.get(key)) for f in values))
        for key in keys
    ]
    return text_table("", ("", *runs), rows) if rows else ""


def differences(runs: Runs) -> list[tuple[str, ...]]:
    """Settings that are not the same in all runs: (name, value of each)."""
    settings = [run.settings for run in runs.values()]
    names = dict.fromkeys(name for found in settings for name in found if name not in NAMES)
    rows = [(name, *(str(found.get(name, "–")) for found in settings)) for name in names]
    return [row for row in rows if len(set(row[1:])) > 1]


def text(value: float | None) -> str:
    """– for what was not measured."""
    return "–" if value is None else short(value)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = CommandParser(prog="python -m tools.compare", description=__doc__, epilog=EXAMPLES)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN_DIR", help="folders of runs")
    parser.add_argument("--out", type=Path, required=True, help="the page to write (.html)")
    return parser.parse_args(argv)


def main() -> None:
    args = parse(sys.argv[1:])
    check_writable("--out", args.out)
    page = build(read_runs(args.runs)).encode()
    write_bytes(args.out, page)
    print(f"wrote {args.out} ({len(page) / 1e3:,.0f} kB)")


if __name__ == "__main__":
    run(main)
