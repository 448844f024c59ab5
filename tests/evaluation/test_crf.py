"""The CRF against recorded outputs of STEGO's (tests/golden/README.md)."""

import sys

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from evaluation import crf
from evaluation.crf import refine, refine_clusters, require_crf, upsample
from pipeline.errors import UserError
from tests import GOLDEN

pytest.importorskip("pydensecrf", reason="needs the extra [crf]")
RECORDED = np.load(GOLDEN / "crf.npz")


@pytest.mark.parametrize("iterations", [1, 10])
def test_probabilities_are_stegos(iterations: int) -> None:
    """Other constants, another floor or order of axes would give numbers of another CRF."""
    ours = refine(RECORDED["probabilities"], RECORDED["image"], iterations)
    np.testing.assert_allclose(ours, RECORDED[f"after_{iterations}"], atol=1e-5)


def test_accuracy_is_stegos() -> None:
    """5 × 5 cells of an image of 160 pixels: most of what the CRF gives comes from pixels far
    away. Without long range a third of the gain is left.
    """
    logits, truth = torch.from_numpy(RECORDED["big_logits"]), RECORDED["big_truth"]
    before = upsample(logits, 160).argmax(dim=0)
    after = refine_clusters(logits[None], before[None], RECORDED["big_image"][None])[0].numpy()
    assert (before.numpy() == truth).mean() == pytest.approx(0.8951, abs=1e-3)
    assert (after == RECORDED["big_labels"]).mean() > 0.9995
    assert (after == truth).mean() == pytest.approx(0.990546875, abs=1e-3)


def test_features_are_normalised_at_each_pixel() -> None:
    """STEGO and CAUSE upsample features, normalise them, and take the products then."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(1, 70, 4, 4, generator=generator)
    centres = F.normalize(torch.randn(5, 70, generator=generator))
    pixels = torch.randint(0, 256, (1, 24, 24, 3), generator=generator).byte().numpy()
    products = torch.einsum("kd,bdhw->bkhw", centres, features)
    unit = F.normalize(upsample(features[0], 24), dim=0)
    likely = torch.einsum("kd,dhw->khw", centres, unit).mul(2).softmax(dim=0)
    expected = refine(likely.numpy(), pixels[0, ..., ::-1]).argmax(axis=0)
    clusters = upsample(products[0], 24).argmax(dim=0)[None]
    ours = refine_clusters(2 * products, clusters, pixels, features)[0].numpy()
    assert (ours == expected).mean() > 0.999
    assert (refine_clusters(2 * products, clusters, pixels)[0].numpy() != expected).mean() > 0.01


def test_of_many_clusters_only_winners_take_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skipping clusters that win no pixel must not renumber the others."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 6, 4, 4, generator=generator)
    logits[:, [0, 3]] -= 100
    pixels = torch.randint(0, 256, (2, 16, 16, 3), generator=generator).byte().numpy()
    clusters = torch.stack([upsample(each, 16).argmax(dim=0) for each in logits])
    every = refine_clusters(logits, clusters, pixels)
    monkeypatch.setattr(crf, "ALL", 5)
    assert (refine_clusters(logits, clusters, pixels) == every).float().mean() > 0.99
    assert set(every.unique().tolist()) <= {1, 2, 4, 5}


def test_without_the_library_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it the command would end in a traceback after it has clustered all images."""
    monkeypatch.setitem(sys.modules, "pydensecrf.densecrf", None)
    with pytest.raises(UserError, match=r"--crf needs pydensecrf2 \(pip install \.\[crf\]\)"):
        require_crf()
