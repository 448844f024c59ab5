"""CAPI's classifiers and the random crops of published probes, against naive loops."""

from collections import Counter

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision import transforms

from evaluation.datasets.random_squares import HUMMINGBIRD, LEOPART, Recipe, draw_crop, jittered
from evaluation.datasets.squares import Squares
from evaluation.probes import voting
from evaluation.probes.linear import fit_logistic, pixel_cross_entropy
from evaluation.probes.linear_sgd import mask_loss
from evaluation.probes.memory import LabelledFeatures
from evaluation.probes.nearest import Distance
from evaluation.probes.selection import Held, select, votes
from evaluation.probes.voting import (
    PixelMemory,
    PixelVote,
    gather_pixels,
    join_pixels,
    split_pixels,
)

CLASSES, VOID = 4, 255


def random_memory(cells: int, dim: int = 5, seed: int = 0) -> PixelMemory:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(cells, dim, generator=generator)
    labels = torch.randint(0, CLASSES + 1, (cells, 6), generator=generator).byte()
    return PixelMemory(features, labels, torch.arange(cells) // 4, CLASSES)


def naive_vote(memory: PixelMemory, cell: Tensor, count: int, distance: Distance) -> list[int]:
    """The label at each place that most of the nearest cells have there; the lowest of several."""
    if distance == "cosine":
        far = [1 - float(F.cosine_similarity(cell, key, dim=0)) for key in memory.features]
    else:
        far = [float((cell - key).norm()) for key in memory.features]
    nearest = sorted(range(len(far)), key=far.__getitem__)[:count]
    places = memory.labels[nearest].T.tolist()
    return [min(Counter(p).items(), key=lambda item: (-item[1], item[0]))[0] for p in places]


@pytest.mark.parametrize("distance", ["cosine", "L2"])
@pytest.mark.parametrize("count", [1, 7])
def test_vote_equals_the_naive_loop(
    distance: Distance, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CAPI's k-NN: pixels vote place by place, void with them, whatever is held at once."""
    memory, cells = random_memory(40), torch.randn(9, 5) * 3
    expected = [naive_vote(memory, cell, count, distance) for cell in cells]
    for held in (1, 2**24):
        monkeypatch.setattr(voting, "VOTES", held)
        vote = PixelVote(memory, torch.ones(40) > 0, neighbours=count, distance=distance)
        assert vote(cells).tolist() == expected


def test_pixels_of_cells_come_back_to_their_places() -> None:
    """A transposed cell would turn every label map by its diagonal."""
    maps = torch.randint(0, 9, (2, 12, 12))
    cells = split_pixels(maps, 3, 4)
    assert cells.shape == (2 * 3 * 4, 4 * 3)
    assert cells[1].tolist() == maps[0, :4, 3:6].flatten().tolist()
    joined = join_pixels(cells.view(2, 3, 4, 12).permute(0, 3, 1, 2), 12)
    assert torch.equal(joined, maps)
    with pytest.raises(ValueError, match="12 pixels are no multiple of 5 × 4 cells"):
        split_pixels(maps, 5, 4)


def test_memory_keeps_cells_that_are_mostly_of_a_class() -> None:
    """As CAPI: a cell whose most frequent label is void is not learnt from, others keep theirs."""
    labels = np.array([[[1, 1, VOID, VOID], [1, VOID, VOID, 2]]], np.uint8)
    labels = labels.repeat(2, axis=1)  # 4 × 4: cells of 2 × 2
    squares = Squares(np.array([7]), [], np.zeros((1, 1, 1, 3), np.uint8))
    features = torch.arange(4.0).reshape(1, 1, 2, 2)
    memory = gather_pixels([LabelledFeatures(squares, features, labels)], 1, CLASSES)
    assert memory.image.tolist() == [7] * 4
    assert memory.labels[3].tolist() == [4, 2, 4, 2]  # a tie: the lowest is a class
    assert memory.features[memory.known()][:, 0].tolist() == [0, 2, 3]
    with pytest.raises(ValueError, match="no labelled pixel"):
        memory.known(torch.tensor([False, True, False, False]))


def test_settings_are_selected_on_images_that_are_held_out() -> None:
    """On images that it has learnt from, one neighbour would always be best."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(4000, 3, generator=generator)
    noisy = (features[:, 0] + torch.randn(4000, generator=generator) > 0).byte()
    memory = PixelMemory(features, noisy[:, None].expand(-1, 4), torch.arange(4000) // 200, 2)
    held = Held(20, seed=0)
    assert len(held.images) == 2
    assert not set(held.images.tolist()) & set(held.others.tolist())
    name, classifier = select(votes([1, 60], ["L2"]), memory, held)
    assert name == "60 neighbours, L2"
    assert classifier(features).shape == (4000, 4)
    with pytest.raises(ValueError, match="needs 10 training images, not 9"):
        select(votes([1, 3], ["L2"]), memory, Held(9, seed=0))


@pytest.mark.parametrize("strength", [0.01, 1.0])
def test_logistic_regression_is_at_its_optimum(strength: float) -> None:
    """The gradient of scikit-learn's objective is 0 there: C times the summed loss plus half the
    squared weights, biases left out.
    """
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(200, 4, generator=generator)
    counts = F.one_hot((features[:, 0] * 2 + torch.randn(200, generator=generator)).long() % 3, 3)
    model = fit_logistic(features, counts.float(), strength=strength)
    loss = 200 * strength * pixel_cross_entropy(model(features), counts.float())
    loss = loss + model.weight.square().sum() / 2
    for gradient in torch.autograd.grad(loss, [*model.parameters()]):
        assert float(gradient.abs().max()) < 1e-2 * strength


def test_mask_loss_is_that_of_upsampled_features() -> None:
    """Leopart upsamples features and classifies then; void pixels do not count."""
    generator = torch.Generator().manual_seed(0)
    model, maps = torch.nn.Linear(5, 3), torch.randn(2, 5, 4, 4, generator=generator)
    masks = torch.randint(0, 3, (2, 10, 10), generator=generator)
    masks[0, :3] = VOID
    upsampled = F.interpolate(maps, (10, 10), mode="bilinear").permute(0, 2, 3, 1)
    expected = F.cross_entropy(model(upsampled).permute(0, 3, 1, 2), masks, ignore_index=VOID)
    torch.testing.assert_close(mask_loss(model, maps, masks), expected)
    assert mask_loss(model, maps, torch.full_like(masks, VOID)).item() == 0


@pytest.mark.parametrize("recipe", [LEOPART, HUMMINGBIRD], ids=["leopart", "hummingbird"])
@pytest.mark.parametrize(("height", "width"), [(375, 500), (640, 200)])
def test_crops_are_torchvisions(recipe: Recipe, height: int, width: int) -> None:
    """Same distribution of boxes: means and deviations of 1,500 draws; all lie in the image."""
    image = torch.zeros(1, height, width)
    torch.manual_seed(0)
    draw = transforms.RandomResizedCrop.get_params
    shapes = (3 / 4, 4 / 3)
    theirs = np.array([draw(image, [*recipe.scale], [*shapes]) for _ in range(1500)])
    generator = np.random.default_rng(0)
    crops = [draw_crop(generator, height, width, recipe) for _ in range(1500)]
    ours = np.array([(c.top, c.left, c.height, c.width) for c in crops])
    assert (ours[:, 0] + ours[:, 2] <= height).all()
    assert (ours[:, 1] + ours[:, 3] <= width).all()
    error = theirs.std(axis=0) * (2 / 1500) ** 0.5
    assert (np.abs(ours.mean(axis=0) - theirs.mean(axis=0)) <= 4.5 * error + 1e-9).all()
    assert np.mean([c.mirrored for c in crops]) == pytest.approx(recipe.mirror, abs=0.04)


def test_jitter_changes_colours_alone() -> None:
    """Half of the draws of each change leave the image as it is, and none moves a pixel."""
    pixels = np.random.default_rng(0).integers(60, 200, (8, 9, 3), dtype=np.uint8)
    generator = np.random.default_rng(0)
    drawn = [jittered(pixels, generator, 0.1).astype(int) for _ in range(200)]
    change = np.array([np.abs(each - pixels).max() for each in drawn])
    assert np.mean(change == 0) == pytest.approx(1 / 16, abs=0.05)
    grey = np.full((8, 9, 3), 128, np.uint8)
    assert all(np.ptp(jittered(grey, generator, 0.1)) == 0 for _ in range(20))
