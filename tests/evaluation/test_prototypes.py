"""Nearest segments and their picture."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.nn import functional as F

from evaluation import commands
from evaluation.datasets.images import FolderImages
from evaluation.datasets.squares import SquareImages
from evaluation.pictures import __main__ as pictures
from evaluation.pictures.drawing import MARGIN
from evaluation.pictures.prototypes import LABEL, TILE, cut_tiles, draw_rows, draw_segment
from evaluation.prototypes import NearestSegments, gather_statistics, segment_similarity
from evaluation.segment import segment_images
from tests.helpers.coloured import CELL, COLOURS, ColourNetwork, write_scenes

CPU = torch.device("cpu")


def test_similarity_is_that_of_the_slot_over_the_won_cells() -> None:
    """The vectorised form equals the definition, a loop, and needs no prototypes."""
    generator = torch.Generator().manual_seed(0)
    prototypes = torch.randn(5, 8, generator=generator)
    features = torch.randn(3, 8, 2, 2, generator=generator) * 4
    scores = torch.einsum(
        "kd,bdhw->bkhw", F.normalize(prototypes, dim=1), F.normalize(features, dim=1)
    )
    similarity = segment_similarity(scores, features)
    for b in range(3):
        winner = scores[b].argmax(dim=0)
        for k in range(5):
            won = features[b][:, winner == k]
            if won.shape[1] == 0:
                assert similarity[b, k] == -torch.inf
                continue
            expected = F.cosine_similarity(won.mean(dim=1), prototypes[k], dim=0)
            assert similarity[b, k] == pytest.approx(float(expected), abs=1e-5)


@given(st.integers(0, 2**32 - 1), st.integers(1, 7), st.integers(1, 4))
def test_stream_keeps_what_a_full_sort_would(seed: int, batch: int, top: int) -> None:
    """Streaming must not lose a near segment between batches, nor depend on the batch size."""
    generator = np.random.default_rng(seed)
    similarity = generator.integers(0, 6, (13, 3)).astype(np.float32) / 6
    similarity[generator.random((13, 3)) < 0.4] = -np.inf
    nearest = NearestSegments(3, top)
    for start in range(0, 13, batch):
        index = np.arange(start, min(start + batch, 13))
        nearest.add(index, similarity[index])
    order = np.argsort(-similarity, axis=0, kind="stable")[:top].T
    expected = np.take_along_axis(similarity.T, order, axis=1)
    np.testing.assert_array_equal(nearest.similarity, expected)
    np.testing.assert_array_equal(nearest.image, np.where(np.isfinite(expected), order, -1))
    np.testing.assert_array_equal(nearest.active, np.isfinite(similarity).sum(axis=0))


def coloured_folder(root: Path) -> FolderImages:
    """Four pictures: red everywhere, green in three, blue in one, yellow in none."""
    maps = [[[0, 0], [0, 0]], [[0, 1], [0, 1]], [[1, 0], [0, 0]], [[0, 2], [1, 0]]]
    return FolderImages(write_scenes(root, [np.array(m) for m in maps])[0])


def test_frequency_and_images_of_known_colours(tmp_path: Path) -> None:
    """A prototype counts only where it wins a cell, so one that wins none must not be shown."""
    images = coloured_folder(tmp_path)
    network = ColourNetwork([3, 2, 1, 0])
    squares = SquareImages(images, 2 * CELL, CPU, batch_size=3)
    nearest = gather_statistics(segment_images(network, squares), top=2).nearest
    assert nearest.active.tolist() == [0, 1, 3, 4]
    assert nearest.by_frequency().tolist() == [3, 2, 1]
    assert nearest.image.tolist() == [[-1, -1], [3, -1], [1, 2], [0, 1]]
    np.testing.assert_allclose(nearest.similarity[3], 1, atol=1e-5)


def test_tiles_show_the_segment_and_dim_the_rest(tmp_path: Path) -> None:
    """Without it the mask of another prototype or image could be drawn."""
    images = coloured_folder(tmp_path)
    network = ColourNetwork([0, 1, 2])
    squares = SquareImages(images, 2 * CELL, CPU)
    nearest = gather_statistics(segment_images(network, squares), top=2).nearest
    tiles = cut_tiles(network, squares, nearest, nearest.by_frequency())
    assert list(tiles) == [0, 1, 2]
    assert [len(row) for row in tiles.values()] == [2, 2, 1]
    blue = np.asarray(tiles[2][0].picture)
    centres = [TILE // 4, 3 * TILE // 4]
    assert blue[centres[0], centres[1]].tolist() == COLOURS[2].tolist()
    assert blue[centres[0], centres[0]].max() < 120

    picture = draw_rows("title", nearest, [("", tiles)])
    assert picture.width > 2 * MARGIN + LABEL + 2 * TILE
    assert len(picture.getcolors(2**24) or []) > 50


def test_segment_of_the_whole_image_is_not_dimmed() -> None:
    """Masks of all ones and of all zeros must work."""
    pixels = np.full((64, 64, 3), 200, np.uint8)
    whole = np.asarray(draw_segment(pixels, np.ones((64, 64), bool)))
    none = np.asarray(draw_segment(pixels, np.zeros((64, 64), bool)))
    assert whole[TILE // 2, TILE // 2].tolist() == [200] * 3
    assert none.max() < 120


def test_command_writes_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command applies its sizes, its subset of images and its output path."""
    images = coloured_folder(tmp_path)
    network = ColourNetwork([0, 1, 2])
    monkeypatch.setattr(commands, "load_network", lambda *_: (network, None))
    out = tmp_path / "new" / "prototypes.png"
    data = images.paths[0].parent
    command = f"x prototypes --checkpoint run --data {data} --out {out} --size 64 --max-images 3"
    monkeypatch.setattr("sys.argv", command.split())
    pictures.main()
    with Image.open(out) as picture:
        assert picture.size[0] > 5 * TILE
    assert [path.name for path in out.parent.iterdir()] == ["prototypes.png"]
