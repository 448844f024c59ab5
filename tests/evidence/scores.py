"""The probes of `evaluation.probe` on one network, read at stages 2, 3 and 4, at all of them joined
and whitened: `python -m tests.evidence.scores FOLDER OPTIONS`. Writes those of FILES that FOLDER
lacks.

The images go through the network once, not once for each reading.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from evaluation import probe
from evaluation.probes.scores import score_probes
from model.encoder import Encoder
from model.timm_encoder import TimmEncoder


class Scores(NamedTuple):
    """What a file of scores has."""

    probe: str
    stages: tuple[str, ...]
    whitened: bool = False


STAGES, DEEP, JOINED = ("2", "3", "4"), ("3", "4"), "2+3+4"
FILES = {
    "knn": Scores("knn", STAGES),
    "linear": Scores("linear", (*STAGES, JOINED)),
    "knn_whitened": Scores("knn", DEEP, whitened=True),
    "linear_whitened": Scores("linear", DEEP, whitened=True),
    "knn_joined": Scores("knn", (JOINED,)),
}
Network = Encoder | TimmEncoder
Maps = Callable[[Network, Tensor, Sequence[int]], list[Tensor]]


def remembering(maps: Maps) -> Maps:
    """An encoder's `maps` that keeps the maps of all stages that are read, by encoder and images.
    While BatchNorm is calibrated, nothing is kept.
    """
    numbers = tuple(map(int, STAGES))
    known: dict[tuple[int, int], dict[int, Tensor]] = {}

    def read(encoder: Network, images: Tensor, stages: Sequence[int]) -> list[Tensor]:
        if any(part.training for part in encoder.modules()) or not {*stages} <= {*numbers}:
            return maps(encoder, images, stages)
        key = id(encoder), hash(images.numpy().tobytes())
        if key not in known:
            known[key] = dict(zip(numbers, maps(encoder, images, numbers), strict=True))
        return [known[key][stage] for stage in stages]

    return read


def remember() -> None:
    """Let all kinds of encoders remember their maps from now on."""
    for network in (Encoder, TimmEncoder):
        network.maps = remembering(network.maps)  # type: ignore


def missing(folder: Path) -> list[str]:
    """The files of scores that a run does not have yet."""
    return [name for name in FILES if not (folder / f"{name}.json").is_file()]


def main() -> None:
    folder, *options = sys.argv[1:]
    remember()
    for name in missing(Path(folder)):
        scores = FILES[name]
        argv = [scores.probe, *options, "--stage", *scores.stages, "--seeds", "0"]
        argv += ["--whiten"] if scores.whitened else []
        args = probe.parse([*argv, "--baseline", "none", "--json", f"{folder}/{name}.json"])
        probe.check(args)
        score_probes(args)


if __name__ == "__main__":
    main()
