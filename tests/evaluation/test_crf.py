"""The CRF, compared with its formula for each pixel and neighbour."""

import math

import numpy as np
import pytest
import torch

from evaluation.crf import CrfConfig, refine


def random_input(
    batch: int, clusters: int, height: int, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(batch, clusters, height, width, generator=generator)
    images = torch.randint(0, 256, (batch, height, width, 3), generator=generator)
    return logits.softmax(dim=1), (images // 4 + 100).to(torch.uint8)


def naive(p: np.ndarray, image: np.ndarray, config: CrfConfig) -> np.ndarray:
    """q_i ∝ p_i exp(Σ_j k_ij q_j), with both kernels normalised over the window of i."""
    clusters, height, width = p.shape
    q = p
    for _ in range(config.iterations):
        following = np.zeros_like(p)
        for y in range(height):
            for x in range(width):
                message = np.zeros(clusters)
                for weight, kernel in (
                    (config.smooth_weight, "smooth"),
                    (config.colour_weight, "colour"),
                ):
                    total, share = 0.0, np.zeros(clusters)
                    for v in range(max(0, y - config.radius), min(height, y + config.radius + 1)):
                        for u in range(
                            max(0, x - config.radius), min(width, x + config.radius + 1)
                        ):
                            if (v, u) == (y, x):
                                continue
                            distance = (v - y) ** 2 + (u - x) ** 2
                            colour = ((image[v, u].astype(float) - image[y, x]) ** 2).sum()
                            exponent = distance / (2 * config.smooth_sigma**2)
                            if kernel == "colour":
                                exponent = distance / (2 * config.position_sigma**2)
                                exponent += colour / (2 * config.colour_sigma**2)
                            k = math.exp(-exponent)
                            total += k
                            share += k * q[:, v, u]
                    message += weight * share / total
                following[:, y, x] = p[:, y, x] * np.exp(message)
        q = following / following.sum(axis=0)
    return q


@pytest.mark.parametrize(
    "config",
    [
        CrfConfig(radius=2, iterations=1, colour_weight=0.0),
        CrfConfig(radius=1, iterations=1, smooth_weight=0.0, position_sigma=1.5),
        CrfConfig(radius=3, iterations=3, smooth_weight=1.0, colour_weight=2.0, colour_sigma=40.0),
    ],
)
def test_equals_the_naive_loop(config: CrfConfig) -> None:
    """At image borders too, and for several images at once."""
    probabilities, images = random_input(2, 3, 7, 6)
    result = refine(probabilities, images, config)
    for b in range(2):
        expected = naive(probabilities[b].double().numpy(), images[b].numpy(), config)
        np.testing.assert_allclose(result[b], expected, rtol=1e-4, atol=1e-6)


def test_nothing_to_say_changes_nothing() -> None:
    """Without iterations or without weights the output is the input."""
    probabilities, images = random_input(1, 4, 5, 5)
    assert torch.equal(refine(probabilities, images, CrfConfig(iterations=0)), probabilities)
    silent = CrfConfig(smooth_weight=0.0, colour_weight=0.0)
    torch.testing.assert_close(refine(probabilities, images, silent), probabilities)


def test_border_moves_to_the_colour_edge() -> None:
    """The purpose of the CRF: a border that is two pixels off a clear edge moves to the edge."""
    images = torch.zeros(1, 12, 16, 3, dtype=torch.uint8)
    images[:, :, 8:] = 200
    first = torch.full((1, 12, 16), 0.3)
    first[:, :, :10] = 0.7
    probabilities = torch.stack([first, 1 - first], dim=1)
    clusters = refine(probabilities, images).argmax(dim=1)
    assert (clusters[:, :, :8] == 0).all()
    assert (clusters[:, :, 8:] == 1).all()


def test_extreme_input_stays_finite() -> None:
    """Probabilities of 0 and 1, and a pixel unlike all its neighbours, whose kernel is almost 0."""
    images = torch.zeros(1, 6, 6, 3, dtype=torch.uint8)
    images[0, 3, 3] = 255
    probabilities = torch.zeros(1, 2, 6, 6)
    probabilities[:, 0] = 1
    result = refine(probabilities, images, CrfConfig(colour_sigma=1.0))
    assert torch.isfinite(result).all()
    torch.testing.assert_close(result.sum(dim=1), torch.ones(1, 6, 6))


@pytest.mark.parametrize("setting", [{"radius": 0}, {"iterations": -1}, {"colour_sigma": 0.0}])
def test_bad_settings_are_named(setting: dict[str, float]) -> None:
    """Without it an empty window would give a mean over nothing."""
    with pytest.raises(ValueError, match=f"{next(iter(setting))} must be"):
        CrfConfig(**setting)  # type: ignore[arg-type]


@pytest.mark.cuda
def test_same_on_a_gpu() -> None:
    """CPU and GPU must agree."""
    probabilities, images = random_input(2, 5, 20, 30)
    there = refine(probabilities.cuda(), images.cuda()).cpu()
    torch.testing.assert_close(there, refine(probabilities, images), rtol=1e-4, atol=1e-5)
