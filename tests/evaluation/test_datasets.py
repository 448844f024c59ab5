"""Label maps of each data set are read in the layout that its authors define."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evaluation.datasets.coco_classes import (
    CLASSES,
    PANOPTIC_DROPS,
    PANOPTIC_MOVES,
    STUFF,
    THINGS,
    coarse_classes,
)
from evaluation.datasets.kinds import KINDS
from evaluation.datasets.labelled_images import LabelledImages
from evaluation.datasets.layouts import LAYOUTS
from evaluation.datasets.open import open_labelled
from pipeline.errors import UserError
from tests.helpers.labelled_sets import save_png

SHAPE = (4, 6)


def grid(*values: int) -> np.ndarray:
    """[4, 6] of these values in turn."""
    return np.resize(np.array(values), SHAPE)


def photograph(path: Path) -> None:
    save_png(path, np.zeros((*SHAPE, 3)))


def only(data: LabelledImages) -> np.ndarray:
    """The label map of a set of one image."""
    assert len(data) == 1
    assert data.load(0).shape == (*SHAPE, 3)
    return data.labels(0, *SHAPE)


# ---- COCO -----------------------------------------------------------------------------------


def test_cocos_ids_are_all_there_once() -> None:
    """Without it a forgotten name would shift all ids after it to other classes."""
    coarse = coarse_classes()
    assert len(CLASSES) == len(set(CLASSES)) == 27
    assert sorted(set(coarse.values())) == list(range(27))
    assert sum(number <= 90 for number in coarse) == 80
    assert [number for number in coarse if number > 91] == list(range(92, 183))
    gone = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91}  # COCO's paper: 91 things, 80 in use
    assert set(range(1, 92)) - set(coarse) == gone
    assert len(THINGS) == 12
    assert len(STUFF) == 15


@pytest.mark.parametrize(
    ("number", "name"),
    [
        (1, "person"), (2, "vehicle"), (15, "outdoor"), (25, "animal"), (33, "accessory"),
        (43, "sports"), (51, "kitchen"), (61, "food"), (70, "furniture"), (77, "electronic"),
        (82, "appliance"), (90, "indoor"), (92, "textile"), (95, "building"),
        (100, "raw-material"), (101, "floor"), (103, "ceiling"), (106, "sky"), (120, "water"),
        (122, "food-stuff"), (149, "ground"), (152, "textile"), (156, "furniture-stuff"),
        (157, "sky"), (158, "building"), (161, "furniture-stuff"), (164, "structural"),
        (169, "plant"), (171, "wall"), (177, "wall"), (179, "water"), (181, "window"),
        (182, "solid"),
    ],
)  # fmt: skip
def test_cocos_published_ids(number: int, name: str) -> None:
    """Ids and supercategories as COCO publishes them, at the ends of ranges, where errors show."""
    assert CLASSES[coarse_classes()[number]] == name


def test_order_of_the_27_is_the_benchmarks() -> None:
    """In another order, confusion matrices and predictions could not be compared with those of
    others.
    """
    assert CLASSES[:3] == ["electronic", "appliance", "food"]
    assert CLASSES[9:14] == ["person", "sports", "vehicle", "ceiling", "floor"]
    assert CLASSES[-2:] == ["structural", "water"]


def test_stuff_maps_hold_ids_less_one(tmp_path: Path) -> None:
    """With an offset of one, each class would become its neighbour."""
    photograph(tmp_path / "val2017/000000000139.jpg")
    save_png(tmp_path / "stuffthingmaps/val2017/000000000139.png", grid(0, 181, 255))
    data = open_labelled("coco-stuff", root=tmp_path)
    assert data.num_classes == 27
    assert data.names == CLASSES
    expected = grid(CLASSES.index("person"), CLASSES.index("solid"), 255)
    np.testing.assert_array_equal(only(data), expected)
    save_png(tmp_path / "stuffthingmaps/val2017/000000000139.png", grid(11))  # street sign, unused
    with pytest.raises(UserError, match="class id 11 is not in the table"):
        only(data)


def panoptic(root: Path, segments: list[dict[str, int]], colours: np.ndarray) -> Path:
    """One image in COCO's panoptic layout; colours [H, W, 3]."""
    photograph(root / "val2017/000000000139.jpg")
    save_png(root / "annotations/panoptic_val2017/000000000139.png", colours)
    categories = [
        {"id": 1, "name": "person", "supercategory": "person", "isthing": 1},
        {"id": 196, "name": "food-other-merged", "supercategory": "food-stuff", "isthing": 0},
        {"id": 52, "name": "banana", "supercategory": "food", "isthing": 1},
    ]
    annotation = {"image_id": 139, "file_name": "000000000139.png", "segments_info": segments}
    file = root / "annotations/panoptic_val2017.json"
    file.write_text(json.dumps({"categories": categories, "annotations": [annotation]}))
    return file


