"""Backbones: read from any file that holds one, and written as safetensors.

In memory a backbone has torchvision's names, without the classifier. No code in a file is executed:
pickles may hold tensors, arrays and plain values only.
"""

import importlib.metadata
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from model.encoder import Encoder
from model.names import (
    COUNT,
    Branch,
    archs_of,
    branch_of,
    choose,
    resnets_in,
    stages_of,
    with_counts,
)
from pipeline.errors import UserError, printable
from pipeline.files import open_file
from train.config import RunConfig, from_dict
from train.pickle_machine import BYTES, TENSORS, NotDense, room
from train.pickles import read_pickle
from train.pretrained import load_model, read_record
from train.run.checkpoint import Record, find, is_checkpoint
from train.run.settings import to_dict
from train.run.sound import STATISTICS, check_weights

META = "meta"
"""The key of the metadata in the dictionaries that we write, as in mmengine's."""
FOLDER_WEIGHTS, FOLDER_CONFIG = "model.safetensors", "config.json"
"""The files of a model on the Hugging Face Hub."""
FACTS = {
    "method", "arch", "stages", "branch", "run", "imported", "start", "prefix", "step", "optimizer",
    "epochs", "batch_size", "prototypes", "view_size", "config", "data", "data_images",
    "data_fingerprint", "data_license", "slotstream", "format", "image_stats", "whitened",
}  # fmt: skip
"""The names in the metadata of files that slotstream writes, see `describe` and tools."""


METHODS = {"slotcon": "SlotCon (arXiv 2205.15288)", "slotmim": "SlotMIM (arXiv 2503.06960)"}
"""What metadata call the method of each objective."""
HEADER_BYTES = 16 << 20
"""Most bytes of the header of a .safetensors file: names, shapes and metadata, 800 a tensor."""
_REAL = {
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.bool,
    torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint64, torch.uint32, torch.uint16, torch.uint8,
}  # fmt: skip
"""Types whose numbers float32 can hold."""
NAME_LENGTH, NETWORKS, SHOWN, _ANCHORS = 500, 16, 6, 8
"""Most characters of a tensor's name: longer ones are skipped. Most copies of a network in a file.
Most prefixes in a message. Names that are looked for to find a network."""


@dataclass(frozen=True)
class Backbone:
    """The weights of a ResNet up to its last feature map, and their metadata."""

    arch: str
    """torchvision's name of the architecture."""
    weights: dict[str, Tensor]
    """Weights by torchvision's names, without fc."""
    metadata: dict[str, str]
    """How the weights were made, see `describe`; empty if the file does not say."""
    stages: int = 4
    """The last stage. Only `read_backbone` with `partial` gives fewer than four."""
    unused: tuple[str, ...] = ()
    """The parts of the source that are not these weights, by the beginnings of their names."""


Content = tuple[Any, dict[str, str]]
"""What a file of weights holds, and its metadata."""


def read_backbone(
    source: Path,
    arch: str | None = None,
    branch: Branch = "teacher",
    partial: bool = False,
    content: Content | None = None,
) -> Backbone:
    """Read the encoder in `source`.

    Args:
        source: a run or a checkpoint; a file or folder that tools.export writes; any file with a
            ResNet below any prefix, under the names of torchvision, detectron2, Hugging Face's
            transformers or nn.Sequential (see `model.names`).
        arch: torchvision's name of the expected architecture; None: any.
        branch: which encoder to take if `source` holds two. Teacher is the default, so a file that
            holds only the student is also accepted for it.
        partial: whether an encoder that ends before stage 4 will do.
        content: what `read_file` gives of the file `source`, if it is known.

    Raises:
        UserError: `source` holds no encoder, or one of another architecture, or is damaged; or
            `branch` is "student" and `source` holds the teacher; or it holds several ResNets whose
            prefixes do not say which is which.
    """
    source = origin(source)
    if source.is_dir():
        record = read_record(find(source))
        state, metadata = load_model(source)[0].state_dict(), describe(record, branch)
    else:
        inside, metadata = content or read_file(source)
        state = tensors_in(inside)
    resnets = resnets_in(state)
    networks = {
        prefix: _dense({ours: state[name] for ours, name in names.items()}, source)
        for prefix, names in resnets.items()
    }
    known = {prefix: found for prefix, found in networks.items() if archs_of(found)}
    whole = {prefix: found for prefix, found in known.items() if stages_of(found) == 4}
    prefix, side = _chosen(whole or known or networks, branch, source, "weights of a ResNet", state)
    weights = networks[prefix]
    if prefix and "arch" not in metadata:
        metadata = metadata | {"prefix": prefix}
    if side:
        metadata = metadata | {"branch": side}
    if branch == "student" and metadata.get("branch") == "teacher":
        raise UserError(f"{source}: weights of the teacher, not of the student")
    arch = _arch(weights, arch, metadata, source)
    stages = stages_of(weights) if archs_of(weights) else 4
    if stages < 4 and not partial:
        raise UserError(f"{source}: a {arch} that ends at stage {stages}; all four are needed")
    place = f"{source}: below '{printable(prefix)}'" if prefix else source
    used = set(resnets[prefix].values())
    unused = parts_outside(used, (name for name in state if name not in used))
    return Backbone(arch, fitting(weights, arch, place, stages), metadata, stages, tuple(unused))


