"""The contrast between cells: its sample, its formula, its guards."""

from hashlib import blake2b

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from model import SlotCon
from model.alignment import align_to_overlap
from model.cells import cell_loss, sample_cells
from model.heads import build_predictor
from model.slots import SlotCapacity
from tests.helpers.host_sync import host_syncs
from tests.helpers.tiny_slotcon import IMAGES, gradients, tiny_batch, tiny_crops, tiny_model

CELLS: dict[str, object] = {"cell_loss_weight": 0.7, "cells": 3}
RELATIONS: dict[str, object] = {"relation_loss_weight": 0.7, "cells": 3}
CPU = torch.device("cpu")


# ---- The sample ----


def test_a_sample_has_no_repetition_and_no_preference() -> None:
    """Without it some cells are never contrasted, or one is its own negative."""
    chosen = sample_cells((0, 0), 4000, 9, 4, CPU)
    assert chosen.shape == (4000, 4)
    assert all(len(set(row)) == 4 for row in chosen.tolist())
    counts = torch.bincount(chosen.flatten(), minlength=9)
    expected = 4000 * 4 / 9
    assert ((counts - expected).abs() < 5 * expected**0.5).all()
    pairs = torch.bincount(chosen[:, 0] * 9 + chosen[:, 1], minlength=81)
    assert (pairs > 0).sum() == 72


def test_a_sample_follows_from_seed_and_step_alone() -> None:
    """Without it a resumed run contrasts other cells than one that ran through."""
    first = sample_cells((1, 5), 6, 16, 8, CPU)
    torch.manual_seed(99)
    assert torch.equal(first, sample_cells((1, 5), 6, 16, 8, CPU))
    for other in ((1, 6), (2, 5), (15, 0)):
        assert not torch.equal(first, sample_cells(other, 6, 16, 8, CPU))
    state = torch.get_rng_state()
    sample_cells((0, 0), 6, 16, 8, CPU)
    assert torch.equal(state, torch.get_rng_state())


def split_mix(state: int) -> int:
    """The output of SplitMix64 (Steele et al., OOPSLA 2014) in a state, as a signed number."""
    value = state % 2**64
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    value = (value ^ value >> 27) * 0x94D049BB133111EB % 2**64
    value ^= value >> 31
    return value - 2**64 if value >= 2**63 else value


def test_a_sample_is_in_the_order_of_split_mix() -> None:
    """Without it an arithmetic shift, or integers that do not wrap, sample something else."""
    draw, images, cells = (2**32 - 1, 10**9), 3, 16
    digest = blake2b(f"{draw[0]} {draw[1]}".encode(), digest_size=8).digest()
    start = int.from_bytes(digest)
    for image, row in enumerate(sample_cells(draw, images, cells, cells, CPU).tolist()):
        states = [start + (image * cells + cell) * 0x9E3779B97F4A7C15 for cell in range(cells)]
        assert row == sorted(range(cells), key=lambda cell: split_mix(states[cell]))


def test_a_sample_larger_than_the_overlap_is_refused() -> None:
    """Without it the contrast has fewer cells than the configuration says."""
    with pytest.raises(ValueError, match=r"a sample of 5 cells of an image: .* give 4"):
        sample_cells((0, 0), 2, 4, 5, CPU)


# ---- The loss ----


def naive_loss(
    model: SlotCon, batch: tuple[Tensor, Tensor, Tensor], own: int, other: int, chosen: Tensor
) -> Tensor:
    """InfoNCE, cell by cell."""
    assert model.cell_predictor is not None
    views, overlap, flipped = batch
    student, teacher = (
        align_to_overlap(branch(views[at]).features, overlap[at], flipped[at]).flatten(2)
        for branch, at in ((model.student, own), (model.teacher, other))
    )
    places = [(b, int(cell)) for b in range(IMAGES) for cell in chosen[b]]
    queries = model.cell_predictor(torch.stack([student[b, :, cell] for b, cell in places]))
    keys = torch.stack([teacher[b, :, cell] for b, cell in places])
    total = torch.zeros(())
    for at, query in enumerate(queries):
        logits = torch.stack([F.cosine_similarity(query, key, dim=0) / 0.2 for key in keys])
        total = total - logits.log_softmax(dim=0)[at]
    return total / len(places) * 2 * 0.2


