"""Encoders of timm: any of its networks that gives maps of its stages (docs/backbones.md).

B images, D channels, h w cells, S side of a view.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from difflib import get_close_matches
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.architectures import IMAGENET, STAGES, Statistics, timm_name
from model.hub import fails_at_once

SIZES: tuple[dict[str, Any], ...] = ({"dynamic_img_size": True}, {"strict_img_size": False}, {})
"""How a network is told to take images of any size: ViTs (positions are interpolated), Swin,
others, which need not be told."""


class TimmEncoder(nn.Module):
    """timm's network `net` without classifier: [B, 3, S, S] -> [B, dim, S/stride, S/stride].

    Its stages end with 4, as a ResNet's: they are the last four levels of a pyramid, or the
    quarters of the blocks of a network with one stride, as a ViT. Their maps are those of timm's
    `forward_intermediates`: without class and register tokens, and after the last normalisation
    where timm can apply it. Weights that no map depends on, such as layers before the classifier,
    stay as they are, without gradients: so `net` has all that timm's own has, and the same names.
    """

    scale: Tensor
    """[3, 1, 1]; with `shift`, from ImageNet's mean and deviation to `image_stats`."""
    shift: Tensor

    def __init__(
        self,
        arch: str,
        stages: int = STAGES,
        *,
        drop_path: float = 0.0,
        image_stats: Statistics | None = None,
        output_stride: int | None = None,
    ) -> None:
        """Later stages than `stages` are not built. `drop_path`: see `ModelConfig`. `image_stats`:
        mean and deviation by which the network gets its images; None: those of its published
        weights. `output_stride`: the stride of the last stage, by dilation. Raises ValueError.
        """
        super().__init__()
        self.arch, self.stages = arch, stages
        known = facts(arch, output_stride)
        self.image_stats = image_stats or known.image_stats
        self.strides, self.stage_dims = (
            {stage: of[stage] for stage in of if stage <= stages}
            for of in (known.strides, known.dims)
        )
        self.dim = self.stage_dims[stages]
        self.step = max(self.strides.values())
        self._levels, self._norm = known.levels, known.norm
        self.net: Any = create(timm_name(arch), drop_path=drop_path, output_stride=output_stride)
        if stages < STAGES:
            self.net.prune_intermediate_layers([known.levels[stages]], prune_head=True)
        read = weights_of(arch, stages)
        for name, weight in self.net.named_parameters():
            weight.requires_grad_(name in read)
        given, own = (torch.tensor(each)[:, :, None, None] for each in (IMAGENET, self.image_stats))
        self.register_buffer("scale", given[1] / own[1])  # kept by checkpoints, as `net`
        self.register_buffer("shift", (given[0] - own[0]) / own[1])

    def forward(self, images: Tensor) -> Tensor:
        """The map of the last stage."""
        return self.maps(images, (self.stages,))[0]

    def maps(self, images: Tensor, stages: Sequence[int]) -> list[Tensor]:
        """Images [B, 3, S, S], normalised by ImageNet's mean and deviation → the map [B, D, h, w]
        of each of `stages`, in their order; those after the last one asked for are not computed.
        Where a side is no multiple of the largest stride, zeros are added around the images.
        """
        images = images * self.scale.to(images.dtype) + self.shift.to(images.dtype)
        images = padded(images, self.step)
        return read_maps(self.net, images, [self._levels[stage] for stage in stages], self._norm)

    def keep_all_paths(self) -> None:
        """No drop path from now on: a teacher's targets are not random."""
        for module in _drop_paths(self.net):
            module.drop_prob = 0.0

    def names_up_to(self, stage: int) -> frozenset[str]:
        """The names in `net` of the weights that the map of a stage is made of."""
        return weights_of(self.arch, stage, norm=False)

    def weights_up_to(self, stage: int) -> frozenset[str]:
        """`names_up_to` as names in this encoder."""
        return frozenset(f"net.{name}" for name in self.names_up_to(stage))

    def freeze(self, stage: int) -> None:
        """Freeze everything up to a stage: no gradients, and BatchNorms that use their running
        statistics without updating them, also in training mode.
        """
        from timm.layers.norm_act import freeze_batch_norm_2d  # keeps the activation within a norm

        frozen = self.names_up_to(stage)
        for name, weight in self.net.named_parameters():
            if name in frozen:
                weight.requires_grad_(False)
        for name, module in list(self.net.named_modules()):
            if isinstance(module, nn.BatchNorm2d) and f"{name}.weight" in frozen:
                self.net.set_submodule(name, freeze_batch_norm_2d(module).requires_grad_(False))

    def dilated(self, output_stride: int) -> "TimmEncoder":
        """The same weights in a network whose last cells are `output_stride` pixels wide. Raises
        ValueError if timm cannot build it.
        """
        if output_stride == self.strides[self.stages]:
            return self
        other = TimmEncoder(
            self.arch, self.stages, image_stats=self.image_stats, output_stride=output_stride
        )
        other.load_state_dict(self.state_dict())
        return other.to(next(self.parameters()).device).train(self.training)


