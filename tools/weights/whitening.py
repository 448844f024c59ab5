"""Whitening as part of the weights: of the last convolution and the norm behind it.

A whitened map is a linear map of a map. Where a convolution and a BatchNorm make the map, they can
make the whitened one at once: whoever loads the weights needs to know nothing of it.

Letters: D features of the map, C inputs of the convolution.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from evaluation.datasets.images import EVALUATION_SIDE, evaluation_size, open_images, spread
from evaluation.datasets.squares import SquareImages
from model.encoder import AnyEncoder, Encoder
from model.reduction import Moments, moments, whitening
from pipeline.choices import WHITEN
from pipeline.errors import about
from train.encoders import encoder_of
from train.weights import Backbone

IMAGES = 1000
"""At most so many unlabelled images are looked at."""


def whitened(backbone: Backbone, source: Path) -> Backbone:
    """`backbone` with a whitened last map: centred and multiplied by covariance^-`WHITEN` of the
    images in `source`, a beton or a folder, as `evaluation` does. Raises UserError.
    """
    encoder = encoder_of(backbone).eval()
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
        fold(moments(maps()), *layers)
    net: nn.Module = encoder if isinstance(encoder, Encoder) else encoder.net
    weights = {name: value.detach().clone() for name, value in net.state_dict().items()}
    told = f"covariance^-{WHITEN} of {len(which)} images of {source.name}, {side} pixels"
    return replace(backbone, weights=weights, metadata={**backbone.metadata, "whitened": told})


def last_layers(encoder: AnyEncoder, images: Tensor) -> tuple[nn.Conv2d, _BatchNorm]:
    """The convolution and the norm behind it whose output is the last map of `images` [B, 3, S, S].
    Raises ValueError if others make the map: a residual sum, an activation, a LayerNorm.
    """
    made: list[tuple[nn.Module, Tensor, Tensor]] = []

    def note(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
        made.append((module, given[0].clone(), output.clone()))  # others write into theirs

    layers = [each for each in encoder.modules() if isinstance(each, nn.Conv2d | _BatchNorm)]
    hooks = [each.register_forward_hook(note) for each in layers]
    last = encoder(images)
    for hook in hooks:
        hook.remove()
    for norm, between, output in made:
        if torch.equal(output, last) and isinstance(norm, _BatchNorm) and _is_linear(norm):
            for conv, _, result in made:
                if (
                    isinstance(conv, nn.Conv2d)
                    and conv.groups == 1
                    and torch.equal(result, between)
                ):
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
def fold(cells: Moments, conv: nn.Conv2d, norm: _BatchNorm) -> None:
    """Change both so that they compute the map whitened by its `cells`.

    The map was y = s ⊙ (W x) + t. With the whitening's matrix M the convolution is M (s ⊙ W) now.
    The norm takes M (mean - t) off, the mean of what it gets, and divides by nothing: its
    statistics are those of these cells, for whoever trains on.
    """
    mean, variance = norm.get_buffer("running_mean"), norm.get_buffer("running_var")
    scale = norm.weight.double() / (variance.double() + norm.eps).sqrt()
    shift = norm.bias.double() - scale * mean.double()
    if conv.bias is not None:
        shift = shift + scale * conv.bias.double()
        conv.bias.zero_()
    matrix = whitening(cells, WHITEN).matrix.double()  # symmetric
    rows = scale[:, None] * conv.weight.double().flatten(1)
    conv.weight.copy_((matrix @ rows).view_as(conv.weight))
    mean.copy_(matrix @ (cells.mean - shift))
    variance.copy_((matrix @ cells.covariance @ matrix).diagonal())
    norm.weight.copy_((variance.double() + norm.eps).sqrt())
    norm.bias.zero_()