def test_the_loss_is_info_nce_between_aligned_cells() -> None:
    """Without it a cell may be contrasted with another place, before the alignment or the flip; and
    the weight may be left out.
    """
    model, plain, batch = tiny_model(**CELLS), tiny_model(), tiny_crops()
    with torch.no_grad():
        output, before = model(*batch, draw=(4, 2)), plain(*batch)
        chosen = sample_cells((4, 2), IMAGES, 4, 3, CPU)
        expected = sum(naive_loss(model, batch, *way, chosen) for way in ((0, 1), (1, 0)))
    torch.testing.assert_close(output.terms["cells"], expected)
    torch.testing.assert_close(output.loss, before.loss + 0.7 * output.terms["cells"])
    assert all(torch.equal(output.terms[name], value) for name, value in before.terms.items())
    assert model.term_names == (*plain.term_names, "cells")
    assert not torch.equal(model(*batch, draw=(4, 3)).terms["cells"], output.terms["cells"])


def test_pairs_without_overlap_are_left_out() -> None:
    """Without it the zeros of a pair without common pixels are taken for features."""
    model = tiny_model(**CELLS)
    views, overlap, flipped = tiny_batch(side=64)
    overlap = overlap.clone()
    overlap[0, 1] = torch.tensor([0.7, 0.2, 0.3, 0.8])
    some = model(views, overlap, flipped).terms["cells"]
    few = [0, 2]
    predictor = build_predictor(16, 16, 16)
    features = torch.randn(2, IMAGES, 16, 2, 2)
    chosen = sample_cells((0, 0), IMAGES, 4, 3, CPU)
    kept = torch.tensor([True, False, True])
    loss = cell_loss(*features, kept, chosen, predictor, 0.2)
    torch.testing.assert_close(
        loss, cell_loss(*features[:, few], kept[few], chosen[few], predictor, 0.2)
    )
    for image in range(IMAGES):
        overlap[1, image] = torch.tensor([0.7, 0.2, 0.3, 0.8])
    output = model(views, overlap, flipped)
    output.loss.backward()
    assert output.terms["cells"] == 0 < some
    gradients(model)


@pytest.mark.parametrize("term", [CELLS, RELATIONS], ids=["cells", "relations"])
def test_no_host_synchronisation(term: dict[str, object]) -> None:
    """Without it the host waits for a GPU, for the sample or for the pairs that overlap."""
    model, batch = tiny_model(**term), tiny_crops()
    model.capacity = SlotCapacity(8, 8)
    with host_syncs() as found:
        model(*batch, draw=(0, 8)).loss.backward()
    assert not found


def test_under_autocast_the_loss_is_float32() -> None:
    """Without it a cosine or softmax in half precision is wrong by per cents."""
    with torch.no_grad():
        expected = tiny_model(**CELLS)(*tiny_crops())
    model = tiny_model(**CELLS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(*tiny_crops())
    output.loss.backward()
    assert output.terms["cells"].dtype == torch.float32
    torch.testing.assert_close(output.terms["cells"], expected.terms["cells"], rtol=0.05, atol=0)


def test_the_predictor_changes_no_other_weight() -> None:
    """Without it runs with and without the loss start from other weights."""
    plain, model = tiny_model().state_dict(), tiny_model(**CELLS)
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in plain.items())
    assert all(name.startswith("cell_predictor.") for name in state if name not in plain)
    assert list(model.official_state_dict()) == list(tiny_model().official_state_dict())
