"""Checkpoints of the authors' code (github.com/CVMI-Lab/SlotCon and SlotMIM) as runs and as
backbones.
"""

import argparse
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model import ModelConfig, SlotCon
from model.architectures import ARCHITECTURES, IMAGENET
from model.names import Branch, arch_of, resnets_in
from model.official import from_official
from pipeline.errors import UserError
from tools.weights.official_settings import with_official_settings
from train.config import DataConfig, RunConfig, from_dict, load_config
from train.run.checkpoint import Record, check_weights, write_model
from train.run.cli import check_writable
from train.run.provenance import new_folder, provenance, write_bytes
from train.run.settings import to_dict, to_yaml
from train.weights import read_backbone, safetensors_bytes

_DIGITS = 15  # of a count: no run has more steps
PROTOTYPES = ("grouping_k.slot_embed.weight", "grouping_k.prototypes_patch.weight")
"""A name that each whole checkpoint has: SlotCon's, SlotMIM's."""
HIDDEN, PATCHES = "projector_k.mlp.0.weight", "encoder_k.patch_embed.proj.weight"
VITS = {192: "tiny", 384: "small", 768: "base", 1024: "large"}
"""timm's names of the ViTs of SlotMIM by their width; all have patches of 16 pixels."""
RECIPE = "slotmim/cocoplus_vitb_800ep"
"""What a checkpoint of SlotMIM is taken to be trained with, where it does not say."""


@dataclass(frozen=True)
class Official:
    """A full checkpoint of the authors' code."""

    source: Path
    state: dict[str, Tensor]
    """Weights by the authors' names, without `module.`."""
    args: dict[str, Any]
    """The authors' command line; empty if the file has none."""
    step: int
    """Optimiser steps done; 0: unknown."""
    epoch: int
    """Epochs done; 0: unknown."""
    data: dict[str, Any]
    """Identity of the training data, as far as known: see Record.data."""


def read_official(
    source: Path, state: dict[str, Tensor], content: Mapping[str, Any], metadata: Mapping[str, str]
) -> Official:
    """All that is known about a full checkpoint. `metadata`: the facts that tools.export wrote."""
    args, scheduler = content.get("args"), content.get("scheduler")
    settings = vars(args) if isinstance(args, argparse.Namespace) else args
    settings = dict(settings) if isinstance(settings, dict) else {}
    # The authors' scheduler counts steps under the name last_epoch.
    steps = scheduler.get("last_epoch") if isinstance(scheduler, dict) else None
    identity = {
        "images": count(settings.get("num_instances") or metadata.get("data_images")),
        "fingerprint": metadata.get("data_fingerprint", "unknown"),
    }
    if licence := metadata.get("data_license"):
        identity["license"] = licence
    step = count(steps or metadata.get("step"))
    return Official(source, state, settings, step, count(content.get("epoch")), identity)


def count(value: object) -> int:
    """A count that the file holds as a number or as text; 0 if it holds anything else."""
    digits = str(value) if isinstance(value, int | str) else ""
    return int(digits) if digits.isdecimal() and len(digits) <= _DIGITS else 0


