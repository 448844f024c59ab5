"""All results of run.sh as one text table on stdout, and as one file, $OUT/results.json.

The files of the parts are then deleted, because a remote machine may return only a few files.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

OUT, WORK = Path(os.environ["OUT"]), Path(os.environ["WORK"])
SIDES = ("side64", "side96", "side128", "side160")
BENCHMARKS = ("all", *SIDES, "step", "compile")
ONE_OBJECT = ("machine", "checks", "fidelity", "largest", *BENCHMARKS)
CURVES = ("curve_fast", "curve_plain")
ONE_OBJECT_A_LINE = ("fp16", "bf16", *CURVES)


def read_results() -> dict[str, Any]:
    """By part; what a part did not write is None or empty."""
    results: dict[str, Any] = {"parts": (WORK / "parts").read_text().splitlines()}
    for name in ONE_OBJECT:
        file = OUT / f"{name}.json"
        results[name] = json.loads(file.read_text()) if file.exists() else None
    for name in ONE_OBJECT_A_LINE:
        file = OUT / f"{name}.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        results[name] = [json.loads(line) for line in lines]
    return results


def pytest_summary() -> list[str]:
    """Failed tests, at most 14, and pytest's last line."""
    log = WORK / "logs" / "pytest.log"
    lines = log.read_text().splitlines() if log.exists() else []
    failed = [line[:200] for line in lines if re.match(r"(FAILED|ERROR) ", line)]
    return failed[:14] + lines[-1:]


def benchmark_lines(name: str, content: dict[str, Any]) -> list[str]:
    """A line a row of `tools.benchmark`, then its verdict."""
    lines = []
    for row in content["results"]:
        if row["stage"] == "augment" and row["operation"] not in (None, "blur", "crop + resize"):
            continue
        keys = ("stage", "backend", "crops", "operation")
        label = " ".join(str(row[key]) for key in keys if row.get(key))
        rates = f"{row['images_per_s']:10,.0f}{row['ms']:9.2f}{row['host_ms']:9.2f}"
        lines.append(f"{name:9}{label:43}{rates}  {', '.join(details(row))}")
    return [*lines, f"{name:9}{content.get('verdict', '')}"]


def details(row: dict[str, Any]) -> list[str]:
    """What only some rows have."""
    detail = row.get("detail") or {}
    texts = []
    if row.get("ratio"):
        texts.append(f"{row['ratio']:.2f} x {row['ratio_to']}")
    if row.get("wait_share") is not None:
        texts.append(f"wait {row['wait_share']:.2%}")
    if row.get("levels"):
        texts.append("off by {:.0f} levels at most, {:.3f} on average".format(*row["levels"]))
    if detail.get("peak_bytes"):
        texts.append(f"{detail['peak_bytes'] / 2**30:.1f} GiB")
    if detail.get("first_s"):
        texts.append(f"first {detail['first_s']:.0f} s")
    if detail.get("launches"):
        texts.append(f"{detail['launches']} launches")
    if detail.get("host_waits") is not None:
        texts.append(f"{detail['host_waits']} waits")
    if detail.get("beside"):
        texts.append(f"beside {detail['beside']:.1%}")
    return texts


def training_line(name: str, rows: list[dict[str, Any]]) -> str:
    """Rates of the log lines after the first, which also holds the start."""
    steady = rows[1:] or rows
    rates = sorted(row["images_per_s"] for row in steady)
    waits = sorted(row["wait_share"] for row in steady)
    skipped, last = sum(row.get("skipped", 0) for row in rows), rows[-1]
    return (
        f"{name}: {len(rows)} lines, median {rates[len(rates) // 2]:,.0f} images/s"
        f" ({rates[0]:,.0f} to {rates[-1]:,.0f}), wait {waits[len(waits) // 2]:.2%},"
        f" loss {rows[0]['loss']:.4f} to {last['loss']:.4f}, skipped {skipped},"
        f" dropped pairs {last.get('dropped_pairs')}, slots {last['active_slots']:.1f}"
    )


def curve_line(name: str, rows: list[dict[str, Any]]) -> str:
    """The grouping loss at about ten places of a run, and the images that had been seen."""
    chosen = rows[:: max(1, len(rows) // 10)]
    losses = [f"{row['grouping_12']:.3f}" for row in chosen]
    return f"{name}: to epoch {rows[-1]['epoch']:.0f}, grouping loss {' '.join(losses)}"


def fidelity_line(row: dict[str, Any]) -> str:
    numbers = f"{row['mae']:8.3f}{row['psnr']:8.1f}{row['edges']:10.4%}{row['most']:6.0f}"
    return f"{row['way']:8}{row['case']:12}{numbers}"


def sections(results: dict[str, Any]) -> dict[str, list[str]]:
    """Lines by heading."""
    machine = results["machine"] or {}
    checks, largest = results["checks"] or {}, results["largest"] or {}
    fidelity = (results["fidelity"] or {"results": []})["results"]
    benchmarks = [name for name in BENCHMARKS if results[name]]
    curves = [name for name in ONE_OBJECT_A_LINE if results[name]]
    return {
        "parts": results["parts"],
        "machine": [f"{name}: {value}" for name, value in machine.items()],
        "pytest -m cuda": pytest_summary(),
        "checks": [f"{name}: {row['value']}" for name, row in checks.items()],
        "fidelity to PIL: mean error, worst view's PSNR, share off by more than 8, largest error": [
            fidelity_line(row) for row in fidelity
        ],
        "benchmark: images/s, ms, host's ms": [
            line for name in benchmarks for line in benchmark_lines(name, results[name])
        ],
        "largest batch": [f"{name}: {row}" for name, row in largest.items()],
        "training": [training_line(name, results[name]) for name in curves],
        "loss by images": [curve_line(name, results[name]) for name in CURVES if results[name]],
    }


def main() -> None:
    results = read_results()
    for heading, lines in sections(results).items():
        if lines:
            print(f"\n==== {heading} ====", *lines, sep="\n")
    (OUT / "results.json").write_text(json.dumps(results) + "\n")
    for name in ONE_OBJECT:
        (OUT / f"{name}.json").unlink(missing_ok=True)
    for name in ONE_OBJECT_A_LINE:
        (OUT / f"{name}.jsonl").unlink(missing_ok=True)


if __name__ == "__main__":
    main()
