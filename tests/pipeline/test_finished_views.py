"""The whole of an image's way on the decoding threads: the bits of PIL for any settings."""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.beton import Beton
from pipeline.loader import ViewLoader, choose, make_loader
from pipeline.views import ViewConfig
from tests.helpers.betons import photograph, write_beton
from tests.pipeline.test_loader import assert_same, views_by_image

CPU = torch.device("cpu")
SIZES = ((1, 1), (1, 40), (33, 1), (2, 3), (16, 16), (17, 15), (90, 64), (64, 131))
SHARE = st.sampled_from([0.0, 0.5, 1.0])


@pytest.fixture(scope="module", params=["jpg", "raw"])
def beton(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Beton:
    """Noise and smooth images, some as small as a pixel."""
    noise = np.random.default_rng(0)
    images = [noise.integers(0, 256, (*size, 3), np.uint8) for size in SIZES]
    images += [photograph(i, *size) for i, size in enumerate(SIZES)]
    path = tmp_path_factory.mktemp("finished") / f"{request.param}.beton"
    return Beton(write_beton(path, images, request.param))


def views_of(beton: Beton, views: ViewConfig, seed: int, **options: Any) -> dict[int, torch.Tensor]:
    made = {"seed": seed, "device": CPU, "threads": 2, "batch_size": len(beton)} | options
    with patch("pipeline.decode._scale", lambda *_: 1):  # a JPEG decoded smaller has other pixels
        return views_by_image(ViewLoader(beton, views, **made))


@settings(max_examples=40, deadline=None)
@given(
    size=st.integers(1, 70),
    seed=st.integers(0, 2**64 - 1),
    scale=st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)).map(sorted),
    jitter=st.tuples(SHARE, *[st.floats(0, 1)] * 3, st.floats(0, 0.5)),
    chances=st.tuples(*[SHARE] * 6),
    sigma=st.tuples(*[st.floats(0.01, 9)] * 2).map(sorted),
)
def test_any_settings_give_the_bits_of_the_reference(
    beton: Beton, size: int, seed: int, scale: list[float], jitter: tuple[float, ...],
    chances: tuple[float, ...], sigma: list[float],
) -> None:  # fmt: skip
    """JPEG and raw records, one decoded after the other into the same memory, views from a pixel
    on. Without it an edge of an image, a row that is left over from the last one, or two operations
    in the wrong order gives views that only look right.
    """
    chance, brightness, contrast, saturation, hue = jitter
    flip, grey, *pairs = chances
    views = ViewConfig(
        size=size, min_scale=scale[0], max_scale=scale[1], min_aspect=0.1, max_aspect=9,
        jitter=chance, brightness=brightness, contrast=contrast, saturation=saturation, hue=hue,
        flip=flip, grey=grey, blur=(pairs[0], pairs[1]), blur_sigma=(sigma[0], sigma[1]),
        solarize=(pairs[2], pairs[3]),
    )  # fmt: skip
    finished = views_of(beton, views, seed, backend="compiled", crops="host")
    assert_same(finished, views_of(beton, views, seed, backend="reference", crops="device"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_views_of_16_bits_are_the_rounded_ones(beton: Beton, dtype: torch.dtype) -> None:
    """They feed a GPU. The compiled code copies their bits as whole numbers."""
    views = ViewConfig(size=24)
    finished = views_of(beton, views, 5, backend="compiled", crops="host", dtype=dtype)
    whole = views_of(beton, views, 5, backend="reference", crops="device")
    assert_same(finished, {i: pair.to(dtype) for i, pair in whole.items()})


@pytest.mark.parametrize(
    ("backend", "crops", "device", "chosen"),
    [
        ("auto", "auto", "cpu", ("compiled", "host")),
        ("auto", "auto", "cuda", ("triton", "device")),
        ("compiled", "auto", "cuda", ("compiled", "host")),
        ("kornia", "auto", "cuda", ("kornia", "device")),
        ("kornia", "auto", "cpu", ("kornia", "host")),
        ("auto", "device", "cpu", ("compiled", "device")),
        ("auto", "dali", "cuda", ("triton", "dali")),
    ],
)
def test_what_auto_means(backend: str, crops: Any, device: str, chosen: tuple[str, str]) -> None:
    """A wrong choice is a slow run, which nothing reports."""
    assert choose(backend, crops, torch.device(device)) == chosen


def test_auto_finishes_views_on_the_decoding_threads(tmp_path: Path) -> None:
    """Without it the default setting decodes whole canvases on a CPU and colours them later."""
    small = Beton(write_beton(tmp_path / "small.beton", [photograph(0, 30, 40)]))
    made = {"crops": "auto", "backend": "auto", "device": CPU, "seed": 0}
    loader = make_loader(small, ViewConfig(size=8), 1, **made)
    assert isinstance(loader, ViewLoader) and loader._finished
    assert next(loader.epoch(0)).views.shape == (2, 1, 3, 8, 8)
