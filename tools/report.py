"""One self-contained HTML page of a run: what ran, how the losses fell, how fast, what was learnt.

The page opens offline and asks nothing of any server. Parts that were not measured are left out,
with the command that adds them.
"""

import argparse
import base64
import html
import io
import json
import math
import shlex
import statistics
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from evaluation.images import open_image
from pipeline.errors import CommandParser, UserError, check_writable, run
from tools.charts import dot_chart, line_chart, short
from tools.report_page import PAGE
from train.checkpoint import Record, find, read_record
from train.config import flatten
from train.metrics import duration
from train.provenance import write_bytes

EXAMPLES = """examples:
  python -m tools.report runs/demo
  python -m tools.report runs/coco --benchmark bench.json --evaluation eval.json \\
      --prototypes prototypes.png --out coco.html
"""

PICTURE_WIDTH = 1800
"""Pixels; wider pictures are scaled down."""
STAGES = ("read", "decode", "params", "augment", "transfer", "step", "pipeline")
NETWORKS = ("trained", "untrained")
METRICS = {"miou": "mIoU", "pixel_accuracy": "pixel accuracy"}

Line = Mapping[str, float]


@dataclass(frozen=True)
class Run:
    """Everything that is known of a run; None for what was not measured."""

    folder: Path
    config: dict[str, Any]
    lines: list[Line]
    record: Record | None
    benchmark: dict[str, Any] | None
    evaluation: dict[str, Any] | None
    prototypes: Path | None


def read_lines(path: Path) -> list[Line]:
    """The lines of metrics.jsonl; a torn last one, of a run that was killed, is left out."""
    try:
        texts = path.read_text().splitlines()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}: not the folder of a run") from None
    lines: list[Line] = []
    for number, text in enumerate(texts, 1):
        try:
            lines.append({name: float(value) for name, value in json.loads(text).items()})
        except (ValueError, TypeError, AttributeError):
            if number < len(texts):
                raise UserError(f"{path}: line {number} is damaged") from None
    if not lines:
        raise UserError(f"{path}: nothing logged yet")
    return lines


def read_results(path: Path) -> dict[str, Any]:
    """A measuring command's --json file. Raises UserError unless it holds a list of results."""
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from None
    rows = content.get("results") if isinstance(content, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f'{path}: no measurements ("results") in this file')
    return dict(content)


def read_config(path: Path) -> dict[str, Any]:
    """config.yaml of a run as nested values. Raises UserError."""
    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}: not the folder of a run") from None
    except yaml.YAMLError:
        raise UserError(f"{path}: not YAML") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds no configuration")
    return content


def read_run(args: argparse.Namespace) -> Run:
    """Read what the command line names, and what lies in the run's folder under the usual names."""
    if not args.run.is_dir():
        raise UserError(f"{args.run}: no such run folder")

    def given(path: Path | None, usual: str) -> Path | None:
        beside = args.run / usual
        return path or (beside if beside.is_file() else None)

    benchmark = given(args.benchmark, "bench.json")
    evaluation = given(args.evaluation, "eval.json")
    try:
        record = read_record(find(args.run))
    except UserError:
        record = None
    return Run(
        folder=args.run,
        config=read_config(args.run / "config.yaml"),
        lines=read_lines(args.run / "metrics.jsonl"),
        record=record,
        benchmark=read_results(benchmark) if benchmark else None,
        evaluation=read_results(evaluation) if evaluation else None,
        prototypes=given(args.prototypes, "prototypes.png"),
    )


def build(report: Run) -> str:
    """The whole page."""
    config = flatten(report.config)
    return PAGE.substitute(
        name=html.escape(str(config.get("name", report.folder.name))),
        summary=html.escape(summary(report)),
        tiles=tiles(report),
        losses=loss_charts(report),
        grouping=grouping_section(report),
        prototypes=prototypes_section(report),
        speed=speed_section(report),
        setting=setting_section(report),
    )


