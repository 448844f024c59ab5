"""The sampler of view parameters: the published distribution, no state, correct geometry."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipeline.views import ViewConfig, ViewParams, sample_views
from tests import GOLDEN
from tests.helpers.view_params import assert_same, take

ALL_ON = ViewConfig(jitter=1, grey=0.5, blur=(1, 1), solarize=(0.5, 0.5))

side = st.one_of(st.integers(1, 40), st.integers(1, 6000))
word32, word64 = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
index64 = st.integers(-(2**63), 2**63 - 1)


def sample(
    count: int, height: int = 480, width: int = 640, seed: int = 0, epoch: int = 0, **config: Any
) -> ViewParams:
    sides = np.full(count, height), np.full(count, width)
    return sample_views(seed, epoch, np.arange(count), *sides, ViewConfig(**config))


# ---- Distribution ----


def crop_statistics(params: ViewParams, height: int, width: int) -> dict[str, NDArray[np.float64]]:
    """Statistics per pair, under the names of the golden file."""
    x0, y0, x1, y1 = params.crops.astype(np.float64).transpose(2, 0, 1)
    w, h = x1 - x0, y1 - y0
    common_w = np.minimum(*x1) - np.maximum(*x0)
    common_h = np.minimum(*y1) - np.maximum(*y0)
    common = common_w.clip(0) * common_h.clip(0)
    return {
        "area_fraction_crop1": (w * h)[0] / (width * height),
        "area_fraction_crop2": (w * h)[1] / (width * height),
        "aspect_crop1": (w / h)[0],
        "aspect_crop2": (w / h)[1],
        "iou": common / ((w * h).sum(0) - common),
        "intersection_over_crop2": common / (w * h)[1],
    }


@pytest.mark.parametrize(("width", "height"), [(640, 480), (500, 375)])
def test_crops_are_distributed_as_the_authors(width: int, height: int) -> None:
    """Quantiles and means lie within 5 standard errors of 20,000 draws of the authors' code.

    Breaks if area, aspect, tries or overlap condition are a few per cent off.
    """
    golden, draws = np.load(GOLDEN / "sampler.npz"), 200_000
    statistics = crop_statistics(sample(draws, height, width, seed=1), height, width)
    both = math.sqrt(1 + int(golden["draws"]) / draws)  # includes our standard error
    for name, values in statistics.items():
        prefix = f"{width}x{height}_{name}"
        quantiles = np.percentile(values, golden["quantile_percent"])
        for kind, ours in (("quantiles", quantiles), ("mean", values.mean())):
            theirs, error = golden[f"{prefix}_{kind}"], golden[f"{prefix}_{kind}_se"]
            assert (np.abs(ours - theirs) <= 5 * error * both).all(), (name, kind, ours, theirs)
    assert (statistics["iou"] == 0).mean() < 1.5e-4  # their 95 % bound


def test_uniform_draws_are_uniform() -> None:
    """Factors, hue and sigma fill their ranges evenly (Kolmogorov-Smirnov, p = 0.001)."""
    count = 50_000
    params = sample(count, jitter=1, blur=(1, 1))
    for v in range(2):
        columns = [*params.jitter[v].T, params.sigma[v]]
        ranges = [(0.6, 1.4), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1), (0.1, 2.0)]
        for column, (low, high) in zip(columns, ranges, strict=True):
            u = np.sort((column.astype(np.float64) - low) / (high - low))
            assert np.abs(u - (np.arange(count) + 0.5) / count).max() < 1.95 / math.sqrt(count)


def test_probabilities_are_as_configured() -> None:
    """Each probability is that of its field and view; 0 and 1 are certain."""
    count = 50_000
    params, config = sample(count), ViewConfig()
    cases: list[tuple[NDArray[np.bool_], tuple[float, float]]] = [
        (params.flipped, (config.flip, config.flip)),
        (params.jittered, (config.jitter, config.jitter)),
        (params.grey, (config.grey, config.grey)),
        (params.sigma > 0, config.blur),
        (params.solarized, config.solarize),
    ]
    for drawn, probabilities in cases:
        for share, p in zip(drawn.mean(axis=1), probabilities, strict=True):
            assert abs(share - p) <= 5 * math.sqrt(p * (1 - p) / count)


def test_every_order_is_equally_likely() -> None:
    """All 24 orders of the colour operations occur, each within 5 standard errors of 1/24."""
    count = 48_000
    order = sample(count).order.reshape(-1, 4)
    assert (np.sort(order, axis=1) == np.arange(4)).all()
    _, counts = np.unique(order, axis=0, return_counts=True)
    expected = len(order) / 24
    assert len(counts) == 24
    assert np.abs(counts - expected).max() < 5 * math.sqrt(expected)


def test_no_two_draws_are_related() -> None:
    """Draws of different kinds, views, images, epochs and seeds are uncorrelated (5 standard
    errors).

    Breaks if two draws share a random word, or if the counter or key is wrong.
    """
    count, columns = 20_000, []
    for seed, epoch in [(0, 0), (1, 0), (0, 1), (2**32, 0), (2**63, 5)]:
        params = sample(
            count + 1, seed=seed, epoch=epoch, jitter=1, blur=(1, 1), solarize=(0.5, 0.5)
        )
        for v in range(2):
            columns += [*params.jitter[v].T, params.sigma[v]]
            columns += [params.flipped[v], params.grey[v], params.solarized[v]]
            columns += [params.order[v, :, 0] == 0]
        columns += [params.crops[0, :, 2] - params.crops[0, :, 0]]  # crop 2 depends on crop 1
    table = np.array(columns, dtype=np.float64)
    table = np.concatenate((table[:, :-1], table[:, 1:]))  # each image with the next one
    correlation = np.corrcoef(table) - np.eye(len(table))
    assert np.abs(correlation).max() < 5 / math.sqrt(count)


# ---- No state ----


@given(
    seed=word64,
    epoch=word32,
    images=st.lists(st.tuples(index64, side, side), min_size=1, max_size=12),
    data=st.data(),
)
def test_an_image_gets_the_same_in_any_batch(
    seed: int, epoch: int, images: list[tuple[int, int, int]], data: st.DataObject
) -> None:
    """Worker count, batch size, order and resume point must not change an image's views."""
    index, height, width = np.array(images, dtype=np.int64).T
    whole = sample_views(seed, epoch, index, height, width, ALL_ON)
    rows = np.array(
        data.draw(st.lists(st.integers(0, len(images) - 1), max_size=12)), dtype=np.int64
    )
    part = sample_views(seed, epoch, index[rows], height[rows], width[rows], ALL_ON)
    assert_same(part, take(whole, rows))


