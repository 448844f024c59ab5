"""Checkpoints of the authors' code (CVMI-Lab/SlotCon and SlotMIM on GitHub) as runs and as
backbones.
"""

import argparse
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model import ModelConfig, SlotCon
from model.architectures import ARCHITECTURES, IMAGENET, is_timm
from model.config import Objective
from model.names import Branch, arch_of, choose, resnets_in
from model.official import from_official
from pipeline.errors import UserError
from tools.weights.official_settings import recipe, with_official_settings
from tools.weights.vits import PATCHES, VITS, vit_of
from train.config import RunConfig, from_dict
from train.encoders import read_encoder
from train.run.checkpoint import Record, write_model
from train.run.cli import check_writable
from train.run.provenance import new_folder, provenance, write_bytes
from train.run.settings import to_dict, to_yaml
from train.run.sound import check_weights
from train.weights import read_file, safetensors_bytes, tensors_in

_DIGITS = 15  # of a count: no run has more steps
PROTOTYPES: dict[Objective, str] = {
    "slotcon": "grouping_k.slot_embed.weight",
    "slotmim": "grouping_k.prototypes_patch.weight",
}
"""The entry that a full checkpoint of each objective has."""
HIDDEN, ENCODER = "projector_k.mlp.0.weight", "encoder_k."


@dataclass(frozen=True)
class Official:
    """A full checkpoint of the authors' code."""

    source: Path
    objective: Objective
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


def objective_of(names: Iterable[str]) -> Objective | None:
    """What the full checkpoint with these entries was trained for; None if it is none."""
    ends = {".".join(name.split(".")[-3:]) for name in names}
    return next((objective for objective, entry in PROTOTYPES.items() if entry in ends), None)


def read_official(
    source: Path,
    objective: Objective,
    state: dict[str, Tensor],
    content: Mapping[str, Any],
    metadata: Mapping[str, str],
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
    epoch = count(content.get("epoch"))
    step = count(steps or metadata.get("step")) or epoch * _steps_per_epoch(settings)
    return Official(source, objective, state, settings, step, epoch, identity)


def _steps_per_epoch(settings: Mapping[str, Any]) -> int:
    """As the authors' sampler and loader make them; 0 if the settings do not say it."""
    images, batch, processes = (
        count(settings.get(name)) for name in ("num_instances", "batch_size", "world_size")
    )
    return -(-images // processes) // batch if images and batch and processes else 0


def count(value: object) -> int:
    """A count that the file holds as a number or as text; 0 if it holds anything else."""
    digits = str(value) if isinstance(value, int | str) else ""
    return int(digits) if digits.isdecimal() and len(digits) <= _DIGITS else 0


def import_run(official: Official, out: Path, arch: str | None = None) -> None:
    """Write the folder of a run: one checkpoint, its configuration, and a line of metrics with the
    steps and epochs done. `arch`: timm:NAME of a ViT that its weights do not tell. Raises
    UserError.
    """
    model = loaded(official, arch)
    config = configured(official, model.config, run_name(out))
    settings = to_dict(config)
    record = Record(official.step, settings, official.data, 0.0, [], origin(official))
    line = {"step": official.step} | ({"epoch": official.epoch} if official.epoch else {})
    with new_folder(out) as folder:
        write_model(folder, record, model)
        (folder / "config.yaml").write_text(to_yaml(config))
        (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")


def loaded(official: Official, arch: str | None = None) -> SlotCon:
    """The model with these weights; its sizes follow from their shapes. Raises UserError."""
    state, source = official.state, official.source
    slotmim = official.objective == "slotmim"
    if slotmim:
        arch, known = arch or vit_of(state, ENCODER), [*VITS.values(), "those of --arch"]
    else:
        arch, known = arch_of(resnets_in(state).get(ENCODER, ())), list(ARCHITECTURES)
    if arch is None or not (slotmim or arch in ARCHITECTURES):
        raise UserError(f"{source}: damaged, or its encoder is none of {', '.join(known)}")
    centres = state[PROTOTYPES[official.objective]]
    if HIDDEN not in state or centres.ndim != 2:
        raise UserError(f"{source}: damaged: no {HIDDEN}, or prototypes of a wrong shape")
    prototypes, dim = centres.shape
    hidden = state[HIDDEN].shape[0] if state[HIDDEN].ndim else 0
    try:
        config = ModelConfig(arch, hidden, dim, prototypes, objective=official.objective)
        if slotmim:
            config = replace(config, image_stats=IMAGENET)  # of its views, not of timm's weights
        with torch.device("meta"):  # takes no memory: the sizes are those that the file claims
            from_official(state, SlotCon(config).state_dict())
        model = SlotCon(config)
        expected = model.state_dict()
        model.load_state_dict(from_official(state, expected))
        check_weights(model.state_dict(), expected)  # float64 may become infinite in float32
    except (ValueError, RuntimeError) as error:  # RuntimeError: a size beyond torch's
        raise UserError(f"{source}: {' '.join(str(error).split())[:200]}") from None
    return model


def configured(official: Official, model: ModelConfig, name: str) -> RunConfig:
    """The run's configuration: settings from the file, defaults for the rest. Raises UserError."""
    try:
        config = recipe(name, model)
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


def import_backbone(
    source: Path, out: Path, branch: Branch, stated: Mapping[str, str], arch: str | None = None
) -> None:
    """Write a backbone under torchvision's names, or a ViT under timm's. `stated` holds facts that
    the file may lack; `arch`, timm:NAME, is of a ViT that its weights do not tell.

    Raises UserError, also if the file contradicts `stated`.
    """
    if out.suffix != ".safetensors":
        raise UserError(f"--out {out}: {source} is only a backbone: give a .safetensors file")
    check_writable("--out", out, source)
    tensors = tensors_in(read_file(source)[0])
    ends = [name.removesuffix(PATCHES) for name in tensors if name.endswith(PATCHES)]
    prefix, side = choose(ends, branch) or ("", None)
    backbone = read_encoder(source, arch or vit_of(tensors, prefix), branch)
    known = backbone.metadata
    if is_timm(backbone.arch):  # the authors' views, not those of timm's weights
        known = {"image_stats": json.dumps(IMAGENET)} | ({"branch": side} if side else {}) | known
    for name, value in stated.items():
        if known.get(name, value) != value:
            raise UserError(f"--{name} {value}: {source} says that it is {known[name]}")
    facts = {"arch": backbone.arch, "imported": source.name}
    write_bytes(out, safetensors_bytes(replace(backbone, metadata={**facts, **stated, **known})))
