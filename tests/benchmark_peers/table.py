"""The figures of all turns, as JSON and as a table in Markdown."""

import argparse
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from tests.benchmark_peers.peers import PEERS
from tests.benchmark_peers.turn import Turn

HEAD = (
    "| views by | images/s (lowest to highest) | to the first row, by turns | CPU ms an image"
    " | memory, GB | first batch, s | geometry known |"
)
FIGURES = ("images_per_s", "cpu_ms", "memory_gb", "first_batch_s")


def content_of(
    args: argparse.Namespace,
    images: int,
    turns: Mapping[str, Sequence[Turn]],
    reasons: Mapping[str, str],
) -> dict[str, Any]:
    """The entries of the --json file."""
    settings = {
        name: getattr(args, name)
        for name in ("seconds", "first_batch", "batch", "size", "threads", "device")
    }
    measured = [name for name in turns if name not in reasons]
    base = turns[measured[0]] if measured else []
    results = [
        {
            "peer": name,
            "about": PEERS[name].about,
            "geometry": PEERS[name].geometry,
            "failed": reasons.get(name),
            "ratio": ratio(own, base) if name in measured else None,
            "turns": [asdict(turn) for turn in own],
        }
        for name, own in turns.items()
    ]
    rounds = max(map(len, turns.values()))
    return {"settings": settings | {"images": images, "rounds": rounds}, "results": results}


def ratio(own: Sequence[Turn], base: Sequence[Turn]) -> float | None:
    """Median of the rounds' ratios of rates."""
    rates = [
        a.images_per_s / b.images_per_s for a, b in zip(own, base, strict=True) if b.images_per_s
    ]
    return statistics.median(rates) if rates else None


def markdown(content: Mapping[str, Any]) -> str:
    """Machine and settings in a line, the table, what is ahead of the first row."""
    settings, hardware = content["settings"], content["hardware"]
    versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    turn = "" if settings["first_batch"] else f" of {settings['seconds']:g} s"
    about = (
        f"{settings['threads']} cores of {hardware['cpu']}, {hardware['memory_gib']:.0f} GB;"
        f" {settings['images']} images, batches of {settings['batch']}, views of"
        f" {settings['size']} pixels on the {settings['device']}; rounds{turn}:"
        f" {settings['rounds']}. {versions}."
    )
    rows = [row(result) for result in content["results"]]
    return "\n".join([about, "", HEAD, "|---" * 7 + "|", *rows, "", ahead(content["results"])])


def row(result: Mapping[str, Any]) -> str:
    name = f"{result['peer']}: {result['about']}"
    if result["failed"]:
        return f"| {name} | {result['failed']} | | | | | |"
    rate, cpu, memory, first = (figures(result, name) for name in FIGURES)
    parts = ["", "", "", ""]
    if max(rate):
        to_first = result["ratio"]
        parts = [shown(rate, 0), f"{to_first:.2f} ×", shown(cpu, 1), shown(memory, 2)]
    known = "yes" if result["geometry"] else "no"
    return f"| {' | '.join([name, *parts, shown(first, 1), known])} |"


def figures(result: Mapping[str, Any], name: str) -> list[float]:
    return [turn[name] for turn in result["turns"]]


def shown(values: Sequence[float], digits: int) -> str:
    """Median, lowest and highest."""
    median, low, high = statistics.median(values), min(values), max(values)
    return f"{median:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def ahead(results: Sequence[Mapping[str, Any]]) -> str:
    """A sentence on where others are better than the first row that was measured."""
    own, *others = [result for result in results if not result["failed"]] or [None]
    if not own or not others:
        return "Nothing to compare."
    better = []
    for figure, more, what in (
        ("images_per_s", 1, "images/s"),
        ("cpu_ms", -1, "CPU time"),
        ("memory_gb", -1, "memory"),
        ("first_batch_s", -1, "first batch"),
    ):
        limit = more * statistics.median(figures(own, figure))
        names = [
            other["peer"]
            for other in others
            if more * statistics.median(figures(other, figure)) > limit
        ]
        better += [f"{what}: {', '.join(names)}"] if names else []
    lead = f"Ahead of {own['peer']} in "
    return f"{lead}{'; '.join(better)}." if better else f"Nothing is ahead of {own['peer']}."
