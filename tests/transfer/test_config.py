"""The configuration that both tasks share: which values are read and refused, and the messages."""

import json
from pathlib import Path

import pytest

from pipeline.errors import UserError
from tests.helpers.tiny_task import TinyConfig
from train.run.settings import to_dict, to_yaml
from transfer.command import settings_of

SETTINGS = settings_of(TinyConfig)
BASE = ["--name", "a", "--optim.steps", "90", "--optim.batch_size", "4", "--optim.lr", "0.1"]


def test_round_trip(tmp_path: Path) -> None:
    """A checkpoint and config.yaml must give the same configuration again."""
    schedule = ["--optim.schedule", "step", "--optim.milestones", "[60, 80]"]
    config, options = SETTINGS.load([*BASE, *schedule, "--resume", "auto"])
    assert config.optim.milestones == (60, 80) and config.optim.norm_weight_decay is None
    assert options == {"resume": "auto", "evaluate": None, "json": None}
    assert SETTINGS.from_dict(json.loads(json.dumps(to_dict(config)))) == config
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config))
    later = ["--config", str(file), "--optim.lr", "0.2"]
    assert SETTINGS.load(later)[0].optim.lr == 0.2


@pytest.mark.parametrize(
    ("argument", "value", "says"),
    [
        ("--optim.step", "3", "unknown key optim.step (did you mean optim.steps?)"),
        ("--optim.steps", "0", "optim.steps must be at least 1, not 0"),
        ("--optim.lr", ".inf", "optim.lr must be a positive number, not inf"),
        ("--optim.norm_weight_decay", "-1", "optim.norm_weight_decay must be 0 or more, or null"),
        ("--optim.schedule", "cosine", "optim.schedule must be one of"),
        ("--optim.milestones", "[3]", 'optim.milestones must be empty, or schedule "step"'),
        ("--optim.milestones", "[3, 3]", "optim.milestones must be growing steps within 1..89"),
        ("--optim.min_lr", "1", "optim.min_lr must be in 0..lr (0.1), not 1"),
        ("--optim.warmup_steps", "90", "optim.warmup_steps must be at least 0 and less than"),
        ("--optim.precise_bn", "-1", "optim.precise_bn must be 0 or more"),
        ("--init.arch", "vit", "init.arch must be one of resnet18,"),
        ("--init.frozen", "6", "init.frozen must be in 0..5, not 6"),
        ("--init.branch", "both", "init.branch must be one of"),
        ("--init.weights", "", "init.weights must be random, supervised or a path"),
        ("--efficiency.workers", "-1", "efficiency.workers must be 0 or more"),
        ("--log.evaluate_every", "-1", "log.evaluate_every must be 0 or more"),
        ("--name", "a/b", "name must be made of"),
    ],
)
def test_impossible_values_are_named(argument: str, value: str, says: str) -> None:
    """Without the key and the value in one line, a user does not know which setting to change."""
    with pytest.raises(UserError) as refused:
        SETTINGS.load([*BASE, argument, value])
    assert str(refused.value).startswith(says) and "\n" not in str(refused.value)


def test_a_resumed_run_keeps_its_science() -> None:
    """A new learning rate in mid-run would mix two recipes; a new disk would not."""
    before, _ = SETTINGS.load(BASE)
    free = ["--data.root", "b", "--optim.max_steps", "3", "--efficiency.workers", "1"]
    assert SETTINGS.changed(before, SETTINGS.load([*BASE, *free])[0]) == []
    other, _ = SETTINGS.load([*BASE, "--optim.lr", "0.2", "--init.frozen", "5"])
    changed = {key for key, _, _ in SETTINGS.changed(before, other)}
    assert changed == {"optim.lr", "init.frozen"}
