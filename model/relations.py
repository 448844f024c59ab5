"""Relations between cells: a term that lets a teacher of any width teach.

Which other cells of the batch a cell is like, in the teacher's space, is what the student learns to
reproduce in its own. Relatives: PaKA (arXiv 2509.05606), which aligns the two kernels, and NeCo
(Pariza et al., arXiv 2408.11054), which sorts the neighbours; here their order is soft. B images,
D and C features, H W cells, n of them sampled.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from model.cells import chosen_rows
from model.distributed import all_gather, rank
from model.precision import full_precision


@full_precision
def relation_loss(
    student: Tensor, teacher: Tensor, overlapping: Tensor, chosen: Tensor, temperature: float
) -> Tensor:
    """One direction: KL between the relations of the chosen cells, a scalar.

    student [B, D, H, W], teacher [B, C, H, W]: features of one and of the other view, aligned on
    the shared pixels; overlapping bool [B]: whether there are such pixels; chosen int64 [B, n]. In
    each space the mean of the chosen cells of all ranks is taken off. Then for each chosen cell i,
    with all other ones j of all ranks:

        p = softmax over j of cosine(teacher[i], teacher[j]) / temperature
        q = softmax over j of cosine(student[i], student[j]) / temperature
        loss += Σ_j p[j]·(log p[j] − log q[j])

    The sum is divided by the number of these i on this rank. The student's cells j and the mean are
    constants, as keys are elsewhere: gradients flow through the cells i. Cells of images without
    shared pixels are neither i nor j. With fewer than two cells the loss is zero.
    """
    valid = overlapping.repeat_interleave(chosen.shape[1], output_size=chosen.numel())
    keys = all_gather(valid)
    own = torch.arange(len(valid), device=valid.device) + rank() * len(valid)
    others = keys & (torch.arange(len(keys), device=keys.device) != own[:, None])
    q, p = (
        _log_relations(chosen_rows(maps, chosen), keys, others, temperature)
        for maps in (student, teacher.detach())
    )
    divergence = (p.exp() * (p - q)).sum(dim=1)
    total = torch.where(valid & (keys.sum() > 1), divergence, 0.0).sum()
    return total / valid.sum().clamp(min=1)


def _log_relations(rows: Tensor, keys: Tensor, others: Tensor, temperature: float) -> Tensor:
    """Log of the softmax over all cells but those outside of `others` [N, M]: [N, M]."""
    everywhere = all_gather(rows)
    mean = torch.where(keys[:, None], everywhere, 0.0).sum(dim=0) / keys.sum().clamp(min=1)
    directions = F.normalize(everywhere - mean, dim=1)
    logits = F.normalize(rows - mean, dim=1) @ directions.T / temperature
    # Not −∞: 0 · (−∞ + ∞) is not a number.
    return logits.masked_fill(~others, torch.finfo(logits.dtype).min).log_softmax(dim=1)