def test_every_bit_of_seed_epoch_and_index_counts() -> None:
    """A 64-bit seed or index cut to 32 bits would give equal views to different images or runs."""

    def fingerprint(seed: int, epoch: int, index: int) -> bytes:
        image = np.array([index], dtype=np.uint64).view(np.int64)
        params = sample_views(seed, epoch, image, [480], [640], ALL_ON)
        return params.crops.tobytes() + params.jitter.tobytes() + params.sigma.tobytes()

    inputs = [(0, 0, 0)]
    inputs += [(1 << bit, 0, 0) for bit in range(64)]
    inputs += [(0, 1 << bit, 0) for bit in range(32)]
    inputs += [(0, 0, 1 << bit) for bit in range(64)]
    assert len({fingerprint(*x) for x in inputs}) == len(inputs)


# ---- The documented layout, followed naively ----


def naive_philox(counter: tuple[int, int, int, int], seed: int) -> list[int]:
    c, k, mask = list(counter), [seed & 0xFFFFFFFF, seed >> 32], 0xFFFFFFFF
    for _ in range(10):
        a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(b >> 32) ^ c[1] ^ k[0], b & mask, (a >> 32) ^ c[3] ^ k[1], a & mask]
        k = [(k[0] + 0x9E3779B9) & mask, (k[1] + 0xBB67AE85) & mask]
    return c


