"""Opens the features that `--features` names: of networks of a run, of networks trained by others,
of the same networks before training, and of plain pixels.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from evaluation.datasets.squares import SquareImages
from evaluation.features import (
    Features,
    Network,
    block_means,
    dilated,
    dilated_name,
    of_encoder,
)
from evaluation.networks import (
    SEED,
    calibrate,
    load_network,
    run_config,
    start_of,
    untrained_network,
)
from evaluation.timm_networks import create_timm, timm_network
from model import SlotCon
from model.encoder import Encoder
from pipeline.errors import UserError
from train.init_config import InitConfig
from train.published import published_weights
from train.weights import read_backbone

SPECS = ("teacher", "student", "projector", "untrained", "supervised", "timm:NAME", "pixels")
TAKE_WEIGHTS = ("supervised", "timm:")
OF_RUNS = {"teacher", "student", "projector", "untrained"}
_NEW = InitConfig()

Opened = Network | Features
"""A network, or features that have no stages to choose from."""


def open_all(args: argparse.Namespace, images: SquareImages) -> list[Features]:
    """The features that the options name: each of --features at each --stage, and beside it, unless
    --baseline is none, those of the same network before training. --weights go to the spec that
    takes a file; `images` calibrate BatchNorm of untrained networks. Raises UserError.
    """
    takes = [spec.startswith(TAKE_WEIGHTS) for spec in args.features]
    if args.weights and sum(takes) != 1:
        raise UserError("--weights needs exactly one of supervised and timm:NAME in --features")
    stride, init = args.output_stride, InitConfig()
    if args.checkpoint is not None and {*args.features} & OF_RUNS:
        init = start_of(args.checkpoint)
    trained = {
        spec: open_trained(
            spec,
            args.checkpoint,
            images.device,
            weights=args.weights if take else None,
            output_stride=stride,
        )
        for spec, take in zip(args.features, takes, strict=True)
    }
    for stage in args.stage or []:  # refused before the work that an untrained network needs
        for network in trained.values():
            if network is not None:
                read(network, stage)
    opened: dict[str, Opened] = {}
    for spec, network in trained.items():
        if network is not None:
            opened[spec] = network
        before = untrained_name(spec, init)
        wanted = args.baseline == "untrained" or network is None
        if before is not None and wanted and before not in opened:
            opened[before] = open_untrained(spec, args.checkpoint, images, stride, init)
            from_weights = "" if init.weights == "random" else f", from {init.weights}"
            print(
                f"{before}: the same network before training{from_weights} (--baseline none "
                "leaves it out)",
                file=sys.stderr,
            )
    found = [read(each, stage) for stage in args.stage or [None] for each in opened.values()]
    distinct = {features.name: features for features in found}
    return [
        features if name == "pixels" else replace(features, name=dilated_name(name, stride))
        for name, features in distinct.items()
    ]


def read(network: Opened, stage: str | None = None) -> Features:
    """`Network.read`, for what has no stages too."""
    return network.read(stage) if isinstance(network, Network) else network


def open_trained(
    spec: str,
    checkpoint: Path | None,
    device: torch.device,
    *,
    weights: Path | None = None,
    output_stride: int | None = None,
) -> Opened | None:
    """The network that `spec` names; None for "untrained".

    Args:
        spec: one of SPECS; FEATURES_HELP describes them.
        checkpoint: a run folder or a checkpoint, for the run's networks and their architecture.
        device: device of the network.
        weights: file of weights for "supervised" and "timm:NAME". None: the published weights,
            downloaded once, later from the cache.
        output_stride: 8 or 16, to dilate the network; None: as it was trained.

    Raises:
        UserError: if something is missing or does not fit.
    """
    kind, _, argument = spec.partition(":")
    if weights is not None and not spec.startswith(TAKE_WEIGHTS):
        raise UserError(f"--weights is for supervised and timm:NAME, not for {spec}")
    if spec == "pixels":
        return Features("pixels", block_means, cosine=False)
    if kind == "timm" and argument:
        model = create_timm(
            argument, weights=weights, pretrained=weights is None, output_stride=output_stride
        )
        return timm_network(spec, model.to(device))
    if kind == "supervised":
        arch = argument or architecture(checkpoint)
        encoder = dilated(supervised_encoder(arch, weights), output_stride)
        return of_encoder(spec, encoder.to(device))
    if spec not in OF_RUNS:
        raise UserError(f"--features {spec}: must be one of {', '.join(SPECS)}")
    if checkpoint is None:
        raise UserError(f"--features {spec} needs --checkpoint")
    if spec == "untrained":
        return None
    return network_of_run(spec, spec, load_network(checkpoint, device)[0], output_stride)


def untrained_name(spec: str, init: InitConfig = _NEW) -> str | None:
    """The name of the network that `spec` is before training; None if it is no network. One of a
    run that began from weights is not untrained: it is the run's start.
    """
    if spec == "pixels":
        return None
    name = "start" if spec in OF_RUNS and init.weights != "random" else "untrained"
    return name if spec in ("teacher", "student", "untrained") else f"{spec}, {name}"


def open_untrained(
    spec: str,
    checkpoint: Path | None,
    images: SquareImages,
    output_stride: int | None = None,
    init: InitConfig = _NEW,
) -> Opened:
    """The network that `spec` names before training: with the weights `init` that its run started
    from, and new ones drawn with the seed of the run, or with `SEED`. BatchNorms that have seen no
    image get the statistics of `images`. Raises UserError.
    """
    kind, _, argument = spec.partition(":")
    name = str(untrained_name(spec, init))
    if kind not in ("timm", "supervised"):
        assert checkpoint is not None, "open_trained refuses it"
        config = run_config(checkpoint)
        heads = spec == "projector"
        network = untrained_network(
            config.model, config.train.seed, images, output_stride, init, heads
        )
        part = "projector" if heads else "teacher"  # what is calibrated
        return network_of_run(name, part, network, output_stride)
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        if kind == "timm":
            model = create_timm(
                argument, weights=None, pretrained=False, output_stride=output_stride
            )
            staged = timm_network(name, model.to(images.device))
        else:
            model = dilated(Encoder(argument or architecture(checkpoint)), output_stride)
            staged = of_encoder(name, model.to(images.device))
    calibrate(model, staged.read(), images)
    return staged


def network_of_run(
    name: str, spec: str, network: SlotCon, output_stride: int | None = None
) -> Opened:
    """The part of a run's network that "teacher", "student" or "projector" is."""
    branch = network.student if spec == "student" else network.teacher
    encoder = dilated(branch.encoder, output_stride)
    if spec == "projector":
        return Features(name, nn.Sequential(encoder, branch.projector).eval())
    return of_encoder(name, encoder)


def architecture(checkpoint: Path | None) -> str:
    """The architecture of a run's encoder; ResNet-50 without a run."""
    if checkpoint is None:
        return "resnet50"
    return run_config(checkpoint).model.arch


def supervised_encoder(arch: str, weights: Path | None) -> Encoder:
    """A torchvision ResNet trained on ImageNet's labels (IMAGENET1K_V1, the usual recipe, unless
    `weights` are given). Raises UserError.
    """
    try:
        encoder = Encoder(arch)
    except (ValueError, TypeError, AttributeError):  # unknown to torchvision, or not a ResNet
        raise UserError(f"--features supervised:{arch}: not a ResNet of torchvision's") from None
    encoder.load_state_dict(
        read_backbone(weights, arch).weights if weights else published_weights(arch)
    )
    return encoder
