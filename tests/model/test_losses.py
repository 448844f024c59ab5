"""Each loss and the grouping against the naive loop that its docstring states."""

import pytest
import torch
from torch import Tensor

from model.grouping import SemanticGrouping, winning_slots
from model.losses import grouping_loss, slot_loss

B, K, D, H, W = 3, 5, 4, 2, 3


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def naive_grouping_loss(
    student: Tensor, teacher: Tensor, center: Tensor, overlapping: Tensor
) -> Tensor:
    total, cells = torch.zeros(()), 0
    for b in range(B):
        for h in range(H):
            for w in range(W):
                if overlapping[b]:
                    p = torch.exp((teacher[b, :, h, w] - center[0]) / 0.07)
                    q = torch.exp(student[b, :, h, w] / 0.1)
                    total = total - ((p / p.sum()) * torch.log(q / q.sum())).sum()
                    cells += 1
    return total / cells


@pytest.mark.parametrize("overlapping", [[True, True, True], [False, True, True]])
def test_grouping_loss_is_the_loop(generator: torch.Generator, overlapping: list[bool]) -> None:
    """A softmax over the wrong axis, or a mean over the wrong cells, still gives a loss."""
    student, teacher = (torch.rand(B, K, H, W, generator=generator) for _ in range(2))
    center, mask = torch.rand(1, K, generator=generator), torch.tensor(overlapping)
    ours = grouping_loss(student, teacher, center, mask, student_temp=0.1, teacher_temp=0.07)
    torch.testing.assert_close(ours, naive_grouping_loss(student, teacher, center, mask))


def test_grouping_loss_without_overlap_is_zero_with_gradient(generator: torch.Generator) -> None:
    """0/0 here would turn the weights of a run into NaN."""
    student = torch.rand(B, K, H, W, generator=generator, requires_grad=True)
    none = torch.zeros(B, dtype=torch.bool)
    loss = grouping_loss(student, student.detach(), torch.zeros(1, K), none, 0.1, 0.07)
    loss.backward()
    assert loss.item() == 0
    assert student.grad is not None
    assert not student.grad.any()


def test_slot_loss_is_the_loop(generator: torch.Generator) -> None:
    """Swapped axes of the logits, or a missing normalisation or 2τ, still give a loss."""
    queries, keys = torch.randn(4, D, generator=generator), torch.randn(7, D, generator=generator)
    positive, temperature = torch.tensor([2, 0, 6, 2]), 0.2
    total = torch.zeros(())
    for n in range(4):
        logits = [queries[n] @ key / queries[n].norm() / key.norm() / temperature for key in keys]
        total = total - torch.log(logits[positive[n]].exp() / torch.stack(logits).exp().sum())
    everything = torch.ones(7, dtype=torch.bool)
    ours = slot_loss(queries, keys, positive, everything[:4], everything, temperature)
    torch.testing.assert_close(ours, total / 4 * 2 * temperature)


def test_slot_loss_ignores_empty_positions(generator: torch.Generator) -> None:
    """Buffers of fixed size are never full: empty positions must not enter loss or gradient."""
    queries = torch.randn(4, D, generator=generator)
    keys, positive = torch.randn(7, D, generator=generator), torch.tensor([0, 4, 3, 0])
    valid_queries = torch.tensor([True, False, True, False])
    valid_keys = torch.tensor([True, False, True, True, False, False, True])
    everything = torch.ones(4, dtype=torch.bool)

    packed = queries[valid_queries].requires_grad_()
    expected = slot_loss(
        packed, keys[valid_keys], torch.tensor([0, 2]), everything[:2], everything, 0.2
    )
    expected.backward()
    queries.requires_grad_()
    ours = slot_loss(queries, keys, positive, valid_queries, valid_keys, 0.2)
    ours.backward()
    torch.testing.assert_close(ours, expected)
    assert queries.grad is not None
    assert packed.grad is not None
    torch.testing.assert_close(queries.grad[valid_queries], packed.grad)
    assert not queries.grad[~valid_queries].any()


@pytest.mark.parametrize("positions", [0, 3])
def test_slot_loss_without_queries_is_zero_with_gradient(
    generator: torch.Generator, positions: int
) -> None:
    """With SyncBatchNorm, a rank without active pairs must still run forward and backward."""
    queries = torch.zeros(positions, D, requires_grad=True)
    keys, none = torch.randn(7, D, generator=generator), torch.zeros(positions, dtype=torch.bool)
    valid_keys = torch.ones(7, dtype=torch.bool)
    loss = slot_loss(queries, keys, torch.zeros(positions, dtype=torch.long), none, valid_keys, 0.2)
    loss.backward()
    assert loss.item() == 0
    assert queries.grad is not None
    assert not queries.grad.any()


def test_grouping_is_the_loop(generator: torch.Generator) -> None:
    """Slots are means of raw features under a softmax over prototypes, not over cells."""
    grouping = SemanticGrouping(K, D, temperature=0.07)
    features = torch.randn(B, D, H, W, generator=generator)
    slots, scores = grouping(features)
    for b in range(B):
        assignment = torch.zeros(K, H, W)
        for h in range(H):
            for w in range(W):
                cell = features[b, :, h, w]
                cosine = grouping.prototypes @ cell / cell.norm() / grouping.prototypes.norm(dim=1)
                torch.testing.assert_close(scores[b, :, h, w], cosine)
                assignment[:, h, w] = (cosine / 0.07).softmax(0) + 1e-6
        for k in range(K):
            mean = (assignment[k] * features[b]).sum(dim=(1, 2)) / assignment[k].sum()
            torch.testing.assert_close(slots[b, k], mean, rtol=1e-4, atol=1e-5)


def test_winning_slots_win_a_cell(generator: torch.Generator) -> None:
    """This mask decides which slots become queries and keys."""
    scores = torch.randn(B, K, H, W, generator=generator)
    won = winning_slots(scores)
    for b in range(B):
        assert set(won[b].nonzero().flatten().tolist()) == set(scores[b].argmax(0).ravel().tolist())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_features_are_grouped_in_float32(dtype: torch.dtype) -> None:
    """Autocast gives half-precision features, but cosines near a tie decide which slots win."""
    grouping = SemanticGrouping(K, D, temperature=0.07)
    features = torch.randn(B, D, H, W).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        slots, scores = grouping(features)
    expected_slots, expected_scores = grouping(features.float())
    assert torch.equal(scores, expected_scores)
    assert torch.equal(slots, expected_slots)
