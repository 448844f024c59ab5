"""The losses, each a function of tensors alone (SlotCon's paper, sections 3.2 and 3.3).

B images, K prototypes, D features, H W cells, N query slots, M key slots.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from model.precision import full_precision


@full_precision
def grouping_loss(
    student: Tensor,
    teacher: Tensor,
    center: Tensor,
    overlapping: Tensor,
    student_temp: float,
    teacher_temp: float,
) -> Tensor:
    """Cross-entropy from the teacher's grouping of a cell to the student's, a scalar.

    student, teacher [B, K, H, W] aligned scores; center [1, K]; overlapping bool [B]: whether the
    two views share pixels. Pairs that share none are excluded. If no pair remains, the loss is a
    zero through which gradients (all zero) still flow. For each overlapping image b and cell i:

        p = softmax((teacher[b, :, i] - center) / teacher_temp)
        q = softmax(student[b, :, i] / student_temp)
        loss += -Σ_k p[k]·log q[k]

    The sum is divided by the number of these cells.
    """
    per_cell = _cross_entropy(student, teacher, center, student_temp, teacher_temp)
    kept = torch.where(overlapping, per_cell.mean(dim=(1, 2)), 0.0)
    return kept.sum() / overlapping.sum().clamp(min=1)


@full_precision
def masked_loss(
    student: Tensor,
    teacher: Tensor,
    center: Tensor,
    masks: Tensor,
    student_temp: float,
    teacher_temp: float,
) -> Tensor:
    """The same cross-entropy within one view, at the cells that the student did not see: a scalar
    (SlotMIM, arXiv 2503.06960).

    student, teacher [B, K, H, W] scores of the same view; masks bool [B, H, W]: what was hidden
    from the student. It is the mean over all hidden cells of the batch, whichever images they are
    of. Without one it is a zero through which gradients (all zero) still flow.
    """
    per_cell = _cross_entropy(student, teacher, center, student_temp, teacher_temp)
    return torch.where(masks, per_cell, 0.0).sum() / masks.sum().clamp(min=1)


def _cross_entropy(
    student: Tensor, teacher: Tensor, center: Tensor, student_temp: float, teacher_temp: float
) -> Tensor:
    """Of each cell, from the teacher's grouping to the student's: [B, H, W]."""
    target = ((teacher - center[:, :, None, None]) / teacher_temp).softmax(dim=1)
    log_prediction = (student / student_temp).log_softmax(dim=1)
    return -(target * log_prediction).sum(dim=1)


@full_precision
def slot_loss(
    queries: Tensor,
    keys: Tensor,
    positive: Tensor,
    valid_queries: Tensor,
    valid_keys: Tensor,
    temperature: float,
) -> Tensor:
    """InfoNCE between predicted student slots and the teacher slots of all images, a scalar.

    queries [N, D], keys [M, D], neither normalised; positive int64 [N] is the key of the same
    prototype in the same image; valid_queries bool [N] and valid_keys bool [M] are their masks.
    For each valid query n, with all valid keys m:

        logit[m] = cosine(queries[n], keys[m]) / temperature
        loss += -log(exp(logit[positive[n]]) / Σ_m exp(logit[m]))

    The sum is divided by the number of valid queries and multiplied by 2·temperature. Without valid
    queries it is a zero through which gradients still flow. At least one key must be valid.
    """
    excluded = torch.zeros_like(valid_keys, dtype=queries.dtype)
    excluded.masked_fill_(~valid_keys, -torch.inf)
    scaled = F.normalize(queries, dim=1) / temperature
    logits = torch.addmm(excluded, scaled, F.normalize(keys, dim=1).T)
    per_query = F.cross_entropy(logits, positive, reduction="none")
    total = torch.where(valid_queries, per_query, 0.0).sum()
    return total / valid_queries.sum().clamp(min=1) * (2 * temperature)


@full_precision
def slot_regression(queries: Tensor, targets: Tensor, valid_queries: Tensor) -> Tensor:
    """BYOL's loss between predicted student slots and their positives, a scalar (table 8b).

    queries, targets [N, D], neither normalised; targets[n] is the teacher's slot of the same
    prototype in the same image; valid_queries bool [N] is the mask. The paper only names the loss.
    Our choices: queries, predictor and positives are the same as for `slot_loss`, and the scale is
    BYOL's, so that the loss lies in 0..4. For each valid query n:

        loss += 2 - 2·cosine(queries[n], targets[n])

    The sum is divided by the number of valid queries. Without any it is a zero through which
    gradients still flow.
    """
    cosine = (F.normalize(queries, dim=1) * F.normalize(targets, dim=1)).sum(dim=1)
    total = torch.where(valid_queries, 2 - 2 * cosine, 0.0).sum()
    return total / valid_queries.sum().clamp(min=1)