def palette_of_colours(colours: np.ndarray) -> Image.Image:
    """The image [H, W, 3] as an optimiser stores it: its few colours in a palette."""
    image = Image.fromarray(colours.astype(np.uint8)).quantize(256)
    np.testing.assert_array_equal(np.asarray(image.convert("RGB")), colours)
    return image


def test_panoptic_colours_are_segment_numbers(tmp_path: Path) -> None:
    """R + 256 G + 65536 B: all channels count, food can be a thing or stuff, and 0 is void."""
    numbers = [7, 256, 65536 * 3 + 256 * 2 + 1]
    segments = [
        {"id": number, "category_id": category}
        for number, category in zip(numbers, (1, 196, 52), strict=True)
    ]
    ids = grid(*numbers, 0)
    colours = np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=-1)
    file = panoptic(tmp_path, segments, colours)
    names = [CLASSES.index(name) for name in ("person", "food-stuff", "food")]
    data = open_labelled("coco-panoptic", root=tmp_path)
    np.testing.assert_array_equal(only(data), grid(*names, 255))

    panoptic(tmp_path, segments[:2], colours)
    with pytest.raises(UserError, match=r"segment 197121 is not in .*panoptic_val2017\.json"):
        only(open_labelled("coco-panoptic", root=tmp_path))
    for image in (palette_of_colours(colours), Image.fromarray(colours.astype(np.uint8))):
        panoptic(tmp_path, segments, colours)
        image.save(tmp_path / "annotations/panoptic_val2017/000000000139.png")
        np.testing.assert_array_equal(
            only(open_labelled("coco-panoptic", root=tmp_path)), grid(*names, 255)
        )
    panoptic(tmp_path, segments[:2], colours)
    save_png(tmp_path / "annotations/panoptic_val2017/000000000139.png", grid(0))  # all is void
    assert (only(open_labelled("coco-panoptic", root=tmp_path)) == 255).all()
    save_png(tmp_path / "annotations/panoptic_val2017/000000000139.png", grid(7))
    with pytest.raises(UserError, match="not a panoptic PNG: its pixels are L"):
        only(open_labelled("coco-panoptic", root=tmp_path))
    for text, message in (
        ("[]", "not COCO panoptic annotations: expected object, got array"),
        ('{"categories": [], "annotations": [{"file_name": "a"}]}', "required field segments_info"),
        (file.read_text().replace("[{", '[{"id": NaN},{', 1), "categories.0..id is NaN: expected"),
        (file.read_text().replace('"id": 7', '"id": 1e9'), r"id is 1.*: expected int"),
        (
            file.read_text().replace('"category_id": 1}', '"category_id": 3}'),
            "annotation of 000000000139.png: no category 3",
        ),
        ('{"categories": [], "annotations": []}', "describes 0 of the 1 label maps"),
        ('{"categories": [{"id": 1, "supercategory": "x"}], "annotations": []}', "'x' is none of"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=message):
            open_labelled("coco-panoptic", root=tmp_path)
    file.unlink()
    with pytest.raises(UserError, match=r"expected panoptic_val2017\.json beside this folder"):
        open_labelled("coco-panoptic", root=tmp_path)


def test_things_12_and_stuff_15_leave_the_others_void(tmp_path: Path) -> None:
    """COCO-Things and COCO-Stuff of Leopart and NeCo: each scores half of the supercategories. The
    stuff is stored in two numberings.
    """
    colours = np.stack([grid(7, 8, 9, 0), grid(0), grid(0)], axis=-1)
    segments = [{"id": n, "category_id": c} for n, c in ((7, 1), (8, 196), (9, 52))]
    panoptic(tmp_path, segments, colours)
    things = open_labelled("coco-things-12", root=tmp_path)
    assert things.names is not None
    assert things.names == sorted(THINGS)
    person, food = things.names.index("person"), things.names.index("food")
    np.testing.assert_array_equal(only(things), grid(person, 255, food, 255))

    save_png(tmp_path / "stuffthingmaps/val2017/000000000139.png", grid(0, 91, 181, 255))
    stuff = open_labelled("coco-stuff-15", root=tmp_path)
    assert stuff.names == sorted(STUFF)
    expected = grid(255, stuff.names.index("textile"), stuff.names.index("solid"), 255)
    np.testing.assert_array_equal(only(stuff), expected)
    maps = tmp_path / "annotations/stuff_val2017_pixelmaps/000000000139.png"
    save_png(maps, grid(183, 92, 182, 0), palette=True)
    np.testing.assert_array_equal(only(open_labelled("coco-stuff-15", root=tmp_path)), expected)
    save_png(maps, grid(1), palette=True)
    with pytest.raises(UserError, match="class id 1 is not in the table of 15 classes"):
        only(open_labelled("coco-stuff-15", root=tmp_path))


def test_panoptic_says_what_it_moves(tmp_path: Path) -> None:
    """Without it a score on panoptic labels would be put beside one on COCO-Stuff."""
    panoptic(tmp_path, [{"id": 7, "category_id": 1}], np.stack(3 * [grid(0)], axis=-1))
    (note,) = open_labelled("coco-panoptic", root=tmp_path).notes()
    assert "move 4 categories of COCO-Stuff (fog to sky, floor-stone to ground" in note
    assert "make 12 void (furniture-other, metal" in note
    assert not open_labelled("coco-things-12", root=tmp_path).notes()
    group_of = {name: group for group, names in STUFF.items() for name in names.split(", ")}
    assert set(PANOPTIC_DROPS) < group_of.keys()
    assert all(group_of[name] != group for name, group in PANOPTIC_MOVES.items())


# ---- driving scenes and VOC -----------------------------------------------------------------


def test_camvid(tmp_path: Path) -> None:
    """11 classes in SegNet's order; id 11 is void."""
    photograph(tmp_path / "val/0016E5_07959.png")
    save_png(tmp_path / "valannot/0016E5_07959.png", grid(0, 10, 11))
    data = open_labelled("camvid", root=tmp_path)
    assert data.names is not None
    assert (data.names[0], data.names[10], data.num_classes) == ("sky", "bicyclist", 11)
    np.testing.assert_array_equal(only(data), grid(0, 10, 255))


def test_cityscapes(tmp_path: Path) -> None:
    """The benchmark's 19 classes. Other ids are void, those of licence plates too."""
    photograph(tmp_path / "leftImg8bit/val/ulm/ulm_000000_000019_leftImg8bit.png")
    labels = tmp_path / "gtFine/val/ulm/ulm_000000_000019_gtFine_labelIds.png"
    save_png(labels, grid(7, 33, 0, 9, 26, 255))
    data = open_labelled("cityscapes", root=tmp_path)
    assert data.names is not None
    assert [data.names[c] for c in (0, 18, 13)] == ["road", "bicycle", "car"]
    np.testing.assert_array_equal(only(data), grid(0, 18, 255, 255, 13, 255))
    save_png(labels, grid(34))
    with pytest.raises(UserError, match="class id 34"):
        only(data)


def test_cityscapes_27(tmp_path: Path) -> None:
    """The 27 classes of unsupervised methods: ids 7 to 33, parking and caravans among them."""
    photograph(tmp_path / "leftImg8bit/val/ulm/ulm_000000_000019_leftImg8bit.png")
    labels = tmp_path / "gtFine/val/ulm/ulm_000000_000019_gtFine_labelIds.png"
    save_png(labels, grid(7, 33, 0, 9, 29, 255))
    data = open_labelled("cityscapes-27", root=tmp_path)
    assert data.num_classes == 27
    assert [data.class_names[c] for c in (2, 22)] == ["parking", "caravan"]
    np.testing.assert_array_equal(only(data), grid(0, 26, 255, 2, 22, 255))


def test_ade20k_in_both_countings(tmp_path: Path) -> None:
    """With 151 classes "other" is one, but its pixels are not scored: open-hummingbird-eval's mean
    is over one class more.
    """
    photograph(tmp_path / "images/validation/a.jpg")
    save_png(tmp_path / "annotations/validation/a.png", grid(0, 1, 150))
    np.testing.assert_array_equal(only(open_labelled("ade20k", root=tmp_path)), grid(255, 0, 149))
    data = open_labelled("ade20k-151", root=tmp_path)
    assert (data.num_classes, data.class_names[0], data.class_names[150]) == (
        151, "other", "class 150",
    )  # fmt: skip
    np.testing.assert_array_equal(only(data), grid(255, 1, 150))


def test_pascal_context_with_and_without_background(tmp_path: Path) -> None:
    """Papers score 59 classes, or 60 with background."""
    root = tmp_path / "VOCdevkit/VOC2010"
    photograph(root / "JPEGImages/2008_000002.jpg")
    save_png(root / "SegmentationClassContext/2008_000002.png", grid(0, 1, 59))
    (root / "ImageSets/SegmentationContext").mkdir(parents=True)
    (root / "ImageSets/SegmentationContext/val.txt").write_text("2008_000002\n")
    data = open_labelled("pascal-context", root=tmp_path)
    assert (data.num_classes, data.class_names[0], data.class_names[58]) == (
        59, "aeroplane", "wood",
    )  # fmt: skip
    np.testing.assert_array_equal(only(data), grid(255, 0, 58))
    with_background = open_labelled("pascal-context-60", root=tmp_path)
    assert with_background.class_names[:2] == ["background", "aeroplane"]
    np.testing.assert_array_equal(only(with_background), grid(0, 1, 59))


def test_voc(tmp_path: Path) -> None:
    """Label maps are palette PNGs. A list names the images of a split. Unlisted images need no
    labels.
    """
    root = tmp_path / "VOCdevkit/VOC2012"
    for name in ("2007_000033", "2007_000042", "2007_000061"):
        photograph(root / f"JPEGImages/{name}.jpg")
    for name in ("2007_000033", "2007_000042"):
        save_png(root / f"SegmentationClass/{name}.png", grid(0, 20, 255), palette=True)
    lists = root / "ImageSets/Segmentation"
    lists.mkdir(parents=True)
    (lists / "val.txt").write_text("2007_000042\n")
    data = open_labelled("voc", root=tmp_path)
    assert data.paths[0].name == "2007_000042.jpg"
    assert data.names is not None
    assert (data.names[20], data.num_classes) == ("tvmonitor", 21)
    np.testing.assert_array_equal(only(data), grid(0, 20, 255))
    folders = {"images": root / "JPEGImages", "labels": root / "SegmentationClass"}
    assert len(open_labelled("voc", **folders)) == 2
    (lists / "val.txt").write_text("2007_000042\n2007_000061\n")
    with pytest.raises(UserError, match="no label map for 1 of 2 images"):
        open_labelled("voc", root=tmp_path)


# ---- lists, folders, refused input ----------------------------------------------------------


def test_list_chooses_and_orders(tmp_path: Path) -> None:
    """PiCIE's curated list has COCO's zero-padded ids; other lists have names or plain ids."""
    for name in ("000000000139", "000000000285", "b/scene"):
        photograph(tmp_path / f"images/{name}.jpg")
        save_png(tmp_path / f"labels/{name}.png", grid(0))
    folders = {"images": tmp_path / "images", "labels": tmp_path / "labels"}
    listed = tmp_path / "list.txt"
    listed.write_text("285\n\nb/scene.jpg\n000000000139\n")
    names = [path.stem for path in open_labelled("folder", **folders, listed=listed).paths]
    assert names == ["000000000285", "scene", "000000000139"]
    listed.write_text("b/scene.jpg\n139\nscene\n")
    with pytest.raises(UserError, match=r"names scene\.jpg twice"):
        open_labelled("folder", **folders, listed=listed)
    listed.write_text("139\n140\n")
    with pytest.raises(UserError, match=r"1 of 2 images are not in .*images \(the first: 140\)"):
        open_labelled("folder", **folders, listed=listed)
    photograph(tmp_path / "images/a/scene.jpg")
    save_png(tmp_path / "labels/a/scene.png", grid(0))
    listed.write_text("scene\n")
    with pytest.raises(UserError, match="several images called scene"):
        open_labelled("folder", **folders, listed=listed)
    listed.write_text("\n")
    with pytest.raises(UserError, match="names no image"):
        open_labelled("folder", **folders, listed=listed)
    with pytest.raises(UserError, match="No such file"):
        open_labelled("folder", **folders, listed=tmp_path / "nowhere")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be", "latin-1"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_lists_in_the_encodings_of_windows(encoding: str, end: str, tmp_path: Path) -> None:
    """Without it the first name of a list from an editor, or all from PowerShell, are unknown."""
    for name in ("a", "b", "c"):
        photograph(tmp_path / f"images/{name}.png")
        save_png(tmp_path / f"labels/{name}.png", grid(0, 1))
    listed, classes = tmp_path / "list.txt", tmp_path / "names.json"
    mark = "\ufeff" if encoding == "utf-16-be" else ""
    listed.write_bytes(f"{mark}c{end}a{end}".encode(encoding))
    classes.write_bytes(f'{mark}["dark", "bright"]{end}'.encode(encoding))
    folders = {"images": tmp_path / "images", "labels": tmp_path / "labels"}
    data = open_labelled("folder", **folders, listed=listed, classes=classes)
    assert [path.stem for path in data.paths] == ["c", "a"]
    assert data.names == ["dark", "bright"]


def test_a_list_that_is_no_text_is_refused(tmp_path: Path) -> None:
    """Without it the message shows bytes, or hides the reason behind a missing image."""
    photograph(tmp_path / "images/a.png")
    save_png(tmp_path / "labels/a.png", grid(0))
    folders = {"images": tmp_path / "images", "labels": tmp_path / "labels"}
    listed = tmp_path / "list.txt"
    for content, message in (
        ("a\n".encode("utf-16-le"), "line 1: a NUL byte; save it as UTF-8 text"),
        (b"\xff\xfea", "damaged UTF-16 text"),
    ):
        listed.write_bytes(content)
        with pytest.raises(UserError, match=rf"list\.txt: {message}"):
            open_labelled("folder", **folders, listed=listed)


def test_a_list_names_files_that_are_not_utf8(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without it images with such names can be scored, but not chosen."""
    name = b"gr\xfcn".decode(errors="surrogateescape")
    for other in (name, "b"):
        photograph(tmp_path / f"images/{other}.png")
        save_png(tmp_path / f"labels/{other}.png", grid(0))
    (tmp_path / "list.txt").write_bytes(b"gr\xfcn.png\n")
    folders = {"images": tmp_path / "images", "labels": tmp_path / "labels"}
    data = open_labelled("folder", **folders, listed=tmp_path / "list.txt")
    assert [path.stem for path in data.paths] == [name]
    said = capsys.readouterr().err.splitlines()
    assert said[-1] == f"taken: 1 of them, listed in {tmp_path / 'list.txt'}"


def test_images_without_the_ending_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without it images of other names are left out of the score without a word."""
    photograph(tmp_path / "leftImg8bit/val/a/a_leftImg8bit.png")
    photograph(tmp_path / "leftImg8bit/val/a/b.png")
    save_png(tmp_path / "gtFine/val/a/a_gtFine_labelIds.png", grid(7))
    assert len(open_labelled("cityscapes", root=tmp_path)) == 1
    said = capsys.readouterr().err
    assert said.endswith("val; left aside: 1 images not called *_leftImg8bit\n")


def test_names_of_layouts() -> None:
    """Without it a layout could be read that no option can name."""
    assert tuple(LAYOUTS) == KINDS


@pytest.mark.parametrize("kind", KINDS)
def test_wrong_layout_says_what_was_expected(kind: str, tmp_path: Path) -> None:
    """An error of one line if the folder is missing, or contains other data."""
    with pytest.raises(UserError, match=f"--dataset {kind} needs --images"):
        open_labelled(kind)
    if kind == "folder":
        return
    with pytest.raises(UserError, match="no such folder"):
        open_labelled(kind, root=tmp_path / "nowhere")
    (tmp_path / "holiday").mkdir()
    with pytest.raises(UserError, match=r"expected .+, found holiday$"):
        open_labelled(kind, root=tmp_path)
    with pytest.raises(UserError, match="are for --dataset folder"):
        open_labelled(kind, root=tmp_path, void=[0])


def test_one_label_map_for_two_images_is_refused(tmp_path: Path) -> None:
    """Without it the label map would count twice, once for an image that may differ."""
    for name in ("a.jpg", "a.png", "b.png"):
        photograph(tmp_path / "images" / name)
    for name in ("a.png", "b.png"):
        save_png(tmp_path / "labels" / name, grid(0))
    with pytest.raises(UserError, match=r"a\.png would belong to both a\.jpg and a\.png"):
        open_labelled(images=tmp_path / "images", labels=tmp_path / "labels")


def test_images_of_another_data_set_are_refused(tmp_path: Path) -> None:
    """Cityscapes pairs images and label maps by name; other names cannot be paired."""
    photograph(tmp_path / "leftImg8bit/val/ulm/one.png")
    (tmp_path / "gtFine/val").mkdir(parents=True)
    with pytest.raises(UserError, match=r"expected images called \*_leftImg8bit, found one\.png"):
        open_labelled("cityscapes", root=tmp_path)
