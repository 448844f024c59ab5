"""Parity with the authors' code: the records of `tests/golden/` (see its README)."""

import hashlib
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor

from model import SlotCon, objective
from model.alignment import align_to_overlap
from model.grouping import winning_slots
from model.losses import slot_loss
from tests import model_golden as golden
from tests.model_golden import Arrays, Parity

FLOAT32 = 1e-5
"""Relative L2 distance that float32 rounding may cause within one forward pass."""


def assert_parity(title: str, rows: list[Parity]) -> None:
    print(f"\n{golden.table(title, rows)}")  # shown by pytest -s, and on failure
    assert all(row.holds for row in rows), [row for row in rows if not row.holds]


def assert_close(ours: Any, theirs: Any, tolerance: float = FLOAT32) -> None:
    distance = float(golden.relative(ours, theirs))
    assert distance <= tolerance, f"relative distance {distance:.1e}"


def test_rebuilt_weights_are_the_recorded_ones() -> None:
    """A wrong rebuild rule or name mapping would make every other golden test meaningless."""
    check = golden.load("weights_check.npz")
    state = golden.build_model().official_state_dict()
    entries = {name: value for name, value in state.items() if value.is_floating_point()}

    assert sorted(entries) == sorted(check["names"])
    for name, shape, total, norm in zip(
        check["names"], check["shapes"], check["sum"], check["norm"], strict=True
    ):
        value = entries[name].double()
        assert ",".join(map(str, value.shape)) == shape
        assert value.sum().item() == pytest.approx(total, abs=1e-6)
        assert value.norm().item() == pytest.approx(norm, rel=1e-6)
    raw = b"".join(entries[name].numpy().astype("<f4").tobytes() for name in sorted(entries))
    assert hashlib.sha256(raw).hexdigest() == golden.settings()["weights_sha256"]


@pytest.mark.parametrize("world", [1, 2])
def test_rebuilt_images_are_the_recorded_ones(world: int) -> None:
    """The same for the images, the inputs of the record."""
    record = golden.load(f"steps_ws{world}.npz")
    for rank in range(world):
        for view, name in enumerate(golden.image_names(world, rank, step=1)):
            at = (1, view) if world == 1 else (1, rank, view)
            image = golden.rebuild_images(name)
            assert hashlib.sha256(image.tobytes()).hexdigest() == record["image_sha256"][at]
            assert np.array_equal(image.ravel()[:8], record["image_first8"][at])
            stat = (image.mean(dtype=np.float64), image.std(dtype=np.float64))
            assert stat == pytest.approx(record["image_stat"][at], rel=1e-5)


@pytest.mark.parametrize("side", [7, 14])
def test_inverse_augmentation(side: int) -> None:
    """Half a cell of offset, or a flip undone before the cut, would show here. Positions in float32
    put the record itself up to 9e-7 off its float64 value."""
    record = golden.load("invaug.npz")
    for case in range(8):
        ours = align_to_overlap(
            *(torch.from_numpy(record[f"{name}{side}"][case]) for name in ("x", "coords", "flags"))
        )
        assert_close(ours, record[f"out{side}"][case], 2e-6)


def test_inverse_augmentation_of_boxes_without_area() -> None:
    """CPU RoIAlign raises for an inverted box; one such pair must not end the training."""
    record = golden.load("invaug.npz")
    scores = torch.from_numpy(record["degenerate_x"]).requires_grad_()
    boxes = torch.from_numpy(record["degenerate_coords"])
    aligned = align_to_overlap(scores, boxes, torch.zeros(len(boxes), dtype=torch.bool))
    assert torch.equal(aligned, torch.from_numpy(record["degenerate_out"]))
    aligned.sum().backward()
    assert scores.grad is not None
    assert not scores.grad.any()


def branch_internals(model: SlotCon, views: Tensor, boxes: list[tuple[Tensor, Tensor]]) -> Arrays:
    """Features, slots, scores and aligned scores of both branches and views, by recorded name."""
    internals = {}
    for letter, branch, feature in (("q", model.student, "x"), ("k", model.teacher, "y")):
        for number, (view, box) in enumerate(zip(views, boxes, strict=True), start=1):
            grouped = branch(view)
            internals[f"projector_{letter}_{feature}{number}"] = grouped.features
            internals[f"slots_{letter}{number}"] = grouped.slots
            internals[f"scores_{letter}{number}"] = grouped.scores
            internals[f"{letter}{number}_aligned"] = align_to_overlap(grouped.scores, *box)
            internals[f"active_{letter}{number}"] = winning_slots(grouped.scores)
        internals[f"encoder_{letter}_view1_channel_mean"] = branch.encoder(views[0]).mean(
            dim=(2, 3)
        )
    return {name: value.detach().numpy() for name, value in internals.items()}


