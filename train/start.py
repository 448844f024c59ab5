"""What a run of pre-training starts from: new weights, or those of a run, a file or a library."""

import hashlib
import json
from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from model import SlotCon
from model.architectures import is_timm
from model.encoder import AnyEncoder
from model.official import official_names, shaped
from pipeline.errors import UserError, printable
from train.config import TrainConfig
from train.encoders import read_encoder
from train.init_config import LIBRARIES, InitConfig
from train.pretrained import load_model
from train.published import published
from train.run.sound import fault_of
from train.weights import (
    read_file,
    state_below,
    stem,
    tensors_in,
    weights_file,
)

_TRAIN = TrainConfig()
_PARTS = 8  # of a network, in the line that names them
_ANCHOR = "student.grouping.prototypes"
"""A name that each whole SlotCon has."""


def start_from(init: InitConfig, model: SlotCon, train: TrainConfig = _TRAIN) -> dict[str, Any]:
    """Give `model`, on the CPU, the weights that `init` names: the encoders of student and teacher
    get the same ones, and so does a frozen teacher, unless `train` names others.

    Returns what they were, for the record of each checkpoint: "weights", an absolute path for a
    file or a run; "kind": "random", "file", "torchvision" or "timm"; "part"; "sha256" of the file;
    "fitted", how many tensors the model got; "new", the parts of the model that begin at random;
    "unused", the parts of the source without a place in the model; the source's "metadata";
    "teacher", the same of a frozen teacher with other weights. Raises UserError, and then has
    changed nothing.
    """
    if init.weights == "random":
        return {"weights": "random", "kind": "random"}
    weights, unused, about = _encoder(init.weights, model.config.arch)
    about["part"] = init.part
    if stated := _other_statistics(about, model.student.encoder):
        raise UserError(
            f"init.weights: {init.weights} gets its images by other statistics: set "
            f"model.image_stats to {stated}"
        )
    expected = model.state_dict()
    found = _below(("student", "teacher"), weights)
    if model.guide is not None and train.teacher_weights:
        weights, _, about["teacher"] = _encoder(train.teacher_weights, train.teacher_arch)
        if stated := _other_statistics(about["teacher"], model.guide.encoder):
            raise UserError(
                f"train.teacher_weights: {train.teacher_weights} gets its images by {stated}, not "
                f"by the statistics that timm has for {train.teacher_arch}"
            )
    if model.guide is not None:
        found |= _below(("guide",), weights)
    if init.part == "all":
        found |= _whole(Path(init.weights), expected)
        unused = []
    fitting = {n: v for n, v in found.items() if n in expected and v.shape == expected[n].shape}
    for name, value in fitting.items():
        if fault := fault_of(printable(name), value):
            raise UserError(f"init.weights: {init.weights}: {fault}")
    learnt = (n for n, _ in model.named_parameters() if n.startswith("guide."))
    missing = [name for name in learnt if name not in fitting]
    if missing:
        raise UserError(f"train.teacher frozen: its weights lack {_parts(missing)[0]}")
    _require_known(model, train, fitting)
    unused += _parts(name for name in found if name not in fitting)
    model.load_state_dict({**expected, **fitting})
    own = ("encoder.scale", "encoder.shift")  # how an encoder of timm gets its images
    new = (
        name
        for name in expected
        if not (name in fitting or name.startswith("guide.") or name.endswith(own))
    )
    return about | {"fitted": len(fitting), "new": _few(_parts(new)), "unused": _few(unused)}


def _encoder(source: str, arch: str) -> tuple[dict[str, Tensor], list[str], dict[str, Any]]:
    """The weights of an encoder by its names, the parts of the source that are not used, and what
    is known of it. Raises UserError.
    """
    if source in LIBRARIES:
        weights, unused = published(source, arch), list[str]()
        about: dict[str, Any] = {"weights": source, "kind": source}
    else:
        path = Path(source)
        backbone = read_encoder(path, arch, partial=True)
        weights, unused = backbone.weights, list(backbone.unused)
        about = {"weights": str(path.resolve()), "kind": "file", "sha256": digest(path)}
        about["metadata"] = dict(backbone.metadata)
    if is_timm(arch):
        weights = {f"net.{name}": value for name, value in weights.items()}
    return weights, unused, about


def _other_statistics(about: Mapping[str, Any], encoder: AnyEncoder) -> str:
    """Mean and deviation by which a source gets its images, if `encoder` has others; else ""."""
    stated: str = about.get("metadata", {}).get("image_stats", "")
    own = getattr(encoder, "image_stats", None) or ()
    try:
        same = not stated or json.loads(stated) == [list(row) for row in own]
    except (ValueError, RecursionError):  # a file may say anything
        same = False
    return "" if same else printable(stated[:80])


def _require_known(model: SlotCon, train: TrainConfig, fitting: Container[str]) -> None:
    """New weights cannot rest, as in `check_start`: those of stages that the source lacks.

    Raises UserError.
    """
    stages, learn = model.config.stages, train.trainable_stages
    whole = model.config.norm == "eval" or train.freeze_encoder_epochs
    rests = stages if whole else stages - (stages if learn is None else learn)
    names = model.student.encoder.weights_up_to(rests) if rests else ()
    full = (f"student.encoder.{name}" for name in sorted(names))
    if missing := [name for name in full if name not in fitting]:
        setting = "model.norm eval" if model.config.norm == "eval" else "resting stages"
        parts = ", ".join(_few(_parts(missing)))
        raise UserError(f"init.weights: without {parts}; new weights cannot rest ({setting})")


def _below(networks: Iterable[str], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of an encoder by their names in a model, once for each of its networks."""
    return {f"{one}.encoder.{name}": value for one in networks for name, value in weights.items()}


def in_words(about: Mapping[str, Any]) -> str:
    """What a run started from, in one line; empty for new weights."""
    if about["kind"] == "random":
        return ""
    digest = f" (sha256 {about['sha256'][:12]})" if about.get("sha256") else ""
    lists = [("new", about["new"]), ("not used", about["unused"])]
    others = "".join(f"; {title}: {', '.join(names)}" for title, names in lists if names)
    return f"starts from {about['weights']}{digest}: {about['fitted']} tensors fit{others}"


def _whole(path: Path, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All weights of a SlotCon, by our names: of a run, of its files, or of the authors' code.

    Raises UserError.
    """
    if path.is_dir():
        return dict(load_model(path)[0].state_dict())
    state = tensors_in(read_file(path)[0])
    for names in ({name: name for name in expected}, official_names(expected)):
        anchor = names[_ANCHOR]
        if any(f".{name}".endswith(f".{anchor}") for name in state):
            given, _ = state_below(state, anchor, path, "weights of a SlotCon")
            found = {ours: given[theirs] for ours, theirs in names.items() if theirs in given}
            return {name: shaped(value, expected[name]) for name, value in found.items()}
    raise UserError(f"{path}: no whole SlotCon in it, an encoder alone (init.part encoder)")


def digest(path: Path) -> str:
    """SHA-256 of the file of weights that a path stands for. Raises UserError."""
    with weights_file(path).open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _parts(names: Iterable[str]) -> list[str]:
    """The parts of a network that these names of tensors belong to."""
    return list(dict.fromkeys(stem(name) or name for name in names))


def _few(parts: Sequence[str]) -> list[str]:
    """The first of these parts, and how many more there are."""
    more = [f"{len(parts) - _PARTS} more"] if len(parts) > _PARTS else []
    return [*map(printable, parts[:_PARTS]), *more]
