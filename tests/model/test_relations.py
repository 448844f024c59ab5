"""Relations between cells: their formula, their guards."""

import copy

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from model import SlotCon
from model.alignment import align_to_overlap
from model.cells import sample_cells
from model.guide import Guide
from model.relations import relation_loss
from tests.helpers.tiny_slotcon import IMAGES, gradients, tiny_crops, tiny_model

RELATIONS: dict[str, object] = {"relation_loss_weight": 0.7, "relation_temp": 0.3, "cells": 3}
CPU = torch.device("cpu")


def naive(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """The divergence of rows [N, D] and [N, C], cell by cell; only the row's cell has gradients."""
    total = torch.zeros(())
    for i in range(len(student)):
        logs = []
        for rows in (student, teacher):
            others = rows.detach() - rows.detach().mean(dim=0)
            cell = rows[i] - rows.detach().mean(dim=0)
            near = [
                F.cosine_similarity(cell, others[j], dim=0) / temperature
                for j in range(len(rows))
                if j != i
            ]
            logs.append(torch.stack(near).log_softmax(dim=0))
        q, p = logs
        total = total + (p.exp() * (p - q)).sum()
    return total / len(student)


@pytest.mark.parametrize("other_space", [False, True], ids=["average", "frozen"])
def test_the_term_is_its_formula_between_aligned_cells(other_space: bool) -> None:
    """With gradients, and with a frozen teacher of another width. Without it a cell is its own
    neighbour, a mean stays in, the two swap their roles, or the weight is left out."""
    torch.manual_seed(3)
    guide = Guide("resnet18", (3, 4), 2 * IMAGES, 2) if other_space else None
    fields = {"group_loss_weight": 0.5} if other_space else {}
    torch.manual_seed(0)
    model = SlotCon(tiny_model(**RELATIONS, **fields).config, copy.deepcopy(guide))
    torch.manual_seed(0)
    plain = SlotCon(tiny_model(**fields).config, guide)
    batch = tiny_crops(side=128 if other_space else 64)
    views, overlap, flipped = batch
    output, before = model(*batch, draw=(4, 2)), plain(*batch, draw=(4, 2))
    chosen = sample_cells((4, 2), IMAGES, 4, 3, CPU)

    def rows(maps: Tensor, at: int) -> Tensor:
        aligned = align_to_overlap(maps, overlap[at], flipped[at]).flatten(2)
        return torch.stack([aligned[b, :, c] for b in range(IMAGES) for c in chosen[b]])

    expected = torch.zeros(())
    for own, other in ((0, 1), (1, 0)):
        if plain.guide is None:
            seen, taught = views[own], plain.teacher(views[other]).features
        else:
            seen, taught = (
                plain.guide.shrunk(views[own]),
                plain.guide(views[other], (2, 2)).features,
            )
        student = plain.student(seen).features
        expected = expected + naive(rows(student, own), rows(taught, other).detach(), 0.3)
    torch.testing.assert_close(output.terms["relations"], expected.detach())
    assert output.terms["relations"] > 0.01
    torch.testing.assert_close(output.loss, before.loss + 0.7 * expected)
    assert model.term_names == (*plain.term_names, "relations")
    output.loss.backward()
    (before.loss + 0.7 * expected).backward()
    for name, value in gradients(plain).items():
        assert (gradients(model)[name] - value).norm() <= 1e-4 * value.norm() + 1e-5, name


def test_pairs_without_overlap_are_left_out() -> None:
    """Without it the zeros of a pair without common pixels are taken for cells, and a batch of such
    pairs is not a number."""
    features, kept = torch.randn(2, IMAGES, 16, 2, 2), torch.tensor([True, False, True])
    chosen, few = sample_cells((0, 0), IMAGES, 4, 3, CPU), [0, 2]
    loss = relation_loss(*features, kept, chosen, 0.1)
    expected = relation_loss(*features[:, few], kept[few], chosen[few], 0.1)
    torch.testing.assert_close(loss, expected)
    for valid, cells in ((torch.zeros(IMAGES) > 0, 3), (torch.arange(IMAGES) == 1, 1)):
        student = features[0].clone().requires_grad_()
        loss = relation_loss(student, features[1], valid, chosen[:, :cells], 0.1)
        loss.backward()
        assert loss == 0 and student.grad is not None and not student.grad.any()


def test_equal_relations_cost_nothing_in_any_space() -> None:
    """Turned, moved, stretched and made wider, a space has the same relations. Without it a teacher
    of another width can't be reproduced at all."""
    student = torch.randn(IMAGES, 8, 2, 2)
    turned, _ = torch.linalg.qr(torch.randn(20, 8))
    teacher = 3 * torch.einsum("dc,bchw->bdhw", turned, student) + torch.randn(20)[:, None, None]
    chosen, kept = sample_cells((0, 0), IMAGES, 4, 4, CPU), torch.ones(IMAGES) > 0
    loss = relation_loss(student, teacher, kept, chosen, 0.1)
    torch.testing.assert_close(loss, torch.zeros(()), atol=1e-5, rtol=0)
    assert relation_loss(student, student.flip(0), kept, chosen, 0.1) > 0.1


def test_under_autocast_the_relations_are_float32() -> None:
    """Without it a softmax of cosines in half precision is wrong by per cents."""
    features, kept = torch.randn(2, IMAGES, 16, 2, 2), torch.ones(IMAGES) > 0
    chosen = sample_cells((0, 0), IMAGES, 4, 3, CPU)
    half = features.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = relation_loss(*half, kept, chosen, 0.1)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, relation_loss(*half.float(), kept, chosen, 0.1))
