"""Which slots are contrasted, brought into buffers of fixed size (paper, section 3.3).

A slot is active in a view if it wins at least one cell. How many are active is known only on the
device. In buffers whose size is known beforehand nothing has to ask for that number, so the host
never waits for the device; places that stay empty are masked out of everything that follows.
B images, K prototypes, D features, N = B·K slots of one view, C places of a buffer.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from model.distributed import all_gather, all_reduce_max, all_reduce_sum, rank
from model.masked_norm import masked_batch_norm

ROUNDING = 256
"""Capacities are multiples of this, so that they seldom change."""


class SlotCapacity(NamedTuple):
    """Places for active slots, per direction of the loss and process; equal on all ranks."""

    queries: int
    """Slots active in the student's view and in the teacher's other view."""
    keys: int
    """Slots active in the teacher's view."""

    def with_margin(self, limit: int) -> "SlotCapacity":
        """A quarter more, rounded up to `ROUNDING`; at most `limit`, the most that can occur."""
        steps = (max(1, math.ceil(1.25 * count / ROUNDING)) for count in self)
        return SlotCapacity(*(step * ROUNDING for step in steps)).within(limit)

    def within(self, limit: int) -> "SlotCapacity":
        """At most `limit` of each."""
        return SlotCapacity(min(self.queries, limit), min(self.keys, limit))


class Packed(NamedTuple):
    """The active ones of N rows, in their order, in the first of C places."""

    row: Tensor
    """int64 [C]: the row at each place; any row at an empty place."""
    taken: Tensor
    """bool [C]: whether the place holds an active row."""
    place: Tensor
    """int64 [N]: the place of each row; C for rows that have none."""


class Contrast(NamedTuple):
    """What a loss between slots needs, for one direction."""

    queries: Tensor
    """[C, D] predicted student slots, not normalised."""
    keys: Tensor
    """[M, D] teacher slots of all ranks, not normalised; M = world · capacity.keys."""
    positive: Tensor
    """int64 [C]: the key of the same prototype in the same image."""
    asked: Tensor
    """bool [C]: which queries are there."""
    offered: Tensor
    """bool [M]: which keys are there."""
    enough: Tensor
    """bool scalar: whether two queries at least were normalised together; if not, the predictor's
    output means nothing."""


def largest_counts(pairs: Tensor, keys: Tensor) -> Tensor:
    """Active pairs and keys of the direction that has more of them: two bool [2, B, K] -> [2]."""
    return torch.stack([active.flatten(1).sum(dim=1).amax() for active in (pairs, keys)])


def read_capacity(counts: Tensor) -> SlotCapacity:
    """The largest `counts` [2] of any rank. This is a host synchronisation."""
    queries, keys = all_reduce_max(counts).tolist()
    return SlotCapacity(queries, keys)


def pack(active: Tensor, capacity: int) -> Packed:
    """Give active rows (bool [N]) one of `capacity` (up to N) places each, in order, as long as
    there is room."""
    order = active.cumsum(0) - 1
    place = torch.where(active & (order < capacity), order, capacity)
    everything = torch.arange(len(active), device=active.device)
    places = torch.arange(capacity + 1, device=active.device)  # the last for rows that have none
    row = places.scatter(0, place, everything)[:capacity]
    return Packed(row, places[:capacity] < active.sum(), place)


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
    bool [B, K]: active in the teacher's view. Every rank makes the same collectives, whatever is
    active. A pair is left out if there is no room for it or for its key.
    """
    keys = pack(keys_active.flatten(), capacity.keys)
    queries = pack(pairs.flatten() & (keys.place < capacity.keys), capacity.queries)
    count = queries.taken.sum()
    if predictor.training and any(isinstance(layer, nn.SyncBatchNorm) for layer in predictor):
        count = all_reduce_sum(count)
    rows = student_slots.flatten(0, 1).index_select(0, queries.row)
    positive = keys.place[queries.row] + rank() * capacity.keys
    return Contrast(
        queries=_predict(predictor, rows, queries.taken, count),
        keys=all_gather(teacher_slots.flatten(0, 1).index_select(0, keys.row)),
        positive=torch.where(queries.taken, positive, 0),
        asked=queries.taken,
        offered=all_gather(keys.taken),
        enough=count > 1,
    )


def _predict(predictor: nn.Sequential, rows: Tensor, taken: Tensor, count: Tensor) -> Tensor:
    """`predictor` of the taken rows, whose BatchNorms see no others: [C, D] -> [C, D]."""
    for layer in predictor:
        if isinstance(layer, _BatchNorm):
            rows = masked_batch_norm(layer, rows, taken, count)
        else:
            rows = layer(rows)
    return rows