class NaiveSampler:
    """One image's pair from METHOD and the layout in views.py, in plain Python."""

    def __init__(self, seed: int, epoch: int, index: int, config: ViewConfig) -> None:
        self.seed, self.epoch, self.index, self.config = seed, epoch, index % 2**64, config

    def words(self, block: int) -> list[int]:
        counter = (block, self.epoch, self.index & 0xFFFFFFFF, self.index >> 32)
        return naive_philox(counter, self.seed)

    def uniform(self, word: int, low: float, high: float) -> float:
        return low + (high - low) * (word / 2**32)

    def tried(self, block: int, height: int, width: int) -> tuple[list[int] | None, float]:
        words, c = self.words(block), self.config
        area = self.uniform(words[0], c.min_scale, c.max_scale) * height * width
        log_aspect = self.uniform(words[1], math.log(c.min_aspect), math.log(c.max_aspect))
        w = round(math.sqrt(area * math.exp(log_aspect)))
        h = round(math.sqrt(area / math.exp(log_aspect)))
        if not (0 < w <= width and 0 < h <= height):
            return None, area
        x, y = words[2] * (width - w + 1) // 2**32, words[3] * (height - h + 1) // 2**32
        return [x, y, x + w, y + h], area

    def free(self, first_block: int, height: int, width: int) -> list[int]:
        for t in range(10):
            crop, _ = self.tried(first_block + t, height, width)
            if crop:
                return crop
        w, h = width, height
        if width / height < self.config.min_aspect:
            h = max(round(width / self.config.min_aspect), 1)
        elif width / height > self.config.max_aspect:
            w = max(round(height * self.config.max_aspect), 1)
        x, y = (width - w) // 2, (height - h) // 2
        return [x, y, x + w, y + h]

    def crops(self, height: int, width: int) -> list[list[int]]:
        first = self.free(0, height, width)
        if not self.config.geometry:
            return [first, first]
        for t in range(10):
            crop, area = self.tried(16 + t, height, width)
            if crop:
                w = min(first[2], crop[2]) - max(first[0], crop[0])
                h = min(first[3], crop[3]) - max(first[1], crop[1])
                if max(w, 0) * max(h, 0) >= self.config.min_overlap * area:
                    return [first, crop]
        return [first, self.free(32, height, width)]

    def view(self, v: int) -> dict[str, Any]:
        coin, factor, rest = (self.words(64 + 8 * v + i) for i in range(3))
        c = self.config
        flip = self.words(64 + 8 * (v if c.geometry else 0))[0]
        amounts = [1.0, 1.0, 1.0, 0.0]
        if jittered := coin[1] / 2**32 < c.jitter:
            reach = (c.brightness, c.contrast, c.saturation, c.hue)
            pairs = zip(factor, amounts, reach, strict=True)
            amounts = [self.uniform(word, one - r, one + r) for word, one, r in pairs]
        return {
            "flipped": flip / 2**32 < c.flip,
            "jittered": jittered,
            "jitter": amounts,
            "order": list(itertools.permutations(range(4)))[rest[0] * 24 // 2**32],
            "grey": coin[2] / 2**32 < c.grey,
            "sigma": self.uniform(rest[1], *c.blur_sigma) if coin[3] / 2**32 < c.blur[v] else 0,
            "solarized": rest[2] / 2**32 < c.solarize[v],
        }


configs = st.sampled_from(
    [
        ViewConfig(),
        ALL_ON,
        ViewConfig(min_scale=0.01, max_scale=0.05, min_overlap=0.3),
        ViewConfig(min_aspect=3, max_aspect=7),
        ViewConfig(min_aspect=0.1, max_aspect=0.2, min_overlap=0),
        ViewConfig(geometry=False, jitter=1, solarize=(0.5, 0.5)),
    ]
)


@settings(max_examples=300)
@given(seed=word64, epoch=word32, index=index64, height=side, width=side, config=configs)
def test_every_draw_follows_the_documented_layout(
    seed: int, epoch: int, index: int, height: int, width: int, config: ViewConfig
) -> None:
    """Another implementation, for example on a GPU, must be able to draw the same numbers."""
    params = sample_views(seed, epoch, [index], [height], [width], config)
    naive = NaiveSampler(seed, epoch, index, config)
    np.testing.assert_array_equal(params.crops[:, 0], naive.crops(height, width))
    for v in range(2):
        for field, expected in naive.view(v).items():
            actual = getattr(params, field)[v, 0]
            np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-7, err_msg=field)