def weights_file(source: Path) -> Path:
    """The file that holds the weights of what `read_backbone` reads. Raises UserError."""
    source = origin(source)
    return find(source) / FOLDER_WEIGHTS if source.is_dir() else source


def origin(source: Path) -> Path:
    """A checkpoint's folder for its weights, as its record says what they are; the weights of a
    folder for the Hugging Face Hub; anything else as it is."""
    if source.name == FOLDER_WEIGHTS and is_checkpoint(source.parent):
        return source.parent
    return source / FOLDER_WEIGHTS if (source / FOLDER_CONFIG).is_file() else source


def _arch(
    weights: Mapping[str, Tensor], needed: str | None, metadata: Mapping[str, str], source: Path
) -> str:
    """The ResNet that these weights are of. Raises UserError."""
    found, stated = archs_of(weights), metadata.get("arch", "")
    if needed is not None:
        if found and needed not in found:
            of = found[0]
            raise UserError(f"{source}: weights of a {of}, not of the {needed} that is needed")
        return needed
    if stated in found or len(found) == 1:
        return stated if stated in found else found[0]
    if found:
        several = " or ".join(found)
        raise UserError(f"{source}: the first stages of a {several}, and it does not say which")
    raise UserError(f"{source}: damaged, or not one of torchvision's ResNets")


def fitting(
    weights: Mapping[str, Tensor], arch: str, source: object, stages: int = 4
) -> dict[str, Tensor]:
    """All weights of a network `arch` up to a stage, as a new network has them: in its order, types
    and memory layout, and each tensor with its own memory.

    Raises UserError, which names `source`, if a weight is missing, has another shape or is not
    finite.
    """
    with torch.device("meta"):
        expected = Encoder(arch, stages).state_dict()
    plain = {
        name: value.detach().to(
            expected[name].dtype, copy=True, memory_format=torch.contiguous_format
        )
        for name, value in with_counts(weights, expected).items()
        if name in expected
    }
    try:
        check_weights({**weights, **plain}, expected)  # float64 may become infinite in float32
    except ValueError as error:
        raise UserError(f"{source}: incomplete, damaged, or not a {arch} ({error})") from None
    return {name: plain[name] for name in expected}


def safetensors_bytes(backbone: Backbone) -> bytes:
    """The content of a .safetensors file. Its header must be UTF-8: other characters, which a file
    name may have, are escaped.
    """
    facts = {"format": "pt", **backbone.metadata}
    header = {
        name: value.encode(errors="backslashreplace").decode() for name, value in facts.items()
    }
    return save(backbone.weights, header)


def describe(record: Record, branch: Branch | None = None) -> dict[str, str]:
    """How the weights of a checkpoint were made, from its record: method, recipe, data, step.

    `branch`: the encoder that the weights belong to; None: the whole model.
    """
    config = from_dict(record.config)
    facts: dict[str, Any] = {
        "method": METHODS[config.model.objective],
        "arch": config.model.arch,
        "stages": config.model.stages if config.model.stages < 4 else None,
        "image_stats": json.dumps(config.model.image_stats) if config.model.image_stats else None,
        "branch": branch,
        "run": config.name,
        "imported": record.provenance.get("imported"),
        "start": _start(record.provenance.get("init", {})),
        "step": record.step,
        "prototypes": config.model.num_prototypes,
        "optimizer": record.provenance.get("args", {}).get("optimizer", config.train.optimizer),
        **(_recipe(config) if "assumed" not in record.provenance else {}),
        "data": Path(config.data.path).name,
        "data_images": record.data["images"],
        "data_fingerprint": record.data["fingerprint"],
        "data_license": record.data.get("license"),
        "slotstream": _version(),
    }
    return {name: str(value) for name, value in facts.items() if value not in (None, "")}


