"""SlotCon on two gloo processes: what the ranks share, and that no rank hangs."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from model.distributed import all_gather, all_reduce_mean, rank, world_size
from tests.helpers.processes import run_workers
from tests.helpers.tiny_slotcon import IMAGES, set_agreement, tiny_batch, tiny_model


def _center(rank: int) -> dict[str, Tensor]:
    model = tiny_model()
    scores: list[Tensor] = []
    model.teacher.grouping.register_forward_hook(lambda _m, _i, grouped: scores.append(grouped[1]))
    model(*tiny_batch(side=64, seed=rank))
    return {"center": model.center, "scores": torch.stack(scores)}


def _step(rank: int, pairs: tuple[int, int], synced: bool) -> dict[str, Tensor]:
    """One forward and backward under DDP with `pairs[rank]` active pairs on each rank."""
    model = tiny_model()
    ddp = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
    if synced:  # only now: DDP refuses SyncBatchNorm on a CPU
        for layer in model.predictor:
            if isinstance(layer, nn.BatchNorm1d):
                layer.__class__ = nn.SyncBatchNorm  # type: ignore[assignment]
    batch = tiny_batch(seed=rank)
    set_agreement(model, batch[0], pairs[rank])
    output = ddp(*batch)
    output.loss.backward()
    gradient = next(model.predictor.parameters()).grad
    assert gradient is not None
    return {"slot": output.terms["slot_12"], "loss": output.loss.detach(), "gradient": gradient}


STEPS = {
    "plain 3-0": ((3, 0), False),
    "plain 1-3": ((1, 3), False),
    "synced 3-0": ((3, 0), True),
    "synced 1-1": ((1, 1), True),
    "synced 1-0": ((1, 0), True),
}


def _worker(rank: int, folder: Path) -> None:
    results: dict[str, dict[str, Tensor]] = {"centre": _center(rank)}
    for name, (pairs, synced) in STEPS.items():
        results[name] = _step(rank, pairs, synced)
    row = torch.tensor([[rank, rank + 10]])
    results["collectives"] = {
        "gathered": all_gather(row),
        "flags": all_gather(row > 0),
        "mean": all_reduce_mean(row.float()),
    }
    torch.save(results, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Tensor]]]:
    """The results of each of two ranks, by scenario."""
    folder = tmp_path_factory.mktemp("ranks")
    run_workers(_worker, folder)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


Results = list[dict[str, dict[str, Tensor]]]


def test_collectives(results: Results) -> None:
    """The labels of the contrast rely on the order of ranks."""
    for of_rank in results:
        collected = of_rank["collectives"]
        assert collected["gathered"].tolist() == [[0, 10], [1, 11]]
        assert collected["flags"].tolist() == [[False, True], [True, True]]
        assert collected["mean"].tolist() == [[0.5, 10.5]]


def test_center_is_the_mean_over_ranks(results: Results) -> None:
    """With centres that drift apart, each rank would learn other targets."""
    assert torch.equal(results[0]["centre"]["center"], results[1]["centre"]["center"])
    scores = torch.stack([of_rank["centre"]["scores"] for of_rank in results])
    expected = 0.1 * scores.mean(dim=(0, 1, 2, 4, 5))[None]
    torch.testing.assert_close(results[0]["centre"]["center"], expected)


@pytest.mark.parametrize(
    ("step", "contrasting"),
    [
        ("plain 3-0", [True, False]),
        ("plain 1-3", [False, True]),  # one row: a BatchNorm of one rank cannot normalise it
        ("synced 3-0", [True, False]),  # the rank without rows joins with an empty batch
        ("synced 1-1", [True, True]),  # one row on each rank is a batch of two
        ("synced 1-0", [False, False]),
    ],
)
def test_ranks_with_few_active_pairs(results: Results, step: str, contrasting: list[bool]) -> None:
    """If one rank skips a collective, the others hang in it, without a message."""
    for of_rank, contrasts in zip(results, contrasting, strict=True):
        assert (of_rank[step]["slot"].item() > 0) == contrasts
        assert torch.isfinite(of_rank[step]["loss"])
    gradient = results[0][step]["gradient"]
    assert torch.equal(gradient, results[1][step]["gradient"])
    assert bool(gradient.any()) == any(contrasting)


def test_one_process_needs_no_group() -> None:
    """A single process must run without a launcher."""
    values = torch.arange(IMAGES)
    assert (rank(), world_size()) == (0, 1)
    assert torch.equal(all_gather(values), values)
    assert torch.equal(all_reduce_mean(values.float()), values.float())
