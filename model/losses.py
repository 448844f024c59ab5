"""The two losses of SlotCon, each a function of tensors alone (paper, sections 3.2 and 3.3).

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

    student, teacher [B, K, H, W] aligned scores; center [1, K]; overlapping bool [B] says which
    pairs share pixels. The others are left out; if none is left the loss is zero, still joined to
    the graph. For each overlapping image b and cell i:

        p = softmax((teacher[b, :, i] - center) / teacher_temp)
        q = softmax(student[b, :, i] / student_temp)
        loss += -Σ_k p[k]·log q[k]
    divided by the number of cells that entered.
    """
    target = ((teacher - center[:, :, None, None]) / teacher_temp).softmax(dim=1)
    log_prediction = (student / student_temp).log_softmax(dim=1)
    per_image = -(target * log_prediction).sum(dim=1).mean(dim=(1, 2))
    kept = torch.where(overlapping, per_image, 0.0)
    return kept.sum() / overlapping.sum().clamp(min=1)


@full_precision
def slot_loss(queries: Tensor, keys: Tensor, positive: Tensor, temperature: float) -> Tensor:
    """InfoNCE between predicted student slots and the teacher slots of all images, a scalar.

    queries [N, D], keys [M, D], neither normalised; positive int64 [N] is the key of the same
    prototype in the same image. For each query n:

        logit[m] = cosine(queries[n], keys[m]) / temperature
        loss += -log(exp(logit[positive[n]]) / Σ_m exp(logit[m]))
    divided by N, times 2·temperature. Without queries: zero, still joined to the graph.
    """
    logits = F.normalize(queries, dim=1) @ F.normalize(keys, dim=1).T / temperature
    total = F.cross_entropy(logits, positive, reduction="sum")
    return total / max(len(queries), 1) * (2 * temperature)
