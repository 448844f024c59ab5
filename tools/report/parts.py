"""The parts of a report, and the commands that make them."""

from typing import NamedTuple


class Part(NamedTuple):
    """A part of a report: one command measures or draws it."""

    name: str
    """Of the part, and of the option that gives its file."""
    title: str
    file: str
    """Its usual name in the run's folder."""
    command: str
    """The command after `python -m`, with {run}, {config}, {data} and {out}."""

    @property
    def made_by(self) -> str:
        """The command without its options: evaluation.probe knn"""
        return self.command.split(" --")[0]


def _probe(name: str, title: str) -> Part:
    labels = "--train-images DIR --train-labels DIR --images DIR --labels DIR"
    command = f"evaluation.probe {name} --checkpoint {{run}} {labels} --json {{out}}"
    return Part(name, title, f"{name}.json", command)


def _picture(name: str, title: str, run: str = "--checkpoint") -> Part:
    command = f"evaluation.pictures {name} {run} {{run}} --data {{data}} --out {{out}}"
    return Part(name, title, f"{name}.png", command)


_SEGMENTATION = "evaluation.unsupervised_segmentation --checkpoint {run} --images DIR --labels DIR"
_SEGMENTATION_PICTURE = _SEGMENTATION + " --picture {out}"
_SLOTS = "evaluation.slots --checkpoint {run} --data {data} --json {out}"
_SLOTS_PICTURE = "evaluation.slots --checkpoint {run} --data {data} --picture {out}"
_STAGES = "tools.benchmark all --data {data} --json {out}"
_COST = "tools.benchmark cost --config {config} --data {data} --json {out}"

SCORES = (
    Part(
        "evaluation",
        "Clusters matched to classes",
        "eval.json",
        f"{_SEGMENTATION} --json {{out}}",
    ),
    _probe("knn", "Dense k-NN retrieval"),
    _probe("linear", "Linear probe"),
    _probe("clusters", "Over-clustering"),
)
"""Scores against label maps."""

SLOTS = Part("slots", "Use of the prototypes", "slots.json", _SLOTS)
BENCHMARK = Part("benchmark", "Throughput of each stage alone", "bench.json", _STAGES)
COST = Part("cost", "Cost of the whole recipe", "cost.json", _COST)
RESULTS = (*SCORES, SLOTS, BENCHMARK, COST)

PICTURES = (
    Part("segmentation", "Clusters beside label maps", "eval.png", _SEGMENTATION_PICTURE),
    _picture("prototypes", "Prototypes and their nearest segments"),
    Part("ends", "Prototypes of the most and the fewest images", "slots.png", _SLOTS_PICTURE),
    _picture("grouping", "Images under the colours of their prototypes"),
    _picture("attention", "Grouping over the training", "--run"),
    _picture("views", "The two views that it trains on"),
)
