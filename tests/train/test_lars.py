"""LARS against the authors' recorded steps."""

import numpy as np
import pytest
import torch
from torch import Tensor

from tests import GOLDEN
from tests.helpers.host_sync import host_syncs
from train.lars import LARS

RECORDED = np.load(GOLDEN / "lars.npz")
TENSORS = ("p1d", "p4d", "p2d", "pzero2d")


def optimizer_of(run: str) -> tuple[LARS, dict[str, torch.nn.Parameter]]:
    weights = {
        name: torch.nn.Parameter(torch.from_numpy(RECORDED[f"{run}_{name}_init"]).clone())
        for name in TENSORS
    }
    settings = {
        key: float(RECORDED[f"{run}_{key}"]) for key in ("lr", "momentum", "weight_decay", "eta")
    }
    return LARS(weights.values(), **settings), weights


@pytest.mark.parametrize("run", ["a", "b"])
def test_steps_match(run: str) -> None:
    """Scaling, decay, momentum, and the exemptions of 1-D and zero tensors. Run b shows an error in
    any of them."""
    optimizer, weights = optimizer_of(run)
    for step in range(3):
        for name, weight in weights.items():
            weight.grad = torch.from_numpy(RECORDED[f"{run}_{name}_grad"][step])
        optimizer.step()
        for name, weight in weights.items():
            for ours, key in ((weight, "param"), (optimizer.state[weight]["momentum"], "mu")):
                theirs = RECORDED[f"{run}_{name}_{key}"][step]
                np.testing.assert_allclose(
                    ours.detach().numpy(), theirs, rtol=1e-6, atol=1e-7 * np.abs(theirs).max()
                )


def test_state_survives_saving() -> None:
    """A resumed run must continue with the momentum of the interrupted one."""
    whole, whole_weights = optimizer_of("b")
    first, first_weights = optimizer_of("b")

    def step(optimizer: LARS, weights: dict[str, torch.nn.Parameter], number: int) -> None:
        for name, weight in weights.items():
            weight.grad = torch.from_numpy(RECORDED[f"b_{name}_grad"][number])
        optimizer.step()

    for number in range(3):
        step(whole, whole_weights, number)
    step(first, first_weights, 0)
    second, second_weights = optimizer_of("b")
    second.load_state_dict(first.state_dict())
    with torch.no_grad():
        for name, weight in second_weights.items():
            weight.copy_(first_weights[name])
    for number in (1, 2):
        step(second, second_weights, number)
    for name in TENSORS:
        assert torch.equal(second_weights[name], whole_weights[name])


def test_parameters_without_gradient_stay() -> None:
    """The teacher and frozen layers have no gradient. Decay must not shrink them."""
    optimizer, weights = optimizer_of("b")
    optimizer.step()
    for name, weight in weights.items():
        assert np.array_equal(weight.detach().numpy(), RECORDED[f"b_{name}_init"])
        assert not optimizer.state[weight]


def tensors(seed: int) -> list[Tensor]:
    """One of each kind: convolution, convolution in channels-last, matrix, bias, zeros."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((4, 3, 3, 3), (4, 8, 3, 3), (5, 4), (7,), (2, 2))
    made = [torch.randn(shape, generator=generator) for shape in shapes]
    made[1] = made[1].contiguous(memory_format=torch.channels_last)
    return [*made[:-1], made[-1] * 0]


def parameters() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(tensor) for tensor in tensors(0)]


@torch.no_grad()
def naive_step(
    weights: list[torch.nn.Parameter], momenta: list[Tensor], settings: dict[str, float]
) -> None:
    """The definition, one tensor after the other."""
    for weight, momentum in zip(weights, momenta, strict=True):
        assert weight.grad is not None
        update = weight.grad
        if weight.ndim > 1:
            update = update + settings["weight_decay"] * weight
            if weight.norm() > 0 and update.norm() > 0:
                update = update * settings["eta"] * weight.norm() / update.norm()
        momentum.mul_(settings["momentum"]).add_(update)
        weight.sub_(settings["lr"] * momentum)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_all_tensors_at_once_is_one_at_a_time(momentum: float) -> None:
    """With a scale on the wrong tensor, or a wrong memory layout, training would still run."""
    settings = {"lr": 0.1, "momentum": momentum, "weight_decay": 0.1, "eta": 0.01}
    ours, theirs = parameters(), parameters()
    optimizer, momenta = LARS(ours, **settings), [torch.zeros_like(w) for w in theirs]
    for step in range(3):
        for mine, naive, gradient in zip(ours, theirs, tensors(step + 1), strict=True):
            mine.grad, naive.grad = gradient.contiguous(), gradient.clone()
        optimizer.step()
        naive_step(theirs, momenta, settings)
        for mine, naive in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, naive)


def test_momentum_of_another_memory_layout() -> None:
    """A resume may switch channels_last: the values must stay, not the order of the bytes."""
    settings = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "eta": 0.01}
    first, weights = (torch.nn.Parameter(tensors(0)[1]) for _ in range(2))
    gradient, flat = tensors(1)[1], weights.detach().contiguous()
    before = LARS([first], **settings)
    first.grad = gradient
    before.step()
    other = torch.nn.Parameter(first.detach().contiguous())
    after = LARS([other], **settings)
    after.load_state_dict(before.state_dict())
    assert after.state[other]["momentum"].stride() == flat.stride()
    other.grad = gradient
    after.step()
    before.step()
    torch.testing.assert_close(other.detach(), first.detach())


def test_loss_scaling_without_waiting() -> None:
    """Scaled steps equal unscaled ones; a step with an overflow changes nothing and counts."""
    settings = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "eta": 0.01}
    plain, scaled = parameters(), parameters()
    reference, optimizer = LARS(plain, **settings), LARS(scaled, **settings)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    def step(gradients: list[Tensor]) -> None:
        loss = torch.stack([(w * g).sum() for w, g in zip(scaled, gradients, strict=True)]).sum()
        scaler.scale(loss).backward()
        with host_syncs() as found:
            scaler.step(optimizer)
            scaler.update()
        assert not found
        optimizer.zero_grad()

    for number in (1, 2):
        gradients = tensors(number)
        for weight, gradient in zip(plain, gradients, strict=True):
            weight.grad = gradient.clone()
        reference.step()
        step(gradients)
        before = [weight.detach().clone() for weight in scaled]
        gradients[2][0, 0] = float("inf") if number == 1 else float("nan")
        step(gradients)
        assert optimizer.skipped.item() == number
        for mine, kept, expected in zip(scaled, before, plain, strict=True):
            assert torch.equal(mine, kept)
            torch.testing.assert_close(mine, expected)
    assert reference.skipped.item() == 0
    assert scaler.get_scale() == 256.0


def test_each_group_has_its_own_rate() -> None:
    """Fine-tuning gives a head another learning rate than the rest."""
    one, two = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = LARS([one], lr=0.1, momentum=0.0)
    optimizer.add_param_group({"params": [two], "lr": 0.5})
    one.grad, two.grad = torch.ones(3), torch.ones(3)
    optimizer.step()
    torch.testing.assert_close(one.detach(), torch.full((3,), 0.9))
    torch.testing.assert_close(two.detach(), torch.full((3,), 0.5))
