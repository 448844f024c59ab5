"""One self-contained HTML page of a run: how it learnt, what it learnt, how fast, at what cost.

The page opens offline and asks nothing of any server. What was measured of the run is found in its
folder under its usual name, or given by an option; the page ends with the commands that would add
the rest.
"""

import argparse
import html
import math
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from tools.report.charts import dot_chart, line_chart, short
from tools.report.page import PAGE
from tools.report.parts import (
    listed,
    picture,
    quoted,
    score_tables,
    section,
    text_table,
    tiles,
)
from tools.report.results import (
    BENCHMARK,
    COST,
    PICTURES,
    RESULTS,
    SCORES,
    SLOTS,
    Part,
    Run,
    network_values,
    read_run,
    slot_values,
    wait_share,
)
from train.run.cli import CommandParser, check_writable, run
from train.run.log import duration
from train.run.provenance import write_bytes

EXAMPLES = """examples:
  python -m tools.report runs/demo
  python -m tools.report runs/coco --benchmark bench.json --evaluation eval.json \\
      --prototypes prototypes.png --out coco.html
  python -m tools.compare runs/demo runs/coco --out compare.html
"""
STAGES = ("read", "decode", "params", "augment", "transfer", "step", "pipeline")


def build(report: Run) -> str:
    """The whole page."""
    pictures = (
        f"<h3>{html.escape(part.title)}</h3>{picture(report.pictures[part.name], part.title)}"
        for part in PICTURES
        if part.name in report.pictures
    )
    return PAGE.substitute(
        name=html.escape(str(report.settings.get("name", report.folder.name))),
        summary=html.escape(summary(report)),
        body="\n".join(
            (
                f'<div class="tiles">{tiles(figures(report))}</div>',
                section("Training", training_charts(report)),
                section(
                    "Against label maps",
                    *(score_tables(part.title, report.rows(part)) for part in SCORES),
                ),
                section(SLOTS.title, slots_part(report)),
                section("Pictures", *pictures),
                section("Speed", speed_charts(report), stages(report)),
                section("Cost", cost_part(report)),
                section("How it was run", setting_part(report)),
                section("Not here yet", missing(report)),
            )
        ),
    )


def summary(report: Run) -> str:
    """One line: network, data, length."""
    config, last = report.settings, report.lines[-1]
    arch, prototypes = config.get("model.arch", "?"), config.get("model.num_prototypes", "?")
    side, data = config.get("views.size", "?"), Path(str(config.get("data.path", "?"))).name
    parts = [f"{arch}, {prototypes} prototypes", f"{side}-pixel views of {data}"]
    if report.record and "images" in report.record.data:
        parts[-1] += f" ({report.record.data['images']:,} images)"
    parts.append(f"{last['step']:,.0f} steps, {last.get('epoch', math.nan):.3g} epochs")
    if "seconds" in last:
        parts.append(f"{duration(last['seconds'])} of training")
    return " · ".join(parts)


def figures(report: Run) -> list[tuple[str, str, str]]:
    """The figures to take away: (figure, name, note)."""
    last = report.lines[-1]
    found: list[tuple[str, str, str]] = []
    values = network_values(report.rows(SCORES[0]))
    if ("trained", "miou") in values:
        before = values.get(("untrained", "miou"))
        note = f"untrained: {statistics.mean(before):.1%}" if before else "no baseline"
        found.append((f"{statistics.mean(values['trained', 'miou']):.1%}", "grouping mIoU", note))
    if "loss" in last:
        first = next(line["loss"] for line in report.lines if "loss" in line)
        found.append((f"{last['loss']:.3f}", "loss", f"at the first log line: {first:.3f}"))
    if "active_slots" in last:
        total = report.settings.get("model.num_prototypes", "?")
        found.append((f"{last['active_slots']:.1f}", "active slots an image", f"of {total}"))
    if "usage_entropy" in last:
        dead = f"{last.get('dead_prototypes', math.nan):.0f} dead prototypes"
        found.append((f"{last['usage_entropy']:.2f}", "usage entropy", f"of 1; {dead}"))
    if "images_per_s" in last:
        note = "median of training"
        found.append((short(round(median_rate(report), 1)), "images a second", note))
    if "wait_share" in last:
        found.append((f"{wait_share(report.lines):.1%}", "data wait", "share of training time"))
    return found


def median_rate(report: Run) -> float:
    """images/s of training."""
    return statistics.median(line.get("images_per_s", math.nan) for line in report.lines)