def _start(init: Mapping[str, Any]) -> str | None:
    """The weights that the run started from, if they were not new: what is said about a file names
    more than the run's own data."""
    if init.get("kind", "random") == "random":
        return None
    about = init.get("metadata", {})
    name = init["kind"] if init["kind"] != "file" else Path(init["weights"]).name
    digest = f"sha256 {init['sha256'][:12]}" if "sha256" in init else "published weights"
    earlier = "".join(f", {about[key]}" for key in ("method", "data", "start") if key in about)
    return f"{name} ({digest}{earlier})"


def tensors_in(content: Any) -> dict[str, Any]:
    """All tensors and arrays of numbers in the content of a file, whatever dictionaries they lie
    in. Their names are the keys on the way to them, joined by dots.
    """
    return dict(_tensors_in(content, ""))


def _tensors_in(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    if len(name) > NAME_LENGTH:
        return
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _tensors_in(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, np.ndarray):
        if value.dtype.kind in "fiub":
            yield name, value
    elif isinstance(value, Tensor | NotDense):
        yield name, value


def state_below(
    state: Mapping[str, Any], anchor: str, source: Path, what: str, branch: Branch = "teacher"
) -> tuple[dict[str, Tensor], str]:
    """The part of `state` that holds a tensor named `anchor`, without the prefix before it, and
    that prefix: of several, that of `branch`. Raises UserError.
    """
    ends = [name for name in state if name == anchor or name.endswith(f".{anchor}")]
    networks: dict[str, Any] = {end.removesuffix(anchor): {} for end in ends[: NETWORKS + 1]}
    for prefix, inner in networks.items():
        below = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        inner.update(_dense(below, source))
    prefix = _chosen(networks, branch, source, what, state)[0]
    return networks[prefix], prefix


def read_weights(
    path: Path,
    expected: Iterable[str],
    branch: Branch = "teacher",
    content: Content | None = None,
) -> tuple[dict[str, Tensor], list[str]]:
    """The state dict, below any prefix, of a model whose names are `expected`; of two, that of
    `branch`. And the parts of the file that are not below this prefix. `content`: as in
    `read_backbone`. Raises UserError.
    """
    # Long names are the least likely to be another model's. A file may lack any, as statistics.
    weights = (name for name in expected if not name.endswith((*STATISTICS, COUNT)))
    anchors = sorted(weights, key=len, reverse=True)[:_ANCHORS]
    tensors = tensors_in((content or read_file(path))[0])
    ends = [f".{name}" for name in tensors]
    known = (name for name in anchors if any(end.endswith(f".{name}") for end in ends))
    anchor = next(known, anchors[0])
    state, prefix = state_below(tensors, anchor, path, "weights of this model", branch)
    others = [name for name in tensors if not name.startswith(prefix)]
    return state, parts_outside(tensors.keys() - others, others)


def _chosen(
    networks: Mapping[str, Mapping[str, Tensor]],
    branch: Branch,
    source: Path,
    what: str,
    state: Mapping[str, Any],
) -> tuple[str, Branch | None]:
    """The prefix of the network to take, and which one it is, see `choose`. Raises UserError, which
    names the prefixes in the file.
    """
    if not state:
        raise UserError(f"{source}: no weights in it")
    if not networks:
        above = dict.fromkeys(stem(name) for name in state)
        raise UserError(f"{source}: no {what} in it; its names begin with {_listed(above)}")
    distinct = list[str]()
    # One network may have two names: DenseCL's student is also `backbone.`
    for prefix in sorted(list(networks)[: NETWORKS + 1], key=lambda prefix: not branch_of(prefix)):
        twins = (other for other in distinct if branch_of(prefix) in (None, branch_of(other)))
        if not any(_equal(networks[prefix], networks[other]) for other in twins):
            distinct.append(prefix)
    if len(networks) <= NETWORKS and (chosen := choose(distinct, branch)):
        return chosen
    raise UserError(
        f"{source}: {what} below {_listed(distinct)}, and no rule says which of them to take: "
        "give a file with one"
    )


def stem(name: str) -> str:
    """A tensor's name up to its first number: the part of the network that it belongs to."""
    parts = name.split(".")
    return ".".join(parts[: next((n for n, p in enumerate(parts) if p.isdigit()), -1)])


def parts_outside(used: Iterable[str], others: Iterable[str]) -> list[str]:
    """The largest parts of a file that hold `others` of its tensors, and none of those `used`."""
    inside = {above for name in used for above in _above(name)}
    parts = (next((p for p in _above(name) if p not in inside), name) for name in others)
    return list(dict.fromkeys(parts))


def _above(name: str) -> list[str]:
    """The parts that a tensor belongs to, the largest first: of a.b.weight a and a.b."""
    return [name[:at] for at, letter in enumerate(name) if letter == "."]


def _listed(prefixes: Iterable[str]) -> str:
    names = [printable(f"'{prefix}'") if prefix else "no prefix" for prefix in prefixes]
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(v, other[k]) for k, v in one.items())