def summary(report: Run) -> str:
    """One line: network, data, length."""
    config, last = flatten(report.config), report.lines[-1]
    arch, prototypes = config.get("model.arch", "?"), config.get("model.num_prototypes", "?")
    side, data = config.get("views.size", "?"), Path(str(config.get("data.path", "?"))).name
    parts = [f"{arch}, {prototypes} prototypes", f"{side}-pixel views of {data}"]
    if report.record and "images" in report.record.data:
        parts[-1] += f" ({report.record.data['images']:,} images)"
    parts.append(f"{last['step']:,.0f} steps, {last.get('epoch', math.nan):.3g} epochs")
    if "seconds" in last:
        parts.append(f"{duration(last['seconds'])} of training")
    return " · ".join(parts)


def tiles(report: Run) -> str:
    """The figures to take away."""
    last = report.lines[-1]
    found: list[tuple[str, str, str]] = []
    values = network_values(report)
    if ("trained", "miou") in values:
        before = values.get(("untrained", "miou"))
        note = f"untrained: {statistics.mean(before):.1%}" if before else "no baseline"
        found.append((f"{statistics.mean(values['trained', 'miou']):.1%}", "grouping mIoU", note))
    if "loss" in last:
        first = report.lines[0]["loss"]
        found.append((f"{last['loss']:.3f}", "loss", f"at the first log line: {first:.3f}"))
    if "active_slots" in last:
        total = flatten(report.config).get("model.num_prototypes", "?")
        found.append((f"{last['active_slots']:.1f}", "active slots an image", f"of {total}"))
    if "images_per_s" in last:
        rate = statistics.median(line["images_per_s"] for line in report.lines)
        found.append((short(round(rate, 1)), "images a second", "median of training"))
    if "wait_share" in last:
        found.append((f"{wait_share(report.lines):.1%}", "data wait", "share of training time"))
    return "".join(
        f'<div class="tile"><b>{html.escape(value)}</b><span>{html.escape(name)}</span>'
        f"<small>{html.escape(note)}</small></div>"
        for value, name, note in found
    )


def wait_share(lines: list[Line]) -> float:
    """Share of the whole training time that was spent waiting for data, in 0..1.

    `seconds` counts from the start of the run, so a line's share weighs as long as its own stretch.
    """
    ends = [line.get("seconds", float(number)) for number, line in enumerate(lines, 1)]
    spans = [max(end - begin, 0.0) for begin, end in zip([0.0, *ends], ends, strict=False)]
    waited = sum(line["wait_share"] * span for line, span in zip(lines, spans, strict=True))
    return waited / (sum(spans) or 1.0)


def loss_charts(report: Run) -> str:
    """Loss terms and active slots over the steps."""
    prototypes = flatten(report.config).get("model.num_prototypes")
    uniform = (
        (f"ln {prototypes}: uniform student", math.log(prototypes))
        if isinstance(prototypes, int)
        else None
    )
    return "".join(
        (
            line_chart(
                "Grouping loss",
                curves(
                    report,
                    grouping_12="view 1 → 2",
                    grouping_21="view 2 → 1",
                ),
                reference=uniform,
            ),
            line_chart("Slot loss", curves(report, slot_12="view 1 → 2", slot_21="view 2 → 1")),
            line_chart("Image-level loss", curves(report, image="both directions"))
            if any("image" in line for line in report.lines)
            else "",
            line_chart("Total loss", curves(report, loss="loss")),
            line_chart(
                "Slots per image",
                curves(report, active_slots="active", active_pairs="in both views"),
                from_zero=True,
            ),
        )
    )


def curves(report: Run, **names: str) -> dict[str, list[tuple[float, float]]]:
    """The logged values of `names`, each under its label, as (step, value)."""
    return {
        label: [(line["step"], line[name]) for line in report.lines if name in line]
        for name, label in names.items()
    }


