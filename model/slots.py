"""Packs the active slots that are contrasted into buffers of fixed size (paper, section 3.3).

A slot is active in a view if it wins at least one cell. Only the device knows how many slots are
active. With buffers of fixed size the host does not need that number, so it never waits for the
device. Empty positions of a buffer are masked out of everything that follows.
B images, K prototypes, D features, N = B·K slots of one view, C positions of a buffer.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from model.distributed import all_gather, all_reduce_max, all_reduce_sum, rank
from model.masked_norm import masked_batch_norm

ROUNDING = 256
"""Capacities are multiples of this, so that they seldom change."""


class SlotCapacity(NamedTuple):
    """Positions for active slots, per direction of the loss and process; equal on all ranks."""

    queries: int
    """For slots that are active in the student's view and in the teacher's other view."""
    keys: int
    """For slots that are active in the teacher's view."""

    def with_margin(self, limit: int) -> "SlotCapacity":
        """A quarter more, rounded up to `ROUNDING`; at most `limit`, the largest possible count."""
        steps = (max(1, math.ceil(1.25 * count / ROUNDING)) for count in self)
        return SlotCapacity(*(step * ROUNDING for step in steps)).within(limit)

    def within(self, limit: int) -> "SlotCapacity":
        """At most `limit` of each."""
        return SlotCapacity(min(self.queries, limit), min(self.keys, limit))


class Packed(NamedTuple):
    """The active rows of N, in their order, at the first of C positions."""

    row: Tensor
    """int64 [C]: the row at each position; any row at an empty position."""
    valid: Tensor
    """bool [C]: whether the position holds an active row."""
    position: Tensor
    """int64 [N]: the position of each row; C for rows without one."""


class Contrast(NamedTuple):
    """The inputs of a loss between slots, for one direction."""

    queries: Tensor
    """[C, D] predicted student slots, not normalised."""
    keys: Tensor
    """[M, D] teacher slots of all ranks, not normalised; M = world size · capacity.keys."""
    positive: Tensor
    """int64 [C]: the key of the same prototype in the same image."""
    valid_queries: Tensor
    """bool [C]: whether the position holds a query."""
    valid_keys: Tensor
    """bool [M]: whether the position holds a key."""
    enough: Tensor
    """bool scalar: whether there is a query; with BatchNorms, whether the predictor normalised at
    least two together. Otherwise its output means nothing."""


def largest_counts(pairs: Tensor, keys: Tensor) -> Tensor:
    """Active pairs and keys of the direction that has more of them: two bool [2, B, K] -> [2]."""
    return torch.stack([active.flatten(1).sum(dim=1).amax() for active in (pairs, keys)])


def read_capacities(counts: Sequence[Tensor]) -> list[SlotCapacity]:
    """The largest of each of `counts` [2] of any rank. The host waits for the device here, once."""
    return [SlotCapacity(*pair) for pair in all_reduce_max(torch.stack(tuple(counts))).tolist()]


def pack(active: Tensor, capacity: int) -> Packed:
    """Give each active row (bool [N]) one of `capacity` (at most N) positions, in order, until the
    positions are used up."""
    order = active.cumsum(0) - 1
    position = torch.where(active & (order < capacity), order, capacity)
    rows = torch.arange(len(active), device=active.device)
    positions = torch.arange(capacity + 1, device=active.device)  # the last: rows without one
    row = positions.scatter(0, position, rows)[:capacity]
    return Packed(row, positions[:capacity] < active.sum(), position)


def contrast(
    predictor: nn.Sequential,
    student_slots: Tensor,
    teacher_slots: Tensor,
    pairs: Tensor,
    keys_active: Tensor,
    capacity: SlotCapacity,
) -> Contrast:
    """One direction: queries of this rank, keys of all ranks.

    student_slots, teacher_slots [B, K, D]; pairs bool [B, K]: active in both; keys_active
    bool [B, K]: active in the teacher's view. Every rank runs the same collectives, whichever
    slots are active. A pair is dropped if its query or its key does not fit into the buffers.
    """
    keys = pack(keys_active.flatten(), capacity.keys)
    queries = pack(pairs.flatten() & (keys.position < capacity.keys), capacity.queries)
    count = queries.valid.sum()
    if synchronised(predictor):
        count = all_reduce_sum(count)
    rows = student_slots.flatten(0, 1).index_select(0, queries.row)
    positive = keys.position[queries.row] + rank() * capacity.keys
    return Contrast(
        queries=predict(predictor, rows, queries.valid, count),
        keys=all_gather(teacher_slots.flatten(0, 1).index_select(0, keys.row)),
        positive=torch.where(queries.valid, positive, 0),
        valid_queries=queries.valid,
        valid_keys=all_gather(keys.valid),
        enough=count > (1 if any(isinstance(part, _BatchNorm) for part in predictor) else 0),
    )


def synchronised(predictor: nn.Sequential) -> bool:
    """Whether the predictor's BatchNorms normalise the rows of all ranks together."""
    return predictor.training and any(isinstance(part, nn.SyncBatchNorm) for part in predictor)


def predict(predictor: nn.Sequential, rows: Tensor, valid: Tensor, count: Tensor) -> Tensor:
    """`predictor` of `rows`, with BatchNorms that see only the valid ones: [C, D] -> [C, D].

    valid bool [C]; count: the valid rows that are normalised together, see `masked_batch_norm`.
    """
    for layer in predictor:
        if isinstance(layer, _BatchNorm):
            rows = masked_batch_norm(layer, rows, valid, count)
        else:
            rows = layer(rows)
    return rows
