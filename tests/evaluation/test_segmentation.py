"""From images and label maps to a score: geometry, streaming, the command, bad input."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from evaluation import clusters, segment, unsupervised_segmentation
from evaluation.datasets.images import (
    FolderImages,
    centre_square,
    evaluation_size,
    open_images,
    spread,
)
from evaluation.datasets.label_maps import read_classes
from evaluation.datasets.labelled_images import LabelledImages
from evaluation.datasets.open import open_labelled
from evaluation.datasets.squares import SquareImages
from evaluation.networks import load_network, untrained_network
from evaluation.pictures.segmentation import paint, palette
from evaluation.segment import assign, segment_images
from model import ModelConfig, SlotCon
from pipeline.errors import UserError
from tests.helpers.betons import varied, write_beton
from tests.helpers.checkpoints import write_checkpoint
from tests.helpers.coloured import CELL, ColourNetwork, write_scenes
from train.config import DataConfig, RunConfig

CPU = torch.device("cpu")
TINY = ModelConfig(arch="resnet18", dim_hidden=8, dim_out=8, num_prototypes=4)


@pytest.mark.parametrize(
    ("height", "width"), [(50, 83), (83, 50), (64, 64), (401, 640), (20, 300), (64, 67)]
)
def test_square_is_the_protocols(height: int, width: int) -> None:
    """Another crop would score other pixels than published numbers."""
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
    labels = generator.integers(0, 9, (height, width), dtype=np.uint8)
    for array, ours, theirs in (
        (pixels, Image.Resampling.BILINEAR, transforms.InterpolationMode.BILINEAR),
        (labels, Image.Resampling.NEAREST, transforms.InterpolationMode.NEAREST),
    ):
        both = transforms.Compose([transforms.Resize(64, theirs), transforms.CenterCrop(64)])
        expected = np.asarray(both(Image.fromarray(array)))
        np.testing.assert_array_equal(centre_square(array, 64, ours), expected)


def test_evaluation_size_is_320_for_224() -> None:
    """The default is the protocol's size; other training sizes give whole cells."""
    assert [evaluation_size(side) for side in (224, 96, 64, 16)] == [320, 128, 96, 32]


def test_assignment_equals_all_prototypes_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Upsampling a few prototypes at a time must not change a pixel."""
    scores = torch.randn(2, 11, 3, 3, generator=torch.Generator().manual_seed(0))
    upsampled = torch.nn.functional.interpolate(scores, (24, 24), mode="bilinear")
    for floats in (1, 3 * 2 * 24 * 24, 2**24):
        monkeypatch.setattr(segment, "UPSAMPLED_FLOATS", floats)
        assert torch.equal(assign(scores, 24), upsampled.argmax(dim=1))


def test_images_come_in_order_whatever_the_batch(tmp_path: Path) -> None:
    """Out of order, images would be scored against label maps of other images."""
    path = write_beton(tmp_path / "images.beton", varied(7), mode="raw")
    images = open_images(path)
    network = ColourNetwork([0, 1])
    for batch_size in (1, 3, 7):
        batches = list(segment_images(network, SquareImages(images, 32, CPU, batch_size)))
        assert np.concatenate([b.squares.index for b in batches]).tolist() == list(range(7))
        pixels = np.concatenate([b.squares.pixels for b in batches])
        expected = [centre_square(i, 32, Image.Resampling.BILINEAR) for i in varied(7)]
        np.testing.assert_array_equal(pixels, np.stack(expected))
    assert network.largest_batch == 7


def test_spread_covers_the_whole_set() -> None:
    """The first M images of a set sorted by class would show one class."""
    assert spread(10, 5).tolist() == [0, 2, 4, 6, 8]
    assert spread(3, 10).tolist() == spread(3, None).tolist() == [0, 1, 2]


# ---- the command ----------------------------------------------------------------------------

MAPS = [np.array([[0, 0], [1, 1]]), np.array([[2, 1], [2, 1]])]
"""Straight borders only: bilinear upsampling keeps them in place, and rounds corners off."""


def score(
    monkeypatch: pytest.MonkeyPatch, root: Path, order: list[int], *more: str
) -> dict[str, float]:
    """Run the command on `root` with a network of colours; returns (metric or class) → value."""
    config = RunConfig(name="x", data=DataConfig("x"), model=TINY)
    network = ColourNetwork(order)
    monkeypatch.setattr(clusters, "load_network", lambda *_: (network, config))
    monkeypatch.setattr(clusters, "start_of", lambda _: config.init)
    out = root / "eval.json"
    folders = ["--images", str(root / "images"), "--labels", str(root / "labels")]
    command = ["x", "--checkpoint", "run", *folders, "--size", "64", "--json", str(out), *more]
    monkeypatch.setattr("sys.argv", command)
    unsupervised_segmentation.main()
    content = json.loads(out.read_text())
    assert {"hardware", "versions", "command", "results"} <= set(content)
    return {
        f"{row['network']} {row.get('class', row['metric'])}": row["value"]
        for row in content["results"]
    }


def test_right_grouping_scores_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From files to JSON, with a correct grouping whose numbering differs from the classes'."""
    write_scenes(tmp_path, MAPS)
    (tmp_path / "classes.json").write_text('["red", "green", "blue"]')
    values = score(monkeypatch, tmp_path, [2, 0, 1], "--baseline", "untrained", "--batch", "1")
    assert values["trained miou"] == values["trained pixel_accuracy"] == 1.0
    assert values["trained red"] == values["trained blue"] == 1.0
    assert 0 <= values["untrained miou"] < 1


