"""Parts of the encoder that do not learn, and norms that keep their statistics."""

import copy

import pytest
import torch

from model import SlotCon
from tests.helpers.tiny_slotcon import tiny_batch, tiny_model


def run_a_step(model: SlotCon) -> None:
    model(*tiny_batch(side=64)).loss.backward()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.grad is not None:
                weight.sub_(0.1 * weight.grad)
    model.update_teacher(0.5)


def changed(model: SlotCon, before: SlotCon) -> set[str]:
    """Weights and buffers of the encoders that are not as they were."""
    old = before.state_dict()
    return {n for n, v in model.state_dict().items() if ".encoder." in n and not v.equal(old[n])}


@pytest.mark.parametrize("norm", ["train", "eval"])
def test_early_stages_rest(norm: str) -> None:
    """Without it what is frozen moves: its weights, or its statistics, which alone cost 5.9 points
    of an ImageNet network's k-NN; or gradients are computed for it in vain."""
    model = tiny_model(norm=norm)
    model.train_stages(1)
    seen = []
    model.student.encoder.layer3.register_forward_hook(
        lambda _, __, out: seen.append(out.requires_grad)
    )
    before = copy.deepcopy(model)
    run_a_step(model)
    assert seen == [False, False]
    moved = changed(model, before)
    assert moved and all(".layer4." in name for name in moved)
    assert any("running_mean" in name for name in moved) == (norm == "train")
    assert any(name.startswith("teacher") for name in moved)


def test_norms_in_eval_mode_normalise_by_what_they_know() -> None:
    """Without it the batch's statistics are used but not kept, which is neither."""
    model = tiny_model(norm="eval")
    images = tiny_batch(side=64)[0][0]
    with torch.no_grad():
        trained = model.student.encoder(images)
        expected = model.student.encoder.eval()(images)
    model.train()
    assert torch.equal(trained, expected)
    assert model.student.projector.training
    assert not any(m.training for m in model.student.encoder.modules() if "Norm" in str(type(m)))
    weights = model.student.encoder.bn1.parameters()
    assert all(weight.requires_grad for weight in weights)


def test_all_rests_and_wakes() -> None:
    """As in the first epochs of a run. Without it the encoder never learns afterwards, or a stage
    that should rest for good does."""
    model = tiny_model()
    model.train_stages(0)
    assert not any(w.requires_grad for w in model.student.encoder.parameters())
    assert all(w.requires_grad for w in model.student.projector.parameters())
    model.train_stages(2)
    learning = {
        n.split(".")[0] for n, w in model.student.encoder.named_parameters() if w.requires_grad
    }
    assert learning == {"layer3", "layer4"}
    model.train_stages(None)
    assert all(w.requires_grad for w in model.student.encoder.parameters())
    assert all(module.training for module in model.modules())
    assert not any(w.requires_grad for w in model.teacher.parameters())
