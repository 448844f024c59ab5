"""Balanced targets against optimal transport computed plainly, and across processes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from model.targets import ITERATIONS, balancing_offset
from tests.helpers.host_sync import host_syncs
from tests.helpers.processes import run_workers
from tests.helpers.tiny_slotcon import gradients, tiny_batch, tiny_model

BALANCED: dict[str, object] = {"targets": "balanced"}


def scores_of(seed: int = 0, images: int = 3) -> Tensor:
    """Cosines [2, B, K, H, W] that prefer the first prototypes."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(2, images, 5, 4, 4, generator=generator) / 4
    return noise - torch.arange(5)[:, None, None] / 8


def targets_of(scores: Tensor, offset: Tensor, temperature: float) -> Tensor:
    """[2, B, K, H, W]"""
    return ((scores - offset[0][:, None, None]) / temperature).softmax(dim=2)


def naive_shares(scores: Tensor, power: float, temperature: float, iterations: int) -> np.ndarray:
    """Shares [K] of the plan after scaling rows (prototypes) and columns (cells) in turn.

    Chizat et al., arXiv 1607.05816: the row's scaling is (p / K v)^power with p = 1 / K; the
    column's (1 / K^T u). The last scaling is the cells'.
    """
    kernel = np.exp(scores.double().numpy() / temperature)
    kernel = np.moveaxis(kernel, 2, 0).reshape(kernel.shape[2], -1)  # [K, cells]
    u, cells = np.ones(len(kernel)), kernel.shape[1]
    v = 1 / (kernel.T @ u) / cells
    for _ in range(iterations):
        u = ((1 / len(kernel)) / (kernel @ v)) ** power
        v = 1 / (kernel.T @ u) / cells
    return u * (kernel @ v)


@pytest.mark.parametrize("power", [0.0, 0.5, 0.7, 1.0])
@pytest.mark.parametrize("temperature", [0.05, 0.2])
def test_offset_is_that_of_optimal_transport(power: float, temperature: float) -> None:
    """Without it the targets are balanced by some other rule than the one named."""
    scores = scores_of()
    offset = balancing_offset(scores, power, temperature)
    shares = targets_of(scores, offset, temperature).mean(dim=(0, 1, 3, 4))
    expected = naive_shares(scores, power, temperature, ITERATIONS)
    np.testing.assert_allclose(shares.numpy(), expected, rtol=1e-4)


def test_ends_of_the_scale() -> None:
    """Without it `balance` 0 is no softmax, or 1 does not use all prototypes equally."""
    scores = scores_of()
    assert not balancing_offset(scores, 0.0, 0.05).any()
    plain, pulled, equal = (
        targets_of(scores, balancing_offset(scores, power, 0.2), 0.2).mean(dim=(0, 1, 3, 4))
        for power in (0.0, 0.7, 1.0)
    )
    assert plain.min() < 0.5 * pulled.min() < equal.min()
    torch.testing.assert_close(equal, torch.full((5,), 0.2), rtol=0.05, atol=0)


def test_a_prototype_that_no_cell_likes_stays_finite() -> None:
    """Without it one dead prototype makes the loss NaN: its share underflows to zero."""
    scores = scores_of()
    scores[:, :, 4] = -1.0
    offset = balancing_offset(scores, 0.7, 0.004)
    assert torch.isfinite(offset).all()
    assert torch.isfinite(targets_of(scores, offset, 0.004)).all()


def test_the_loss_takes_the_batch_s_offset() -> None:
    """Without it the setting changes nothing, or the running centre moves all the same."""
    model, batch = tiny_model(**BALANCED, balance=0.6, balance_temp=0.04), tiny_batch(side=64)
    output = model(*batch)
    assert not model.center.any()
    plain = tiny_model()
    with torch.no_grad():
        students, teachers = (
            [branch(view).scores for view in batch[0]] for branch in (plain.student, plain.teacher)
        )
    offset = balancing_offset(torch.stack(teachers), 0.6, 0.04)
    targets = targets_of(torch.stack(teachers), offset, 0.04)
    for name, own, other in (("grouping_12", 0, 1), ("grouping_21", 1, 0)):
        log_q = (students[own] / 0.1).log_softmax(dim=1)
        expected = -(targets[other] * log_q).sum(dim=1).mean()
        torch.testing.assert_close(output.terms[name], expected)  # the views overlap entirely
    assert output.terms["slot_12"] == plain(*batch).terms["slot_12"]


def test_no_host_synchronisation() -> None:
    """Without it the host waits for a GPU three times a step."""
    model, batch = tiny_model(**BALANCED), tiny_batch(side=64)
    model(*batch)
    model.adapt_capacity()
    with host_syncs() as found:
        model(*batch).loss.backward()
    assert not found


@pytest.mark.parametrize(
    ("field", "value"),
    [("targets", "sinkhorn"), ("balance", 1.5), ("balance", -0.1), ("balance_temp", 0.0)],
)
def test_config_names_an_impossible_field(field: str, value: object) -> None:
    """Without it a misspelt setting trains as the published method."""
    with pytest.raises(ValueError, match=field):
        tiny_model(**{field: value})


# ---- Two processes ----

# In eval mode an image does not depend on its batch, and without slot terms each process has the
# same weight. So two processes must give the result of one process with all images.
SHARED: dict[str, object] = {
    **BALANCED,
    "supervise": (2, 4),
    "group_loss_weight": 1.0,
    "cell_loss_weight": 1.0,
    "relation_loss_weight": 1.0,
    "cells": 3,
}


def _worker(rank: int, folder: Path) -> None:
    model = tiny_model(**SHARED).eval()
    ddp = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
    output = ddp(*tiny_batch(side=64, seed=rank), draw=(7, 3))
    output.loss.backward()
    results = {"terms": output.terms, "gradients": gradients(model)}
    torch.save(results, folder / f"{rank}.pt")


def test_two_processes_do_what_one_does(tmp_path: Path) -> None:
    """Without it shares or keys are those of one process, and the sample of cells another one: half
    of the batch on each of two must give the loss and the gradients of all of it on one.
    """
    run_workers(_worker, tmp_path)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    halves = zip(*(tiny_batch(side=64, seed=seed) for seed in (0, 1)), strict=True)
    model = tiny_model(**SHARED).eval()
    output = model(*(torch.cat(parts, dim=1) for parts in halves), draw=(7, 3))
    output.loss.backward()
    names = [name for name in output.terms if not name.removeprefix("stage2_").startswith("slot")]
    assert {"stage2_cells", "relations"} < set(names) and "grouping_12" in names
    for name in names:
        mean = sum(of_rank["terms"][name] for of_rank in ranks) / 2
        torch.testing.assert_close(mean, output.terms[name], rtol=1e-4, atol=1e-6)
    for name, gradient in gradients(model).items():
        for of_rank in ranks:
            difference = (of_rank["gradients"][name] - gradient).norm()
            assert difference <= 1e-3 * gradient.norm() + 1e-7, name