def _dense(state: Mapping[str, Any], source: Path) -> dict[str, Tensor]:
    """`state` with arrays, of any byte order and strides, as tensors. Raises UserError."""
    made = {
        name: torch.from_numpy(value.astype(value.dtype.newbyteorder("=")))
        if isinstance(value, np.ndarray)
        else value
        for name, value in state.items()
    }
    for name, value in made.items():
        if isinstance(value, NotDense) or value.dtype not in _REAL:
            raise UserError(f"{source}: {printable(name)} is not a dense tensor of real numbers")
    return made


def read_file(path: Path) -> Content:
    """The content and the metadata of a .safetensors file, a .pkl of arrays, or a file of torch's.

    Raises UserError, also for a pickle that holds more than tensors, arrays and plain values, and
    for more tensors or bytes than `train.pickle_machine` allows.
    """
    try:
        open_file(path).close()  # what follows opens it by its name
        if path.suffix == ".safetensors":
            return _read_safetensors(path)
        content = read_pickle(path)
    except (UserError, MemoryError):
        raise
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except Exception:  # a damaged file makes unpicklers and safetensors raise almost anything
        kind = f" in the format of {path.suffix}" if path.suffix else ""
        raise UserError(f"{path}: damaged, or not a file of weights{kind}") from None
    metadata = content.get(META) if isinstance(content, dict) else None
    return content, _ours(metadata) if isinstance(metadata, dict) else {}


def _read_safetensors(path: Path) -> Content:
    """As `read_file`. The library checks that the shapes fit the file."""
    with path.open("rb") as stream:
        header = int.from_bytes(stream.read(8), "little")
    size = path.stat().st_size
    if header > size - 8:
        raise UserError(f"{path}: not a file of weights, or cut short")
    if header > HEADER_BYTES:
        raise UserError(f"{path}: a header of {header:,} bytes, the limit is {HEADER_BYTES:,}")
    if size - header > BYTES:
        raise UserError(f"{path}: tensors of {size - header:,} bytes, the limit is {BYTES:,}")
    with safe_open(path, framework="pt") as file:
        names = list(file.keys())
        if len(names) > TENSORS:
            raise UserError(f"{path}: {len(names):,} tensors, the limit is {TENSORS:,}")
        content = {name: file.get_tensor(name) for name in names}
        if any(room(value.shape, value.itemsize) > BYTES for value in content.values()):
            raise UserError(f"{path}: a tensor with an impossible shape")
        return content, _ours(file.metadata() or {})


def _ours(metadata: Mapping[Any, Any]) -> dict[str, str]:
    """The entries of `metadata` that slotstream wrote; all its files have `arch`.

    Entries of others are dropped: mmcv writes the environment, and uses our names for other values
    (its `config` is Python source).
    """
    known = FACTS if "arch" in metadata else set()
    return {n: v for n, v in metadata.items() if n in known and isinstance(v, str)}


def _recipe(config: RunConfig) -> dict[str, Any]:
    return {
        "epochs": config.train.epochs,
        "batch_size": config.train.batch_size,
        "view_size": config.views.size,
        "config": json.dumps({part: to_dict(config)[part] for part in ("views", "model", "train")}),
    }


def _version() -> str | None:
    """slotstream's version, if it is installed."""
    try:
        return importlib.metadata.version("slotstream")
    except importlib.metadata.PackageNotFoundError:
        return None
