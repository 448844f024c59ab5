"""Features and masks of images, as files: `slotstream embed` and `slotstream segment`."""

import csv
import functools
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from evaluation import embed, masks
from evaluation.datasets.squares import normalise
from evaluation.mask_files import mask_names, scaled_side
from evaluation.networks import load_network
from evaluation.segment import assign
from model import ModelConfig, SlotCon
from pipeline.errors import UserError
from pipeline.images import load_rgb
from tests.helpers.betons import varied
from tests.helpers.checkpoints import write_checkpoint
from tools import build_dataset

TINY = ModelConfig(arch="resnet18", stages=2, dim_hidden=8, dim_out=8, num_prototypes=6)
NAMES = ["b/2, ü.png", "a.png", "a.jpg", "c\nd.png", "e.png"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return write_checkpoint(tmp_path_factory.mktemp("run") / "one", SlotCon(TINY), TINY)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five images of different sizes, with odd names."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "b").mkdir()
    for name, pixels in zip(NAMES, varied(len(NAMES)), strict=True):
        Image.fromarray(pixels).save(folder / name)
    return folder


def embedded(run: Path, data: Path, out: Path, *more: str) -> tuple[np.ndarray, list[list[str]]]:
    embed.main([*words(run, data, out), *more])
    with out.with_name(out.name + ".csv").open(newline="") as file:
        rows = list(csv.reader(file))
    return np.load(out), rows


def words(run: Path, data: Path, out: Path) -> list[str]:
    return ["--checkpoint", str(run), "--data", str(data), "--out", str(out), "--size", "64"]


@functools.cache
def network_of(run: Path) -> SlotCon:
    return load_network(run, torch.device("cpu"))[0]


def teacher_maps(run: Path, photos: Path, name: str, stage: int) -> torch.Tensor:
    """Of one image: [D, h, w], by the encoder itself."""
    network, side = network_of(run), 64
    pixels = Image.fromarray(load_rgb(photos / name))
    width, height = (int(each * side // min(pixels.size)) for each in pixels.size)
    left, top = round((width - side) / 2), round((height - side) / 2)
    square = pixels.resize((width, height), Image.Resampling.BILINEAR)
    square = square.crop((left, top, left + side, top + side))
    images = normalise(torch.from_numpy(np.array(square))[None])
    with torch.no_grad():
        return network.teacher.encoder.maps(images, [stage])[0][0]


def test_a_row_is_the_mean_feature_of_the_image_it_names(
    run: Path, photos: Path, tmp_path: Path
) -> None:
    """Without it features belong to other images than those beside them, or to another stage."""
    features, rows = embedded(run, photos, tmp_path / "a.npy", "--stage", "1", "--batch", "2")
    assert rows[0] == ["image"] and sorted(row[0] for row in rows[1:]) == sorted(NAMES)
    assert features.shape == (5, 64) and features.dtype == np.float32
    for row, (name,) in zip(features, rows[1:], strict=True):
        expected = teacher_maps(run, photos, name, 1).mean(dim=(1, 2))
        np.testing.assert_allclose(row, expected, rtol=1e-4, atol=1e-5)
    embed.main([*words(run, photos, tmp_path / "a.parquet"), "--stage", "1"])
    table = pyarrow.parquet.read_table(tmp_path / "a.parquet")
    assert table.column_names == ["image", "features"]
    assert table["image"].to_pylist() == [row[0] for row in rows[1:]]
    np.testing.assert_allclose(np.stack(table["features"].to_pylist()), features, atol=1e-5)
    assert sorted(tmp_path.iterdir()) == [
        tmp_path / f"a.{e}" for e in ("npy", "npy.csv", "parquet")
    ]


def test_slots_are_those_of_the_paper(run: Path, photos: Path, tmp_path: Path) -> None:
    """Without it a slot is not the mean of section 3.1, or inactive ones are written too."""
    network = network_of(run)
    more = ("--slots", "--features", "projector")
    slots, rows = embedded(run, photos, tmp_path / "s.npy", *more)
    assert rows[0] == ["image", "slot", "share"] and len(rows) == len(slots) + 1
    assert slots.shape[1] == TINY.dim_out
    totals = dict.fromkeys(NAMES, 0.0)
    for slot, (name, prototype, share) in zip(slots, rows[1:], strict=True):
        totals[name] += float(share)
        maps = teacher_maps(run, photos, name, 2)
        with torch.no_grad():
            cells = network.teacher.projector(maps[None])[0].flatten(1).T  # [N, D]
            prototypes = network.teacher.grouping.prototypes
            cosines = F.normalize(cells, dim=1) @ F.normalize(prototypes, dim=1).T
            weight = (cosines / network.teacher.grouping.temperature).softmax(1) + 1e-6
        weight = weight[:, int(prototype)]
        expected = (weight[:, None] * cells).sum(0) / weight.sum()
        np.testing.assert_allclose(slot, expected, rtol=1e-3, atol=1e-5)
        won = (cosines.argmax(1) == int(prototype)).float().mean()
        assert won > 0 and abs(float(won) - float(share)) < 1e-6
    np.testing.assert_allclose(list(totals.values()), 1, atol=1e-6)
    finer, again = embedded(run, photos, tmp_path / "f.npy", "--slots", "--stage", "1")
    assert again == rows and finer.shape == (len(slots), 64)


def test_betons_and_lists_have_names(run: Path, photos: Path, tmp_path: Path) -> None:
    """Without it features of a beton or of a list have numbers only, or those of other images."""
    beton = tmp_path / "p.beton"
    build_dataset.main(["folder", "--root", str(photos), "--out", str(beton), "--workers", "1"])
    _, rows = embedded(run, beton, tmp_path / "b.npy")
    assert sorted(row[0] for row in rows[1:]) == sorted(NAMES)
    (photos.parent / "list.txt").write_text(f"{photos.name}/e.png\n\n{photos.name}/a.jpg\n")
    features, rows = embedded(run, photos.parent / "list.txt", tmp_path / "l.npy")
    assert [row[0] for row in rows[1:]] == [f"{photos.name}/e.png", f"{photos.name}/a.jpg"]
    whole, names = embedded(run, photos, tmp_path / "w.npy")
    place = [row[0] for row in names[1:]].index("e.png")
    np.testing.assert_allclose(features[0], whole[place], atol=1e-5)
    (photos.parent / "bad.txt").write_text("nowhere.png\n")
    with pytest.raises(UserError, match=r"bad\.txt: line 1: there is no file nowhere\.png"):
        embed.main(words(run, photos.parent / "bad.txt", tmp_path / "x.npy"))


@pytest.mark.parametrize("out", ["a.npy", "a.parquet", "masks"])
def test_a_bad_image_leaves_nothing(out: str, run: Path, tmp_path: Path) -> None:
    """Without it a file or folder that is cut short looks like a result."""
    data, place = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    place.mkdir()
    for number, pixels in enumerate(varied(9)):
        Image.fromarray(pixels).save(data / f"{number}.png")
    (data / "9.png").write_bytes(b"nonsense")
    command = masks if out == "masks" else embed
    with pytest.raises(UserError, match=r"9\.png: not an image"):
        command.main([*words(run, data, place / out)])
    assert list(place.iterdir()) == []


def test_bad_options_are_refused(run: Path, photos: Path, tmp_path: Path) -> None:
    """Without it each of these fails late, or does something else than was asked."""
    out = tmp_path / "a.npy"
    for command, more, message in [
        (embed, ["--out", "a.txt"], r"must end in \.npy or \.parquet"),
        (embed, ["--stage", "9"], "--stage 9: teacher has the stages 1 to 2"),
        (embed, ["--batch", "0"], "--batch must be above 0"),
        (masks, ["--clusters", "3", "--merge", "2"], "--merge joins prototypes"),
        (masks, ["--stage", "2"], "--stage is for k-means, which needs --clusters"),
        (masks, ["--merge", "9"], "--merge 9: .* has 6 prototypes"),
        (masks, ["--unlabelled", "x"], "--unlabelled is for --merge"),
        (masks, ["--out", str(photos)], "is there already"),
        (masks, ["--clusters", "99999"], "fewer than 99999 clusters"),
    ]:
        with pytest.raises(UserError, match=message):
            command.main([*words(run, photos, out), *more])
    with pytest.raises(UserError, match="--slots needs --checkpoint"):
        embed.main(["--data", str(photos), "--out", str(out), "--features", "pixels", "--slots"])
    assert list(tmp_path.iterdir()) == []


def test_a_mask_has_the_image_s_size_and_its_segments(
    run: Path, photos: Path, tmp_path: Path
) -> None:
    """Without it a mask does not lie on its image, or its values are other prototypes."""
    masks.main(words(run, photos, tmp_path / "m"))
    files = sorted(path.relative_to(tmp_path / "m").as_posix() for path in files_in(tmp_path / "m"))
    expected_files = ["a.jpg.png", "a.png.png", "b/2, ü.png", "c\nd.png", "e.png", "segments.json"]
    assert files == expected_files
    about = json.loads((tmp_path / "m/segments.json").read_text())
    assert about["kind"] == "prototypes" and len(about["segments"]) == 6
    assert abs(sum(one["share"] for one in about["segments"]) - 1) < 1e-9
    network = network_of(run)
    for name in ("e.png", "b/2, ü.png"):
        pixels = load_rgb(photos / name)
        height, width = pixels.shape[:2]
        mask = Image.open(tmp_path / "m" / name)
        assert mask.mode == "P" and mask.size == (width, height)
        colour = about["segments"][3]["colour"]
        assert mask.getpalette()[9:12] == colour
        cells = [round(side * 2 / min(height, width)) for side in (width, height)]
        sides = [32 * count for count in cells]  # two for the shorter side
        scaled = Image.fromarray(pixels).resize(tuple(sides), Image.Resampling.BILINEAR)
        images = normalise(torch.from_numpy(np.array(scaled))[None])
        segments = assign(network.segment(images)[0], (sides[1], sides[0]))[0].numpy()
        enlarged = Image.fromarray(segments.astype(np.int32)).resize((width, height), 0)
        np.testing.assert_array_equal(np.asarray(mask), np.asarray(enlarged))


def files_in(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("more", "kind", "count"),
    [
        (["--merge", "2"], "groups", 2),
        (["--merge", "2", "--crf"], "groups", 2),
        (["--clusters", "3", "--stage", "1+2"], "k-means", 3),
        (["--clusters", "3", "--features", "pixels", "--crf"], "k-means", 3),
    ],
)
def test_other_segments(
    more: list[str], kind: str, count: int, run: Path, photos: Path, tmp_path: Path
) -> None:
    """Without it groups, clusters or the CRF of the evaluation cannot be had as masks."""
    masks.main([*words(run, photos, tmp_path / "m"), *more])
    about = json.loads((tmp_path / "m/segments.json").read_text())
    assert (about["kind"], len(about["segments"])) == (kind, count)
    values = {
        value
        for file in files_in(tmp_path / "m")
        if file.suffix == ".png"
        for value in np.unique(np.asarray(Image.open(file))).tolist()
    }
    assert values == {one["value"] for one in about["segments"] if one["share"]}
    assert len(values) > 1


def test_many_prototypes_are_16_bit(photos: Path, tmp_path: Path) -> None:
    """Without it prototype 256 is written as prototype 0."""
    config = ModelConfig(arch="resnet18", stages=1, dim_hidden=8, dim_out=8, num_prototypes=700)
    torch.manual_seed(0)
    run = write_checkpoint(tmp_path / "many", SlotCon(config), config)
    masks.main(words(run, photos, tmp_path / "m"))
    mask = np.asarray(Image.open(tmp_path / "m/e.png"))
    assert mask.dtype == np.uint16 and mask.max() > 255


def test_masks_stay_in_their_folder() -> None:
    """Without it a name in a hostile beton writes anywhere, or one mask replaces another."""
    found = mask_names(["../../x.jpg", "/etc/passwd.png", "a/b.c.jpg"])
    assert [str(path) for path in found] == ["__/__/x.png", "etc/passwd.png", "a/b.c.png"]
    with pytest.raises(UserError, match=r"a\.jpg\.png: two images"):
        mask_names(["a.jpg", "a.jpg"])
    with pytest.raises(UserError, match=r"a\.png: an image's mask, and a folder"):
        mask_names(["a.jpg", "a.png/b.jpg"])


def test_a_panorama_is_bounded() -> None:
    """Without it an image of 60,000 × 1 pixels takes all memory."""
    assert [scaled_side(side, 320) for side in (320, 480.2, 333, 1e9)] == [320, 480, 320, 5120]