class Facts(NamedTuple):
    """What is known about an architecture before it has weights. The first three are by stage."""

    levels: dict[int, int]
    """The number in timm's list of levels, from 0."""
    strides: dict[int, int]
    """Pixels along one side of a cell, measured."""
    dims: dict[int, int]
    """Channels of the map."""
    norm: bool
    """Whether timm can apply the last normalisation to the maps."""
    image_stats: Statistics
    """Mean and deviation of the images that the published weights were trained on."""


@lru_cache(maxsize=64)
def facts(arch: str, output_stride: int | None = None) -> Facts:
    """Facts of timm:NAME, from a network without memory on images of its own size. Raises
    ValueError, which begins with the name of the setting, if it has no maps.
    """
    net = outline(arch, output_stride)
    info = list(getattr(net, "feature_info", None) or [])
    if not info or not hasattr(net, "forward_intermediates"):
        raise ValueError(f"arch {arch}: timm gives no maps of its stages")
    reductions = [int(level["reduction"]) for level in info]
    levels = stage_levels(reductions)
    maps, norm = _own_maps(net, arch, levels)
    side = maps[-1].shape[-1] * reductions[-1]
    strides = {stage: side / each.shape[-1] for stage, each in zip(levels, maps, strict=True)}
    if any(strides[stage] != reductions[level] for stage, level in levels.items()):
        raise ValueError(f"arch {arch}: its maps do not divide an image into equal squares")
    if output_stride not in (None, reductions[-1]):
        raise ValueError(f"arch {arch}: it cannot be dilated to cells of {output_stride} pixels")
    mean, deviation = (
        tuple(float(value) for value in net.pretrained_cfg[name]) for name in ("mean", "std")
    )
    return Facts(
        levels,
        {stage: int(stride) for stage, stride in strides.items()},
        {stage: each.shape[1] for stage, each in zip(levels, maps, strict=True)},
        norm,
        (mean, deviation),  # type: ignore[arg-type]
    )


