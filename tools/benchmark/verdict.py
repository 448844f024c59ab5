"""What the benchmark's figures say: a table, the targets, a verdict, two runs compared."""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.errors import UserError
from tools.benchmark.timing import Result

HEADS = (
    "stage", "images/s", "lowest", "highest", "ms/batch", "host ms", "GB/s", "of copy",
    "beside", "batch", "threads",
)  # fmt: skip

STEP_HEADS = (
    "step", "first s", "operators", "launches", "host waits", "beside networks", "GPU GiB",
    "largest batch",
)  # fmt: skip


def table(results: Sequence[Result]) -> str:
    """One row a measurement. "of copy": the bytes that must move, as a share of what a plain copy
    moves in that time.
    """
    rows = [HEADS]
    for result in results:
        moved, copied = result.bytes_per_s, copy_rate(results)
        share = moved / copied if moved and copied and result.stage == "augment" else None
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
    return ", ".join(parts)


def step_table(results: Sequence[Result]) -> str:
    """What else is known of the training steps, and ms by part; empty without a step."""
    steps = [(result.name, result.detail) for result in results if result.detail]
    rows: list[Sequence[str]] = [STEP_HEADS]
    for name, detail in steps:
        counts = (detail.operators, detail.launches, detail.host_waits)
        rows.append(
            (
                name,
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
    """The first column to the left, all others to the right, two spaces between."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *rest in rows:
        cells = [first.ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def find(
    results: Sequence[Result], stage: str, backend: str, crops: str | None = None
) -> Result | None:
    """A whole stage by a backend, with the most threads that were measured."""
    wanted = (stage, backend, crops, None)
    found = [r for r in results if (r.stage, r.backend, r.crops, r.operation) == wanted]
    return max(found, key=lambda result: result.threads, default=None)


def copy_rate(results: Sequence[Result]) -> float | None:
    """Bytes/s of a plain copy, read and written, in the memory where the views are made."""
    found = find(results, "transfer", "device copy") or find(results, "transfer", "memory copy")
    return found.bytes_per_s if found else None


# ---- Targets ----


class Target(NamedTuple):
    """A claim of the project, and what this run has to say to it."""

    claim: str
    figure: str
    state: str


def targets(results: Sequence[Result], settings: Mapping[str, Any]) -> list[Target]:
    """The targets; those for an H200 are judged on whichever GPU is there, none on a CPU."""
    gpu = settings["device"] == "cuda"
    whole = settings["batch"] == 512 and settings["size"] == 224
    triton = find(results, "augment", "triton") if gpu else None
    paths = [r for r in results if r.stage == "pipeline" and gpu]
    path = max((r for r in paths if not r.operation), key=lambda r: r.images_per_s, default=None)
    waits = [r.wait_share for r in paths if r.wait_share is not None]
    loader, drawn = find(results, "decode", "loader"), find(results, "params", "numba")
    ms = triton.ms if triton and whole else None
    ratio = triton.ratio if triton and triton.ratio_to == "kornia" else None
    rate = path.images_per_s if path and path.threads == 16 else None
    of_bare = loader.ratio if loader else None
    pairs = drawn.images_per_s if drawn and settings["batch"] >= 512 else None
    step = find(results, "step", "fast") if gpu and whole else None
    times = step.ratio if step and step.ratio_to == "plain" else None
    beside = step.detail.beside if step and step.detail else None
    speed = step.images_per_s if step else None
    return [
        _judge("both views of 512 images at 224 pixels: at most 5 ms", ms, "{:.2f} ms", _below(5)),
        _judge("augmentation: at least 40 x kornia", ratio, "{:.1f} x", _above(40)),
        _judge("data path, 16 threads: 4,000 images/s", rate, "{:,.0f} images/s", _above(4000)),
        _judge("data wait: at most 1 %", min(waits, default=None), "{:.2%}", _below(0.01)),
        _judge("loader: at least 95 % of bare decoding", of_bare, "{:.1%}", _above(0.95)),
        _judge("parameters, 512 images: 1 million pairs/s", pairs, "{:,.0f} pairs/s", _above(1e6)),
        _judge("step, 512 images: at least 2.5 x plain", times, "{:.2f} x", _above(2.5)),
        _judge("step beside the networks: at most 8 %", beside, "{:.1%}", _below(0.08)),
        _judge("step: at least 1,500 images/s", speed, "{:,.0f} images/s", _above(1500)),
    ]


def _judge(claim: str, value: float | None, text: str, holds: Callable[[float], bool]) -> Target:
    if value is None:
        return Target(claim, "", "not measured here")
    return Target(claim, text.format(value), "met" if holds(value) else "not met")


def _above(limit: float) -> Callable[[float], bool]:
    return lambda value: value >= limit


def _below(limit: float) -> Callable[[float], bool]:
    return lambda value: value <= limit


# ---- Verdict ----


def verdict(results: Sequence[Result], cores: int) -> str:
    """What limits training, by how much, and what would help; from the measured figures alone."""
    paths = [r for r in results if r.stage == "pipeline" and not r.operation]
    step = find(results, "step", "fast")
    if not paths:
        return "To learn what limits training, measure step and pipeline together."
    path = max(paths, key=lambda result: result.images_per_s)
    source = f"data.backend={path.backend}, data.crops={path.crops}, {path.threads} threads"
    brings = f"{_rate(path)} images/s ({source})"
    if step is None:
        name, advice = _bottleneck(results, path, cores, math.inf)
        return f"The data path brings {brings}; what limits it is {name}: {advice}."
    if path.images_per_s >= step.images_per_s:
        times = path.images_per_s / step.images_per_s
        text = (
            f"The training step limits, at {_rate(step)} images/s:"
            f" the data path brings {times:.2g} times as many, {brings}."
        )
        return text + _for_the_step(results, step) + _while_training(results, path)
    name, advice = _bottleneck(results, path, cores, step.images_per_s)
    share = path.images_per_s / step.images_per_s
    return (
        f"The data path limits: it brings {brings}, {share:.0%} of the {_rate(step)} that the"
        f" training step could take; what limits it is {name}: {advice}."
        + _while_training(results, path)
    )


def _for_the_step(results: Sequence[Result], step: Result) -> str:
    """What would help a step that limits: a setting that was measured to, or else fewer pixels."""
    variants = [r for r in results if (r.stage, r.backend) == ("step", "fast") and r.operation]
    best = max(variants, key=lambda result: result.images_per_s, default=step)
    if best.images_per_s > 1.05 * step.images_per_s:
        return f" Of its settings, {best.operation} helps: {_rate(best)} images/s."
    tried = " (--also compile measures what efficiency.compile does)" if not variants else ""
    return f" Smaller views at first (train.view_sizes) or more GPUs would help{tried}."


def _while_training(results: Sequence[Result], path: Result) -> str:
    """What became of both together, with crops made where the fastest path makes them."""
    found = [r for r in results if r.operation == "overlap" and r.crops == path.crops]
    if not found:
        return ""
    best = found[0]
    text = (
        f" Together ({best.backend}, crops {best.crops}) they ran at {_rate(best)} images/s"
        f" with a data wait of {best.wait_share or 0:.1%}"
    )
    if best.ratio is not None and best.ratio < 0.95 and (best.wait_share or 0) < 0.02:
        text += ": a step that shares its processor with the data path takes longer"
    return text + "."


def _bottleneck(
    results: Sequence[Result], path: Result, cores: int, wanted: float
) -> tuple[str, str]:
    """The slowest part of a data path, and what would help."""
    parts = {
        "reading": find(results, "read", "page cache"),
        "parameters": find(results, "params", "numba"),
    }
    if path.crops == "device":
        parts["decoding"] = find(results, "decode", "loader")
        parts["transfer"] = find(results, "transfer", "host to device")
        parts["augmentation"] = find(results, "augment", path.backend)
    else:  # decoding and cropping are one: at least as slow as the path, where DALI does both
        parts["decoding"] = find(results, "decode", "loader", path.crops) or path
    measured = {name: part for name, part in parts.items() if part}
    if not measured:
        return "unknown", "measure its stages too"
    name = min(measured, key=lambda part: measured[part].images_per_s)
    rate = measured[name].images_per_s
    text = f"{name} ({rate:,.0f} images/s)"
    if path.images_per_s < 0.7 * rate:
        text += ", with which the other stages take turns"
    if name != "decoding":
        advice = {
            "reading": "smaller records (pack with --store jpeg --max-side) or a faster disk",
            "parameters": "nothing that this benchmark measures",
            "augmentation": "a GPU with data.backend=triton"
            if path.backend != "triton"
            else "smaller images (pack with --max-side)",
            "transfer": "data.crops=host, which moves views instead of whole images, or smaller"
            " images (pack with --max-side)",
        }
        return text, advice[name]
    each = path.images_per_s / path.threads
    need = math.ceil(wanted / each) if math.isfinite(wanted) else cores
    if cores > path.threads:
        threads = min(cores, max(need, path.threads + 1))
        return text, f"{threads} threads, about {each * threads:,.0f} images/s"
    if math.isfinite(wanted):
        return text, f"at this rate a core, {need} cores, or smaller images (pack with --max-side)"
    return text, "more cores, or smaller images (pack with --max-side)"


def _rate(result: Result) -> str:
    digits = 0 if result.images_per_s >= 100 else 1
    return f"{result.images_per_s:,.{digits}f}"


# ---- Two runs ----

_Row = Mapping[str, Any]


def compare(first: Mapping[str, Any], second: Mapping[str, Any], names: Sequence[Path]) -> str:
    """A table of ratios between two runs' files, and a warning for whatever differs but speed.

    Raises UserError for files of another kind.
    """
    warnings = [
        f"warning: {key} differs: {a!r} and {b!r}"
        for part in ("hardware", "versions", "settings")
        for key, a, b in _differences(
            *(_part(run, part, name) for run, name in zip((first, second), names, strict=True))
        )
    ]
    rows = [("stage", *(name.name for name in names), "ratio", "")]
    groups = [
        _groups(run["results"], name) for run, name in zip((first, second), names, strict=True)
    ]
    for key in groups[0]:
        if key not in groups[1]:
            continue
        for a, b in _matched(groups[0][key], groups[1][key]):
            notes = [
                f"{field} {a.get(field)} and {b.get(field)}"
                for field in ("batch", "threads")
                if a.get(field) != b.get(field)
            ]
            ratio = b["images_per_s"] / a["images_per_s"]
            speeds = (f"{row['images_per_s']:,.1f}" for row in (a, b))
            label = " · ".join(part for part in key if part)
            rows.append(
                (label, *speeds, f"{ratio:.3g}", "differs: " * bool(notes) + ", ".join(notes))
            )
    if len(rows) == 1:
        raise UserError(f"{names[0]} and {names[1]} have no measurement in common")
    once = [
        f"only in {name.name}: {' · '.join(part for part in key if part)}"
        for name, own, other in zip(names, groups, reversed(groups), strict=True)
        for key in own
        if key not in other
    ]
    return "\n".join((*warnings, aligned(rows), *once))


def _part(run: Mapping[str, Any], part: str, name: Path) -> _Row:
    values = run.get(part) or {}
    if not isinstance(values, dict):
        raise UserError(f"{name}: its {part} are no mapping")
    return values


def _differences(first: _Row, second: _Row) -> list[tuple[str, Any, Any]]:
    keys = [*first, *(key for key in second if key not in first)]
    return [(k, first.get(k), second.get(k)) for k in keys if first.get(k) != second.get(k)]


def _groups(rows: Sequence[_Row], name: Path) -> dict[tuple[str, ...], list[_Row]]:
    """Rows by what they measured, in their order; those of one group differ in threads only."""

    def key(row: _Row) -> tuple[str, ...]:
        return tuple(str(row.get(k) or "") for k in ("stage", "backend", "crops", "operation"))

    for row in rows:
        if not isinstance(row.get("images_per_s"), int | float) or not row["images_per_s"] > 0:
            raise UserError(f"{name}: a measurement without images_per_s")
    order = list(dict.fromkeys(map(key, rows)))
    ordered = sorted(rows, key=lambda row: order.index(key(row)))
    return {k: list(group) for k, group in groupby(ordered, key)}


def _matched(first: list[_Row], second: list[_Row]) -> list[tuple[_Row, _Row]]:
    """Those with equal threads; where there are none, those with the most."""
    pairs = [(a, b) for a in first for b in second if a.get("threads") == b.get("threads")]
    most = [max(rows, key=lambda row: row.get("threads") or 0) for rows in (first, second)]
    return pairs or [(most[0], most[1])]
