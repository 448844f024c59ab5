"""A frozen teacher, against its definition cell by cell."""

import copy

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from model import SlotCon
from model.guide import Guide
from tests.helpers.host_sync import host_syncs
from tests.helpers.tiny_slotcon import tiny_batch, tiny_model

SIDE, K = 64, 5


def guided(arch: str = "resnet18", factor: int = 2, **fields: object) -> SlotCon:
    torch.manual_seed(3)
    guide = Guide(arch, (3, 4), K, factor)
    plain = tiny_model(num_prototypes=K, group_loss_weight=1.0, **fields)
    torch.manual_seed(0)
    return SlotCon(plain.config, guide)


def naive_features(guide: Guide, views: Tensor, side: int) -> Tensor:
    """[B, C, side, side]"""
    fine, coarse = guide.encoder.maps(views, (3, 4))
    batch, _, height, width = fine.shape
    coarse = F.interpolate(F.normalize(coarse, dim=1), size=(height, width), mode="bilinear")
    joined = torch.cat((F.normalize(fine, dim=1), coarse), dim=1)
    step = height // side
    cells = torch.zeros(batch, joined.shape[1], side, side)
    for y in range(side):
        for x in range(side):
            block = joined[:, :, y * step : (y + 1) * step, x * step : (x + 1) * step]
            mean = block.mean(dim=(2, 3))
            cells[:, :, y, x] = mean / mean.norm(dim=1, keepdim=True)
    return cells


def test_features_are_joined_and_pooled() -> None:
    """At twice the resolution, on the student's grid. Without it cells of other places teach."""
    model, views = guided(), tiny_batch(side=2 * SIDE)[0][0]
    assert model.guide is not None
    with torch.no_grad():
        expected = naive_features(model.guide, views, 2)
        found = model.guide.features(views, (2, 2))
        small = model.guide.shrunk(views)
    torch.testing.assert_close(found, expected)
    assert small.shape[-1] == SIDE
    torch.testing.assert_close(small[0, 0, 3, 5], views[0, 0, 6:8, 10:12].mean())


@pytest.mark.parametrize("arch", ["resnet18", "resnet34"])
def test_the_student_learns_the_teacher_s_assignments(arch: str) -> None:
    """The loss is the cross-entropy of its assignments, cell by cell, with a centre of 0. Without
    it another teacher than the frozen one is imitated."""
    model, batch = guided(arch), tiny_batch(side=2 * SIDE)
    guide = model.guide
    assert guide is not None
    guide.mean.normal_()
    before = copy.deepcopy(model)
    output = model(*batch)
    with torch.no_grad():
        cells = naive_features(guide, batch[0][0], 2) - guide.mean[:, None, None]
        targets = torch.einsum(
            "kc,bchw->bkhw", F.normalize(guide.prototypes, dim=1), F.normalize(cells, dim=1)
        )
        targets = (targets / model.config.teacher_temp).softmax(dim=1)
        scores = before.student(guide.shrunk(batch[0][0])).scores / model.config.student_temp
        expected = -(targets * scores.log_softmax(dim=1)).sum(dim=1).mean()
    torch.testing.assert_close(output.terms["grouping_12"], expected)
    torch.testing.assert_close(output.loss, output.terms["grouping_12"] * 2)
    assert output.terms["slot_12"] == 0 and output.usage.sum() == 2 * 3 * 4
    output.loss.backward()
    learning = {name for name, weight in model.named_parameters() if weight.grad is not None}
    assert learning == {n for n, w in model.named_parameters() if w.requires_grad}
    assert all(name.startswith("student.") for name in learning)
    old = before.guide.state_dict() if before.guide else {}
    assert all(torch.equal(value, old[name]) for name, value in guide.state_dict().items())


def test_it_stays_in_eval_mode_and_never_waits() -> None:
    """Without it the frozen network's statistics follow the batches, or the host the device."""
    model = guided(targets="balanced").train()
    assert model.guide is not None
    assert not any(module.training for module in model.guide.modules())
    with host_syncs() as found:
        model(*tiny_batch(side=2 * SIDE)).loss.backward()
    assert not found


def test_a_norm_as_projector() -> None:
    """Without it prototypes lie on a layer that is thrown away after training."""
    model = tiny_model(projector="norm", dim_out=512)
    images = tiny_batch(side=64)[0][0]
    with torch.no_grad():
        features, maps = model.student(images).features, model.student.encoder(images)
    mean, deviation = maps.mean(dim=(0, 2, 3)), maps.var(dim=(0, 2, 3), correction=0)
    expected = (maps - mean[:, None, None]) / (deviation[:, None, None] + 1e-5).sqrt()
    torch.testing.assert_close(features, expected)
    with pytest.raises(ValueError, match=r"dim_out must be 512, the encoder's width"):
        tiny_model(projector="norm")
