"""The health of the prototypes in the log, and the alarm."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model import SlotCon
from model.grouping import winning_slots
from tests.helpers.host_sync import host_syncs
from tests.helpers.tiny_slotcon import IMAGES, tiny_batch, tiny_model
from tests.helpers.training import run_dir, small_beton, small_run, trainer
from train.config import RunConfig
from train.health import CollapseAlarm, near_duplicates, usage_entropy
from train.metrics import STATS, Meter
from train.run import checkpoint
from train.run.ends import Collapsed

HEALTHY = {"active_slots": 4.0, "usage_entropy": 0.9, "grouping_12": 3.0, "grouping_21": 3.1}
FEW_SLOTS = HEALTHY | {"active_slots": 1.4}
ONE_FOR_ALL = HEALTHY | {"usage_entropy": 0.1}
CELLS, WARMUP = 49, 100


@pytest.fixture(scope="module")
def beton(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_beton(tmp_path_factory.mktemp("data"))


def with_log(config: RunConfig, **changes: object) -> RunConfig:
    return replace(config, log=replace(config.log, **changes))  # type: ignore[arg-type]


def lines(config: RunConfig) -> list[dict[str, float]]:
    text = (run_dir(config) / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


# ---- measurements ----


@given(st.lists(st.integers(0, 1000), min_size=2, max_size=20))
def test_entropy_is_its_definition(usage: list[int]) -> None:
    """Divided by log K, so that one bound holds for every K."""
    usage[0] += 1
    shares = [count / sum(usage) for count in usage if count]
    expected = -sum(share * math.log(share) for share in shares) / math.log(len(usage))
    assert usage_entropy(torch.tensor(usage)) == pytest.approx(expected, abs=1e-12)


def test_entropy_at_its_ends() -> None:
    """A prototype that never wins must not give NaN."""
    assert usage_entropy(torch.tensor([0, 9, 0])) == 0
    assert usage_entropy(torch.full((2048,), 3)) == pytest.approx(1)


def test_duplicates_are_pairs_in_one_direction() -> None:
    """Length does not matter; a prototype is no duplicate of itself or of its opposite."""
    prototypes = torch.tensor([[1.0, 0], [5, 0.1], [-1, 0], [0, 1], [1, 0.2]])
    assert near_duplicates(prototypes).item() == 3  # 0 and 1, 0 and 4, 1 and 4


def test_usage_counts_the_cells_of_the_teacher() -> None:
    """Both views count, whatever the loss does with them."""
    model, batch = tiny_model(), tiny_batch(side=64)
    usage = model(*batch).usage
    scores = torch.stack([model.teacher(view).scores for view in batch[0]])
    expected = torch.bincount(scores.argmax(dim=2).flatten(), minlength=2 * IMAGES)
    assert usage.tolist() == expected.tolist() and usage.sum() == 2 * IMAGES * 4
    won = torch.stack([winning_slots(view) for view in scores]).any(dim=(0, 1))
    assert torch.equal(usage > 0, won)


def a_meter(beton: Path, folder: Path) -> tuple[Meter, SlotCon]:
    run = trainer(small_run(beton, folder))
    return run.meter, run.slotcon


def test_the_log_needs_no_further_wait(beton: Path, tmp_path: Path) -> None:
    """A log line is one copy to the host, which also carries usage and duplicates."""
    meter, model = a_meter(beton, tmp_path)
    output = model(*tiny_batch(side=64))
    with host_syncs() as found:
        meter.add(output)
        duplicates = near_duplicates(model.teacher.grouping.prototypes)
    assert not found
    with host_syncs() as found:
        meter.read(0, duplicates)
    assert found["cpu"] == 1


def test_meter_continues_from_any_checkpoint(beton: Path, tmp_path: Path) -> None:
    """From a checkpoint of the same run, of twice as many processes, of a version without usage, of
    another model: averages and usage must stay the same, and nothing may fail."""
    meter, model = a_meter(beton, tmp_path)
    model.eval()
    output = model(*tiny_batch(side=64))
    meter.add(output)
    state, before = meter.state(), meter.read()
    assert before.usage.tolist() == output.usage.tolist()

    meter.load(state)
    assert meter.state() == state
    meter.load(state * 2)
    assert meter.read().averages == before.averages
    assert meter.read().usage.tolist() == (2 * before.usage).tolist()
    meter.load([state[0][: len(meter.names) + 1]])
    assert meter.read().averages == before.averages and not meter.read().usage.any()
    for other in ([], [[1.0, 2.0]]):
        meter.load(other)
        assert not meter.read().averages
    assert set(STATS) <= set(before.averages)


# ---- the alarm ----


@pytest.mark.parametrize("bad", [FEW_SLOTS, ONE_FOR_ALL])
def test_alarm_needs_two_bad_lines_in_a_row(bad: dict[str, float]) -> None:
    """One bad line gives no alarm, nor does the warm-up; each line does not repeat the warning."""
    alarm = CollapseAlarm(num_prototypes=256, warmup_steps=WARMUP)
    said = [
        bool(alarm.check(begin, begin + 10, CELLS, bad if is_bad else HEALTHY))
        for begin, is_bad in [
            *((begin, True) for begin in (0, 50, 90)),
            *((100, True), (110, False), (120, True)),  # two single bad lines
            *((begin, True) for begin in (130, 140, 150)),  # the second in a row, once
            *((160, False), (170, True), (180, True)),  # again, after a healthy line
        ]
    ]
    assert said == [False] * 6 + [True] + [False] * 4 + [True]


def test_alarm_gives_a_loss_at_chance_more_time() -> None:
    """Every grouping starts with this loss. If it never falls, all prototypes have become alike.
    Slots and usage do not show it: tiny differences decide which prototype wins, and they win in
    turn."""
    chance = HEALTHY | dict.fromkeys(("grouping_12", "grouping_21"), math.log(256))
    for every, expected in ((50, 9), (1, 199)):  # ten lines; two hundred steps
        alarm = CollapseAlarm(num_prototypes=256, warmup_steps=WARMUP)
        begins = range(0, WARMUP + every * (expected + 10), every)
        said = [begin for begin in begins if alarm.check(begin, begin + every, CELLS, chance)]
        assert said == [WARMUP + every * expected]
        assert not alarm.check(10_000, 10_001, CELLS, HEALTHY)


def test_a_grouping_that_is_not_learnt_may_stay_at_chance(
    beton: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without it `on_collapse: stop` ends each run of 200 steps in which relations alone learn."""
    config = roomy_run(beton, tmp_path)
    values = HEALTHY | {"step": 9, "grouping_12": math.log(8), "grouping_21": math.log(8)}
    for weight, expected in ((0.5, 1), (0.0, 0)):
        model = replace(config.model, group_loss_weight=weight, relation_loss_weight=1, cells=4)
        run = trainer(replace(config, model=model, name=f"weight_{weight}"))
        run.view_size = 96
        for step in range(0, 300, 20):
            run.run.step = step + 20
            run._check_collapse(step, values)
        said = capsys.readouterr().err.splitlines()
        assert sum("about log K: chance" in line for line in said) == expected


