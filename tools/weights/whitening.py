"""Whitening as part of the weights: of the last convolution and the norm behind it.

A whitened map is a linear map of a map. Where a convolution and a BatchNorm make the map, they can
make the whitened one at once: whoever loads the weights needs to know nothing of it.

Letters: D features of the map, C inputs of the convolution.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from evaluation.datasets.images import EVALUATION_SIDE, evaluation_size, open_images, spread
from evaluation.datasets.squares import SquareImages
from model.architectures import is_timm
from model.encoder import AnyEncoder, Encoder
from model.reduction import Reduction, fit_whitening
from model.timm_encoder import TimmEncoder
from pipeline.choices import WHITEN
from pipeline.errors import about
from train.encoders import image_stats, load
from train.weights import Backbone

IMAGES = 1000
"""At most so many unlabelled images are looked at."""


def whitened(backbone: Backbone, source: Path) -> Backbone:
    """`backbone` with a whitened last map: centred and multiplied by covariance^-`WHITEN` of the
    images in `source`, a beton or a folder, as `evaluation` does. Raises UserError.
    """
    encoder = build(backbone)
    images = open_images(source)
    which = spread(len(images), IMAGES)
    size = backbone.metadata.get("view_size", "")
    side = evaluation_size(int(size)) if size.isdecimal() else EVALUATION_SIDE
    squares = SquareImages(images, side, torch.device("cpu"))

    def maps() -> Iterator[Tensor]:
        for batch in squares.batches("whitening", which):
            yield encoder(batch.normalised(squares.device))

    with about(f"--whiten {source}"), torch.inference_mode():
        layers = last_layers(encoder, squares.first().normalised(squares.device))
        fitted = fit_whitening(maps(), WHITEN)
    fold(fitted, *layers)
    net: nn.Module = encoder if isinstance(encoder, Encoder) else encoder.net
    weights = {name: value.detach().clone() for name, value in net.state_dict().items()}
    told = f"covariance^-{WHITEN} of {len(which)} images of {source.name}, {side} pixels"
    return replace(backbone, weights=weights, metadata={**backbone.metadata, "whitened": told})


def build(backbone: Backbone) -> AnyEncoder:
    """The encoder of these weights, in eval mode. Raises UserError."""
    arch, stages = backbone.arch, backbone.stages
    encoder: Any = Encoder(arch, stages) if not is_timm(arch) else None
    if encoder is None:
        encoder = TimmEncoder(arch, stages, image_stats=image_stats(backbone))
    load(getattr(encoder, "net", encoder), backbone.weights, Path(arch))
    built: AnyEncoder = encoder.eval()
    return built


def last_layers(encoder: AnyEncoder, images: Tensor) -> tuple[nn.Conv2d, _BatchNorm]:
    """The convolution and the norm behind it whose output is the last map of `images` [B, 3, S, S].
    Raises ValueError if others make the map: a residual sum, an activation, a LayerNorm.
    """
    made: list[tuple[nn.Module, Tensor, Tensor]] = []

    def note(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
        made.append((module, given[0], output))

    layers = [each for each in encoder.modules() if isinstance(each, nn.Conv2d | _BatchNorm)]
    hooks = [each.register_forward_hook(note) for each in layers]
    last = encoder(images)
    for hook in hooks:
        hook.remove()
    for norm, between, output in made:
        if output is last and isinstance(norm, _BatchNorm) and _is_linear(norm):
            for conv, _, result in made:
                if result is between and isinstance(conv, nn.Conv2d) and conv.groups == 1:
                    return conv, norm
    raise ValueError(
        "its last map is not the output of a convolution and a BatchNorm alone, so its weights "
        "cannot hold a whitening: whiten the features instead (--whiten of evaluation)"
    )


def _is_linear(norm: nn.Module) -> bool:
    """timm's norms have an activation and a drop within."""
    parts = (getattr(norm, "act", None), getattr(norm, "drop", None))
    return all(part is None or isinstance(part, nn.Identity) for part in parts)


@torch.no_grad()
def fold(whitening: Reduction, conv: nn.Conv2d, norm: _BatchNorm) -> None:
    """Change both so that they compute the whitened map. With y = s ⊙ (W x) + t before,
    Wᵢ = Mᵀ (s ⊙ W), and the norm adds Mᵀ (t − mean): its statistics are 0 and 1 afterwards.
    """
    mean, variance = norm.running_mean, norm.running_var
    assert mean is not None and variance is not None
    scale = norm.weight.double() / (variance.double() + norm.eps).sqrt()
    shift = norm.bias.double() - scale * mean.double()
    if conv.bias is not None:
        shift = shift + scale * conv.bias.double()
        conv.bias.zero_()
    matrix = whitening.matrix.double().T
    rows = (scale[:, None] * conv.weight.double().flatten(1)).to(matrix)
    conv.weight.copy_((matrix @ rows).view_as(conv.weight))
    norm.bias.copy_(matrix @ (shift - whitening.mean.double()))
    norm.weight.fill_((1 + norm.eps) ** 0.5)
    mean.zero_()
    variance.fill_(1)