def import_run(official: Official, out: Path) -> None:
    """Write the folder of a run: one checkpoint, its configuration, and a line of metrics with the
    steps and epochs done. Raises UserError.
    """
    model = loaded(official)
    config = configured(official, model.config, run_name(out))
    settings = to_dict(config)
    record = Record(official.step, settings, official.data, 0.0, [], origin(official))
    line = {"step": official.step} | ({"epoch": official.epoch} if official.epoch else {})
    with new_folder(out) as folder:
        write_model(folder, record, model)
        (folder / "config.yaml").write_text(to_yaml(config))
        (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")


def loaded(official: Official) -> SlotCon:
    """SlotCon with these weights; its sizes follow from their shapes. Raises UserError."""
    state, source = official.state, official.source
    name = next(name for name in PROTOTYPES if name in state)
    slotmim = name == PROTOTYPES[1]
    arch = vit_of(state) if slotmim else arch_of(resnets_in(state).get("encoder_k.", ()))
    known = [f"ViT-{size}/16" for size in VITS.values()] if slotmim else ARCHITECTURES
    if arch is None or not (slotmim or arch in ARCHITECTURES):
        raise UserError(f"{source}: damaged, or its encoder is none of {', '.join(known)}")
    if HIDDEN not in state or state[name].ndim != 2:
        raise UserError(f"{source}: damaged: no {HIDDEN}, or prototypes of a wrong shape")
    prototypes, dim = state[name].shape
    hidden = state[HIDDEN].shape[0] if state[HIDDEN].ndim else 0
    own: dict[str, Any] = {"objective": "slotmim", "image_stats": IMAGENET} if slotmim else {}
    try:
        config = ModelConfig(arch, hidden, dim, prototypes, **own)
        with torch.device("meta"):  # takes no memory: the sizes are those that the file claims
            from_official(state, SlotCon(config).state_dict())
        model = SlotCon(config)
        expected = model.state_dict()
        model.load_state_dict(from_official(state, expected))
        check_weights(model.state_dict(), expected)  # float64 may become infinite in float32
    except (ValueError, RuntimeError) as error:  # RuntimeError: a size beyond torch's
        raise UserError(f"{source}: {' '.join(str(error).split())[:200]}") from None
    return model


def vit_of(state: Mapping[str, Tensor]) -> str | None:
    """The architecture of SlotMIM's encoder; None if it is none of `VITS`."""
    shape = tuple(state[PATCHES].shape) if PATCHES in state else (0,)
    known = len(shape) == 4 and shape[1:] == (3, 16, 16) and shape[0] in VITS
    return f"timm:vit_{VITS[shape[0]]}_patch16_224" if known else None


def configured(official: Official, model: ModelConfig, name: str) -> RunConfig:
    """The run's configuration: settings from the file, defaults for the rest. Raises UserError."""
    try:
        config = RunConfig(name, DataConfig("unknown"))
        if model.hides_patches:
            told = ["--name", name, "--data.path", "unknown", "--config", RECIPE]
            config = load_config(told)[0]
        config = replace(config, model=replace(model, drop_path=config.model.drop_path))
        # Read back to check the types: a dataclass accepts values of any type.
        return from_dict(to_dict(with_official_settings(config, official.args, model)))
    except (ValueError, TypeError) as error:
        raise UserError(f"{official.source}: impossible settings: {error}") from None


def run_name(out: Path) -> str:
    """The name of the folder, without characters that a run's name cannot have."""
    return re.sub(r"[^A-Za-z0-9._-]", "_", out.resolve().name).lstrip(".") or "official"


def origin(official: Official) -> dict[str, Any]:
    """Provenance: this import, and the settings of the authors' command line that JSON can hold."""
    plain = {
        name: value
        for name, value in official.args.items()
        if value is None or isinstance(value, int | float | str)
    }
    facts: dict[str, Any] = {"imported": official.source.name, "args": plain}
    if not plain:
        facts["assumed"] = "the recipe: the file holds no settings, these are the defaults"
    return provenance() | facts


def import_backbone(source: Path, out: Path, branch: Branch, stated: Mapping[str, str]) -> None:
    """Write a backbone under torchvision's names. `stated` holds facts that the file may lack.

    Raises UserError, also if the file contradicts `stated`.
    """
    if out.suffix != ".safetensors":
        raise UserError(f"--out {out}: {source} is only a backbone: give a .safetensors file")
    check_writable("--out", out, source)
    backbone = read_backbone(source, branch=branch)
    known = backbone.metadata
    for name, value in stated.items():
        if known.get(name, value) != value:
            raise UserError(f"--{name} {value}: {source} says that it is {known[name]}")
    facts = {"arch": backbone.arch, "imported": source.name}
    write_bytes(out, safetensors_bytes(replace(backbone, metadata={**facts, **stated, **known})))