def test_alarm_knows_views_with_too_few_cells() -> None:
    """Views of 32 pixels have one cell and so never two slots; nor has a single prototype."""
    for cells, prototypes in ((1, 256), (4, 256), (49, 1)):
        alarm = CollapseAlarm(prototypes, 0)
        assert not any(alarm.check(step, step + 1, cells, FEW_SLOTS) for step in range(5))
    alarm = CollapseAlarm(256, 0)
    assert any(alarm.check(step, step + 1, 1, ONE_FOR_ALL) for step in range(2))


def collapse(model: SlotCon) -> None:
    """One prototype wins every cell: the others point away from the mean of all features."""
    for branch in (model.student, model.teacher):
        collapse_head(branch)


def collapse_head(head: Any) -> None:
    *_, (_, bias) = head.projector.named_parameters()
    torch.nn.init.constant_(bias, 50.0)
    torch.nn.init.constant_(head.grouping.prototypes, -1.0)
    torch.nn.init.constant_(head.grouping.prototypes[0], 1.0)


def roomy_run(beton: Path, folder: Path, **log: object) -> RunConfig:
    """Views of 96 pixels: nine cells."""
    config = small_run(beton, folder, warmup_epochs=0, max_steps=4)
    config = replace(config, views=replace(config.views, size=96))
    return with_log(config, every=1, **log)


def test_a_healthy_run_is_quiet(
    beton: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It prints no warning, and its log holds the figures."""
    config = roomy_run(beton, tmp_path)
    trainer(config).train()
    assert "collapsed" not in capsys.readouterr().err
    for line in lines(config):
        assert 0.25 < line["usage_entropy"] <= 1 and line["active_slots"] > 2
        assert 0 <= line["dead_prototypes"] < 8 and line["near_duplicates"] == 0


def test_a_collapsed_run_warns_once_and_continues(
    beton: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It warns at the second bad line."""
    config = roomy_run(beton, tmp_path)
    run = trainer(config)
    with torch.no_grad():
        collapse(run.slotcon)
    run.train()
    said = [line for line in capsys.readouterr().err.splitlines() if "collapsed" in line]
    assert len(said) == 1 and said[0].startswith("warning: ") and "at step 2:" in said[0]
    last = lines(config)[-1]
    assert last["step"] == 4 and last["usage_entropy"] == 0 and last["active_slots"] == 1
    assert last["dead_prototypes"] == 7 and last["near_duplicates"] == math.comb(7, 2)


def test_a_stage_before_the_last_collapses(
    beton: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without it a head that has died trains on unseen: the last stage is healthy."""
    config = roomy_run(beton, tmp_path)
    model = replace(config.model, stages=3, supervise=(2, 3), stage_sizes=((2, 16, 6, 4),))
    run = trainer(replace(config, model=model))
    with torch.no_grad():
        for branch in (run.slotcon.student, run.slotcon.teacher):
            collapse_head(branch.heads["2"])
    run.train()
    said = [line for line in capsys.readouterr().err.splitlines() if "collapsed" in line]
    assert len(said) == 1 and "at step 2: stage2: usage entropy 0.00" in said[0]
    last = lines(config)[-1]
    assert last["stage2_usage_entropy"] == 0 and last["stage2_dead_prototypes"] == 5
    assert last["usage_entropy"] > 0.25 and last["dead_prototypes"] < 8


def test_a_collapsed_run_stops_if_configured(beton: Path, tmp_path: Path) -> None:
    """It stops at once, with its line in the log, and without a roll-back."""
    config = roomy_run(beton, tmp_path, on_collapse="stop", on_divergence="roll_back")
    run = trainer(with_log(config, checkpoint_every=1))
    with torch.no_grad():
        collapse(run.slotcon)
    with pytest.raises(Collapsed, match=r"collapsed at step 2: 1\.0 active slots.*step_1"):
        run.train()
    assert [line["step"] for line in lines(config)] == [1, 2]
    newest = checkpoint.latest(run_dir(config))
    assert newest and newest.name == "step_1"