def network_values(report: Run) -> dict[tuple[str, str], list[float]]:
    """Values of each (network, metric) over the seeds; a class's IoU is the metric "iou CLASS"."""
    values: dict[tuple[str, str], list[float]] = defaultdict(list)
    for row in (report.evaluation or {"results": []})["results"]:
        metric = f"iou {row['class']}" if row.get("metric") == "iou" else str(row.get("metric"))
        values[str(row.get("network", "trained")), metric].append(float(row["value"]))
    return values


def grouping_section(report: Run) -> str:
    """mIoU and accuracy beside the untrained network's, then the classes."""
    values = network_values(report)
    if not values:
        return missing(
            "how well the grouping agrees with label maps",
            f"python -m evaluation.unsupervised_segmentation --checkpoint {quoted(report.folder)}"
            " --images DIR --labels DIR --baseline untrained --json eval.json",
            "--evaluation eval.json",
        )
    networks = [n for n in NETWORKS if any(network == n for network, _ in values)]
    networks += sorted({network for network, _ in values} - set(networks))
    classes = sorted(
        {metric for _, metric in values if metric.startswith("iou ")},
        key=lambda metric: -statistics.mean(values.get((networks[0], metric), [0.0])),
    )
    table = share_table(
        values, networks, {m: n for m, n in METRICS.items() if m in {k[1] for k in values}}
    )
    if classes:
        names = {metric: metric.removeprefix("iou ") for metric in classes}
        table += f"<h3>IoU by class</h3>{share_table(values, networks, names)}"
    return table


def share_table(
    values: Mapping[tuple[str, str], list[float]], networks: list[str], metrics: Mapping[str, str]
) -> str:
    """One row a metric, one column a network: the mean over seeds (± deviation) and a bar."""
    head = "".join(f"<th>{html.escape(network)}</th>" for network in networks)
    rows = []
    for metric, name in metrics.items():
        cells = []
        for number, network in enumerate(networks):
            found = values.get((network, metric))
            if not found:
                cells.append("<td>–</td>")
                continue
            mean = statistics.mean(found)
            text = f"{mean:.1%}"
            if len(found) > 1:
                text += f" ± {100 * statistics.stdev(found):.1f}"
            cells.append(
                f'<td><span class="bar s{min(number, 3)}" style="width:{80 * mean:.1f}%"></span>'
                f"<span>{text}</span></td>"
            )
        rows.append(f"<tr><th>{html.escape(name)}</th>{''.join(cells)}</tr>")
    return f'<table class="shares"><tr><th></th>{head}</tr>{"".join(rows)}</table>'