def training_charts(report: Run) -> str:
    """Loss terms, slots and the health of the prototypes over the steps; those that are logged."""
    prototypes = report.settings.get("model.num_prototypes")
    uniform = (
        (f"ln {prototypes}: uniform student", math.log(prototypes))
        if isinstance(prototypes, int) and prototypes > 0
        else None
    )
    both = ("view 1 → 2", "view 2 → 1")
    charts = (
        chart(report, "Grouping loss", grouping_12=both[0], grouping_21=both[1], reference=uniform),
        chart(report, "Slot loss", slot_12=both[0], slot_21=both[1]),
        chart(report, "Image-level loss", image="both directions"),
        chart(report, "Total loss", loss="loss"),
        chart(
            report,
            "Slots per image",
            active_slots="active",
            active_pairs="in both views",
            from_zero=True,
        ),
        chart(
            report,
            "Usage entropy of the prototypes (1: all win equally often)",
            usage_entropy="usage entropy",
            from_zero=True,
        ),
        chart(
            report,
            "Dead prototypes and near-duplicates",
            dead_prototypes="dead",
            near_duplicates="near-duplicates",
            from_zero=True,
        ),
    )
    return f'<div class="charts">{"".join(charts)}</div>'


def chart(
    report: Run,
    title: str,
    *,
    reference: tuple[str, float] | None = None,
    from_zero: bool = False,
    percent: bool = False,
    **names: str,
) -> str:
    """The logged values of `names`, each under its label, over the steps; nothing if none is
    logged.
    """
    lines = {
        label: [(line["step"], line[name]) for line in report.lines if name in line]
        for name, label in names.items()
    }
    if not any(lines.values()):
        return ""
    return line_chart(title, lines, reference=reference, from_zero=from_zero, percent=percent)


def slots_part(report: Run) -> str:
    """How the prototypes are used over whole images: figures, and each one's share."""
    values, rows = slot_values(report), report.rows(SLOTS)
    if not values:
        return ""
    total = report.settings.get("model.num_prototypes", "?")
    spread = f" ± {values['active_slots_sd']:.2f}" if "active_slots_sd" in values else ""
    shown = {
        "active_slots": ("active slots an image", f"{{:.2f}}{spread}"),
        "usage_entropy": ("usage entropy (1: all win equally often)", "{:.3f}"),
        "dead_prototypes": ("dead prototypes", f"{{:.0f}} of {total}"),
        "near_duplicates": ("pairs of near-duplicates", "{:.0f}"),
    }
    table = text_table(
        "",
        ("", f"{rows[0].get('images', 0):,} whole images"),
        [(name, form.format(values[key])) for key, (name, form) in shown.items() if key in values],
    )
    shares = {
        name: list(enumerate(sorted(row["value"] for row in rows if row["metric"] == key)[::-1]))
        for key, name in (("image_share", "of images"), ("cell_share", "of cells"))
    }
    curve = line_chart(
        "Share in which each prototype is active",
        shares,
        x_name="prototypes, each curve from often to seldom",
        from_zero=True,
        percent=True,
    )
    return f'<div class="charts">{curve}{table}</div>'


def speed_charts(report: Run) -> str:
    """Speed and data wait over training."""
    charts = (
        chart(report, "Images a second, in training", images_per_s="images/s", from_zero=True),
        chart(
            report,
            "Share of time waiting for data",
            wait_share="data wait",
            from_zero=True,
            percent=True,
        ),
    )
    return f'<div class="charts">{"".join(charts)}</div>'


def stages(report: Run) -> str:
    """Throughput of each stage alone, as a chart and a table."""
    measured = [
        row
        for row in report.rows(BENCHMARK)
        if row.get("images_per_s", 0) > 0 and not row.get("operation")
    ]
    if not measured:
        return ""
    order = {stage: number for number, stage in enumerate(STAGES)}
    measured.sort(key=lambda row: order.get(str(row.get("stage")), len(order)))
    dots = dot_chart(
        BENCHMARK.title,
        (
            (
                stage_name(row),
                row["images_per_s"],
                row.get("slowest") or row["images_per_s"],
                row.get("fastest") or row["images_per_s"],
            )
            for row in measured
        ),
        unit="images/s",
    )
    head = ("stage", "images/s", "ms an image", "batch", "threads")
    rows = [
        (
            stage_name(row),
            f"{row['images_per_s']:,.1f}",
            f"{1e3 / row['images_per_s']:,.3g}",
            str(row.get("batch", "–")),
            str(row.get("threads", "–")),
        )
        for row in measured
    ]
    return f'<div class="charts">{dots}{text_table("numbers", head, rows)}</div>'