# ---- Geometry ----


def to_source(params: ViewParams) -> NDArray[np.float64]:
    """The recorded overlap box of each view in pixels of the image: [2, B, 4]."""
    box = params.overlap.astype(np.float64)
    x1, y1, x2, y2 = box.transpose(2, 0, 1)
    x1, x2 = np.where(params.flipped, 1 - x2, x1), np.where(params.flipped, 1 - x1, x2)
    left, top, right, bottom = params.crops.astype(np.float64).transpose(2, 0, 1)
    w, h = right - left, bottom - top
    return np.stack((left + x1 * w, top + y1 * h, left + x2 * w, top + y2 * h), axis=-1)


@settings(max_examples=300)
@given(seed=word64, index=index64, height=side, width=side, config=configs)
def test_crops_and_overlap_are_correct(
    seed: int, index: int, height: int, width: int, config: ViewConfig
) -> None:
    """Crops are inside the image and not empty, from 1x1 up; both views record the same overlap."""
    params = sample_views(seed, 0, [index], [height], [width], config)
    x0, y0, x1, y1 = params.crops.transpose(2, 0, 1)
    assert (x0 >= 0).all() and (x0 < x1).all() and (x1 <= width).all()
    assert (y0 >= 0).all() and (y0 < y1).all() and (y1 <= height).all()
    common = [x0.max(), y0.max(), x1.min(), y1.min()]
    source = to_source(params)[:, 0]
    np.testing.assert_allclose(source, [common, common], atol=1e-6 * max(height, width) * 4)
    x1o, y1o, x2o, y2o = params.overlap.transpose(2, 0, 1)
    assert (
        ((x2o <= x1o) | (y2o <= y1o)) == (common[2] <= common[0] or common[3] <= common[1])
    ).all()


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 5000), (5000, 1), (2, 3), (17, 20)])
def test_extreme_images(height: int, width: int) -> None:
    """On an image one pixel wide all tries fail; the fallback must still have an allowed aspect."""
    crops = sample(200, height, width).crops
    w, h = (crops[..., 2] - crops[..., 0]), (crops[..., 3] - crops[..., 1])
    assert (w >= 1).all() and (h >= 1).all()
    assert (w <= np.ceil(h * 4 / 3 + 1)).all() and (h <= np.ceil(w * 4 / 3 + 1)).all()


def test_a_pair_without_overlap_is_possible_and_recorded_as_such() -> None:
    """The model excludes such pairs from the grouping loss, and recognises them by the box."""
    params = sample(2000, min_scale=0.01, max_scale=0.02)
    x0, y0, x1, y1 = params.crops.transpose(2, 0, 1)
    apart = (x1.min(0) <= x0.max(0)) | (y1.min(0) <= y0.max(0))
    assert 20 < apart.sum() < 1980
    bx1, by1, bx2, by2 = params.overlap.transpose(2, 0, 1)
    np.testing.assert_array_equal((bx2 <= bx1) | (by2 <= by1), np.stack((apart, apart)))
    beyond = (params.overlap < 0) | (params.overlap > 1)  # kept, not clipped
    assert beyond[:, apart].any() and not beyond[:, ~apart].any()


def test_the_overlap_condition_holds_until_it_is_given_up() -> None:
    """With large crops, crop 1 always covers the required share of crop 2."""
    params = sample(20_000, min_scale=0.5, min_overlap=0.3)
    statistics = crop_statistics(params, 480, 640)
    assert statistics["intersection_over_crop2"].min() > 0.299


