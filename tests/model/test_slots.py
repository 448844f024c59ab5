"""Active slots in buffers of fixed size, and BatchNorm over the valid rows of a buffer."""

import copy
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from model import SlotCon
from model.heads import build_predictor
from model.masked_norm import masked_batch_norm
from model.slots import SlotCapacity, contrast, pack
from tests.helpers.host_sync import host_syncs
from tests.helpers.processes import run_workers
from tests.helpers.tiny_slotcon import IMAGES, set_agreement, tiny_batch, tiny_model

D = 4
ROOMY = SlotCapacity(queries=15, keys=17)
"""More than the 3 · 4 slots that can win a cell in the tiny model's views of 64 pixels."""


@given(st.lists(st.booleans(), min_size=1, max_size=30), st.integers(0, 35))
def test_pack_takes_the_first_active_rows_in_order(active: list[bool], capacity: int) -> None:
    """A row at a wrong position would be contrasted with the key of another slot."""
    capacity = min(capacity, len(active))
    packed = pack(torch.tensor(active), capacity)
    assert packed.row.lt(len(active)).all()
    expected = [row for row, is_active in enumerate(active) if is_active][:capacity]
    assert packed.row.shape == packed.valid.shape == (capacity,)
    assert packed.row[packed.valid].tolist() == expected
    positions = dict(zip(expected, range(capacity), strict=False))
    assert packed.position.tolist() == [positions.get(row, capacity) for row in range(len(active))]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_masked_norm_is_batchnorm_of_the_valid_rows(dtype: torch.dtype) -> None:
    """Empty positions must not enter the mean, the variance or a gradient."""
    generator = torch.Generator().manual_seed(0)
    rows = (3 + torch.randn(9, D, generator=generator)).to(dtype).requires_grad_()
    upstream = torch.randn(9, D, generator=generator).to(dtype)
    valid = torch.tensor([True, False, True, True, False, True, False, True, False])
    ours = nn.BatchNorm1d(D, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    nn.init.normal_(ours.weight)
    theirs = copy.deepcopy(ours)

    mine = masked_batch_norm(ours, rows, valid, valid.sum())
    mine.backward(upstream)
    packed = rows.detach()[valid].requires_grad_()
    expected = theirs(packed)
    expected.backward(upstream[valid])
    assert mine.dtype == dtype
    torch.testing.assert_close(mine[valid], expected)
    assert rows.grad is not None
    assert packed.grad is not None
    torch.testing.assert_close(rows.grad[valid], packed.grad)
    assert not rows.grad[~valid].any()
    for mine, expected in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, expected.grad)
    for mine, expected in zip(ours.buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(mine, expected)

    torch.testing.assert_close(masked_batch_norm(ours.eval(), rows, valid, valid.sum()), ours(rows))


def one_step(model: SlotCon, batch: tuple[Tensor, Tensor, Tensor]) -> dict[str, Tensor]:
    """Losses, counts, gradients and buffers after one forward and backward pass."""
    output = model(*batch)
    output.loss.backward()
    result = {"loss": output.loss.detach(), **output.terms, **output.stats}
    result |= {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return result | {name: b for name, b in model.named_buffers() if name != "largest_counts"}


@pytest.mark.parametrize("capacity", [ROOMY, SlotCapacity(1000, 1000)])
def test_static_selection_is_exact_selection(capacity: SlotCapacity) -> None:
    """Neither the size of the buffers nor their empty positions may change the method. Buffers for
    a larger batch may have more positions than this batch has slots."""
    exact, static = tiny_model().double(), tiny_model().double()
    static.capacity = capacity
    views, overlap, flipped = tiny_batch(side=64)
    batch = views.double(), overlap, flipped
    expected, ours = (one_step(model, batch) for model in (exact, static))
    assert ours["active_pairs"] > 1
    assert ours["dropped_pairs"] == 0
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("pairs", [0, 1, 2])
def test_few_pairs_in_static_selection(pairs: int) -> None:
    """A direction with fewer than two pairs is set to zero on the device, without NaN."""
    model, batch = tiny_model(), tiny_batch()
    set_agreement(model, batch[0], pairs)
    model.capacity = SlotCapacity(queries=3, keys=3)
    result = one_step(model, batch)
    assert (result["slot_12"] > 0) == (pairs == 2)
    assert result["predictor.1.num_batches_tracked"] == (2 if pairs == 2 else 0)
    assert all(value.isfinite().all() for value in result.values())
    assert result["predictor.0.weight"].any() == (pairs == 2)


@pytest.mark.parametrize("capacity", [SlotCapacity(2, 9), SlotCapacity(9, 2), SlotCapacity(9, 9)])
def test_dropped_pairs_are_counted(capacity: SlotCapacity) -> None:
    """If a query or its key does not fit, the pair is dropped, and the log says how many were."""
    model, batch = tiny_model(), tiny_batch()
    set_agreement(model, batch[0], pairs=IMAGES)  # one pair in each image, both directions
    model.capacity = capacity
    result = one_step(model, batch)
    kept = min(IMAGES, *capacity)
    assert result["active_pairs"] == 1
    assert result["dropped_pairs"].item() == pytest.approx((IMAGES - kept) / IMAGES)
    assert result["loss"].isfinite()


def test_capacity_follows_the_largest_counts() -> None:
    """Too small a capacity drops pairs; one that only grows costs memory until the run ends."""
    model = tiny_model()
    model(*tiny_batch(side=64))
    most = [int(count) for count in model.largest_counts]
    assert 2 <= most[0] <= most[1] <= 4 * IMAGES
    model(*tiny_batch())  # fewer cells, fewer slots: the maximum stays
    assert model.largest_counts.tolist() == most

    model(*tiny_batch(side=64))
    model.adapt_capacity()
    assert model.capacity == SlotCapacity(4 * IMAGES, 4 * IMAGES)  # the largest possible count
    assert not model.largest_counts.any()
    assert SlotCapacity(0, 1000).with_margin(10_000) == SlotCapacity(256, 1280)
    assert SlotCapacity(205, 204).with_margin(10_000) == SlotCapacity(512, 256)
    assert "largest_counts" not in model.state_dict()


def test_static_selection_never_waits() -> None:
    """With one synchronisation per step the GPU idles while the host prepares the next step."""
    model, batch = tiny_model(), tiny_batch(side=64)
    with host_syncs() as exact:
        one_step(model, batch)
    assert exact == {"tolist": 1}
    model.capacity = ROOMY
    with host_syncs() as static:
        model.update_teacher(0.9)
        model(*batch).loss.backward()
    assert not static


def test_host_syncs_are_seen() -> None:
    """`host_syncs`, which the test above uses, must see each kind of synchronisation."""
    rows = torch.arange(3.0, requires_grad=True)
    with host_syncs() as result:
        (rows[rows > 0] ** 2).sum().backward()
        float(rows.detach().sum())
        rows.nonzero()
        rows.detach().cpu()
    assert result["cpu"] == result["_local_scalar_dense"] == 1
    assert result["nonzero"] + result["index"] + result["index_put_"] > 1


@pytest.mark.cuda
def test_static_selection_never_waits_for_a_gpu() -> None:
    """The same, as CUDA reports it; CUDA also sees copies."""
    model = tiny_model().cuda()
    batch = [tensor.cuda() for tensor in tiny_batch(side=64)]
    one_step(model, batch)  # type: ignore[arg-type]
    model.adapt_capacity()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model.update_teacher(0.9)
        model(*batch).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _slots() -> tuple[nn.Sequential, dict[str, Tensor]]:
    """A predictor, and slots of two images per rank; the number of active slots differs by rank."""
    generator = torch.Generator().manual_seed(3)
    predictor = build_predictor(D, 8, D).double()
    for parameter in predictor.parameters():
        nn.init.normal_(parameter, generator=generator)
    keys = torch.rand(4, 5, generator=generator) > 0.4
    pairs = keys & (torch.rand(4, 5, generator=generator) > 0.3)
    pairs[2:, :3] = False
    student, teacher = torch.randn(2, 4, 5, D, generator=generator, dtype=torch.float64)
    return predictor, {"student": student, "teacher": teacher, "pairs": pairs, "keys": keys}


def _contrast_worker(rank: int, folder: Path) -> None:
    predictor, slots = _slots()
    predictor = nn.SyncBatchNorm.convert_sync_batchnorm(predictor)
    mine = {name: value[2 * rank : 2 * rank + 2] for name, value in slots.items()}
    student = mine["student"].requires_grad_()
    result = contrast(
        predictor, student, mine["teacher"], mine["pairs"], mine["keys"], SlotCapacity(9, 8)
    )
    (result.queries[result.valid_queries] ** 3).sum().backward()
    buffers = dict(predictor.named_buffers())
    gradients = [parameter.grad for parameter in predictor.parameters()]
    torch.save((result, student.grad, gradients, buffers), folder / f"{rank}.pt")


def test_two_ranks_are_one_batch(tmp_path: Path) -> None:
    """Two ranks must give the same BatchNorm over queries, and the same keys, as one process."""
    run_workers(_contrast_worker, tmp_path)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in (0, 1)]
    predictor, slots = _slots()
    student = slots["student"].requires_grad_()
    whole = contrast(
        predictor, student, slots["teacher"], slots["pairs"], slots["keys"], SlotCapacity(20, 20)
    )
    (whole.queries[whole.valid_queries] ** 3).sum().backward()

    queries = torch.cat([result.queries[result.valid_queries] for result, *_ in ranks])
    torch.testing.assert_close(queries, whole.queries[whole.valid_queries])
    assert student.grad is not None
    torch.testing.assert_close(torch.cat([gradient for _, gradient, *_ in ranks]), student.grad)
    of_ranks = [gradients for *_, gradients, _ in ranks]
    for first, second, parameter in zip(*of_ranks, predictor.parameters(), strict=True):
        torch.testing.assert_close(first + second, parameter.grad)
    for result, _, _, buffers in ranks:
        assert result.keys.shape == (2 * 8, D)  # only the buffers are gathered, not all 2 · 10
        torch.testing.assert_close(result.keys[result.valid_keys], whole.keys[whole.valid_keys])
        for name, value in predictor.named_buffers():
            torch.testing.assert_close(buffers[name], value)
    positives = [result.keys[result.positive[result.valid_queries]] for result, *_ in ranks]
    expected = whole.keys[whole.positive[whole.valid_queries]]
    torch.testing.assert_close(torch.cat(positives), expected)
