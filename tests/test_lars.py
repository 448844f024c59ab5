"""LARS against the authors' recorded steps."""

from pathlib import Path

import numpy as np
import pytest
import torch

from train.lars import LARS

GOLDEN = np.load(Path(__file__).parent / "golden" / "lars.npz")
TENSORS = ("p1d", "p4d", "p2d", "pzero2d")


def optimizer_of(run: str) -> tuple[LARS, dict[str, torch.nn.Parameter]]:
    weights = {
        name: torch.nn.Parameter(torch.from_numpy(GOLDEN[f"{run}_{name}_init"]).clone())
        for name in TENSORS
    }
    settings = {
        key: float(GOLDEN[f"{run}_{key}"]) for key in ("lr", "momentum", "weight_decay", "eta")
    }
    return LARS(weights.values(), **settings), weights


@pytest.mark.parametrize("run", ["a", "b"])
def test_steps_match(run: str) -> None:
    """Scaling, decay, momentum and the exemptions of 1-D and zero tensors, each of which run b
    makes visible."""
    optimizer, weights = optimizer_of(run)
    for step in range(3):
        for name, weight in weights.items():
            weight.grad = torch.from_numpy(GOLDEN[f"{run}_{name}_grad"][step])
        optimizer.step()
        for name, weight in weights.items():
            for ours, key in ((weight, "param"), (optimizer.state[weight]["momentum"], "mu")):
                theirs = GOLDEN[f"{run}_{name}_{key}"][step]
                np.testing.assert_allclose(
                    ours.detach().numpy(), theirs, rtol=1e-6, atol=1e-7 * np.abs(theirs).max()
                )


def test_state_survives_saving() -> None:
    """A resumed run must go on with the interrupted one's momentum, or it is not the same run."""
    whole, whole_weights = optimizer_of("b")
    first, first_weights = optimizer_of("b")

    def step(optimizer: LARS, weights: dict[str, torch.nn.Parameter], number: int) -> None:
        for name, weight in weights.items():
            weight.grad = torch.from_numpy(GOLDEN[f"b_{name}_grad"][number])
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
    """The teacher and frozen layers have no gradient; decay must not shrink them."""
    optimizer, weights = optimizer_of("b")
    optimizer.step()
    for name, weight in weights.items():
        assert np.array_equal(weight.detach().numpy(), GOLDEN[f"b_{name}_init"])
        assert not optimizer.state[weight]
