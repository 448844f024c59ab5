"""Scores of whole images: windows, sizes, the confusion matrix and its figures."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from evaluation.datasets.open import open_labelled
from pipeline.errors import UserError
from tests.helpers.labelled_sets import NAMES, blocks, picture, save_png, write_folder_set
from transfer.segmentation.config import InferenceConfig
from transfer.segmentation.evaluate import confusion_of, examples, score_rows, slide, starts

KERNEL = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(0)) / 255


def blurred(pixels: Tensor) -> Tensor:
    """Scores that depend on the window's border, like a network's: [B, H, W, 3] → [B, 2, H, W]."""
    return F.conv2d(pixels.permute(0, 3, 1, 2).float(), KERNEL, padding=2)


def noise(height: int, width: int) -> Tensor:
    return torch.randint(256, (1, height, width, 3), dtype=torch.uint8)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 20), st.data())
@settings(max_examples=40)
def test_windows_against_a_loop_over_pixels(
    height: int, width: int, window: int, data: st.DataObject
) -> None:
    """Each pixel's mean over the windows that cover it. A wrong last window or count would show."""
    stride = data.draw(st.integers(1, window))
    pixels = noise(height, width)
    total, count = np.zeros((2, height, width)), np.zeros((height, width))
    rows = max(-(-(height - window) // stride), 0) + 1
    columns = max(-(-(width - window) // stride), 0) + 1
    for row in range(rows):
        for column in range(columns):
            bottom, right = min(row * stride + window, height), min(column * stride + window, width)
            top, left = max(bottom - window, 0), max(right - window, 0)
            found = blurred(pixels[:, top:bottom, left:right])[0].numpy()
            for y in range(top, bottom):
                for x in range(left, right):
                    total[:, y, x] += found[:, y - top, x - left]
                    count[y, x] += 1
    assert count.min() >= 1
    expected = total / count
    np.testing.assert_allclose(slide(blurred, pixels, window, stride)[0], expected, atol=1e-4)


def test_windows_of_cityscapes() -> None:
    """1025 × 2049 in windows of 769 at strides of 513: 2 × 4, the last ones at the border."""
    assert starts(1025, 769, 513) == [0, 256]
    assert starts(2049, 769, 513) == [0, 513, 1026, 1280]
    assert starts(769, 769, 513) == starts(100, 769, 513) == [0]


def test_one_window_that_covers_the_image_is_the_whole() -> None:
    """On small images, both modes are the same protocol."""
    pixels = noise(20, 31)
    assert torch.equal(slide(blurred, pixels, 31, 13), blurred(pixels))


def naive_rows(predicted: np.ndarray, labels: np.ndarray, classes: int) -> dict[str, float]:
    """From the definitions, pixel by pixel."""
    known = labels != 255
    ious, accuracies = {}, []
    for c in range(classes):
        is_c, said_c = (labels == c) & known, (predicted == c) & known
        if (is_c | said_c).any():
            ious[c] = (is_c & said_c).sum() / (is_c | said_c).sum()
        if is_c.any():
            accuracies.append((is_c & said_c).sum() / is_c.sum())
    return {
        "miou": float(np.mean(list(ious.values()))),
        "mean_accuracy": float(np.mean(accuracies)),
        "pixel_accuracy": float((predicted == labels)[known].mean()),
    } | {f"class {c}": float(iou) for c, iou in ious.items()}


@given(st.integers(0, 10_000))
@settings(max_examples=40)
def test_figures_against_their_definitions(seed: int) -> None:
    """Some classes are only in the predictions, only in the labels, or in neither."""
    from evaluation.confusion import confusion_matrix

    generator = np.random.default_rng(seed)
    labels = generator.choice([0, 1, 3, 255], (9, 11)).astype(np.uint8)
    predicted = generator.choice([0, 2, 3], (9, 11))
    rows = score_rows(confusion_matrix(predicted, labels, 5, 5), [f"class {c}" for c in range(5)])
    found = {row.get("class", row["metric"]): row["value"] for row in rows}
    assert "class 4" not in found
    assert found["class 2"] == found["class 1"] == 0
    assert found == pytest.approx(naive_rows(predicted, labels, 5))


def test_nothing_to_score() -> None:
    """A mean of nothing is NaN, which JSON cannot hold."""
    with pytest.raises(ValueError, match="no labelled pixel"):
        score_rows(np.zeros((3, 3), np.int64), NAMES)


class Colours(nn.Module):
    """The class of each pixel is its strongest channel."""

    align_corners = False

    def scores(self, pixels: Tensor) -> Tensor:
        return pixels.permute(0, 3, 1, 2).float()


@pytest.mark.parametrize("inference", [InferenceConfig(), InferenceConfig(window=24, stride=16)])
def test_images_are_scored_at_their_labels_size(tmp_path: Path, inference: InferenceConfig) -> None:
    """The network sees half the size, and sizes differ. A shift of half a pixel would show."""
    write_folder_set(tmp_path, 0, 3)
    labels = blocks(7, (40, 72))
    save_png(tmp_path / "val/labels/val01.png", labels)
    save_png(tmp_path / "val/images/val01.png", picture(labels, 7))
    folders = {"images": tmp_path / "val/images", "labels": tmp_path / "val/labels"}
    data = open_labelled(**folders)
    found = list(examples(data, range(3), (32, 24), threads=2))
    assert [tuple(each.pixels.shape[:2]) for each in found] == [(24, 32), (18, 32), (24, 32)]
    confusion = confusion_of(Colours(), found, 3, inference, torch.device("cpu"))  # type: ignore[arg-type]
    assert confusion.sum() == 2 * 47 * 64 + 39 * 72  # all but the first rows, which are void
    values = {row["metric"]: row["value"] for row in score_rows(confusion, NAMES)}
    assert values["pixel_accuracy"] > 0.9


@pytest.mark.parametrize("inference", [InferenceConfig(), InferenceConfig(window=24, stride=16)])
def test_scores_that_are_no_numbers_are_refused(tmp_path: Path, inference: InferenceConfig) -> None:
    """Without it a network that overflows in fp16 predicts the first class, without a word."""

    class Overflowing(Colours):
        def scores(self, pixels: Tensor) -> Tensor:
            return super().scores(pixels) * torch.inf  # 0 becomes NaN

    write_folder_set(tmp_path, 0, 1)
    data = open_labelled(images=tmp_path / "val/images", labels=tmp_path / "val/labels")
    found = examples(data, range(1), (32, 24), threads=1)
    with pytest.raises(UserError, match=r"images/val00\.png: the network's scores are not finite"):
        confusion_of(Overflowing(), found, 3, inference, torch.device("cpu"))  # type: ignore[arg-type]