def stage_name(row: Mapping[str, Any]) -> str:
    """decode · loader, or pipeline · kornia · crops host"""
    crops = f"crops {row['crops']}" if row.get("crops") else None
    return " · ".join(str(part) for part in (row.get("stage"), row.get("backend"), crops) if part)


def cost_part(report: Run) -> str:
    """Time so far and to come, and what the benchmark says of the whole recipe."""
    last, epochs = report.lines[-1], report.settings.get("train.epochs")
    rows = []
    if "seconds" in last:
        rows.append(("training so far", duration(last["seconds"])))
        if epochs and 0 < last.get("epoch", 0) < epochs:
            rest = last["seconds"] * (epochs / last["epoch"] - 1)
            rows.append(("left at this pace", f"{duration(rest)} to epoch {epochs}"))
    if "images_per_s" in last:
        rows.append(("images a second (median)", short(round(median_rate(report), 1))))
    table = text_table("", ("", "this run"), rows) if rows else ""
    return table + recipe_table(report)


def recipe_table(report: Run) -> str:
    """Hours, energy and CO2e of the whole recipe on some numbers of GPUs."""
    found = report.results.get(COST.name, {}).get("cost") or []
    head = ("", "GPUs", "images/s", "hours", "kWh", "kg CO2e", "measured")
    rows = [
        (
            str(cost.get("backend", "")),
            str(cost.get("gpus", "?")),
            *(
                "unknown" if cost.get(name) is None else short(cost[name])
                for name in ("images_per_s", "hours", "kwh", "co2_kg")
            ),
            "yes" if cost.get("measured") else "scaled",
        )
        for cost in found
    ]
    return f"<h3>{COST.title}</h3>{text_table('numbers', head, rows)}" if rows else ""


def setting_part(report: Run) -> str:
    """Where every number comes from: machines, versions, commands, the whole configuration."""
    measured = {"training": report.record.provenance} if report.record else {}
    measured |= report.results
    machines: dict[tuple[str, ...], list[str]] = {}
    for name, content in measured.items():
        machine = tuple(listed(content.get(key) or {}) for key in ("hardware", "versions"))
        machines.setdefault(machine, []).append(name)
    rows = [(", ".join(names), *machine) for machine, names in machines.items()]
    commands = [(name, str(content.get("command", ""))) for name, content in measured.items()]
    tables = (
        text_table("", ("", "hardware", "versions"), rows)
        + text_table("commands", ("", "command"), commands)
        if measured
        else ""
    )
    text = html.escape(yaml.safe_dump(report.config, sort_keys=False))
    return f"{tables}<details><summary>Configuration</summary><pre>{text}</pre></details>"


def missing(report: Run) -> str:
    """The commands that make what is not in the page, each in the place where it is found."""
    names = {
        "run": quoted(report.folder),
        "data": quoted(report.settings.get("data.path", "FILE.beton")),
        "config": quoted(report.folder / "config.yaml"),
    }
    there = report.results.keys() | report.pictures.keys()
    return "".join(
        f"<p>{html.escape(part.title)}<br><code>"
        f"{html.escape(part.command.format(**names, out=quoted(report.folder / part.file)))}"
        "</code></p>"
        for part in (*RESULTS, *PICTURES)
        if part.name not in there
    )


def parse(argv: list[str]) -> argparse.Namespace:
    parser = CommandParser(prog="python -m tools.report", description=__doc__, epilog=EXAMPLES)
    parser.add_argument("run", type=Path, metavar="RUN_DIR", help="folder of the run")
    for kind, parts in (("JSON", RESULTS), ("picture", PICTURES)):
        for part in parts:
            text = option_help(kind, part)
            parser.add_argument(f"--{part.name}", type=Path, metavar="FILE", help=text)
    parser.add_argument("--out", type=Path, help="the page to write (RUN_DIR/report.html)")
    return parser.parse_args(argv)


def option_help(kind: str, part: Part) -> str:
    """JSON of evaluation.slots: Use of the prototypes (RUN_DIR/slots.json if there)"""
    return f"{kind} of {part.made_by}: {part.title} (RUN_DIR/{part.file} if there)"


def main() -> None:
    args = parse(sys.argv[1:])
    out = args.out or args.run / "report.html"
    check_writable("--out", out)
    given = {part.name: getattr(args, part.name) for part in (*RESULTS, *PICTURES)}
    page = build(read_run(args.run, given)).encode()
    write_bytes(out, page)
    print(f"wrote {out} ({len(page) / 1e3:,.0f} kB)")


if __name__ == "__main__":
    run(main)
