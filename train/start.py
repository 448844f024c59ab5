"""What a run of pre-training starts from: new weights, or those of a run, a file or a library."""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from model import SlotCon
from model.official import official_names
from pipeline.errors import UserError, printable
from train.config import InitConfig
from train.pretrained import load_model
from train.weights import (
    published_weights,
    read_backbone,
    read_file,
    state_below,
    stem,
    tensors_in,
    timm_weights,
    weights_file,
)

LIBRARIES = {"torchvision": published_weights, "timm": timm_weights}
_PARTS = 8  # of a network, in the line that names them
_ANCHORS = ("student.grouping.prototypes", "grouping_q.slot_embed.weight")
"""A name that each whole SlotCon has: ours, the authors'."""


def start_from(init: InitConfig, model: SlotCon) -> dict[str, Any]:
    """Give `model`, on the CPU, the weights that `init` names: the encoders of student and teacher
    get the same ones.

    Returns what they were, for the record of each checkpoint: "weights", an absolute path for a
    file or a run; "kind": "random", "file", "torchvision" or "timm"; "part"; "sha256" of the file;
    "fitted", how many tensors the model got; "new", the parts of the model that begin at random;
    "unused", the parts of the source without a place in the model; the source's "metadata".
    Raises UserError, and then has changed nothing.
    """
    if init.weights == "random":
        return {"weights": "random", "kind": "random"}
    arch, library = model.config.arch, LIBRARIES.get(init.weights)
    about: dict[str, Any] = {"weights": init.weights, "kind": init.weights, "part": init.part}
    if library:
        weights, unused = library(arch), list[str]()
    else:
        path = Path(init.weights)
        backbone = read_backbone(path, arch, partial=True)
        weights, unused = backbone.weights, list(backbone.unused)
        about |= {"weights": str(path.resolve()), "kind": "file", "sha256": _sha256(path)}
        about["metadata"] = dict(backbone.metadata)
    expected = model.state_dict()
    found = {
        f"{branch}.encoder.{name}": value
        for branch in ("student", "teacher")
        for name, value in weights.items()
    }
    if init.part == "all":
        found |= _whole(Path(init.weights), expected)
        unused = []
    fitting = {n: v for n, v in found.items() if n in expected and v.shape == expected[n].shape}
    for name, value in fitting.items():
        if not value.isfinite().all():
            raise UserError(f"init.weights: {init.weights}: {printable(name)} is not finite")
    unused += [name for name in found if name not in fitting]
    model.load_state_dict({**expected, **fitting})
    new = (name for name in expected if name not in fitting)
    return about | {"fitted": len(fitting), "new": _parts(new), "unused": _parts(unused)}


def in_words(about: Mapping[str, Any]) -> str:
    """What a run started from, in one line; empty for new weights."""
    if about["kind"] == "random":
        return ""
    digest = f" (sha256 {about['sha256'][:12]})" if about.get("sha256") else ""
    lists = [("new", about["new"]), ("not used", about["unused"])]
    others = "".join(f"; {title}: {', '.join(names)}" for title, names in lists if names)
    return f"starts from {about['weights']}{digest}: {about['fitted']} tensors fit{others}"


def _whole(path: Path, expected: Iterable[str]) -> dict[str, Tensor]:
    """All weights of a SlotCon, by our names: of a run, of its files, or of the authors' code.

    Raises UserError.
    """
    if path.is_dir():
        return dict(load_model(path)[0].state_dict())
    state = tensors_in(read_file(path)[0])
    known = ({name: name for name in expected}, official_names(expected))
    for anchor, names in zip(_ANCHORS, known, strict=True):
        if any(f".{name}".endswith(f".{anchor}") for name in state):
            given = state_below(state, anchor, path, "weights of a SlotCon")
            return {ours: given[theirs] for ours, theirs in names.items() if theirs in given}
    raise UserError(f"{path}: no whole SlotCon in it, an encoder alone (init.part encoder)")


def _sha256(path: Path) -> str:
    with weights_file(path).open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _parts(names: Iterable[str]) -> list[str]:
    """The parts of a network that these names belong to, a few of them."""
    parts = list(dict.fromkeys(printable(stem(name) or name) for name in names))
    return parts if len(parts) <= _PARTS else [*parts[:_PARTS], f"{len(parts) - _PARTS} more"]
