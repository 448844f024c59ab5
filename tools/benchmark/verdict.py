"""The benchmark's output: tables, a verdict, a comparison of two runs."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import UserError, printable
from tools.benchmark.options import VARIANTS
from tools.benchmark.timing import Result
from tools.report.schema import Rate, Rates

HEADS = (
    "stage", "images/s", "lowest", "highest", "ms/batch", "host ms", "GB/s", "of copy",
    "beside", "batch", "threads",
)  # fmt: skip

STEP_HEADS = (
    "step", "GFLOP/image", "first s", "operators", "launches", "host waits", "beside networks",
    "GPU GiB", "largest batch",
)  # fmt: skip


def table(results: Sequence[Result]) -> str:
    """One row for each measurement. "of copy" is its bytes/s as a share of a plain copy's."""
    copy = plain_copy(results)
    rows = [HEADS]
    for result in results:
        moved, share = result.bytes_per_s, None
        if moved and copy and copy.bytes_per_s and result.stage == "augment":
            share = moved / copy.bytes_per_s
        rows.append(
            (
                result.name,
                f"{result.images_per_s:,.1f}",
                f"{result.slowest:,.1f}",
                f"{result.fastest:,.1f}",
                f"{result.ms:,.2f}",
                f"{result.host_ms:,.2f}",
                f"{moved / 1e9:,.2f}" if moved else "",
                f"{share:.1%}" if share else "",
                _beside(result),
                str(result.batch),
                str(result.threads),
            )
        )
    return aligned(rows)


def _beside(result: Result) -> str:
    parts = []
    if result.wait_share is not None:
        parts.append(f"data wait {result.wait_share:.1%}")
    if result.ratio is not None:
        parts.append(f"{result.ratio:.3g} x {result.ratio_to}")
    if result.levels is not None:
        parts.append("off by {:.0f} levels at most, {:.3f} on average".format(*result.levels))
    return ", ".join(parts)


