"""Pictures of groupings and views, and the statistics of slots."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from evaluation import commands, slots
from evaluation.datasets.images import BetonImages, FolderImages
from evaluation.datasets.squares import SquareImages
from evaluation.pictures import __main__ as pictures
from evaluation.pictures.components import component_colours
from evaluation.pictures.draw import PANEL, spread_ends
from evaluation.pictures.drawing import (
    GAP,
    OUTLINE,
    distinct,
    fitting_font,
    font,
    overlay,
    prototype_colours,
)
from evaluation.pictures.views import CROPS, HEIGHT, DrawnPair, draw_pairs, picture_of_views, shared
from evaluation.prototypes import NearestSegments, gather_statistics
from evaluation.segment import segment_images
from evaluation.slot_usage import duplicate_pairs, ends, result_rows
from model import ModelConfig, SlotCon
from pipeline.augment import IMAGENET_MEAN, IMAGENET_STD
from pipeline.beton import Beton
from pipeline.errors import UserError
from pipeline.loader import make_loader
from pipeline.views import ViewConfig
from tests.helpers.betons import varied, write_beton
from tests.helpers.checkpoints import write_checkpoint
from tests.helpers.coloured import CELL, ColourNetwork, write_scenes
from train.config import DataConfig, RunConfig
from train.run.checkpoint import Record, write_record
from train.run.settings import to_dict

CPU = torch.device("cpu")
MAPS = [[[0, 0], [0, 0]], [[0, 1], [0, 1]], [[1, 0], [0, 0]], [[0, 2], [1, 0]]]


class FakeNetwork(ColourNetwork):
    """A network with a teacher. The first two prototypes of the teacher are near-duplicates."""

    teacher = SimpleNamespace(
        grouping=SimpleNamespace(prototypes=torch.tensor([[1.0, 0], [9, 1], [0, 1], [-1, 0]]))
    )


@pytest.fixture
def scenes(tmp_path: Path) -> FolderImages:
    """Four pictures: red in all, green in three, blue in one, yellow in none."""
    return FolderImages(write_scenes(tmp_path / "scenes", [np.array(m) for m in MAPS])[0])


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run folder with three checkpoints without weights; a fake network replaces them."""
    config = RunConfig(name="x", data=DataConfig("x"), views=ViewConfig(size=64))
    for step in (1, 2, 10):
        folder = tmp_path / f"run/checkpoints/step_{step}"
        folder.mkdir(parents=True)
        data = {"images": 1, "fingerprint": ""}
        record = Record(step, to_dict(config), data, seconds=0, meter=[], provenance={})
        write_record(folder, record)
    model = SimpleNamespace(num_prototypes=4)
    fake = SimpleNamespace(model=model, views=config.views, train=config.train)
    monkeypatch.setattr(commands, "load_network", lambda *_: (FakeNetwork([0, 1, 2, 3]), fake))
    return tmp_path / "run"


def draw(monkeypatch: pytest.MonkeyPatch, command: str, out: Path) -> Image.Image:
    monkeypatch.setattr("sys.argv", ["pictures", *command.split(), "--out", str(out)])
    pictures.main()
    with Image.open(out) as picture:
        return picture.convert("RGB")


# ---- statistics ----


def test_statistics_of_known_pictures(scenes: FolderImages) -> None:
    """Counts over images and over cells, for any batch size."""
    squares = SquareImages(scenes, 2 * CELL, CPU, batch_size=3)
    result = gather_statistics(segment_images(ColourNetwork([0, 1, 2, 3]), squares), top=2)
    assert result.slots.tolist() == [1, 2, 2, 3]
    assert result.cells.tolist() == [11, 4, 1, 0] and result.dead == 1
    assert result.nearest.active.tolist() == [4, 3, 1, 0]
    share = np.array([11, 4, 1]) / 16
    assert result.entropy == pytest.approx(-(share * np.log(share)).sum() / np.log(4))
    rows = result_rows(result, [(0, 1, 0.95)], {"step": 7})
    assert {"metric": "active_slots", "value": 2.0, "step": 7} in rows
    assert {"metric": "image_share", "prototype": 1, "value": 0.75, "step": 7} in rows
    assert {"metric": "cosine", "prototypes": [0, 1], "value": 0.95, "step": 7} in rows
    with pytest.raises(ValueError, match="no images"):
        gather_statistics([], top=2)


