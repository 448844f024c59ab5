"""Pieces of the pages that tools.report and tools.compare write: tables, pictures, sections."""

import base64
import html
import io
import shlex
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from evaluation.datasets.images import open_image
from tools.report.results import network_values, share

PICTURE_WIDTH = 1800
"""Pixels; wider pictures are scaled down."""
METRICS = {"miou": "mIoU", "pixel_accuracy": "pixel accuracy"}


def section(title: str, *parts: str) -> str:
    """A heading and what stands under it; nothing if that is nothing."""
    body = "".join(parts)
    return f"<h2>{html.escape(title)}</h2>{body}" if body else ""


def tiles(found: Iterable[tuple[str, str, str]]) -> str:
    """Figures to take away: (figure, name, note)."""
    return "".join(
        f'<div class="tile"><b>{html.escape(value)}</b><span>{html.escape(name)}</span>'
        f"<small>{html.escape(note)}</small></div>"
        for value, name, note in found
    )


def text_table(style: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of plain text; each row's first cell is its heading."""
    titles = "".join(f"<th>{html.escape(title)}</th>" for title in head)
    body = "".join(
        f"<tr><th>{html.escape(row[0])}</th>"
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    return f'<div class="wide"><table class="{style}"><tr>{titles}</tr>{body}</table></div>'


def score_tables(title: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """One row a network: mIoU and accuracy; under it the classes, one column a network."""
    values = network_values(rows)
    networks = list(dict.fromkeys(network for network, _ in values))
    metrics = {m: n for m, n in METRICS.items() if any((w, m) in values for w in networks)}
    if not metrics:
        return ""
    head = ("", *metrics.values())
    lines = [
        (network, [values.get((network, metric)) for metric in metrics]) for network in networks
    ]
    classes = list(dict.fromkeys(metric for _, metric in values if metric.startswith("iou ")))
    classes.sort(key=lambda metric: -statistics.mean(values.get((networks[0], metric), [0.0])))
    by_class = [
        (metric.removeprefix("iou "), [values.get((network, metric)) for network in networks])
        for metric in classes
    ]
    return (
        f'<h3>{html.escape(title)}</h3><p class="note">{html.escape(score_note(rows))}</p>'
        + share_table(head, lines)
        + (
            f"<details><summary>IoU by class</summary>"
            f"{share_table(('', *networks), by_class)}</details>"
            if by_class
            else ""
        )
    )


def score_note(rows: Sequence[Mapping[str, Any]]) -> str:
    """300 images at 320 pixels, mean ± deviation over 3 seeds"""
    first, seeds = rows[0], max(map(len, network_values(rows).values()))
    parts = [f"{first['images']:,} images"] if "images" in first else []
    if "train_images" in first:
        parts.append(f"learnt from {first['train_images']:,}")
    if "size" in first:
        parts.append(f"{first['size']} pixels")
    if first.get("flip"):
        parts.append("averaged with their mirror images")
    return ", ".join([*parts, f"mean ± deviation over {seeds} seeds" if seeds > 1 else "one seed"])


def share_table(
    head: Sequence[str], rows: Iterable[tuple[str, Sequence[list[float] | None]]]
) -> str:
    """Rows (name, values over the seeds for each column): mean ± deviation and a bar."""
    titles = "".join(f"<th>{html.escape(title)}</th>" for title in head)
    lines = []
    for name, cells in rows:
        line = f"<tr><th>{html.escape(name)}</th>"
        for number, found in enumerate(cells):
            line += "<td>–</td>" if not found else share_cell(found, number)
        lines.append(f"{line}</tr>")
    least = 190 + 120 * (len(head) - 1)  # pixels; equal columns, so that bars compare
    return (
        f'<div class="wide"><table class="shares" style="min-width:{least}px">'
        f"<tr>{titles}</tr>{''.join(lines)}</table></div>"
    )


def share_cell(values: list[float], series: int) -> str:
    """A bar in the colour of a series, and the figures."""
    width = 100 * statistics.mean(values)
    return (
        f'<td><span class="bar s{series % 8}" style="width:{width:.1f}%"></span>'
        f"<span>{share(values)}</span></td>"
    )


def picture(path: Path, title: str) -> str:
    """A picture as WebP inside the page. Raises UserError if it cannot be read."""
    image = open_image(path).convert("RGB")
    image.thumbnail((PICTURE_WIDTH, 10 * PICTURE_WIDTH), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    image.save(stream, "WEBP", quality=82)
    data = base64.b64encode(stream.getvalue()).decode()
    return (
        f'<img class="picture" width="{image.width}" height="{image.height}"'
        f' alt="{html.escape(title)}" src="data:image/webp;base64,{data}">'
    )


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
