"""Training examples: where each pixel comes from, and that labels stay with their pixels."""

import colorsys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import functional as TF

from transfer.examples import generator
from transfer.segmentation.augment import (
    PADDING,
    Box,
    augment,
    choose,
    cut,
    distort,
    fit,
    largest_share,
    recoloured,
    resize,
    scaled,
)
from transfer.segmentation.config import AugmentConfig

CONFIG = AugmentConfig(crop=32, size=(80, 60))
NOISE = np.random.default_rng(0).integers(0, 256, (45, 61, 3), np.uint8)


def ramp(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """An image whose pixels encode their position (x, y, 0); labels of cells of 8 × 8 pixels."""
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([x, y, np.zeros_like(x)], axis=-1).astype(np.uint8)
    return pixels, ((y // 8) * 16 + x // 8).astype(np.uint8)


@pytest.mark.parametrize(
    ("shape", "size", "expected"),
    [
        ((1024, 2048), (2049, 1025), (1025, 2049)),  # Cityscapes: 2049/2048 and 1025/1024 differ
        ((500, 333), (2049, 513), (770, 513)),
        ((375, 500, 3), (2048, 512), (512, 683)),
        ((100, 1000), (2049, 513), (205, 2049)),  # the longer side is what limits it
        ((1000, 1), (10, 10), (10, 1)),
    ],
)
def test_fit(shape: tuple[int, ...], size: tuple[int, int], expected: tuple[int, int]) -> None:
    """The protocol's sizes. Another rounding would evaluate other images."""
    assert fit(shape, size) == expected


@given(st.integers(5, 130), st.integers(5, 130), st.data())
@settings(max_examples=60)
def test_cut_is_a_part_of_the_resized_image(height: int, width: int, data: st.DataObject) -> None:
    """Our cut is no border for PIL: resizing the whole image and then cropping gives the same."""
    top, left = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    box = Box(
        top,
        left,
        data.draw(st.integers(1, height - top)),
        data.draw(st.integers(1, width - left)),
    )
    place = slice(top, top + box.height), slice(left, left + box.width)
    whole = np.asarray(Image.fromarray(NOISE).resize((width, height), Image.Resampling.BILINEAR))
    found = cut(NOISE, (height, width), box, Image.Resampling.BILINEAR).astype(int)
    assert np.abs(found - whole[place]).max() <= 1  # rounding of PIL's fixed-point weights
    np.testing.assert_array_equal(resize(NOISE, (height, width)), whole)

    labels = NOISE[..., 0]
    found = cut(labels, (height, width), box, Image.Resampling.NEAREST)
    y, x = ((np.arange(n) + 0.5) * m / n for n, m in ((height, 45), (width, 61)))
    clear = [np.abs(at - np.round(at)) > 1e-9 for at in (y, x)]  # not between two pixels
    expected = labels[y.astype(int)][:, x.astype(int)][place]
    sure = np.ix_(clear[0][place[0]], clear[1][place[1]])
    np.testing.assert_array_equal(found[sure], expected[sure])


@pytest.mark.parametrize("scale", [0.5, 1.0, 1.37, 2.0])
@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_labels_stay_with_their_pixels(scale: float, flip: float) -> None:
    """On a ramp, each pixel says where it came from. A crop, flip or scale of only the image or
    only the labels would show.
    """
    pixels, labels = ramp(60, 80)
    config = replace(CONFIG, scale=(scale, scale), flip=flip)
    seen = set()
    for index in range(10):
        found, classes = augment(pixels, labels, config, generator(0, 0, index))
        assert found.shape == (32, 32, 3)
        inside = classes != 255
        assert inside.any()
        x, y = found[..., 0].astype(float), found[..., 1].astype(float)
        column, row = classes % 16, classes // 16
        for at, cell in ((x, column), (y, row)):
            away = np.abs(at - (cell * 8 + 3.5))[inside]
            assert away.max() <= 4 + 0.5 / scale + 1
        along = np.diff(x[0][inside[0]])
        assert (along <= 0).all() if flip else (along >= 0).all()
        assert abs(abs(along.mean()) - 1 / scale) < 0.1
        seen.add((int(x[0, 0]), int(y[0, 0])))
        assert (found[~inside] == PADDING).all()
    assert len(seen) > 1 or scale == 0.5  # there the whole image is as high as the crop


def test_labels_are_never_between_two_classes() -> None:
    """If labels were interpolated, the border of classes 0 and 20 would become class 10."""
    labels = np.zeros((45, 61), np.uint8)
    labels[:, 30:] = 20
    for index in range(20):
        _, classes = augment(NOISE, labels, CONFIG, generator(1, 0, index))
        assert set(np.unique(classes)) <= {0, 20, 255}


def test_void_right_and_below_of_a_small_image() -> None:
    """Padding that counts as a class would be learned. Its pixels normalise to about 0."""
    config = AugmentConfig(crop=32, size=(20, 16), scale=(1, 1), flip=1)
    found, classes = augment(NOISE, np.zeros((45, 61), np.uint8), config, generator(0, 0, 0))
    height, width = fit(NOISE.shape, (20, 16))
    assert (classes[:height, :width] == 0).all()
    assert (classes[height:] == 255).all()
    assert (classes[:, width:] == 255).all()
    assert (found[height:] == PADDING).all()
    assert PADDING == (124, 116, 104)


def test_an_example_follows_from_its_generator_alone() -> None:
    """Otherwise a resumed run, or other workers, would see other examples."""
    pixels, labels = NOISE, NOISE[..., 0] % 3
    config = replace(CONFIG, distort=True, max_class_share=0.75)
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    one, other = (augment(pixels, labels, config, generator(3, 1, 7)) for _ in range(2))
    np.testing.assert_array_equal(one[0], other[0])
    np.testing.assert_array_equal(one[1], other[1])
    third = augment(pixels, labels, config, generator(3, 2, 7))
    assert not np.array_equal(one[0], third[0])
    np.testing.assert_array_equal(state, np.random.get_state()[1])  # noqa: NPY002


def test_crops_of_one_class_are_drawn_again() -> None:
    """ADE20K's setting: with a limit, crops show the rare class more often."""
    labels = np.zeros((60, 80), np.uint8)
    labels[:24, :24] = 1
    labels[:, 70:] = 255
    shares = {}
    for limit in (1.0, 0.75):
        config = replace(CONFIG, max_class_share=limit)
        found = [choose(labels, (60, 80), config, generator(0, 0, i))[1] for i in range(60)]
        shares[limit] = np.mean([largest_share(crop) < 0.75 for crop in found])
    assert shares[1.0] < 0.25
    assert shares[0.75] > 0.5
    assert largest_share(np.full((3, 3), 255)) == 1
    assert largest_share(np.array([0, 1, 1, 255])) == pytest.approx(2 / 3)
    # Where no crop will do, the last of eleven is taken.
    box, crop = choose(np.zeros_like(labels), (60, 80), config, generator(0, 0, 0))
    assert crop.shape == (32, 32)
    assert box.height == 32


# ---- colours ----------------------------------------------------------------------------------


def test_brightness_and_contrast() -> None:
    """Contrast here is a factor without a mean: torchvision calls this brightness."""
    expected = TF.adjust_brightness(Image.fromarray(NOISE), 1.3)
    np.testing.assert_allclose(scaled(NOISE, 1.3, 0), np.asarray(expected), atol=1)
    brighter = np.clip(NOISE.astype(int) + 20, 0, 255)
    np.testing.assert_array_equal(scaled(NOISE, 1, 20), brighter)
    assert scaled(NOISE, 1, -300).max() == 0


@pytest.mark.parametrize(("turn", "factor"), [(0.1, 1.0), (-0.07, 1.0), (0.0, 0.5), (0.0, 1.4)])
def test_hue_and_saturation(turn: float, factor: float) -> None:
    """Equal to Python's HSV, pixel by pixel, within the precision of 256 steps."""
    pixels = NOISE[:8, :8]
    found = recoloured(pixels, turn, factor)
    for pixel, changed in zip(pixels.reshape(-1, 3), found.reshape(-1, 3), strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(*(pixel / 255))
        exact = colorsys.hsv_to_rgb((hue + turn) % 1, min(saturation * factor, 1), value)
        np.testing.assert_allclose(changed / 255, exact, atol=0.03)
    if factor == 1:
        other = TF.adjust_hue(Image.fromarray(pixels), turn)
        np.testing.assert_allclose(found, np.asarray(other), atol=7)


def test_each_distortion_comes_half_the_time() -> None:
    """All four are applied independently. Without one of them, the recipe would differ."""
    draws = [distort(NOISE, generator(0, 0, i)) for i in range(200)]
    same = np.mean([np.array_equal(found, NOISE) for found in draws])
    assert 0.01 < same < 0.15  # 1/16
    assert all(found.shape == NOISE.shape and found.dtype == np.uint8 for found in draws)
    grey = np.full((4, 4, 3), 100, np.uint8)  # which hue and saturation leave as it is
    levels = [distort(grey, generator(0, 0, i))[0, 0, 0] for i in range(400)]
    assert 0.15 < np.mean(np.array(levels) == 100) < 0.35  # 1/4
    assert min(levels) < 60
    assert max(levels) > 140
