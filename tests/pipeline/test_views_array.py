"""The sampler over arrays: another implementation of the same promise, to the last bit."""

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.views import ViewConfig, ViewParams, sample_views
from pipeline.views_array import sample_views_numpy, sample_views_torch
from tests.helpers.view_params import assert_same
from tests.pipeline.test_views import configs, index64, side, word32, word64

SIDES = [1, 2, 3, 5, 7, 64, 375, 480, 640, 6000, 65535]


def torch_on(device: str) -> Callable[..., ViewParams]:
    def sample(*arguments: Any) -> ViewParams:
        tensors = sample_views_torch(*arguments, device)
        drawn = [getattr(tensors, field.name) for field in fields(tensors)]
        assert all(tensor.device.type == device for tensor in drawn)
        return ViewParams(*(tensor.cpu().numpy() for tensor in drawn))

    return sample


samplers = pytest.mark.parametrize(
    "sample",
    [
        sample_views_numpy,
        torch_on("cpu"),
        pytest.param(torch_on("cuda"), marks=pytest.mark.cuda),
    ],
    ids=["numpy", "torch", "torch-cuda"],
)


@samplers
@settings(max_examples=100)
@given(
    seed=word64,
    epoch=word32,
    images=st.lists(st.tuples(index64, side, side), max_size=20),
    config=configs,
)
def test_equal_to_the_sampler(
    sample: Callable[..., ViewParams],
    seed: int,
    epoch: int,
    images: list[tuple[int, int, int]],
    config: ViewConfig,
) -> None:
    """Values and types: a backend must not care who drew. Also for no image at all."""
    index, height, width = np.array(images, dtype=np.int64).reshape(-1, 3).T
    arguments = (seed, epoch, index, height, width, config)
    assert_same(sample(*arguments), sample_views(*arguments))


@samplers
@pytest.mark.parametrize(
    "config",
    [
        ViewConfig(),
        ViewConfig(jitter=1, grey=0.5, blur=(0.5, 0.5), solarize=(0.5, 0.5), min_overlap=0.5),
        ViewConfig(min_scale=0.01, max_scale=0.05, min_aspect=0.2, max_aspect=7),
    ],
    ids=["slotcon", "all-on", "narrow"],
)
def test_equal_on_thousands_of_odd_sizes(
    sample: Callable[..., ViewParams], config: ViewConfig
) -> None:
    """Sides at which every try fails, and at which float32 would not do."""
    height, width = np.array(np.meshgrid(SIDES, SIDES)).reshape(2, -1).repeat(40, axis=1)
    index = np.arange(len(height)) * 0x1E3779B97F4A7C15
    arguments = (2**64 - 1, 3, index, height, width, config)
    assert_same(sample(*arguments), sample_views(*arguments))


@samplers
def test_bad_arguments_are_refused(sample: Callable[..., ViewParams]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        sample(0, 0, [0], [0], [640], ViewConfig())
    with pytest.raises(ValueError, match="seed"):
        sample(-1, 0, [0], [480], [640], ViewConfig())