def test_void_class_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pixels of a class given as --void do not count, and the class is not in the table."""
    write_scenes(tmp_path, MAPS)
    values = score(monkeypatch, tmp_path, [0, 1], "--void", "2")
    assert values["trained miou"] == 1.0
    assert values["trained used_prototypes"] == 2
    assert "trained class 2" not in values


def test_bad_input_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it each of these would end in a traceback or in a wrong score."""
    images_folder, labels_folder = write_scenes(tmp_path, MAPS)

    def opened(**more: Path) -> LabelledImages:
        return open_labelled("folder", images=images_folder, labels=labels_folder, **more)

    (tmp_path / "one.json").write_text('["a"]')
    with pytest.raises(UserError, match="class id 1 is not in the table of 1 classes"):
        opened(classes=tmp_path / "one.json").labels(0, 64, 64)
    with pytest.raises(UserError, match=r"000\.png: label map of 64×64 pixels for an image of 9×8"):
        opened().labels(0, 8, 9)
    Image.new("RGB", (64, 64), "red").save(labels_folder / "000.png")
    with pytest.raises(UserError, match="not a label map: its pixels are RGB"):
        opened().labels(0, 64, 64)
    (labels_folder / "000.png").write_bytes(b"nonsense")
    with pytest.raises(UserError, match=r"000\.png: not an image"):
        opened().labels(0, 64, 64)
    (labels_folder / "001.png").unlink()
    with pytest.raises(UserError, match=r"no label map for 1 of 2 images \(the first: 001\.png\)"):
        opened()
    with pytest.raises(UserError, match="no such folder"):
        FolderImages(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no images in this folder"):
        FolderImages(write_scenes(tmp_path / "empty", [])[0])
    for text in ("{}", '["a", "a"]', "[1]", "[]", "nonsense"):
        (tmp_path / "table.json").write_text(text)
        with pytest.raises(UserError, match=r"table\.json: "):
            read_classes(tmp_path / "table.json")

    write_scenes(tmp_path / "void", [np.full((2, 2), 255)])
    with pytest.raises(UserError, match="all void"):
        score(monkeypatch, tmp_path / "void", [0, 1])


def test_prototypes_on_flipped_images_agree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If a mirrored map were not mirrored back, every asymmetric image would score worse."""
    write_scenes(tmp_path, MAPS)
    values = score(monkeypatch, tmp_path, [2, 0, 1], "--flip")
    assert values["trained miou"] == 1.0


def test_crf_keeps_what_is_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The refined grouping has a row and a name of its own beside the plain grouping."""
    pytest.importorskip("pydensecrf", reason="needs the extra [crf]")
    write_scenes(tmp_path, MAPS)
    values = score(monkeypatch, tmp_path, [2, 0, 1], "--crf")
    assert values["trained miou"] == values["trained, CRF miou"] == 1.0


def test_kmeans_on_features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """k-means finds the colours from pixels alone. Each seed is a row, and the mean is over the
    seeds.
    """
    write_scenes(tmp_path, MAPS)
    (tmp_path / "classes.json").write_text('["red", "green", "blue"]')
    out, picture = tmp_path / "eval.json", tmp_path / "eval.png"
    folders = ["--images", str(tmp_path / "images"), "--labels", str(tmp_path / "labels")]
    more = ["--size", "64", "--json", str(out), "--picture", str(picture), "--seeds", "0", "1"]
    monkeypatch.setattr("sys.argv", ["x", *folders, *more, "--features", "pixels"])
    unsupervised_segmentation.main()
    content = json.loads(out.read_text())
    mious = [row for row in content["results"] if row["metric"] == "miou"]
    assert [row["seed"] for row in mious] == [0, 1]
    assert {row["num_clusters"] for row in mious} == {3}
    values = [row["value"] for row in mious]
    assert max(values) > 0.95  # mixed blocks on borders, none here
    summary = content["summary"][0]
    assert summary["network"] == "pixels, k-means"
    assert summary["mean"] == pytest.approx(sum(values) / 2)
    assert summary["sd"] == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
    with Image.open(picture) as image:
        assert image.width > 3 * 240


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "needs --checkpoint or --features"),
        (["--checkpoint", "x", "--pca", "9"], "--pca 9 is for k-means, which needs --features"),
        (["--checkpoint", "x", "--seeds", "0"], "--seeds 0 is for k-means"),
        (["--features", "pixels", "pixels"], "the same features twice"),
        (
            ["--features", "pixels", "--clusters", "3", "--weights", "w.pth"],
            "--weights needs exactly one of",
        ),
        (["--features", "pixels", "--seeds", "1", "1"], "--seeds must be different"),
        (["--features", "pixels", "--clusters", "0"], "--clusters must be above 0, not 0"),
        (["--features", "pixels", "--picture", "x.svg"], "must end in .png"),
        (["--features", "pixels"], "k-means needs --clusters"),
        (["--features", "pixels", "--clusters", "999"], "128 cells are fewer than 999 clusters"),
        (["--features", "nonsense", "--clusters", "3"], "must be one of teacher"),
    ],
)
def test_bad_options_are_one_line(
    options: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bad options are found before the work where possible."""
    write_scenes(tmp_path, MAPS)
    folders = ["--images", str(tmp_path / "images"), "--labels", str(tmp_path / "labels")]
    monkeypatch.setattr("sys.argv", ["x", *folders, "--size", "64", *options])
    with pytest.raises(UserError, match=message):
        unsupervised_segmentation.main()


def test_picture_paints_clusters_as_their_classes() -> None:
    """Predictions and ground truth must have the same colours."""
    colours = palette(3)
    truth = np.array([[0, 1], [2, 255]], np.uint8)
    painted = paint(np.array([[5, 0], [1, 3]]), np.array([1, 2, -1, -1, -1, 0]), colours)
    np.testing.assert_array_equal(painted[0], colours[truth[0]])
    np.testing.assert_array_equal(painted[1, 0], colours[2])
    assert len(set(painted[1, 1].tolist())) == 1  # grey: of no class
    assert len({tuple(c) for c in palette(27)[:27].tolist()}) == 27


# ---- networks -------------------------------------------------------------------------------


def test_checkpoint_of_another_architecture_is_refused(tmp_path: Path) -> None:
    """Weights that fit partly must not be evaluated, and the error must be one line."""
    model = SlotCon(TINY)
    loaded, _ = load_network(write_checkpoint(tmp_path / "good", model, TINY), CPU)
    assert torch.equal(loaded.teacher.grouping.prototypes, model.teacher.grouping.prototypes)
    other = ModelConfig(arch="resnet34", dim_hidden=8, dim_out=8, num_prototypes=4)
    with pytest.raises(UserError) as caught:
        load_network(write_checkpoint(tmp_path / "bad", model, other), CPU)
    assert "another model" in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="no such"):
        load_network(tmp_path / "nowhere", CPU)


def test_untrained_is_the_runs_own_start(tmp_path: Path) -> None:
    """The baseline must be the initial network of the run, and the caller's random state must not
    change.
    """
    images = SquareImages(FolderImages(write_scenes(tmp_path, MAPS)[0]), 2 * CELL, CPU)
    torch.manual_seed(3)
    expected, following = SlotCon(TINY), torch.rand(1)
    torch.manual_seed(3)
    SlotCon(TINY)
    network = untrained_network(TINY, 3, images)
    assert torch.equal(torch.rand(1), following)
    for ours, theirs in zip(network.parameters(), expected.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    first = network.teacher.encoder.bn1
    assert isinstance(first, torch.nn.BatchNorm2d)
    (squares,) = images.batches()
    with torch.inference_mode():
        channels = network.teacher.encoder.conv1(squares.normalised(CPU))
    torch.testing.assert_close(first.running_mean, channels.mean(dim=(0, 2, 3)))
    assert not network.training


def test_one_image_of_one_cell_calibrates_nothing(tmp_path: Path) -> None:
    """BatchNorm fails on it. Nine images must not become a batch of eight and a batch of one."""
    images = FolderImages(write_scenes(tmp_path / "nine", 9 * MAPS[:1])[0])
    assert untrained_network(TINY, 3, SquareImages(images, CELL, CPU))
    alone = FolderImages(write_scenes(tmp_path / "one", MAPS[:1])[0])
    with pytest.raises(UserError, match="has no variance"):
        untrained_network(TINY, 3, SquareImages(alone, CELL, CPU))
