"""The student's own output as the teacher's, and the copy that is stored."""

import pytest
import torch

from tests.helpers.host_sync import host_syncs
from tests.helpers.tiny_slotcon import gradients, tiny_batch, tiny_model

WHOLE: dict[str, object] = {
    "supervise": (2, 4),
    "targets": "balanced",
    "cell_loss_weight": 1.0,
    "cells": 2,
}


@pytest.mark.parametrize("fields", [{}, {"align": "projections"}, WHOLE], ids=str)
def test_own_teacher_is_a_teacher_with_the_student_s_weights(fields: dict[str, object]) -> None:
    """Without it gradients flow into the targets, or other maps than the student's teach. At the
    start of a run the teacher's weights are the student's, so both must give the same bits.
    """
    model, own, batch = tiny_model(**fields), tiny_model(**fields), tiny_batch(side=64)
    expected, output = model(*batch), own(*batch, own_teacher=True)
    assert torch.equal(output.loss, expected.loss)
    assert all(torch.equal(output.terms[name], value) for name, value in expected.terms.items())
    assert torch.equal(output.usage, expected.usage)
    expected.loss.backward()
    output.loss.backward()
    mine = gradients(own)
    assert all(torch.equal(mine[name], value) for name, value in gradients(model).items())
    assert torch.equal(own.center, model.center)


def test_own_teacher_computes_no_second_forward() -> None:
    """Without it the setting costs what it should save."""
    model, calls = tiny_model(**WHOLE), list[str]()
    for name, branch in (("student", model.student), ("teacher", model.teacher)):
        for part in (branch.encoder.conv1, branch.projector, branch.heads["2"]):
            part.register_forward_hook(lambda *_, name=name: calls.append(name))
    model(*tiny_batch(side=64), own_teacher=True)
    assert calls == ["student"] * 6
    model.adapt_capacity()
    with host_syncs() as found:
        model(*tiny_batch(side=64), own_teacher=True).loss.backward()
    assert not found


def test_copy_to_teacher() -> None:
    """Without it a run's teacher, which is evaluated and exported, is untrained or has statistics
    of other weights.
    """
    model = tiny_model(**WHOLE)
    model(*tiny_batch(side=64), own_teacher=True)
    for parameter in model.student.parameters():
        torch.nn.init.normal_(parameter)
    model.copy_to_teacher()
    student = model.student.state_dict()
    assert all(torch.equal(student[name], v) for name, v in model.teacher.state_dict().items())
    assert not any(parameter.requires_grad for parameter in model.teacher.parameters())
    images = tiny_batch(side=64)[0][0]
    for ours, theirs in zip(model.segment(images), model.segment(images, "student"), strict=True):
        assert torch.equal(ours, theirs)
