"""AdamW and the groups of weights, against the published formula, one tensor at a time."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.host_sync import host_syncs
from tests.helpers.tiny_slotcon import tiny_batch, tiny_model
from train.config import TrainConfig
from train.lars import LARS
from train.optimizer import AdamW, build_optimizer, set_rate

ADAM = TrainConfig(optimizer="adamw", base_lr=0.01, weight_decay=0.1, encoder_lr_scale=0.25)


def naive(weights: dict[str, Tensor], gradients: list[dict[str, Tensor]], lr: float) -> None:
    """AdamW (arXiv 1711.05101, algorithm 2), in place."""
    for name, weight in weights.items():
        rate = lr * (0.25 if ".encoder." in name else 1)
        decay = 0.0 if weight.ndim < 2 or "pos_embed" in name else 0.1
        first, second = torch.zeros_like(weight), torch.zeros_like(weight)
        for t, step in enumerate(gradients, start=1):
            first = 0.9 * first + 0.1 * step[name]
            second = 0.999 * second + 0.001 * step[name] ** 2
            corrected = first / (1 - 0.9**t), second / (1 - 0.999**t)
            weight.sub_(rate * (corrected[0] / (corrected[1].sqrt() + 1e-8) + decay * weight))


def random_gradients(model: Any, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(weight.shape, generator=generator)
        for name, weight in model.named_parameters()
        if weight.requires_grad
    }


def give(model: Any, gradients: dict[str, Tensor]) -> None:
    for name, gradient in gradients.items():
        model.get_parameter(name).grad = gradient.clone()


def test_adamw_is_the_published_one() -> None:
    """Groups, rates, decay. Without it norms, biases or positions decay, which a trained network
    does not survive, or the encoder's rate is not its share."""
    model = tiny_model()
    encoder: Any = model.student.encoder
    encoder.pos_embed = torch.nn.Parameter(torch.randn(1, 5, 3))
    expected = {n: w.detach().double() for n, w in model.named_parameters() if w.requires_grad}
    steps = [random_gradients(model, seed) for seed in range(3)]
    optimizer = build_optimizer(model, ADAM)
    for gradients in steps:
        set_rate(optimizer, 0.01)
        give(model, gradients)
        optimizer.step()
    naive(expected, [{n: g.double() for n, g in step.items()} for step in steps], 0.01)
    for name, value in expected.items():
        torch.testing.assert_close(model.get_parameter(name).double(), value, atol=2e-6, rtol=1e-5)


def test_lars_has_one_group_in_the_model_s_order() -> None:
    """Without it the checkpoints of earlier runs give each weight another's momentum."""
    model = tiny_model()
    optimizer = build_optimizer(model, TrainConfig())
    assert isinstance(optimizer, LARS) and len(optimizer.param_groups) == 1
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    assert all(a is b for a, b in zip(optimizer.param_groups[0]["params"], weights, strict=True))
    scaled = build_optimizer(model, TrainConfig(encoder_lr_scale=0.1))
    set_rate(scaled, 2.0)
    assert [group["lr"] for group in scaled.param_groups] == [0.2, 2.0]


def test_resting_weights_are_not_in_the_optimiser() -> None:
    """Without it what rests decays, and takes the memory of its moments."""
    model = tiny_model()
    model.train_stages(1)
    optimizer = build_optimizer(model, ADAM)
    known = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
    early = model.student.encoder.layer3.parameters()
    assert not any(id(weight) in known for weight in early)
    assert all(id(weight) in known for weight in model.student.encoder.layer4.parameters())


@pytest.mark.parametrize("change", [{}, {"optimizer": "lars", "base_lr": 1.0}], ids=str)
def test_a_step_never_waits(change: dict[str, Any]) -> None:
    """Without it the host waits for the GPU in each step."""
    model = tiny_model(norm="eval")
    model.train_stages(2)
    optimizer = build_optimizer(model, replace(ADAM, **change))
    model(*tiny_batch(side=64)).loss.backward()
    optimizer.step()  # makes its state
    model.adapt_capacity()
    with host_syncs() as found:
        model(*tiny_batch(side=64)).loss.backward()
        set_rate(optimizer, 0.1)
        optimizer.step()
        optimizer.zero_grad()
    assert not found


def weighted(layout: Any = torch.contiguous_format) -> tuple[Tensor, AdamW]:
    torch.manual_seed(0)
    weight = torch.randn(4, 3, 2, 2).to(memory_format=layout).requires_grad_()
    return weight, AdamW([{"params": [weight], "weight_decay": 0.1}], 0.9)


def test_memory_layouts_may_differ() -> None:
    """Of a gradient, and of the moments of a checkpoint. Without it the fused update refuses them,
    or takes each number for another's."""
    last = torch.channels_last
    gradient = torch.randn(4, 3, 2, 2)
    results = []
    for given, later in ((torch.contiguous_format, torch.contiguous_format), (last, last)):
        weight, optimizer = weighted()
        set_rate(optimizer, 0.01)
        weight.grad = gradient.to(memory_format=given)
        optimizer.step()
        saved = optimizer.state_dict()
        other, resumed = weighted(later)
        with torch.no_grad():
            other.copy_(weight)
        resumed.load_state_dict(saved)
        set_rate(resumed, 0.01)
        other.grad = gradient.clone()
        resumed.step()
        results.append(other.detach())
    assert torch.equal(*results)


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_loss_scaling_without_waiting(value: float) -> None:
    """A step that overflows in fp16 changes nothing and is counted, by the device alone."""
    weight, optimizer = weighted()
    set_rate(optimizer, 0.01)
    before = weight.detach().clone()
    scaler: Any = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaled_step(weight, optimizer, scaler, torch.full_like(before, value))
    assert torch.equal(weight, before) and optimizer.skipped == 1
    plain, reference = weighted()
    set_rate(reference, 0.01)
    gradient = torch.randn_like(before)
    plain.grad = gradient.clone()
    reference.step()
    scaled_step(weight, optimizer, scaler, gradient)
    torch.testing.assert_close(weight, plain)
    assert optimizer.skipped == 1 and reference.skipped == 0


def scaled_step(weight: Tensor, optimizer: AdamW, scaler: Any, gradient: Tensor) -> None:
    weight.grad = scaler.scale(gradient.clone())
    scaler.step(optimizer)
    scaler.update()
