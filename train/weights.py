"""Backbones: read from whatever holds one, under one set of names, torchvision's for a ResNet
without its classifier, and written as safetensors.

What others wrote is opened without running anything that is in it: pickles of tensors, arrays and
plain values only.
"""

import importlib.metadata
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from model.encoder import Encoder
from model.names import ENCODERS, Branch, arch_of, backbone_of, branches_of, with_counts
from pipeline.errors import UserError, printable
from train.config import RunConfig, from_dict, to_dict
from train.pickles import read_pickle
from train.run.checkpoint import Record, check_weights, find, is_checkpoint, load_model, read_record

META = "meta"
"""Where the dictionaries that we write keep their metadata, as mmengine's do."""
FOLDER_WEIGHTS, FOLDER_CONFIG = "model.safetensors", "config.json"
"""The files of a folder as Hugging Face's hub keeps it."""
FACTS = {
    "method", "arch", "branch", "run", "imported", "step", "optimizer", "epochs", "batch_size",
    "prototypes", "view_size", "config", "data", "data_images", "data_fingerprint", "data_license",
    "slotstream", "format",
}  # fmt: skip
"""What the metadata of a file of ours may say, see `describe` and tools."""


@dataclass(frozen=True)
class Backbone:
    """A ResNet's weights up to its last map, and what is known of them."""

    arch: str
    """torchvision's name of it."""
    weights: dict[str, Tensor]
    """By torchvision's names, without fc."""
    metadata: dict[str, str]
    """How they were made, see `describe`; empty where the file does not say."""


def read_backbone(source: Path, arch: str | None = None, branch: Branch = "teacher") -> Backbone:
    """The encoder of architecture `arch` (None: whichever it is) in `source`.

    Args:
        source: a run or a checkpoint; a file or folder that tools.export writes; any state dict of
            a ResNet under the names of torchvision, timm, detectron2, MoCo or the authors' code.
        arch: torchvision's name.
        branch: which encoder, where `source` holds two.

    Raises:
        UserError: in one line, where there is none, or it is another, or damaged, or known to be
            the teacher where the student is asked for (the teacher is what nobody has to ask for).
    """
    if source.name == FOLDER_WEIGHTS and is_checkpoint(source.parent):
        source = source.parent  # which says what they are
    if (source / FOLDER_CONFIG).is_file():
        source = source / FOLDER_WEIGHTS
    if source.is_dir():
        record = read_record(find(source))
        state, metadata = load_model(source)[0].state_dict(), describe(record, branch)
    else:
        state, metadata = read_state(source, branch)
    sides = branches_of(state)
    if len(sides) == 2:
        metadata = metadata | {"branch": branch}
    elif sides:
        metadata = metadata | {"branch": sides[0]}
    if branch == "student" and metadata.get("branch") == "teacher":
        raise UserError(f"{source}: weights of the teacher, not of the student that was asked for")
    weights = backbone_of(state, branch)
    if not weights:
        raise UserError(f"{source}: no weights of a ResNet in it")
    looks = arch_of(weights)
    if arch is None and looks is None:
        raise UserError(f"{source}: damaged, or not a ResNet of torchvision's")
    if arch is not None and looks not in (None, arch):
        raise UserError(f"{source}: weights of a {looks}, not of the {arch} that was asked for")
    arch = arch or str(looks)
    return Backbone(arch, fitting(weights, arch, source), metadata)


def fitting(weights: Mapping[str, Tensor], arch: str, source: object) -> dict[str, Tensor]:
    """All weights of an `arch`, in its order, as a new network has them: plain tensors of their own
    memory, in its types and layout. Raises UserError, naming `source`, unless they are there, of
    its shapes and finite.
    """
    with torch.device("meta"):
        expected = Encoder(arch).state_dict()
    plain = {
        name: value.detach().to(
            expected[name].dtype, copy=True, memory_format=torch.contiguous_format
        )
        for name, value in with_counts(weights, expected).items()
        if name in expected
    }
    try:
        check_weights({**weights, **plain}, expected)  # as converted: float64 may become infinite
    except ValueError as error:
        raise UserError(f"{source}: damaged, or not a {arch} ({error})") from None
    return {name: plain[name] for name in expected}


def safetensors_bytes(backbone: Backbone) -> bytes:
    """A .safetensors file. Its header is UTF-8, which names of files need not be: what is none is
    escaped.
    """
    facts = {"format": "pt", **backbone.metadata}
    header = {
        name: value.encode(errors="backslashreplace").decode() for name, value in facts.items()
    }
    return save(backbone.weights, header)


def published_weights(arch: str) -> dict[str, Tensor]:
    """The backbone that torchvision publishes, trained on ImageNet's labels (IMAGENET1K_V1), from
    its cache or downloaded into it. Raises UserError.
    """
    chosen = torchvision.models.get_model_weights(arch)["IMAGENET1K_V1"]
    try:
        state = chosen.get_state_dict(progress=True, check_hash=True)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"{chosen.url} cannot be had ({error}): download it and give its file instead"
        ) from None
    return fitting(backbone_of(state, "teacher"), arch, chosen.url)


