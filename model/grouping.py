"""Semantic grouping: cells are assigned to prototypes and pooled into slots (paper, section 3.1).

B images, K prototypes, D features, H W cells.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.precision import full_precision


class SemanticGrouping(nn.Module):
    """K learned prototypes, shared by all images and initialised from N(0, 1). `temperature` and
    `floor` are those of `pool_slots`."""

    def __init__(
        self, num_prototypes: int, dim: int, temperature: float, floor: float = 1e-6
    ) -> None:
        super().__init__()
        self.temperature, self.floor = temperature, floor
        self.prototypes = nn.Parameter(torch.randn(num_prototypes, dim))

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Group `features` [B, D, H, W] into (slots [B, K, D], scores [B, K, H, W])."""
        scores = cosine_scores(features, self.prototypes)
        return pool_slots(features, scores, self.temperature, self.floor), scores


@full_precision
def cosine_scores(features: Tensor, prototypes: Tensor) -> Tensor:
    """Cosine of every cell [B, D, H, W] with every prototype [K, D]: [B, K, H, W]."""
    return torch.einsum(
        "kd,bdhw->bkhw", F.normalize(prototypes, dim=1), F.normalize(features, dim=1)
    )


@full_precision
def pool_slots(features: Tensor, scores: Tensor, temperature: float, floor: float = 1e-6) -> Tensor:
    """Mean of the (un-normalised) features [B, D, H, W] under each slot's assignment: [B, K, D].

    a[b, k, i] = softmax over k of scores[b, k, i] / temperature, + floor
    slot[b, k] = Σ_i a[b, k, i]·features[b, :, i] / Σ_i a[b, k, i]        i: the H·W cells

    With the floor a slot is a mean of cells even if no cell prefers it.
    """
    assignment = (scores / temperature).softmax(dim=1) + floor
    share = assignment / assignment.sum(dim=(2, 3), keepdim=True)
    return torch.einsum("bdhw,bkhw->bkd", features, share)


def won_cells(scores: Tensor) -> Tensor:
    """Number of cells whose arg-max is each slot: [B, K, H, W] -> int64 [B, K]."""
    winner = scores.argmax(dim=1).flatten(1)
    won = torch.zeros(scores.shape[:2], dtype=torch.long, device=scores.device)
    return won.scatter_add_(1, winner, torch.ones_like(winner))


def winning_slots(scores: Tensor) -> Tensor:
    """Whether each slot is the arg-max of at least one cell: [B, K, H, W] -> bool [B, K]."""
    return won_cells(scores) > 0
