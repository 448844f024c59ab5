"""The image-level objective of an ablation (paper, table 8d): a contrast between whole images.

The paper calls it MoCo v3-like and gives no details. Our choices keep it as close as possible to
the contrast between slots:
- an image is the mean of its projected cells, so a predictor is the only additional head;
- this predictor has the shape of the slot predictor, and separate weights;
- temperature and factor are those of the slots;
- the keys are the teacher's other views of all images of all ranks.

B images, D features, H W cells.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.distributed import all_gather, rank
from model.precision import full_precision


def image_loss(
    student: Tensor, teacher: Tensor, predictor: nn.Module, temperature: float
) -> Tensor:
    """One direction: InfoNCE between whole images, a scalar.

    student, teacher [B, D, H, W]: the projector's output for one view and for the other. B is equal
    on all ranks; `predictor` must normalise at least 2 images together.

        query[b] = predictor(mean over cells of student[b])
        logit[b, m] = cosine(query[b], mean over cells of teacher[m]) / temperature
        loss += -log softmax over m of logit[b, m], at m = b

    divided by B, times 2·temperature; m counts the images of all ranks.
    """
    queries = predictor(student.mean(dim=(2, 3)))
    return _info_nce(queries, all_gather(teacher.mean(dim=(2, 3))), temperature)


@full_precision
def _info_nce(queries: Tensor, keys: Tensor, temperature: float) -> Tensor:
    """queries [B, D]; keys [W·B, D] of W ranks, those of this rank from row rank · B on."""
    logits = F.normalize(queries, dim=1) @ F.normalize(keys, dim=1).T / temperature
    positive = torch.arange(len(queries), device=queries.device) + rank() * len(queries)
    return F.cross_entropy(logits, positive) * (2 * temperature)
