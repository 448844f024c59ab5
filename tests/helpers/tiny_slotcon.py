"""A SlotCon small enough for a test, and inputs that set the number of active slots.

Views of 32 pixels give maps of one cell, so each image has exactly one active slot per branch.
"""

import torch
from torch import Tensor, nn

from model import ModelConfig, SlotCon

IMAGES = 3


def tiny_model(**fields: object) -> SlotCon:
    """A trainable ResNet-18 model with six prototypes, the same on every call."""
    torch.manual_seed(0)
    sizes = {"dim_hidden": 16, "dim_out": 16, "num_prototypes": 2 * IMAGES}
    model = SlotCon(ModelConfig(arch="resnet18", **{**sizes, **fields}))  # type: ignore[arg-type]
    return model.train()


def tiny_batch(side: int = 32, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """(views, overlap, flipped); both views of an image are the whole image."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(IMAGES, 3, side, side, generator=generator)
    overlap = torch.tensor([0.0, 0.0, 1.0, 1.0]).expand(2, IMAGES, 4)
    return torch.stack((images, images)), overlap, torch.zeros(2, IMAGES, dtype=torch.bool)


def tiny_crops(seed: int = 3, side: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    """A batch of different views, with every kind of box and flip."""
    generator = torch.Generator().manual_seed(seed)
    views = torch.randn(2, IMAGES, 3, side, side, generator=generator)
    first, size = torch.rand(2, 2, IMAGES, 2, generator=generator) / 2
    return views, torch.cat((first, first + size), dim=-1), torch.tensor([[0, 1, 1], [0, 0, 1]]) > 0


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """The gradient of every trainable parameter; fails if one is missing or not finite."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, f"{name} has no gradient"
            assert torch.isfinite(parameter.grad).all(), name
            found[name] = parameter.grad
    return found


@torch.no_grad()
def set_agreement(model: SlotCon, views: Tensor, pairs: int) -> None:
    """Set prototypes such that exactly `pairs` images have an active pair of slots.

    Prototype b of the student is image b's feature, prototype IMAGES + b its opposite. In the
    teacher, the two are swapped for images that must not have a pair.
    """
    for branch in (model.student, model.teacher):
        feature = branch(views[0]).features.flatten(1)
        disagree = torch.arange(IMAGES)[:, None] >= (pairs if branch is model.teacher else IMAGES)
        sign = torch.where(disagree, -1.0, 1.0)
        branch.grouping.prototypes.copy_(torch.cat((sign * feature, -sign * feature)))
