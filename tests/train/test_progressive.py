"""Progressive view size: smaller views at first; images, order, geometry, schedules stay equal."""

from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.errors import UserError
from tests.helpers.training import assert_same_tensors, run_dir, small_beton, small_run, trainer
from train.config import RunConfig, TrainConfig, from_dict
from train.run.settings import to_dict
from train.trainer import Trainer

GROWING = ((0.0, 32), (0.5, 64))


def test_the_size_follows_the_stages(tmp_path: Path) -> None:
    """A stage that begins an epoch late or early changes the cost and the result."""
    config = small_run(tmp_path / "no.beton", tmp_path, epochs=4, view_sizes=GROWING)
    assert [config.view_size(epoch) for epoch in range(4)] == [32, 32, 64, 64]
    config = replace(config, train=TrainConfig(epochs=3, view_sizes=GROWING, warmup_epochs=1))
    assert [config.view_size(epoch) for epoch in range(3)] == [32, 32, 64]
    late = ((0.0, 32), (0.55, 64))  # 0.55 * 100 is 55.00000000000001
    config = replace(config, train=TrainConfig(epochs=100, view_sizes=late))
    assert [config.view_size(epoch) for epoch in (54, 55)] == [32, 64]
    config = replace(config, train=replace(config.train, view_sizes=()))
    assert [config.view_size(epoch) for epoch in range(3)] == [64, 64, 64]
    assert from_dict(to_dict(config)) == config


def test_the_scale_follows_the_stages(tmp_path: Path) -> None:
    """Without it crops stay small, or grow at another time than the configuration says."""
    parts = ((0.0, 0.1, 0.3), (0.5, 0.08, 1.0))
    config = small_run(
        tmp_path / "no.beton", tmp_path, epochs=4, view_scales=parts, view_sizes=GROWING
    )
    drawn = [config.views_of(epoch) for epoch in range(4)]
    scales = [(views.size, views.min_scale, views.max_scale) for views in drawn]
    assert scales == [(32, 0.1, 0.3)] * 2 + [(64, 0.08, 1.0)] * 2
    assert drawn[3] == config.views
    assert from_dict(to_dict(config)) == config


@pytest.mark.parametrize(
    "parts",
    [
        [[0, 0.1, 0.3]],  # does not end with those of views
        [[0.1, 0.08, 1]],
        [[0, 0.3, 0.1], [0.5, 0.08, 1]],
        [[0, 0, 0.3], [0.5, 0.08, 1]],
        [[0, 0.1, 1.1], [0.5, 0.08, 1]],
        [[0, 0.1], [0.5, 0.08, 1]],
    ],
)
def test_impossible_scales_are_refused(tmp_path: Path, parts: object) -> None:
    """Without it a run fails in the middle, or ends on other crops than it says."""
    values = to_dict(small_run(tmp_path / "no.beton", tmp_path))
    values["train"]["view_scales"] = parts
    with pytest.raises(UserError, match=r"train\.view_scales must be"):
        from_dict(values)


@pytest.mark.parametrize(
    "stages",
    [
        [[0, 32], [0.5, 96]],  # does not end with views.size
        [[0, 60], [0.5, 64]],
        [[0, 64], [0.5, 32], [0.7, 64]],
        [[0.1, 64]],
        [[0, 32], [1, 64]],
        [[0, 32], [0.5, 32], [0.5, 64]],
        [[0, 32], [0.5]],
        [[0, 0], [0.5, 64]],
        "no",
    ],
)
def test_impossible_stages_are_refused(tmp_path: Path, stages: object) -> None:
    """The error comes before anything is loaded, and names the setting."""
    values = to_dict(small_run(tmp_path / "no.beton", tmp_path))
    values["train"]["view_sizes"] = stages
    with pytest.raises(UserError, match=r"train\.view_sizes must be"):
        from_dict(values)


def test_run_grows_and_resumes_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step sees each size in its epochs. A run that was interrupted during the small ones ends
    with the same weights."""
    config: RunConfig = small_run(small_beton(tmp_path), tmp_path, view_sizes=GROWING)
    run, met = trainer(config), []
    step = run.model.forward
    monkeypatch.setattr(
        run.model, "forward", lambda views, *rest, **options: (
            met.append(views.shape[-1]) or step(views, *rest, **options)
        ),
    )  # fmt: skip
    run.train()
    assert met == [32] * 5 + [64] * 5
    parted = replace(config, name="parted")
    trainer(replace(parted, train=replace(parted.train, max_steps=3))).train()
    resumed: Trainer = trainer(parted, "auto")
    assert resumed.run.step == 3
    resumed.train()
    assert_same_tensors(*(run_dir(c) / "checkpoints" / "step_10" for c in (config, parted)))