def prototypes_section(report: Run) -> str:
    """The picture, as WebP inside the page."""
    if report.prototypes is None:
        return missing(
            "what the prototypes stand for",
            f"python -m tools.show_prototypes --checkpoint {quoted(report.folder)}"
            " --data FILE.beton --out prototypes.png",
            "--prototypes prototypes.png",
        )
    image = open_image(report.prototypes).convert("RGB")
    image.thumbnail((PICTURE_WIDTH, 10 * PICTURE_WIDTH), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    image.save(stream, "WEBP", quality=82)
    data = base64.b64encode(stream.getvalue()).decode()
    return (
        f'<img class="picture" width="{image.width}" height="{image.height}"'
        f' alt="Nearest segments of each prototype" src="data:image/webp;base64,{data}">'
    )


def speed_section(report: Run) -> str:
    """Speed and data wait over training, and throughput by stage."""
    charts = "".join(
        (
            line_chart(
                "Images a second, in training",
                curves(report, images_per_s="images/s"),
                from_zero=True,
            ),
            line_chart(
                "Share of time waiting for data",
                curves(report, wait_share="data wait"),
                from_zero=True,
                percent=True,
            ),
        )
    )
    return f'<div class="charts">{charts}</div>{stages(report)}'


def stages(report: Run) -> str:
    """Throughput of each stage alone, as a chart and a table."""
    measured = [
        row
        for row in (report.benchmark or {"results": []})["results"]
        if row.get("images_per_s", 0) > 0 and not row.get("operation")
    ]
    if not measured:
        data = quoted(flatten(report.config).get("data.path", "FILE.beton"))
        return missing(
            "the throughput of each stage",
            f"python -m tools.benchmark all --data {data} --json bench.json",
            "--benchmark bench.json",
        )
    order = {stage: number for number, stage in enumerate(STAGES)}
    measured.sort(key=lambda row: order.get(row.get("stage"), len(order)))
    chart = dot_chart(
        "Throughput of each stage alone",
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
    return f'<div class="charts">{chart}{text_table("numbers", head, rows)}</div>'


def stage_name(row: Mapping[str, Any]) -> str:
    """decode · loader, or pipeline · kornia · crops host"""
    crops = f"crops {row['crops']}" if row.get("crops") else None
    return " · ".join(str(part) for part in (row.get("stage"), row.get("backend"), crops) if part)


def setting_section(report: Run) -> str:
    """Where every number comes from: machines, versions, commands, the whole configuration."""
    rows: list[tuple[str, ...]] = []
    training = report.record.provenance if report.record else None
    measured = {
        "training": training,
        "benchmark": report.benchmark,
        "evaluation": report.evaluation,
    }
    for name, content in measured.items():
        if content:
            measured_on = (listed(content.get(key) or {}) for key in ("hardware", "versions"))
            rows.append((name, *measured_on, str(content.get("command", ""))))
    machines = text_table("machines", ("", "hardware", "versions", "command"), rows) if rows else ""
    text = html.escape(yaml.safe_dump(report.config, sort_keys=False))
    return f"{machines}<details><summary>Configuration</summary><pre>{text}</pre></details>"


def text_table(style: str, head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """A table of plain text; each row's first cell is its heading."""
    titles = "".join(f"<th>{html.escape(title)}</th>" for title in head)
    body = "".join(
        f"<tr><th>{html.escape(row[0])}</th>"
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    return f'<table class="{style}"><tr>{titles}</tr>{body}</table>'


def listed(values: Mapping[str, Any]) -> str:
    """{"cores": 2, "gpus": []} as "cores 2"."""
    parts = []
    for name, value in values.items():
        text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        if text:
            parts.append(f"{name.replace('_gib', ' in GiB').replace('_', ' ')} {text}")
    return ", ".join(parts)


def quoted(path: object) -> str:
    """A path as a shell takes it."""
    return shlex.quote(str(path))


def missing(what: str, command: str, option: str) -> str:
    """A line for a part that was not measured."""
    return (
        f'<p class="missing">Not here yet: {html.escape(what)}. To add it, run'
        f" <code>{html.escape(command)}</code> and give this report"
        f" <code>{html.escape(option)}</code>.</p>"
    )


def parse(argv: list[str]) -> argparse.Namespace:
    parser = CommandParser(
        prog="python -m tools.report",
        description=__doc__,
        epilog=EXAMPLES,
    )
    parser.add_argument("run", type=Path, metavar="RUN_DIR", help="folder of the run")
    parser.add_argument(
        "--benchmark", type=Path, help="JSON of tools.benchmark (RUN_DIR/bench.json if there)"
    )
    parser.add_argument(
        "--evaluation",
        type=Path,
        help="JSON of evaluation.unsupervised_segmentation (RUN_DIR/eval.json if there)",
    )
    parser.add_argument(
        "--prototypes",
        type=Path,
        help="picture of tools.show_prototypes (RUN_DIR/prototypes.png if there)",
    )
    parser.add_argument("--out", type=Path, help="the page to write (RUN_DIR/report.html)")
    return parser.parse_args(argv)


def main() -> None:
    args = parse(sys.argv[1:])
    out = args.out or args.run / "report.html"
    check_writable("--out", out)
    page = build(read_run(args)).encode()
    write_bytes(out, page)
    print(f"wrote {out} ({len(page) / 1e3:,.0f} kB)")


if __name__ == "__main__":
    run(main)
