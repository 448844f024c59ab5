"""Learning rate and teacher momentum against the authors' recorded ones."""

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import GOLDEN
from train.schedule import FLOOR, learning_rate, teacher_momentum

RECORDED = np.load(GOLDEN / "schedule.npz")
LONG = json.loads(str(RECORDED["config_json"]))["long"]
SHORT: dict[str, Any] = {
    "peak": 0.03125,
    "warmup_steps": 6,
    "warmup_multiplier": 100,
    "total_steps": 12,
}


def long_settings() -> dict[str, Any]:
    steps = LONG["steps_per_epoch"]
    batch = LONG["batch_size_per_process"] * LONG["world_size"]
    return {
        "peak": LONG["base_lr"] * batch / 256,
        "warmup_steps": LONG["warmup_epoch"] * steps,
        "warmup_multiplier": LONG["warmup_multiplier"],
        "total_steps": LONG["epochs"] * steps,
    }


def test_short_run_matches_every_step() -> None:
    """With a warm-up that is off by one, or a cosine that starts late, the learning rates would not
    be the paper's."""
    rates = [learning_rate(step, **SHORT) for step in range(12)]
    np.testing.assert_allclose(rates, RECORDED["short_lr"], rtol=1e-12)
    np.testing.assert_allclose(
        learning_rate(12, **SHORT), RECORDED["short_lr_after_last"], rtol=1e-9
    )
    momenta = [teacher_momentum(step, base=0.99, total_steps=12) for step in range(12)]
    np.testing.assert_allclose(momenta, RECORDED["short_momentum"], rtol=1e-15)


def test_long_run_matches_at_all_recorded_steps() -> None:
    """The authors' cosine is PyTorch's recursion; ours is the closed form. They must agree up to
    rounding, which accumulates over the 1755 steps of the recursion (relative to the peak)."""
    settings = long_settings()
    rates = [learning_rate(int(step), **settings) for step in RECORDED["long_step"]]
    np.testing.assert_allclose(rates, RECORDED["long_lr"], rtol=1e-9, atol=1e-12 * settings["peak"])
    last = learning_rate(settings["total_steps"], **settings)
    np.testing.assert_allclose(last, RECORDED["long_lr_after_last"], rtol=1e-6)


def test_momentum_of_a_whole_number_of_batches() -> None:
    """If no image is dropped, counting steps and counting images are the same, and the momenta are
    equal."""
    total = int(RECORDED["long_K_exact"])
    assert total == long_settings()["total_steps"]
    momenta = [
        teacher_momentum(int(s), base=0.99, total_steps=total) for s in RECORDED["long_step"]
    ]
    np.testing.assert_allclose(momenta, RECORDED["long_momentum_exact"], rtol=1e-15)


def test_momentum_of_a_ragged_set_is_ours() -> None:
    """A deliberate difference: the authors' index counts dropped images, so their momentum lags
    behind ours (by less than 1e-4 here) and does not reach 1. If they were equal, ours would count
    images again."""
    total = long_settings()["total_steps"]
    ours = np.array(
        [teacher_momentum(int(s), base=0.99, total_steps=total) for s in RECORDED["long_step"]]
    )
    theirs = RECORDED["long_momentum_ragged"]
    later = RECORDED["long_step"] > 0
    assert (ours[later] >= theirs[later]).all() and np.abs(ours - theirs).max() < 1e-4
    assert teacher_momentum(total, base=0.99, total_steps=total) == 1


@given(
    warmup=st.integers(0, 50),
    rest=st.integers(1, 200),
    peak=st.floats(1e-3, 10),
    multiplier=st.floats(1, 1000),
)
def test_rate_rises_to_the_peak_then_falls(
    warmup: int, rest: int, peak: float, multiplier: float
) -> None:
    """All configurations, also without warm-up or with a single step, give finite rates in
    (0, peak]."""
    total = warmup + rest
    rates = [
        learning_rate(
            step,
            peak=peak,
            warmup_steps=warmup,
            warmup_multiplier=multiplier,
            total_steps=total,
        )
        for step in range(total + 1)
    ]
    assert rates[warmup] == pytest.approx(peak)
    assert all(np.diff(rates[: warmup + 1]) >= 0) and all(np.diff(rates[warmup:]) <= 0)
    assert rates[-1] == pytest.approx(FLOOR)
