"""The plain step and the fast one are the same step."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from model import SlotCon
from tests.helpers.tiny_slotcon import tiny_model
from tools.benchmark.plain_step import PlainStep
from tools.benchmark.step import FastStep, spread_prototypes, step_views
from train.config import EfficiencyConfig

BATCHES = 3
TOLERANCE = 2e-4
BEFORE_A_NORM = ("projector.0.bias", "projector.3.bias", "predictor.0.bias", "predictor.3.bias")
"""Their true gradient is zero: only rounding moves them."""


def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Noise, with overlaps and flips as training draws them."""
    return (step_views(5, 64, seed=number) for number in range(BATCHES))


def start() -> SlotCon:
    """A model with several active slots an image."""
    model = tiny_model(num_prototypes=16)
    spread_prototypes(model, next(batches())[0])
    return model


def trained(model: SlotCon, kind: str, **efficiency: Any) -> tuple[list[float], SlotCon]:
    """Losses of some steps, and the model after them."""
    if kind == "plain":
        plain = PlainStep(model)
        return [plain(*b, lr=0.5, teacher_momentum=0.9) for b in batches()], model
    fast = FastStep(model, efficiency=EfficiencyConfig(**efficiency))
    losses = [fast(*b, lr=0.5, teacher_momentum=0.9).loss.item() for b in batches()]
    return losses, model


@pytest.fixture(scope="module")
def plain_run() -> tuple[SlotCon, list[float], SlotCon]:
    """A model, the losses of plain steps, and the model after them."""
    before = start()
    return before, *trained(copy.deepcopy(before), "plain")


@pytest.mark.parametrize("selection", ["exact", "static"])
def test_the_plain_step_and_the_fast_one_agree(
    plain_run: tuple[SlotCon, list[float], SlotCon], selection: str
) -> None:
    """A ratio of speeds means nothing unless the two compute the same."""
    model, expected, plain = plain_run
    losses, fast = trained(copy.deepcopy(model), "fast", slot_selection=selection)
    assert max(expected) - min(expected) > 100 * TOLERANCE  # training changed them
    assert losses == pytest.approx(expected, rel=TOLERANCE)
    theirs, before = plain.state_dict(), model.state_dict()
    for name, value in fast.state_dict().items():
        if value.is_floating_point() and not name.endswith(BEFORE_A_NORM):
            moved = (value - before[name]).norm()
            assert (value - theirs[name]).norm() <= 0.02 * moved + 1e-5 * value.norm(), name


def test_the_plain_step_has_slots_to_contrast() -> None:
    """Without active pairs the test above would compare only half of the loss."""
    out = start()(*next(batches()))
    assert float(out.stats["active_pairs"]) > 1
    assert float(out.terms["slot_12"]) > 0


def test_a_variant_has_no_plain_step() -> None:
    """A variant would be compared with another method."""
    with pytest.raises(ValueError, match="no plain version"):
        PlainStep(tiny_model(slot_loss="regression"))
