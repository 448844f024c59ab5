"""Settings of published evaluators, against numbers that these evaluators gave on known arrays.

`tests/golden/evaluators.json` holds them; tests/golden/README.md says where they come from.
"""

import hashlib
import json
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from evaluation.confusion import score_grouping
from evaluation.datasets.images import FITS, torch_nearest
from evaluation.segment import assign, assign_cells
from model.kmeans import Clusters
from tests import GOLDEN

RECORDED: dict[str, Any] = json.loads((GOLDEN / "evaluators.json").read_text())


@pytest.mark.parametrize("case", RECORDED["grouping"])
def test_every_rule_of_matching_gives_its_evaluators_number(case: str) -> None:
    """Without it a score could not be put beside a published one: where classes are missing or
    clusters spare, the rules differ by up to 0.15.
    """
    recorded = RECORDED["grouping"][case]
    confusion = np.array(recorded["confusion"])
    for rule, miou in recorded["miou"].items():
        match, absent = rule.split()
        assert score_grouping(confusion, match, absent).miou == pytest.approx(miou, abs=1e-12), rule


@pytest.mark.parametrize("row", RECORDED["fits"])
def test_every_fit_takes_its_evaluators_pixels(row: dict[str, Any]) -> None:
    """Without it predictions are scored at other pixels than published ones: torch's nearest
    neighbour takes other pixels than Pillow's, and STEGO scales the image by nearest neighbour.
    """
    y, x, c = np.ogrid[: row["height"], : row["width"], :3]
    image = ((7 * y + 13 * x + 29 * c + x * y // 5) % 256).astype(np.uint8)
    y, x = y[..., 0], x[..., 0]
    labels = (3 * (y // 5) + 5 * (x // 7)) % 27
    labels = np.where((y // 11 + x // 9) % 7 == 0, 255, labels).astype(np.uint8)
    for name in row.keys() - {"size", "height", "width"}:
        fit, what = name.split()
        square = getattr(FITS[fit], what)(image if what == "image" else labels, row["size"])
        digest = hashlib.sha256(np.ascontiguousarray(square).tobytes()).hexdigest()
        assert digest == row[name], name


@pytest.mark.parametrize("side", [5, 64, 100, 333])
def test_nearest_pixels_are_torchs(side: int) -> None:
    """A rounding of its own would shift a row of labels."""
    labels = np.random.default_rng(0).integers(0, 256, (2, 100, 64), dtype=np.uint8)
    expected = F.interpolate(torch.from_numpy(labels)[:, None], (side, side), mode="nearest")[:, 0]
    np.testing.assert_array_equal(torch_nearest(labels, side), expected.numpy())


def test_clusters_of_upsampled_features() -> None:
    """STEGO and CAUSE upsample features and normalise them then. The clusters are those of scores
    that are not normalised: else 9 % of the pixels of noise differ.
    """
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 16, 6, 7, generator=generator)
    centres = F.normalize(torch.randn(27, 16, generator=generator))
    size = (48, 56)
    upsampled = F.normalize(F.interpolate(features, size, mode="bilinear"), dim=1)
    expected = torch.einsum("kd,bdhw->bkhw", centres, upsampled).argmax(dim=1)
    clusters = Clusters(centres, cosine=True, inertia=0.0, iterations=0)
    ours = assign(clusters.logits(features, unit=False), size)
    assert (ours == expected).float().mean() > 0.9999
    assert (assign(clusters.logits(features), size) == expected).float().mean() < 0.95


def test_clusters_of_cells_keep_their_borders() -> None:
    """Leopart and NeCo give a pixel the cluster of its cell."""
    scores = torch.randn(2, 9, 7, 7, generator=torch.Generator().manual_seed(0))
    winner = scores.argmax(dim=1)
    expected = torch_nearest(winner.numpy(), 100)
    np.testing.assert_array_equal(assign_cells(scores, 100).numpy(), expected)
