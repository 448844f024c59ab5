"""Inverse augmentation on coordinate ramps, in which each wrong box shows as a wrong coordinate."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torchvision.ops import roi_align

from model.alignment import align_to_overlap, has_area

Box = tuple[float, float, float, float]


def centres(cells: int, low: float, high: float) -> NDArray[np.float64]:
    """Image coordinates of the centres of `cells` cells between low and high."""
    return low + (np.arange(cells) + 0.5) / cells * (high - low)


@st.composite
def intervals(draw: st.DrawFn) -> tuple[tuple[float, float], tuple[float, float]]:
    """Two intervals in (0..1) that share at least 0.02."""
    start, end = draw(st.floats(0, 0.4)), draw(st.floats(0.6, 1))
    first = (start, draw(st.floats(start + 0.1, 1)))
    second = (draw(st.floats(0, min(first[1] - 0.02, end - 0.1))), end)
    return first, second


@settings(max_examples=60)
@given(
    x=intervals(),
    y=intervals(),
    flips=st.tuples(st.booleans(), st.booleans()),
    cells=st.sampled_from([1, 3, 7, 14]),
)
def test_aligned_ramps_agree_between_views(
    x: tuple[tuple[float, float], tuple[float, float]],
    y: tuple[tuple[float, float], tuple[float, float]],
    flips: tuple[bool, bool],
    cells: int,
) -> None:
    """Cell (i, j) of both aligned maps must cover the same pixels of the image.

    Each view's map holds the image coordinates of its cells. After alignment it must hold the
    coordinates of the cells of the shared box. Beyond a view's outermost cell centres there is
    nothing to interpolate: there it holds the border cell's value (at most half a cell away).
    """
    shared = [(max(a[0], b[0]), min(a[1], b[1])) for a, b in (x, y)]
    for (x0, x1), (y0, y1), flip in zip(x, y, flips, strict=True):
        columns, rows = centres(cells, x0, x1), centres(cells, y0, y1)
        seen_x = columns[::-1] if flip else columns
        ramp = np.stack(np.broadcast_arrays(seen_x[None, :], rows[:, None]))
        left, right = ((edge - x0) / (x1 - x0) for edge in shared[0])
        top, bottom = ((edge - y0) / (y1 - y0) for edge in shared[1])
        box = (1 - right, top, 1 - left, bottom) if flip else (left, top, right, bottom)

        aligned = align_to_overlap(
            torch.from_numpy(ramp[None].copy()), torch.tensor([box]), torch.tensor([flip])
        )[0].numpy()

        expected_x = centres(cells, *shared[0]).clip(columns[0], columns[-1])
        expected_y = centres(cells, *shared[1]).clip(rows[0], rows[-1])
        np.testing.assert_allclose(aligned[0], np.tile(expected_x, (cells, 1)), atol=1e-6)
        np.testing.assert_allclose(aligned[1], np.tile(expected_y[:, None], cells), atol=1e-6)


def test_one_pair_without_area_leaves_the_others_alone() -> None:
    """The guard must act per image: one such pair must not spoil the batch."""
    scores = torch.rand(3, 4, 7, 7)
    overlap = torch.tensor([[0.1, 0.2, 0.9, 0.8], [0.6, 0.1, 0.4, 0.9], [0.0, 0.5, 0.5, 1.0]])
    flipped = torch.tensor([True, False, False])
    aligned = align_to_overlap(scores, overlap, flipped)
    for image in (0, 2):
        one = slice(image, image + 1)
        alone = align_to_overlap(scores[one], overlap[one], flipped[one])
        assert torch.equal(aligned[one], alone)
    assert not aligned[1].any()


def test_aligned_maps_and_gradients_are_those_of_roi_align() -> None:
    """Without it two matrices could be another interpolation than the authors' RoIAlign."""
    maps = torch.randn(64, 3, 5, 7, dtype=torch.float64, requires_grad=True)
    corners = torch.rand(64, 2, 2).sort(dim=1).values
    corners[0] = torch.tensor([[0.0, 0.0], [1.0, 1.0]])  # the whole view
    overlap, flipped = corners.flatten(1).double(), torch.arange(64) % 2 == 1
    aligned = align_to_overlap(maps, overlap, flipped)

    sides = torch.tensor([7, 5, 7, 5])
    boxes = torch.cat([torch.arange(64)[:, None], overlap * sides], dim=1)
    expected = roi_align(maps, boxes, (5, 7), aligned=True)
    expected = torch.where(flipped[:, None, None, None], expected.flip(-1), expected)
    torch.testing.assert_close(aligned, expected)
    ways = torch.randn_like(expected)
    gradients = (torch.autograd.grad((each * ways).sum(), maps)[0] for each in (aligned, expected))
    torch.testing.assert_close(*gradients)


def test_has_area() -> None:
    """Zero, inverted and undefined boxes have none."""
    boxes = [[0, 0, 1, 1], [0.5, 0, 0.5, 1], [0, 0.6, 1, 0.4], [float("nan"), 0, 1, 1]]
    assert has_area(torch.tensor(boxes)).tolist() == [True, False, False, False]