def test_internals_of_the_first_forward() -> None:
    """If the losses are wrong, this shows which stage is."""
    record, steps = golden.load("internals.npz"), golden.load("steps_ws1.npz")
    views, overlap, flipped = golden.batch(steps, world=1, rank=0, step=0)

    model = golden.build_model().train()
    model.update_teacher(float(steps["teacher_momentum"][0]))
    with patch.object(objective, "slot_loss", wraps=slot_loss) as slot_losses:
        output = model(views, overlap, flipped)
    for name, value in branch_internals(
        model, views, list(zip(overlap, flipped, strict=True))
    ).items():
        if value.dtype == bool:
            assert np.array_equal(value, record[name]), name
        else:
            assert_close(value, record[name])

    for direction, call in zip(("12", "21"), slot_losses.call_args_list, strict=True):
        queries, keys, positive = golden.contrasted(*call.args)
        normalised = [
            torch.nn.functional.normalize(rows, dim=1) for rows in (queries.detach(), keys)
        ]
        logits = normalised[0] @ normalised[1].T / model.config.contrast_temp
        assert_close(queries.detach(), record[f"predictor_out_{direction}"])
        assert_close(logits, record[f"logits_{direction}"])
        assert np.array_equal(positive, record[f"labels_{direction}"])
        assert_close(output.terms[f"grouping_{direction}"], record[f"loss_group_{direction}"], 1e-6)
        assert_close(output.terms[f"slot_{direction}"], record[f"loss_ctr_{direction}"], 1e-6)
    assert_close(output.loss.detach(), record["loss_total"], 1e-6)


def check_masks(steps: list[Arrays], record: Arrays, rank: int | None = None) -> None:
    """Active slots are decided by comparisons: they must agree exactly."""
    for index, step in enumerate(steps):
        at = index if rank is None else (index, rank)
        assert np.array_equal(step["active_q"], record["active_q"][at])
        assert np.array_equal(step["active_k"], record["active_k"][at])
        stats = step["stats"].item()
        images = 2 * golden.settings()["batch_size"]
        assert stats["active_slots"] == pytest.approx(record["active_k"][at].sum() / images)
        assert stats["active_pairs"] == pytest.approx(record["num_active_pairs"][at].sum() / images)


def test_six_steps_in_one_process() -> None:
    """Forward, backward, teacher, centre, BatchNorm and LARS together, as in the authors' code."""
    steps = golden.one_process()
    check_masks(steps, golden.load("steps_ws1.npz"))
    tracked = golden.load("steps_ws1.npz")["bn1_q_num_batches_tracked"]
    assert [int(step["bn1_q_num_batches_tracked"]) for step in steps] == list(tracked)
    assert_parity("One process, float32", golden.compare_one_process(golden.FLOAT32, steps))


def test_steps_in_float64() -> None:
    """Float32 rounding hides small parts, such as the assignment floor and weight decay."""
    steps = golden.one_process(golden.FLOAT64, count=2)
    assert_parity("One process, float64", golden.compare_one_process(golden.FLOAT64, steps))


def test_steps_in_static_selection() -> None:
    """A GPU runs with static selection and a CPU with exact: both need the proof."""
    steps = golden.one_process(golden.STATIC, count=3)
    check_masks(steps, golden.load("steps_ws1.npz"))
    assert_parity("Static selection", golden.compare_one_process(golden.STATIC, steps))


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, list[Arrays]]]:
    return golden.two_processes(tmp_path_factory.mktemp("golden"))


@pytest.mark.parametrize("mode", golden.TWO_PROCESS_MODES, ids=lambda mode: mode.name)
def test_three_steps_in_two_processes(
    two_processes: list[dict[str, list[Arrays]]], mode: golden.Mode
) -> None:
    """Gathered keys, label offsets, the centre over ranks and averaged gradients."""
    record = golden.load("steps_ws2.npz")
    for rank, of_rank in enumerate(two_processes):
        steps = of_rank[mode.name]
        check_masks(steps, record, rank)
        tracked = record["bn1_q_num_batches_tracked"][:, rank]
        assert [int(step["bn1_q_num_batches_tracked"]) for step in steps] == list(tracked)
        rows = golden.compare_two_processes(rank, steps)
        assert_parity(f"Two processes, {mode.name}, rank {rank}", rows)
        for term, direction in enumerate(("12", "21")):
            first = steps[0]
            assert np.array_equal(
                first[f"labels_{direction}"], record[f"step0_labels_{direction}_rank{rank}"]
            )
            gathered = record[f"step0_gathered_k_{direction}"][record["gathered_mask_k"][0, term]]
            assert_close(first[f"keys_{direction}"], gathered)
