"""Parity of SlotMIM with the authors' code: the records of `tests/golden/slotmim/` (its README)."""

import hashlib
import json
import math
from unittest.mock import patch

import numpy as np
import pytest
import torch

pytest.importorskip("timm")

from model import ModelConfig, SlotCon, objective
from model.alignment import align_to_overlap
from model.architectures import IMAGENET
from model.losses import slot_loss
from model.masked_vit import MaskedVit, sine_table
from tests import slotmim_golden as golden
from tests.model_golden import Arrays, Parity, contrasted, load, settings, table
from tests.slotmim_golden import RECORD
from train.config import TrainConfig
from train.optimizer import build_optimizer
from train.schedule import learning_rate, teacher_momentum, teacher_temp, weight_decay


def assert_parity(title: str, rows: list[Parity]) -> None:
    print(f"\n{table(title, rows)}")  # shown by pytest -s, and on failure
    assert all(row.holds for row in rows), [row for row in rows if not row.holds]


def test_rebuilt_weights_are_the_recorded_ones() -> None:
    """Without it a wrong rule, or a wrong name, would make the other tests worthless."""
    check = load("weights_check.npz", RECORD)
    state = golden.build_model().official_state_dict()
    assert sorted(state) == sorted(check["names"])
    for name, shape in zip(check["names"], check["shapes"], strict=True):
        assert ",".join(map(str, state[name].shape)) == shape
    raw = b"".join(state[name].numpy().astype("<f4").tobytes() for name in sorted(state))
    assert hashlib.sha256(raw).hexdigest() == settings(RECORD)["weights_sha256"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_six_steps_in_one_process(dtype: torch.dtype) -> None:
    """Forward, losses, clipping, resting prototypes, AdamW, teacher and centre together. Without it
    a step could be another method's; float64 shows what float32 rounds away."""
    steps = golden.one_process(dtype)
    assert_parity(f"One process, {dtype}", golden.compare(steps, 1, 0, dtype))


def test_steps_in_static_selection() -> None:
    """As a GPU runs them. Without it slots in padded buffers could be other ones."""
    steps = golden.one_process(torch.float64, golden.ROOM, count=3)
    assert_parity("Static selection", golden.compare(steps, 1, 0, torch.float64))


def test_three_steps_in_two_processes(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Without it gathered keys, labels, the centre over ranks or mean gradients could be wrong."""
    ranks = golden.two_processes(tmp_path_factory.mktemp("golden"))
    for rank, of_rank in enumerate(ranks):
        for dtype, steps in of_rank.items():
            rows = golden.compare(steps, 2, rank, dtype)
            assert_parity(f"Two processes, rank {rank}, {dtype}", rows)


def internals(model: SlotCon, given: dict[str, torch.Tensor]) -> Arrays:
    """Scores and slots of both networks and views, by recorded name."""
    found: dict[str, torch.Tensor] = {}
    boxes = list(zip(given["overlap"], given["flipped"], strict=True))
    hidden = {"student": given["masks"], "teacher": (None, None)}
    for name, branch in (("student", model.student), ("teacher", model.teacher)):
        seen = zip(given["views"], hidden[name], strict=True)
        views = [branch.stages(view, masks)[-1] for view, masks in seen]
        found[f"{name}_slots"] = torch.stack([view.slots for view in views])
        found[f"{name}_scores"] = torch.stack([view.scores for view in views]).flatten(3)
        aligned = [align_to_overlap(view.scores, *b) for view, b in zip(views, boxes, strict=True)]
        found[f"{name}_scores_aligned"] = torch.stack(aligned)
        for number, (view, masks) in enumerate(zip(views, given["masks"], strict=True), start=1):
            found[f"masked_scores_{name}_{number}"] = view.scores.movedim(1, -1)[masks]
    unmasked = [model.student.stages(view)[-1].scores.flatten(2) for view in given["views"]]
    found["student_scores_unmasked"] = torch.stack(unmasked)
    return {name: value.detach().numpy() for name, value in found.items()}


def test_internals_of_the_first_forward() -> None:
    """Without it a wrong loss would not say where it begins to be wrong."""
    record, steps = load("internals_f64.npz", RECORD), load("steps_ws1.npz", RECORD)
    model = golden.build_model(torch.float64)
    at = golden.rates(0, golden.train_settings(1))
    model.set_teacher_temp(at["teacher_temp"])
    model.update_teacher(at["teacher_momentum"])
    given = golden.inputs(steps, 1, 0, 0, torch.float64)
    for name, ours in internals(model, given).items():
        assert np.abs(ours - record[name]).max() <= 1e-12 * np.abs(record[name]).max(), name
    with patch.object(objective, "slot_loss", wraps=slot_loss) as slot_losses:
        model(**given)
    for direction, call in zip(("12", "21"), slot_losses.call_args_list, strict=True):
        queries, keys, positive = contrasted(*call.args)
        unit = [torch.nn.functional.normalize(rows, dim=1) for rows in (queries.detach(), keys)]
        logits = unit[0] @ unit[1].T / model.config.contrast_temp
        for name, value in (("predicted", queries.detach()), ("logits", logits)):
            np.testing.assert_allclose(value, record[f"{name}_{direction}"], rtol=1e-9, atol=1e-12)
        assert np.array_equal(positive, record[f"labels_{direction}"])


def test_schedules_of_the_long_recipe() -> None:
    """Without it the recipe's 188,800 steps could have other rates than the authors'."""
    record = load("schedule.npz", RECORD)
    config = json.loads(str(record["config_json"]))
    per_epoch, total = config["steps_per_epoch"], config["total_steps"]
    steps = [int(step) for step in record["long_step"]]
    peak = config["base_lr"] * config["batch_per_process"] * config["world_size"] / 256
    rates = [
        learning_rate(
            step,
            peak=peak,
            warmup_steps=config["warmup_epoch"] * per_epoch,
            warmup_multiplier=None,
            total_steps=total,
            reaches_peak=True,
            final=config["min_lr"],
        )
        for step in steps
    ]
    decays = [
        weight_decay(
            step,
            first=config["weight_decay"],
            last=config["weight_decay_end"],
            total_steps=total,
        )
        for step in steps
    ]
    momenta = [
        teacher_momentum(step, base=config["teacher_momentum"], total_steps=total) for step in steps
    ]
    temperatures = [
        teacher_temp(
            epoch,
            first=config["warmup_teacher_temp"],
            last=config["teacher_temp"],
            warmup_epochs=config["warmup_teacher_temp_epochs"],
        )
        for epoch in range(config["epochs"])
    ]
    assert rates[0] == 0
    np.testing.assert_allclose(rates, record["long_lr"], rtol=1e-12)
    np.testing.assert_allclose(decays, record["long_wd"], rtol=1e-12)
    np.testing.assert_allclose(momenta, record["long_teacher_momentum_exact"], rtol=1e-14)
    np.testing.assert_allclose(temperatures, record["long_teacher_temp"], rtol=1e-12)


def test_positions_are_the_authors() -> None:
    """Without it x and y could change places, which no loss would show."""
    record = load("posembed.npz", RECORD)
    small = np.concatenate((np.zeros((1, 64)), sine_table(6, 6, 64)))
    np.testing.assert_allclose(small, record["table_small"], atol=1e-13)
    large = np.concatenate((np.zeros((1, 768)), sine_table(14, 14, 768)))
    np.testing.assert_allclose(large[record["table_768_rows"]], record["table_768"], atol=1e-13)
    assert large.sum() == pytest.approx(float(record["table_768_sum"]), rel=1e-12)


def test_vit_base_is_the_authors() -> None:
    """Names, shapes, which weights decay, drop paths of ViT-B/16 with 512 prototypes. Without it a
    recipe could train another network than the authors'."""
    record = json.loads((RECORD / "vit_base.json").read_text())
    config = ModelConfig(
        "timm:vit_base_patch16_224",
        2048,
        256,
        512,
        objective="slotmim",
        drop_path=0.1,
        image_stats=IMAGENET,
    )
    with torch.device("meta"):
        model = SlotCon(config)
    official = model.official_state_dict()
    own = {n.removeprefix("encoder_q."): v for n, v in official.items() if "encoder_q." in n}
    shapes = {name: facts["shape"] for name, facts in record["encoder"].items()}
    assert {name: list(value.shape) for name, value in own.items()} == shapes
    sizes = [sum(p.numel() for p in part) for part in (
        [p for p in model.parameters() if p.requires_grad], model.teacher.parameters()
    )]  # fmt: skip
    assert sizes == [record["trainable"], record["teacher"]]
    train = TrainConfig(optimizer="adamw", base_lr=0.01, decay_positions=True)
    groups = build_optimizer(model, train).param_groups
    resting = [group for group in groups if group["weight_decay"] == 0]
    assert sum(p.numel() for group in resting for p in group["params"]) == record["undecayed"]
    blocks = model.student.encoder.net.blocks
    drawn = [getattr(block.drop_path1, "drop_prob", 0.0) for block in blocks]
    assert drawn == pytest.approx(record["drop_path"], abs=1e-6)
    assert not any(
        getattr(b.drop_path1, "drop_prob", 0.0) for b in model.teacher.encoder.net.blocks
    )


def test_new_weights_start_as_the_authors() -> None:
    """Each kind of weight of a smaller ViT against the recorded ones: their spread follows from the
    shape. Without it training would start from timm's own values."""
    record = json.loads((RECORD / "vit_base.json").read_text())["encoder"]
    torch.manual_seed(0)
    encoder = MaskedVit("timm:vit_tiny_patch16_224")
    state = {name.removeprefix("net."): value for name, value in encoder.state_dict().items()}
    for name, theirs in record.items():
        ours, shape = state[name], theirs["shape"]
        if name.endswith("weight") and len(shape) > 1:
            bounds = [
                math.sqrt(6 / (size[0] + math.prod(size[1:]))) for size in (shape, ours.shape)
            ]
            assert theirs["largest"] == pytest.approx(bounds[0], rel=1e-3), name
            assert ours.abs().max() == pytest.approx(bounds[1], rel=1e-3), name
            assert ours.std() == pytest.approx(bounds[1] / math.sqrt(3), rel=0.03), name
        elif name == "patch_embed.proj.bias":  # torch's default
            assert theirs["largest"] == pytest.approx(1 / math.sqrt(768), rel=1e-2)
            assert ours.abs().max() == pytest.approx(1 / math.sqrt(768), rel=0.05)
        elif name == "cls_token":
            assert ours.std() == pytest.approx(0.02, rel=0.2)
        elif name == "pos_embed":
            torch.testing.assert_close(ours[0, 1:], sine_table(14, 14, 192).float())
            assert not ours[0, 0].any()
        else:
            assert ours.unique().tolist() == [theirs["largest"]], name
