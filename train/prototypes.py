"""Prototypes to begin with: centres of the cells that the networks see, not random directions.

Random directions suit a random network. A trained one has cells in a few narrow cones, and most
random prototypes would never win one.

N cells, D features, K prototypes.
"""

from collections.abc import Iterable, Iterator

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor
from torch.nn import functional as F

from model import SlotCon
from model.kmeans import kmeans
from pipeline.errors import UserError
from pipeline.source import Batch

MOST_CELLS = 2**16
"""Most cells to cluster, of the first images of the first epoch, over all processes."""


@torch.no_grad()
def place_prototypes(
    slotcon: SlotCon, batches: Iterable[Batch], accelerator: Accelerator, seed: int
) -> None:
    """Set the prototypes of student and teacher, and those of a frozen teacher, by spherical
    k-means of cells. All processes call it and get the same ones.

    Without a frozen teacher the cells are the student's projections, and their centres are its
    prototypes. With one they are its own cells without their mean; a prototype of the student
    begins as the mean direction of its projections of a cluster's cells. They have the length of
    random ones, √D, so that a learning rate turns them as much. Raises UserError if there are fewer
    cells than prototypes.
    """
    pairs = list(_cells(slotcon, batches, accelerator))
    own = torch.cat([cells for cells, _ in pairs])[:MOST_CELLS]
    if len(own) < slotcon.config.num_prototypes:
        raise UserError(
            f"model.prototype_init: {len(own)} cells are fewer than "
            f"{slotcon.config.num_prototypes} prototypes"
        )
    guide, count = slotcon.guide, slotcon.config.num_prototypes
    if guide is None:
        centres = kmeans(own, count, seed).centres
    else:
        cells = torch.cat([theirs for _, theirs in pairs])[:MOST_CELLS]
        guide.mean.copy_(broadcast(cells.mean(dim=0)))
        clusters = kmeans(cells - guide.mean, count, seed)
        guide.prototypes.copy_(broadcast(clusters.centres))
        nearest = (F.normalize(cells - guide.mean, dim=1) @ guide.prototypes.T).argmax(dim=1)
        sums = own.new_zeros(count, own.shape[1]).index_add_(0, nearest, F.normalize(own, dim=1))
        none = sums.norm(dim=1, keepdim=True) == 0
        centres = torch.where(none, slotcon.student.grouping.prototypes, sums)
    centres = F.normalize(centres, dim=1) * centres.shape[1] ** 0.5
    for branch in (slotcon.student, slotcon.teacher):
        branch.grouping.prototypes.copy_(broadcast(centres))


def _cells(
    slotcon: SlotCon, batches: Iterable[Batch], accelerator: Accelerator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Of each view of the first batches, over all processes: the student's cells [N, D], and the
    frozen teacher's cells at the same places [N, C], if there is one.
    """
    guide, found = slotcon.guide, 0
    for batch in batches:
        for view in batch.views:
            with accelerator.autocast():
                maps = slotcon.student(view if guide is None else guide.shrunk(view)).features
                theirs = maps if guide is None else guide.features(view, maps.shape[-2:])
            yield tuple(
                accelerator.gather(each.float().movedim(1, -1).flatten(0, -2))
                for each in (maps, theirs)
            )
            found += len(maps) * maps.shape[-2] * maps.shape[-1] * accelerator.num_processes
        if found >= MOST_CELLS:
            break
