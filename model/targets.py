"""Balanced targets: the teacher's shares of the prototypes are pulled towards equal ones.

K prototypes, H W cells.
"""

import torch
from torch import Tensor

from model.distributed import all_reduce_mean
from model.precision import full_precision

ITERATIONS = 3
"""As in SwAV (Caron et al., arXiv 2006.09882, section 3.1)."""


@torch.no_grad()
@full_precision
def balancing_offset(scores: Tensor, power: float, temperature: float) -> Tensor:
    """The offset [1, K] of scores [..., K, H, W] that balances softmax((scores − offset) / τ).

    Scaling for optimal transport with one soft marginal (Chizat et al., arXiv 1607.05816, section
    4.3: the scaling's exponent is λ / (λ + ε) for a marginal that a KL divergence pulls). Each cell
    has mass 1; prototype k's mass without its own scaling is m[k], over the cells of all ranks:

        scale[k] = m[k]^−power          power 1: equal shares; 0: no change

    `ITERATIONS` times, from scale 1. It needs a collective each, of K values; the host waits for
    none of them. Like the centre it comes from the maps as they are, not from the aligned ones, so
    that each cell counts once. B is equal on all ranks.
    """
    logits = scores.movedim(-3, -1).flatten(0, -2) / temperature
    log_scale = logits.new_zeros(logits.shape[-1])
    for _ in range(ITERATIONS):
        share = all_reduce_mean((logits + log_scale).softmax(dim=1).mean(dim=0))
        log_share = share.clamp(min=torch.finfo(share.dtype).tiny).log()
        log_scale = power * (log_scale - log_share)
    return -temperature * log_scale[None]