def describe(record: Record, branch: Branch | None = None) -> dict[str, str]:
    """What a checkpoint's record says of how its weights were made: method, recipe, data, step.

    `branch` is the encoder that they are of; None: all of the model.
    """
    config = from_dict(record.config)
    facts: dict[str, Any] = {
        "method": "SlotCon (arXiv 2205.15288)",
        "arch": config.model.arch,
        "branch": branch,
        "run": config.name,
        "imported": record.provenance.get("imported"),
        "step": record.step,
        "prototypes": config.model.num_prototypes,
        "optimizer": record.provenance.get("args", {}).get("optimizer", "lars"),
        **(_recipe(config) if "assumed" not in record.provenance else {}),
        "data": Path(config.data.path).name,
        "data_images": record.data["images"],
        "data_fingerprint": record.data["fingerprint"],
        "data_license": record.data.get("license"),
        "slotstream": _version(),
    }
    return {name: str(value) for name, value in facts.items() if value not in (None, "")}


def read_state(path: Path, branch: Branch = "teacher") -> tuple[dict[str, Tensor], dict[str, str]]:
    """The state dict in a file, see `state_in`, and its metadata. Raises UserError."""
    content, metadata = read_file(path)
    state, told = state_in(content, path, branch)
    return state, metadata | told


def state_in(
    content: Any, source: Path, branch: Branch = "teacher"
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The state dict that a file's content is, or holds under one of the usual names; and, as
    metadata, which it is in a file of DINO's kind, which holds two, or one of them: `branch`
    chooses.

    Raises UserError, naming `source`.
    """
    told: dict[str, str] = {}
    for wrapper in ("state_dict", "model", branch, "teacher", "student"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
            told = {"branch": wrapper} if wrapper in ENCODERS else {}
    if not isinstance(content, dict) or not content:
        raise UserError(f"{source}: no weights in it")
    state = {str(name): _tensor(value) for name, value in content.items()}
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise UserError(f"{source}: no weights in it")
        if not _dense(value):
            raise UserError(f"{source}: {printable(name)} is no plain tensor of real numbers")
    return state, told


def read_weights(path: Path) -> dict[str, Tensor]:
    """The state dict of any model in a file, less what wraps its names. Raises UserError."""
    state, _ = read_state(path)
    return {name.removeprefix("module.").removeprefix("backbone."): v for name, v in state.items()}


def read_file(path: Path) -> tuple[Any, dict[str, str]]:
    """What a .safetensors file, a .pkl of arrays or one of torch's holds, and its metadata.

    Raises UserError; a pickle of anything but tensors, arrays and plain values is refused.
    """
    try:
        with path.open("rb"):  # safetensors' own OSError gives no reason
            pass
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                names = file.keys()
                content = {name: file.get_tensor(name) for name in names}
                return content, _ours(file.metadata() or {})
        content = read_pickle(path)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except Exception:  # what the unpicklers or safetensors make of another file, or of half of one
        kind = f" of the kind that {path.suffix} says" if path.suffix else ""
        raise UserError(f"{path}: damaged, or not a file of weights{kind}") from None
    metadata = content.get(META) if isinstance(content, dict) else None
    return content, _ours(metadata) if isinstance(metadata, dict) else {}


def _ours(metadata: Mapping[Any, Any]) -> dict[str, str]:
    """What we know of `metadata` if it is of a file of ours, all of which say `arch`. What others
    say is not carried on: mmcv the environment, and under our names what is of another kind (its
    `config` is Python's text).
    """
    known = FACTS if "arch" in metadata else set()
    return {name: str(value) for name, value in metadata.items() if name in known}


def _recipe(config: RunConfig) -> dict[str, Any]:
    return {
        "epochs": config.train.epochs,
        "batch_size": config.train.batch_size,
        "view_size": config.views.size,
        "config": json.dumps({part: to_dict(config)[part] for part in ("views", "model", "train")}),
    }


def _version() -> str | None:
    """slotstream's, where it is installed."""
    try:
        return importlib.metadata.version("slotstream")
    except importlib.metadata.PackageNotFoundError:
        return None


def _tensor(value: Any) -> Any:
    """An array of numbers as a tensor, whatever its byte order and strides; all else as it is."""
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "fiub":
        return value
    return torch.from_numpy(value.astype(value.dtype.newbyteorder("=")))


def _dense(value: Tensor) -> bool:
    """It has a real number at each of its places: sparse, quantised and complex ones and those
    without content cannot be converted, or lose a part.
    """
    odd = value.is_meta or value.is_quantized or value.is_complex()
    return value.layout is torch.strided and not odd
