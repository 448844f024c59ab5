"""Encoders of every architecture, read from any file that holds one: `train.weights` reads those of
torchvision's ResNets, this module those of timm's networks too.
"""

import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from model.architectures import Statistics, is_timm
from model.encoder import AnyEncoder, Encoder
from model.names import Branch, with_counts
from model.timm_encoder import TimmEncoder, facts, first_line
from pipeline.errors import UserError, printable
from train.pretrained import load_model, read_record
from train.run.checkpoint import find
from train.run.sound import check_weights
from train.weights import (
    Backbone,
    Content,
    describe,
    origin,
    parts_outside,
    read_backbone,
    read_file,
    read_weights,
)


def read_encoder(
    source: Path, arch: str | None = None, branch: Branch = "teacher", partial: bool = False
) -> Backbone:
    """As `read_backbone`, of timm's networks too: of a run, of a file that tools.export writes, or,
    if `arch` is timm:NAME, of any file with its weights. Names are timm's, without the classifier.
    Raises UserError.
    """
    source, content = origin(source), None
    if source.is_dir():
        record = read_record(find(source))
        metadata = describe(record, branch)
    else:
        content = read_file(source)
        metadata = content[1]
    found = metadata.get("arch", arch or "")
    if not is_timm(found) and not is_timm(arch or ""):
        return read_backbone(source, arch, branch, partial, content)
    stated = source.is_dir() or is_timm(found)  # else the names of the weights decide
    if arch is not None and stated and _untagged(found) != _untagged(arch):
        raise UserError(f"{source}: weights of a {found}, not of the {arch} that is needed")
    found, unused = arch or found, list[str]()
    stages = metadata.get("stages", "4")
    if stages not in ("1", "2", "3", "4"):
        raise UserError(f"{source}: damaged: it says that it ends at stage {stages}")
    if stages != "4" and not partial:
        raise UserError(f"{source}: a {found} that ends at stage {stages}; all four are needed")
    if source.is_dir():
        net: Any = getattr(load_model(source)[0], branch).encoder.net
    elif branch == "student" and metadata.get("branch") == "teacher":
        raise UserError(f"{source}: weights of the teacher, not of the student")
    else:
        net = _new(found, int(stages), source)
        unused = load_weights(net, source, branch, content)
    weights = {
        name: value.detach().clone(memory_format=torch.contiguous_format)
        for name, value in net.state_dict().items()
    }
    return Backbone(found, weights, metadata, int(stages), tuple(unused))


def encoder_of(backbone: Backbone) -> AnyEncoder:
    """The encoder of these weights, as `read_encoder` returns them. Raises UserError."""
    if not is_timm(backbone.arch):
        resnet = Encoder(backbone.arch, backbone.stages)
        resnet.load_state_dict(backbone.weights)
        return resnet
    statistics = image_stats(backbone)
    encoder = TimmEncoder(backbone.arch, backbone.stages, image_stats=statistics)
    encoder.net.load_state_dict(backbone.weights)
    return encoder


def image_stats(backbone: Backbone) -> Statistics:
    """Mean and deviation by which an encoder of timm gets its images: as the file says, else those
    of the weights that timm publishes. Raises UserError.
    """
    stated = backbone.metadata.get("image_stats")
    if stated is None:
        return facts(backbone.arch).image_stats
    try:
        mean, deviation = ([float(value) for value in row] for row in json.loads(stated))
        assert len(mean) == len(deviation) == 3 and min(deviation) > 0
        assert all(map(math.isfinite, mean + deviation))
    except (ValueError, TypeError, AssertionError, RecursionError):
        shown = printable(stated[:80])
        raise UserError(f"{backbone.arch}: damaged: image_stats {shown}") from None
    return (mean[0], mean[1], mean[2]), (deviation[0], deviation[1], deviation[2])


def _untagged(arch: str) -> str:
    """Without timm's tag, which names weights."""
    return arch.partition(".")[0]


def _new(arch: str, stages: int, source: Path) -> Any:
    try:
        return TimmEncoder(arch, stages).net
    except (ValueError, KeyError) as error:
        raise UserError(f"{source}: {error}") from None


def load_weights(
    model: Any, path: Path, branch: Branch = "teacher", content: Content | None = None
) -> list[str]:
    """Load a file of the model's weights: under timm's names, or under those of a release that
    timm's own model converts, such as DINOv2's. Its classifier is left out, its positions are
    interpolated; of two networks it is that of `branch`. Returns the parts that are left out: the
    classifier and other networks. `content`: as in `read_backbone`. Raises
    UserError.
    """
    state, others = read_weights(path, model.state_dict(), branch, content)
    stored = state
    module = sys.modules[type(model).__module__]
    if convert := getattr(module, "checkpoint_filter_fn", None):
        try:
            state = convert(dict(stored), model)
        except Exception as error:  # it expects its model's weights
            raise UserError(f"{path}: of another model ({first_line(error)})") from None
    for name, value in state.items():  # timm also resizes patches, which makes another model
        if name in stored and "pos_embed" not in name and value.shape != stored[name].shape:
            shape = list(stored[name].shape)
            raise UserError(f"{path}: of another model ({name} has shape {shape})")
    heads = model.pretrained_cfg.get("classifier") or "head"
    heads = (heads,) if isinstance(heads, str) else tuple(heads)
    drop = tuple(f"{head}." for head in heads)
    kept = {name: value for name, value in state.items() if not name.startswith(drop)}
    load(model, with_counts(kept, model.state_dict()), path)
    return [*others, *parts_outside(kept, (name for name in state if name not in kept))]


def load(module: nn.Module, state: dict[str, Tensor], source: Path) -> None:
    """Load all of `state` into `module`. Raises UserError, in one line, unless it fits exactly."""
    try:
        check_weights(state, module.state_dict())
    except ValueError as error:
        raise UserError(f"{source}: incomplete, damaged, or of another model ({error})") from None
    module.load_state_dict(state)