def step_table(results: Sequence[Result]) -> str:
    """The counts of the training steps, and ms by part. Empty without a step."""
    steps = [(result.name, result.detail) for result in results if result.detail]
    rows: list[Sequence[str]] = [STEP_HEADS]
    for name, detail in steps:
        counts = (detail.operators, detail.launches, detail.host_waits)
        rows.append(
            (
                name,
                "" if detail.gflop is None else f"{detail.gflop:.2f}",
                f"{detail.first_s:.1f}",
                *("" if count is None else f"{count:,}" for count in counts),
                "" if detail.beside is None else f"{detail.beside:.1%}",
                "" if detail.peak_bytes is None else f"{detail.peak_bytes / 2**30:.1f}",
                "" if detail.largest_batch is None else f"{detail.largest_batch:,}",
            )
        )
    profiled = [(name, detail.parts) for name, detail in steps if detail.parts]
    names = dict.fromkeys(part for _, parts in profiled for part in parts)
    split: list[Sequence[str]] = [("ms in the profiler", *(name for name, _ in profiled))]
    split += [(part, *(f"{parts.get(part, 0):,.2f}" for _, parts in profiled)) for part in names]
    return "\n\n".join(aligned(table) for table in (rows, split) if len(table) > 1)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """A table: the first column is aligned left, all others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *rest in rows:
        cells = [first.ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


FINISHED = "finished views"
"""The operation of a loader whose threads colour the views as well: data.backend=compiled with
data.crops=host."""


def find(
    results: Sequence[Result],
    stage: str,
    *backends: str,
    crops: str | None = None,
    operation: str | None = None,
) -> Result | None:
    """A stage by the first of `backends` that was measured, with the most threads."""
    for backend in backends:
        wanted = (stage, backend, crops, operation)
        rows = [r for r in results if (r.stage, r.backend, r.crops, r.operation) == wanted]
        if rows:
            return max(rows, key=lambda result: result.threads)
    return None


def plain_copy(results: Sequence[Result]) -> Result | None:
    """A plain copy in the memory where the views are made."""
    return find(results, "transfer", "device copy", "memory copy")


# ---- Verdict ----


def verdict(results: Sequence[Result], cores: int) -> str:
    """The stage that limits training, by how much, and the remedy; from measured rates alone."""
    paths = [r for r in results if r.stage == "pipeline" and not r.operation]
    step = find(results, "step", "fast")
    if not paths:
        return "To learn what limits training, measure step and pipeline together."
    path = max(paths, key=lambda result: result.images_per_s)
    delivers = (
        f"{_rate(path)} images/s"
        f" (data.backend={path.backend}, data.crops={path.crops}, {path.threads} threads)"
    )
    if step is None:
        limit = _path_limit(results, path, cores, math.inf)
        return f"The data path delivers {delivers}. {limit}"
    ratio = path.images_per_s / step.images_per_s
    if ratio >= 1:
        text = (
            f"The training step limits, at {_rate(step)} images/s: the data path delivers"
            f" {ratio:.2g} times as many, {delivers}. {_step_advice(results, step)}"
        )
    else:
        text = (
            f"The data path limits: it delivers {delivers}, {ratio:.0%} of the {_rate(step)} that"
            f" the training step can process. "
            + _path_limit(results, path, cores, step.images_per_s)
        )
    return text + _while_training(results, path) + _finished_views(results)


def _step_advice(results: Sequence[Result], step: Result) -> str:
    """How to speed up a step that limits: by a measured setting, or else by fewer pixels."""
    steps = [r for r in results if (r.stage, r.backend) == ("step", "fast") and r.operation]
    variants = [r for r in steps if "efficiency" in VARIANTS.get(str(r.operation), {})]
    best = max(variants, key=lambda result: result.images_per_s, default=step)
    if best.images_per_s > 1.05 * step.images_per_s:
        return f"Of its settings, {best.operation} helps: {_rate(best)} images/s."
    hint = "" if variants else " (--also compile measures what efficiency.compile does)"
    return f"Smaller views at first (train.view_sizes) or more GPUs would help{hint}."


def _while_training(results: Sequence[Result], path: Result) -> str:
    """The rate of step and data path together, cropped where the fastest path crops."""
    rows = [r for r in results if r.operation == "overlap" and r.crops == path.crops]
    if not rows:
        return ""
    both = next((row for row in rows if row.backend == path.backend), rows[0])
    wait = both.wait_share or 0
    text = (
        f" Together ({both.backend}, crops {both.crops}) they ran at {_rate(both)} images/s"
        f" with a data wait of {wait:.1%}"
    )
    if both.ratio is not None and both.ratio < 0.95 and wait < 0.02:
        text += ": a step that shares its processor with the data path takes longer"
    return text + "."


def _finished_views(results: Sequence[Result]) -> str:
    """Beside a GPU: whether training is faster if the processor makes the views, or the GPU."""
    rows = [r for r in results if r.operation == "overlap"]
    gpu = max((r.images_per_s for r in rows if r.backend == "triton"), default=0.0)
    host = next((r for r in rows if (r.backend, r.crops) == ("compiled", "host")), None)
    if not gpu or host is None:
        return ""
    ratio = host.images_per_s / gpu
    better = "the better choice" if ratio > 1.02 else "no better choice"
    return (
        f" Views that the processor finishes (data.backend=compiled, data.crops=host) are {better}"
        f" here: with them training ran at {_rate(host)} images/s, {ratio:.2g} times the rate with"
        " the GPU's views."
    )


_ADVICE = {
    "reading": "smaller records (pack with --store jpeg --max-side) or a faster disk",
    "parameters": "nothing that this benchmark measures",
    "transfer": "data.crops=host, which moves views instead of whole images, or smaller images"
    " (pack with --max-side)",
}


def _path_limit(results: Sequence[Result], path: Result, cores: int, needed: float) -> str:
    """The slowest stage of a data path that should deliver `needed` images/s, and the remedy."""
    stages = {
        "reading": find(results, "read", "page cache"),
        "parameters": find(results, "params", "numba"),
    }
    if path.crops == "device":
        stages["decoding"] = find(results, "decode", "loader")
        stages["transfer"] = find(results, "transfer", "host to device")
        stages["augmentation"] = find(results, "augment", path.backend)
    else:  # these threads decode and crop; DALI's stage is never measured alone
        finished = FINISHED if (path.backend, path.crops) == ("compiled", "host") else None
        found = find(results, "decode", "loader", crops=path.crops, operation=finished)
        stages["decoding"] = found or path
    measured = {name: stage for name, stage in stages.items() if stage}
    if not measured:
        return "Measure its stages too, to learn which one limits it."
    name = min(measured, key=lambda stage: measured[stage].images_per_s)
    rate = measured[name].images_per_s
    turns = ", which takes turns with the other stages" if path.images_per_s < 0.7 * rate else ""
    if name == "decoding":
        advice = _decoding_advice(path, cores, needed)
    elif name == "augmentation" and path.backend != "triton":
        advice = "a GPU with data.backend=triton"
    else:
        advice = _ADVICE.get(name, "smaller images (pack with --max-side)")
    return f"Its slowest stage is {name} ({rate:,.0f} images/s{turns}). What helps: {advice}."


def _decoding_advice(path: Result, cores: int, needed: float) -> str:
    """More threads if there are free cores, else more cores."""
    per_thread = path.images_per_s / path.threads
    enough = math.ceil(needed / per_thread) if math.isfinite(needed) else cores
    if cores > path.threads:
        threads = min(cores, max(enough, path.threads + 1))
        return f"{threads} threads, about {per_thread * threads:,.0f} images/s"
    more = f"{enough} cores at this rate per core" if math.isfinite(needed) else "more cores"
    return f"{more}, or smaller images (pack with --max-side)"


def _rate(result: Result) -> str:
    digits = 0 if result.images_per_s >= 100 else 1
    return f"{result.images_per_s:,.{digits}f}"


# ---- Two runs ----

_LONGEST = 120
"""Characters of a setting in a warning."""


def compare(first: Rates, second: Rates, names: Sequence[Path]) -> str:
    """A table of the ratios between two --json files, below a warning for every other difference.

    Raises UserError if a file holds a measurement of 0 images/s, or if they have none in common.
    """
    runs = (first, second)
    lines = [
        f"warning: {key} differs: {a} and {b}"
        for part in ("hardware", "versions", "settings")
        for key, a, b in _differences(*(getattr(run, part) or {} for run in runs))
    ]
    rows = [("stage", *(name.name for name in names), "ratio", "")]
    groups = [_groups(run.results, name) for run, name in zip(runs, names, strict=True)]
    for label in groups[0]:
        if label in groups[1]:
            pairs = _matched(groups[0][label], groups[1][label])
            rows += [_ratio_row(label, a, b) for a, b in pairs]
    if len(rows) == 1:
        raise UserError(f"{names[0]} and {names[1]} have no measurement in common")
    lines.append(aligned(rows))
    for name, group, other in zip(names, groups, reversed(groups), strict=True):
        lines += [f"only in {name.name}: {label}" for label in group if label not in other]
    return "\n".join(lines)


def _ratio_row(label: str, a: Rate, b: Rate) -> tuple[str, ...]:
    notes = [
        f"{field} {one} and {other}"
        for field, one, other in (
            ("batch", a.batch, b.batch),
            ("threads", a.threads, b.threads),
        )
        if one != other
    ]
    rates = (a.images_per_s, b.images_per_s)
    note = "differs: " + ", ".join(notes) if notes else ""
    return (label, *(f"{rate:,.1f}" for rate in rates), f"{rates[1] / rates[0]:.3g}", note)


def _differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[tuple[str, ...]]:
    keys = dict.fromkeys((*first, *second))
    pairs = ((key, first.get(key), second.get(key)) for key in keys)
    return [(printable(key), _shown(a), _shown(b)) for key, a, b in pairs if a != b]


def _shown(value: object) -> str:
    text = repr(value)  # escapes control characters
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "…"


def _groups(rows: Sequence[Rate], name: Path) -> dict[str, list[Rate]]:
    """Rows grouped by measurement, in their order. Rows of a group differ only in threads."""
    groups: dict[str, list[Rate]] = {}
    for row in rows:
        if not row.images_per_s > 0:
            raise UserError(f"{name}: a measurement of 0 images/s")
        parts = (row.stage, row.backend, row.crops, row.operation)
        label = " · ".join(part for part in parts if part)
        groups.setdefault(printable(label), []).append(row)
    return groups


def _matched(first: list[Rate], second: list[Rate]) -> list[tuple[Rate, Rate]]:
    """Pairs with equal threads. Without any: the rows with the most threads."""
    pairs = [(a, b) for a in first for b in second if a.threads == b.threads]
    most = [max(rows, key=lambda row: row.threads or 0) for rows in (first, second)]
    return pairs or [(most[0], most[1])]