def test_without_geometry_the_views_differ_in_colour_only() -> None:
    """The ablation must compare two recipes whose other draws are all equal."""
    config = {"jitter": 1, "blur": (1, 1), "solarize": (0.5, 0.5)}
    full, same = sample(500, **config), sample(500, geometry=False, **config)
    for view in range(2):
        np.testing.assert_array_equal(same.crops[view], full.crops[0])
        np.testing.assert_array_equal(same.flipped[view], full.flipped[0])
    assert (same.overlap == [0, 0, 1, 1]).all()
    for field in ("jitter", "order", "jittered", "grey", "sigma", "solarized"):
        np.testing.assert_array_equal(getattr(same, field), getattr(full, field), err_msg=field)
    assert (same.jitter[0] != same.jitter[1]).all()


def test_undrawn_operations_are_neutral() -> None:
    """A backend may apply the factors of an image without jitter; they must have no effect."""
    params = sample(1000)
    assert (params.jitter[~params.jittered] == [1, 1, 1, 0]).all()
    params = sample(100, jitter=0, flip=0, grey=0, blur=(0, 0), solarize=(0, 0))
    for drawn in (params.jittered, params.flipped, params.grey, params.sigma > 0, params.solarized):
        assert not drawn.any()


def test_types_and_shapes() -> None:
    """Other modules rely on the axes, and torch on the types."""
    params = sample(3)
    expected = {
        "crops": ((2, 3, 4), np.int32),
        "flipped": ((2, 3), np.bool_),
        "overlap": ((2, 3, 4), np.float32),
        "jitter": ((2, 3, 4), np.float32),
        "order": ((2, 3, 4), np.uint8),
        "jittered": ((2, 3), np.bool_),
        "grey": ((2, 3), np.bool_),
        "sigma": ((2, 3), np.float32),
        "solarized": ((2, 3), np.bool_),
    }
    for name, (shape, dtype) in expected.items():
        array = getattr(params, name)
        assert (array.shape, array.dtype) == (shape, np.dtype(dtype)), name
    assert sample(0).crops.shape == (2, 0, 4)


# ---- Bad input ----


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("size", 0),
        ("size", 96.5),
        ("min_scale", 0),
        ("min_scale", 1.5),
        ("max_scale", 0.05),
        ("max_scale", 1.01),
        ("max_scale", math.nan),
        ("min_aspect", 0),
        ("max_aspect", 0.5),
        ("max_aspect", math.inf),
        ("min_overlap", -0.1),
        ("flip", 1.1),
        ("jitter", -0.1),
        ("brightness", 1.5),
        ("contrast", -1),
        ("saturation", math.nan),
        ("hue", 0.6),
        ("grey", 2),
        ("blur", (1, 1.1)),
        ("blur", (1,)),
        ("blur_sigma", (0, 1)),
        ("blur_sigma", (2, 1)),
        ("blur_sigma", (1, math.inf)),
        ("solarize", (-0.1, 0)),
        ("geometry", "no"),
    ],
)
def test_impossible_settings_are_refused_by_name(field: str, value: Any) -> None:
    """A run must not start with an impossible recipe."""
    with pytest.raises(ValueError, match=f"^{field} "):
        ViewConfig(**{field: value})


def test_a_pair_read_as_a_list_is_the_same_config() -> None:
    """YAML and JSON have no tuples; a configuration must equal itself after write and read."""
    read = ViewConfig(blur=[0.5, 0.5])  # type: ignore[arg-type]
    assert read == ViewConfig(blur=(0.5, 0.5))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seed": -1}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"epoch": 2**32}, "epoch"),
        ({"height": [0]}, "at least 1"),
        ({"width": [640, 640]}, "same length"),
        ({"index": [[0]]}, "one axis"),
    ],
)
def test_bad_arguments_are_refused(changed: dict[str, Any], message: str) -> None:
    """Compiled code checks no bounds: it would read beyond the end of a short array."""
    good: dict[str, Any] = {"seed": 0, "epoch": 0, "index": [0], "height": [480], "width": [640]}
    with pytest.raises(ValueError, match=message):
        sample_views(**(good | changed), config=ViewConfig())