def test_a_frequent_prototype_is_not_called_rare() -> None:
    """With few active prototypes the two columns must not overlap."""
    nearest = NearestSegments(9, top=1)
    nearest.active[:] = [0, 5, 9, 7, 3, 0, 8, 2, 1]
    assert [end.tolist() for end in ends(nearest)] == [[2, 6, 3, 1, 4], [8, 7]]


def test_duplicates_name_both_the_nearest_first() -> None:
    """To prune duplicates, a user needs the numbers of both prototypes."""
    prototypes = torch.tensor([[1.0, 0], [0, 1], [1, 0.3], [2, 0.01]])
    assert [pair[:2] for pair in duplicate_pairs(prototypes)] == [(0, 3), (2, 3), (0, 2)]


def test_slots_command(
    run: Path, scenes: FolderImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Text, JSON and picture from one call."""
    out, picture = tmp_path / "slots.json", tmp_path / "slots.png"
    command = f"x --checkpoint {run} --data {scenes.paths[0].parent} --size 64 --json {out}"
    monkeypatch.setattr("sys.argv", [*command.split(), "--picture", str(picture)])
    slots.main()
    said = capsys.readouterr().out
    assert "2.00 ± 0.71 (1 to 3, 4 images)" in said and "1 of 4" in said and "#0 #1 0.99" in said
    rows = {row["metric"]: row for row in json.loads(out.read_text())["results"]}
    assert rows["dead_prototypes"]["value"] == 1 and rows["near_duplicates"]["value"] == 1
    assert rows["active_slots"]["step"] == 10 and rows["active_slots"]["images"] == 4
    with Image.open(picture) as drawn:
        assert drawn.height > 500


# ---- groupings ----


def test_colours_are_distinct_where_it_matters() -> None:
    """Without it two large segments could have the same colour."""
    winners = np.repeat(np.arange(256), np.arange(256) + 1)
    colours = prototype_colours(winners, 256).astype(int)
    assert len(np.unique(colours, axis=0)) == 256
    most = colours[-8:]
    apart = np.abs(most[:, None] - most[None]).sum(axis=2)
    assert apart[~np.eye(8, dtype=bool)].min() > 60
    assert (colours[255] == distinct(1)[0]).all()


def test_overlay_marks_segments_and_borders() -> None:
    """The same prototype has the same colour, and only borders between segments are drawn."""
    pixels = np.full((6, 6, 3), 100, np.uint8)
    winner = np.zeros((6, 6), np.int64)
    winner[:, 3:] = 1
    drawn = np.asarray(overlay(pixels, winner, distinct(2)))
    assert (drawn[:, 3] == 255).all()
    assert (drawn[:, :3] == drawn[0, 0]).all() and (drawn[:, 4:] == drawn[0, 4]).all()
    assert (drawn[0, 0] != drawn[0, 4]).any()


def test_confusion_and_attention(
    run: Path, scenes: FolderImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commands draw a row for each image and a column for each checkpoint."""
    data = f"--data {scenes.paths[0].parent} --size 64"
    grouping = draw(monkeypatch, f"grouping --checkpoint {run} {data}", tmp_path / "g.png")
    assert grouping.width > 6 * PANEL and grouping.height > 2 * PANEL
    strip = draw(
        monkeypatch, f"attention --run {run} {data} --only 3 --columns 2", tmp_path / "a.png"
    )
    assert 3 * PANEL < strip.width < 4 * PANEL
    assert spread_ends(3, 2) == [0, 2] and spread_ends(3, 1) == [2]
    assert spread_ends(10, 4) == [0, 3, 6, 9] and spread_ends(2, 9) == [0, 1]


# ---- views ----


def test_views_are_those_of_the_training(tmp_path: Path) -> None:
    """For the same image and epoch: equal pixels, geometry and flips."""
    beton = write_beton(tmp_path / "small.beton", varied(6))
    config = ViewConfig(size=32, mask_ratio=0.5, mask_cell=8)
    which = np.array([4, 1])
    pairs = draw_pairs(BetonImages(beton), which, seed=5, epoch=2, config=config)
    loader = make_loader(
        Beton(beton),
        config,
        6,
        crops="device",
        backend="reference",
        seed=5,
        device=CPU,
        dtype=torch.float32,
        threads=1,
    )
    batch = next(iter(loader.epoch(2)))
    for pair, number in zip(pairs, which.tolist(), strict=True):
        position = batch.index.tolist().index(number)
        mean, std = (torch.tensor(v)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
        expected = (batch.views[:, position] * std + mean).clamp(0, 1) * 255
        views = torch.from_numpy(np.stack(pair.views)).permute(0, 3, 1, 2)
        torch.testing.assert_close(views.float(), expected, atol=0.51, rtol=0)
        assert pair.flipped == batch.flipped[:, position].tolist()
        torch.testing.assert_close(torch.tensor(pair.overlaps), batch.overlap[:, position])
        assert pair.masks is not None and batch.masks is not None
        assert np.array_equal(np.stack(pair.masks), batch.masks[:, position])


def test_boxes_are_drawn_where_they_are() -> None:
    """Boxes are in pixels of the image, and in the 0..1 frame of a view. An empty overlap is not
    drawn.
    """
    grey = np.full((HEIGHT, HEIGHT, 3), 128, np.uint8)
    crops = [(20.0, 20.0, 120.0, 120.0), (60.0, 60.0, 220.0, 220.0)]
    overlaps = [(0.4, 0.4, 1.0, 1.0), (0.0, 0.0, 0.375, 0.375)]
    pair = DrawnPair(grey, [grey, grey], crops, overlaps, [False, True])
    colours = [tuple(bytes.fromhex(c[1:])) for c in (*CROPS, OUTLINE)]

    def boxes(pair: DrawnPair, colour: tuple[int, ...]) -> list[int]:
        """Left, top and right edge of all pixels that have the colour."""
        drawn = np.asarray(picture_of_views([pair], "title"))
        rows, columns = np.nonzero((drawn == colour).all(axis=2))
        return [int(columns.min()), int(rows.min()), int(columns.max())] if len(rows) else []

    left, top, _ = boxes(pair, colours[0])
    first = left - 20, top  # of the panel, from the upper left corner of the first crop
    assert boxes(pair, colours[2])[0] == first[0] + 60
    assert shared(*crops) == (60, 60, 120, 120)
    apart = DrawnPair(grey, [grey, grey], [crops[0], (130.0, 130.0, 150.0, 150.0)],
                      [(2.0, 2.0, 1.0, 1.0)] * 2, [False, True])  # fmt: skip
    assert boxes(apart, colours[2]) == []


def test_hidden_cells_are_grey() -> None:
    """Without it a picture of a masked run shows what its student never saw, or hides other cells:
    the lower left quarter of the first view, and the upper right cell of 4 x 4 in the second.
    """
    white = np.full((HEIGHT, HEIGHT, 3), 255, np.uint8)
    masks = [np.array([[0, 0], [1, 0]], bool), np.zeros((4, 4), bool)]
    masks[1][0, 3] = True
    whole = [(0.0, 0.0, 1.0, 1.0)] * 2
    pair = DrawnPair(white, [white, white], whole, whole, [False, False])
    plain, masked = (
        np.asarray(picture_of_views([drawn], "title")).astype(int)
        for drawn in (pair, replace(pair, masks=masks))
    )
    grey = (np.abs(masked - 141).max(axis=2) < 4) & (plain.min(axis=2) == 255)
    rows, columns = np.nonzero(grey)
    middle = columns[columns < columns.mean()].max() + 1
    for left, right, height, width in ((0, middle, 2, 2), (middle, None, 4, 4)):
        part = grey[:, left:right]
        rows, columns = np.nonzero(part)
        assert part.sum() == pytest.approx(HEIGHT**2 / height / width, rel=0.2)  # less the outline
        assert np.ptp(rows) + 1 == pytest.approx(HEIGHT / height, abs=7)
        assert np.ptp(columns) + 1 == pytest.approx(HEIGHT / width, abs=7)


def test_views_command(
    run: Path, tmp_path: Path, scenes: FolderImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder works like a beton."""
    command = f"views --checkpoint {run} --data {scenes.paths[0].parent} --images 2 --epoch 3"
    assert draw(monkeypatch, command, tmp_path / "v.webp").height > 2 * HEIGHT


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("views --checkpoint {run} --data {data} --out v.png --epoch 800", "--epoch must be in"),
        ("views --checkpoint {run} --data {data} --out v.png --only 4", "has the images 0 to 3"),
        ("views --checkpoint {run} --data {data} --out v.gif", "must end in .png"),
        ("grouping --checkpoint {run} --data {data} --out v.png --images 0", "above 0, not 0"),
        ("attention --run {run}/checkpoints/step_1 --data {data} --out v.png", "folder of its run"),
        ("attention --run {data} --data {data} --out v.png", "no whole checkpoint"),
    ],
)
def test_wrong_options_are_one_line(
    command: str, says: str, run: Path, scenes: FolderImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each message names the error."""
    arguments = command.format(run=run, data=scenes.paths[0].parent).split()
    monkeypatch.setattr("sys.argv", ["x", *arguments])
    with pytest.raises(UserError, match=says):
        pictures.main()


# ---- features ----


def test_components_are_those_of_numpys_svd() -> None:
    """Red, green and blue are the first three components of all cells, each over its own range."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(3, 7, generator=generator) * torch.tensor([[9.0], [3.0], [1.0]])
    maps = torch.einsum("bkhw,kd->bdhw", torch.randn(2, 3, 5, 6, generator=generator), mixing) + 50
    colours = component_colours(maps)
    assert colours.shape == (2, 5, 6, 3) and colours.dtype == np.uint8
    x = maps.permute(0, 2, 3, 1).reshape(-1, 7).double().numpy()
    directions = np.linalg.svd(x - x.mean(axis=0))[2][:3]
    for number, direction in enumerate(directions):
        sign = np.sign(direction[np.abs(direction).argmax()])
        values = (x - x.mean(axis=0)) @ direction * sign
        low, high = np.quantile(values, [0.01, 0.99])
        expected = 255 * ((values - low) / (high - low)).clip(0, 1)
        assert np.abs(colours[..., number].ravel() - expected).max() < 1


def test_components_that_do_not_exist_are_grey() -> None:
    """Two features have no third component, and a picture of one colour has none that varies."""
    maps = torch.rand(1, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    assert (component_colours(maps)[..., 2] == 128).all()
    assert (component_colours(torch.ones(1, 5, 2, 2)) == 128).all()


def test_features_command(
    tmp_path: Path, scenes: FolderImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A column for each network and stage beside the images, the untrained network among them."""
    torch.manual_seed(0)
    tiny = ModelConfig(arch="resnet18", dim_hidden=8, dim_out=6, num_prototypes=4)
    checkpoint = write_checkpoint(tmp_path / "checkpoint", SlotCon(tiny), tiny)
    data = f"features --data {scenes.paths[0].parent}"
    words = f"{data} --checkpoint {checkpoint} --size 64 --only 3 1"
    one = draw(monkeypatch, f"{words} --baseline none", tmp_path / "one.png")
    four = draw(monkeypatch, f"{words} --stage 1 3+4", tmp_path / "four.png")
    assert four.width == one.width + 3 * (PANEL + GAP) and four.height == one.height
    with pytest.raises(UserError, match="--stage 5: teacher has the stages 1 to 4"):
        draw(monkeypatch, f"{words} --stage 5", tmp_path / "none.png")
    with pytest.raises(UserError, match="--features teacher needs --checkpoint"):
        draw(monkeypatch, data, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_names_of_columns_fit() -> None:
    """The name of a network and its stage is longer than a panel is wide."""
    name = "timm:tf_efficientnet_lite0, untrained, stage 4"
    assert fitting_font(name, PANEL).getlength(name) <= PANEL < font(20).getlength(name)