def stage_levels(strides: Sequence[int]) -> dict[int, int]:
    """By stage, 1 to 4, the number of its level, from the strides of all levels. Stage 4 is the
    last level. A network with fewer levels has later stages only.
    """
    count = len(strides)
    if count > STAGES and len(set(strides)) == 1:  # blocks, as of a ViT
        return {stage: count * stage // STAGES - 1 for stage in range(1, STAGES + 1)}
    first = max(1, STAGES + 1 - count)
    return {stage: count - 1 - (STAGES - stage) for stage in range(first, STAGES + 1)}


@lru_cache(maxsize=64)
def weights_of(arch: str, stage: int, *, norm: bool = True) -> frozenset[str]:
    """The names of the weights that the map of a stage depends on; `norm`: after the last
    normalisation.
    """
    levels = {stage: facts(arch).levels[stage]}
    with torch.inference_mode(False), torch.enable_grad():  # whatever the caller does
        net = outline(arch)
        _own_maps(net, arch, levels, (norm and facts(arch).norm,))[0][0].sum().backward()
    return frozenset(name for name, weight in net.named_parameters() if weight.grad is not None)


def idle_parts(arch: str) -> list[str]:
    """The parts of the whole network that no map depends on: their weights are never trained."""
    idle = (name for name, _ in outline(arch).named_parameters() if name not in weights_of(arch, 4))
    return list(dict.fromkeys(name.rpartition(".")[0] or name for name in idle))


@lru_cache(maxsize=64)
def patch_size(arch: str) -> int | None:
    """Pixels along one side of the patches of a ViT; None for a network that does not begin with
    one embedding for each patch of images of any size.
    """
    strides, net = set(facts(arch).strides.values()), outline(arch)
    if len(strides) > 1 or not hasattr(net, "patch_embed") or not hasattr(net, "blocks"):
        return None
    (side,) = strides
    try:
        patches = net.patch_embed(torch.empty(2, 3, 2 * side, 3 * side, device="meta"))
    except Exception:  # networks assert and raise as they like
        return None
    return side if tuple(patches.shape) == (2, 2, 3, net.embed_dim) else None


@lru_cache(maxsize=64)
def refused_side(arch: str, stages: int, side: int) -> str | None:
    """Why views of `side` pixels do not fit; None if they do."""
    known = facts(arch)
    stride = max(value for stage, value in known.strides.items() if stage <= stages)
    if side % stride:
        return f"a multiple of {stride}, the stride of {arch}"
    try:
        (found,) = _outlined(outline(arch), side, [known.levels[stages]], known.norm)
    except ValueError as error:
        return f"a size that {arch} takes ({error})"
    if found.shape[-1] * known.strides[stages] != side:
        return f"a size of which {arch} has a map with cells of {known.strides[stages]} pixels"
    return None


def has_drop_path(arch: str) -> bool:
    """Whether any block of the network can be left out."""
    try:
        return any(True for _ in _drop_paths(outline(arch, drop_path=0.5)))
    except ValueError:
        return False


def can_checkpoint(arch: str) -> bool:
    """Whether timm can recompute the network's activations."""
    try:
        outline(arch).set_grad_checkpointing()
    except (AssertionError, AttributeError, TypeError):
        return False
    return True


def read_maps(net: Any, images: Tensor, levels: Sequence[int], norm: bool) -> list[Tensor]:
    """The maps [B, D, h, w] of these levels of timm's `net`, in their order; those after the last
    one are not computed.
    """
    order = sorted(set(levels))
    maps = net.forward_intermediates(
        images,
        indices=order,
        norm=norm,
        stop_early=True,
        output_fmt="NCHW",
        intermediates_only=True,
    )
    return [maps[order.index(level)] for level in levels]


def create(
    name: str,
    *,
    pretrained: bool = False,
    drop_path: float = 0.0,
    output_stride: int | None = None,
) -> Any:
    """timm's network `name`, without classifier, for images of any size if it can. Raises
    ValueError, in one line.
    """
    try:
        import timm
    except ImportError:
        raise ValueError("it needs timm (pip install .[timm])") from None
    stem, dot, _ = name.partition(".")
    if ":" in name:  # a folder, or a place on a hub
        dot = ""
    elif not timm.is_model(stem):
        near = ", ".join(get_close_matches(stem, timm.list_models(), n=3)) or "none"
        raise ValueError(f"timm has no such network; near it: {near}")
    if dot and name not in (tagged := timm.list_pretrained(f"{stem}*")):
        known = ", ".join(each for each in tagged if each.startswith(f"{stem}.")) or "none"
        raise ValueError(f"timm has no such weights; it has: {known}")
    dilation: dict[str, Any] = {} if output_stride is None else {"output_stride": output_stride}
    # Some have a drop path by default: 0 is said too, unless the network does not know the word.
    ways = [dilation | {"drop_path_rate": drop_path}] + [dilation] * (drop_path == 0)
    refusal = ""
    with fails_at_once() if pretrained else nullcontext():  # once: it looks up the hub's name
        for options in (size | way for way in ways for size in SIZES):
            try:
                return timm.create_model(name, pretrained, num_classes=0, **options)
            except TypeError as error:  # it has no such option
                refusal = first_line(error)
            except Exception as error:  # timm's hub and networks raise many types
                raise ValueError(first_line(error)) from None
    if output_stride is not None:
        refusal = f"it cannot be dilated to cells of {output_stride} pixels"
    raise ValueError(refusal)


def padded(images: Tensor, step: int) -> Tensor:
    """Images [B, 3, S, S] with both sides a multiple of `step`: zeros are added on all sides, so
    that the map stays centred on the image (as DINOv2's CenterPadding).
    """
    missing = [-side % step for side in images.shape[2:]]
    if not any(missing):
        return images
    top, left = (amount // 2 for amount in missing)
    return F.pad(images, (left, missing[1] - left, top, missing[0] - top))


def first_line(error: Exception) -> str:
    """The first line of an error's message."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def outline(arch: str, output_stride: int | None = None, drop_path: float = 0.0) -> Any:
    """The network of an architecture, without memory for its weights. Raises ValueError."""
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            return create(timm_name(arch), drop_path=drop_path, output_stride=output_stride)
    except ValueError as error:
        raise ValueError(f"arch {arch}: {error}") from None


def _own_maps(
    net: Any, arch: str, levels: Mapping[int, int], norms: Sequence[bool] = (True, False)
) -> tuple[list[Tensor], bool]:
    """The maps of these levels on images of the network's own size, or of the next one that its
    stride divides; and the first of `norms` that timm can do. Raises ValueError.
    """
    own, last = int(net.pretrained_cfg["input_size"][-1]), int(net.feature_info[-1]["reduction"])
    refusal = ""
    for side in dict.fromkeys((-(-own // last) * last, own)):
        for norm in norms:
            try:
                maps = _outlined(net, side, list(levels.values()), norm)
            except ValueError as error:
                refusal = str(error)
                continue
            if all(each.ndim == 4 and each.shape[2] == each.shape[3] for each in maps):
                return maps, norm
            refusal = "its maps are not square"
    raise ValueError(f"arch {arch}: {refusal}")


def _outlined(net: Any, side: int, levels: list[int], norm: bool) -> list[Tensor]:
    """The maps of two images of `side` pixels, of shapes alone. Raises ValueError."""
    images = torch.empty(2, 3, side, side, device="meta")
    try:
        return read_maps(net, images, levels, norm)
    except Exception as error:  # networks assert and raise as they like
        raise ValueError(first_line(error)) from None


def _drop_paths(net: nn.Module) -> list[Any]:
    return [module for module in net.modules() if type(module).__name__ == "DropPath"]
