"""The table puts the user's results beside the published ones, and only comparable ones."""

import json
import math
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import UserError
from tests import ROOT
from tests.helpers.exported import call
from train.run.settings import to_dict
from transfer import command
from transfer.detection.config import DetectionConfig
from transfer.published import PUBLISHED, read
from transfer.segmentation.config import SegmentationConfig
from transfer.table import CONFIGS, main

COCO = {"method": "SlotCon (arXiv 2205.15288)", "run": "coco_r50", "epochs": "800",
        "data": "coco.beton", "data_images": "118287", "data_fingerprint": "1f", "step": "184800",
        "batch_size": "512", "branch": "teacher", "config": '{"train": {"seed": 0}}'}  # fmt: skip
IMAGES = {"coco": (117_266, 5_000), "cityscapes": (2_975, 500), "voc-aug": (10_582, 1_449),
          "ade20k": (20_210, 2_000), "camvid": (367, 101)}  # fmt: skip
"""Numbers of training images and of scored images."""
FILE = ROOT / "transfer" / "published.yaml"
settings_of = cache(command.settings_of)  # building a parser is slow


def result(
    folder: Path,
    recipe: str = "cityscapes",
    *argv: str,
    value: float = 0.7,
    metadata: dict[str, str] | None = None,
    kind: str = "file",
    **changes: Any,
) -> Path:
    """The folder of a run of configs/transfer/RECIPE with a result.json like the trainer's."""
    detection = recipe.startswith("coco")
    settings: Any = settings_of(DetectionConfig if detection else SegmentationConfig)
    file = str(CONFIGS / f"{recipe}.yaml")
    config, _ = settings.load(["--config", file, "--data.root", "/data", *argv])
    dataset = "coco" if detection else config.data.dataset
    metrics = ("box_ap", "box_ap50", "mask_ap") if detection else ("miou", "pixel_accuracy")
    rows = [{"metric": metric, "value": value} for metric in metrics]
    trained, scored = IMAGES[dataset]
    content = {
        "hardware": {},
        "name": config.name,
        "task": "detection" if detection else "segmentation",
        "dataset": dataset,
        "images": trained,
        "scored": {"dataset": dataset, "images": scored, "fingerprint": "3c"},
        "schedule": {"steps": config.optim.steps, "batch_size": config.optim.batch_size},
        "init": {
            "weights": "runs/coco_r50", "kind": kind, "arch": config.init.arch,
            "branch": "teacher", "frozen": config.init.frozen, "metadata": metadata or {},
        },
        "step": config.optim.steps,
        "results": [*rows, {"metric": "iou", "class": "road", "value": 0.9}],
        "config": to_dict(config),
    }  # fmt: skip
    folder.mkdir()
    (folder / "result.json").write_text(json.dumps(content | changes))
    return folder


def made(tmp_path: Path, *runs: Path) -> dict[str, Any]:
    """The table of these runs as JSON."""
    call(main, *runs, "--json", tmp_path / "table.json")
    return dict(json.loads((tmp_path / "table.json").read_text()))


def users_rows(content: dict[str, Any]) -> dict[int, list[dict[str, Any]]]:
    """The user's rows, by table number."""
    tables = {t["number"]: [row for row in t["rows"] if row["own"]] for t in content["tables"]}
    return {number: rows for number, rows in tables.items() if rows}


PAPER = {
    2: """
        - 32.8 50.9 35.3 29.9 47.9 32.0 65.3 39.5 29.4
        800 38.5 58.1 42.1 34.8 55.3 37.3 73.8 69.2 36.2
        800 40.1 60.2 43.6 36.3 57.3 38.9 75.3 70.6 37.0
        800 39.3 60.1 42.8 - - - - - -
        800 39.6 59.3 43.3 35.7 56.5 38.4 75.8 71.6 37.1
        800 40.5 60.5 44.0 36.6 57.8 39.0 75.2 72.0 38.3
        1000 39.8 59.5 43.5 35.9 56.4 38.7 76.1 70.2 38.1
        800 40.3 60.2 44.4 36.3 57.3 38.9 75.6 70.9 36.7
        800 41.0 61.1 45.0 37.0 58.3 39.8 76.2 71.6 39.0
    """,
    3: """
        800 41.0 61.1 45.0 37.0 58.3 39.8 76.2 71.6 39.0
        100 41.4 61.6 45.6 37.2 58.5 39.9 75.4 73.1 38.6
        200 41.8 62.2 45.7 37.8 59.1 40.7 76.3 75.0 38.8
        800 40.6 60.8 44.5 36.7 57.9 39.3 - - -
        800 41.8 62.2 45.8 37.8 59.4 40.6 76.5 73.9 39.2
    """,
    4: """
        - 32.8 50.9 35.3 29.9 47.9 32.0 65.3 39.5 29.4
        100 39.7 59.5 43.3 35.9 56.6 38.6 74.6 74.4 37.9
        800 40.4 60.1 44.2 36.5 57.2 39.2 76.2 73.7 36.9
        200 40.1 61.0 43.9 36.4 58.0 38.9 76.0 72.6 37.8
        200 40.9 60.9 44.7 36.8 57.8 39.4 75.4 72.9 37.3
        200 40.3 59.9 44.3 36.4 57.0 39.2 76.2 72.8 38.1
        100 40.7 60.5 44.8 36.8 57.4 39.7 76.8 73.9 38.2
        200 40.6 - - 36.4 - - 75.5 72.6 -
        100 41.6 61.9 45.6 37.4 58.8 40.2 76.5 71.9 37.8
        100 41.4 61.6 45.6 37.2 58.5 39.9 75.4 73.1 38.6
        200 41.8 62.2 45.7 37.8 59.1 40.7 76.3 75.0 38.8
    """,
    7: """
        - 65.3
        - 73.8
        - 76.2
        - 73.9
    """,
}
"""Epochs and figures of each row, extracted from the paper's text by a program."""


def test_published_figures_are_the_papers() -> None:
    """A wrong digit would be quoted."""
    assert [table.number for table in PUBLISHED.tables] == [*PAPER]
    for table in PUBLISHED.tables:
        rows = [
            " ".join("-" if value is None else str(value) for value in (row.epochs, *row.figures))
            for row in table.rows
        ]
        assert rows == [line.strip() for line in PAPER[table.number].strip().splitlines()]
        assert all(row.data in table.data for row in table.rows)


@pytest.mark.parametrize(
    ("old", "new"),
    [("32.8, 50.9", "32.8"), ("Self-EMD,      COCO", "Self-EMD, COCO+"), ("1000", "many"),
     ("data: [COCO,", "data: [COCO2,"), ("[City.]", "[Town]"), ("scored: 5000", "photos: 5000")],
)  # fmt: skip
def test_a_slip_in_the_published_rows_is_refused(old: str, new: str, tmp_path: Path) -> None:
    """Without it, figures would move to another column."""
    text = FILE.read_text()
    assert old in text
    (tmp_path / "published.yaml").write_text(text.replace(old, new))
    with pytest.raises(ValueError):
        read(tmp_path / "published.yaml")


def test_runs_of_one_backbone_make_a_row(tmp_path: Path) -> None:
    """Each result is in its column; seeds are averaged."""
    runs = [
        result(tmp_path / "a", "coco_1x", value=0.411, metadata=COCO),
        result(tmp_path / "b", "cityscapes", value=0.75, metadata=COCO),
        result(tmp_path / "c", "cityscapes", "--optim.seed", "1", value=0.77, metadata=COCO),
        result(tmp_path / "d", "voc", "--log.dir", "elsewhere", value=0.72, metadata=COCO),
        result(tmp_path / "e", "ade20k", value=0.38, metadata=COCO),
    ]
    rows = users_rows(made(tmp_path, *runs))
    assert rows.keys() == {2, 3, 7}
    assert len(rows[2]) == 1
    row = rows[2][0]
    assert (row["method"], row["data"], row["epochs"]) == ("* SlotCon: coco_r50", "COCO", "800")
    figures = dict(zip(PUBLISHED.columns, row["figures"], strict=True))
    assert figures == {
        "AP^b": "41.1", "AP^b_50": "41.1", "AP^b_75": "", "AP^m": "41.1", "AP^m_50": "",
        "AP^m_75": "", "City.": "76.0 ± 1.4", "VOC": "72.0", "ADE": "38.0",
    }  # fmt: skip
    assert rows[7][0]["figures"] == ["76.0 ± 1.4"]


@pytest.mark.parametrize(
    ("one", "other", "says"),
    [
        ({"step": "92400"}, {}, [("", "400 of 800"), ("", "800")]),
        ({"step": "184600"}, {}, [("", "799 of 800"), ("", "800")]),
        ({"branch": "student"}, {}, [(", student", "800"), ("", "800")]),
        (
            {"step": "50000", "data_images": "0"},
            {"data_images": "0"},
            [(", step 50000", "? of 800"), (", step 184800", "? of 800")],
        ),
        (
            {"data_fingerprint": "2e"},
            {},
            [(", data_fingerprint 2e", "800"), (", data_fingerprint 1f", "800")],
        ),
        (
            {"config": '{"train": {"seed": 1}}'},
            {},
            [(", train.seed 1", "800"), (", train.seed 0", "800")],
        ),
    ],
)
def test_different_backbones_are_not_averaged(
    one: dict[str, str], other: dict[str, str], says: list[tuple[str, str]], tmp_path: Path
) -> None:
    """They may share a name: the row must say which one it is and how far its training came."""
    runs = [
        result(tmp_path / "a", value=0.5, metadata=COCO | one),
        result(tmp_path / "b", "cityscapes", "--optim.seed", "1", metadata=COCO | other),
    ]
    rows = users_rows(made(tmp_path, *runs))[7]
    assert [(row["method"], row["epochs"]) for row in rows] == [
        (f"* SlotCon: coco_r50{name}", epochs) for name, epochs in says
    ]
    assert [row["figures"] for row in rows] == [["50.0"], ["70.0"]]


def test_the_branch_comes_from_init_if_the_file_does_not_name_it(tmp_path: Path) -> None:
    """A file may hold two encoders and no metadata about them."""
    metadata = {key: value for key, value in COCO.items() if key != "branch"}
    init = {"weights": "full.pth", "kind": "file", "branch": "student", "metadata": metadata}
    runs = [
        result(tmp_path / "a", value=0.5, init=init),
        result(tmp_path / "b", value=0.7, init=init | {"branch": "teacher"}),
    ]
    rows = users_rows(made(tmp_path, *runs))[7]
    assert [row["method"].endswith("student") for row in rows] == [True, False]


def test_files_with_little_metadata_are_distinguished_by_their_path(tmp_path: Path) -> None:
    """Two files may have the same name and metadata. The whole path is shown: the beginnings of
    long paths may be the same.
    """
    said = {"data": "COCO", "epochs": "800", "imported": "w.pth"}
    init = {"kind": "file", "branch": "teacher", "metadata": said}
    files = [f"/data/weights/{name}/w.safetensors" for name in "ab"]
    runs = [
        result(tmp_path / str(n), init=init | {"weights": file}) for n, file in enumerate(files)
    ]
    rows = users_rows(made(tmp_path, *runs))[2]
    assert [(row["method"], row["data"], row["epochs"]) for row in rows] == [
        (f"* weights: w.safetensors, weights {file}", "COCO", "800") for file in files
    ]


@pytest.mark.parametrize(
    "said", [{"config": "model = dict(type='MoCo')"}, {"config": "[1]"}, {"data_images": 118_287}]
)
def test_unusual_metadata(said: dict[str, Any], tmp_path: Path) -> None:
    """Files of mmcv hold Python text under "config". Without it, one such run would stop the table
    of all others.
    """
    metadata = {"data": "COCO", "epochs": 200} | said
    run = result(tmp_path / "run", metadata=metadata)
    rows = users_rows(made(tmp_path, run))
    assert [(row["data"], row["epochs"]) for row in rows[2]] == [("COCO", "200")]


def test_the_same_weights_in_several_files_are_one_backbone(tmp_path: Path) -> None:
    """A run and its export."""
    exported = COCO | {"format": "pt", "data_license": "CC", "slotstream": "9"}
    runs = [
        result(tmp_path / "a", value=0.75, metadata=COCO),
        result(tmp_path / "b", "cityscapes", "--optim.seed", "1", value=0.77, metadata=exported),
    ]
    assert users_rows(made(tmp_path, *runs))[7][0]["figures"] == ["76.0 ± 1.4"]


def test_a_deviation_is_over_seeds(tmp_path: Path) -> None:
    """A run that is given twice counts once. Two runs of one seed are refused."""
    run = result(tmp_path / "a", metadata=COCO)
    (tmp_path / "link").symlink_to(run)
    rows = users_rows(made(tmp_path, run, run / "result.json", tmp_path / "link"))
    assert rows[7][0]["figures"] == ["70.0"]
    again = result(tmp_path / "b", metadata=COCO)
    with pytest.raises(UserError, match=r"b/result.json: .*optim.seed as .*a/result.json"):
        call(main, run, again)
    others = {"dataset": "cityscapes", "images": 500, "fingerprint": "4d"}
    elsewhere = result(
        tmp_path / "e", "cityscapes", "--optim.seed", "1", metadata=COCO, scored=others
    )
    with pytest.raises(UserError, match=r"e/result.json: scored on other images than .*a/result"):
        call(main, run, elsewhere)
    aside = [result(tmp_path / name, "camvid", metadata=COCO) for name in "cd"]
    call(main, *aside)  # each has a separate row


@pytest.mark.parametrize("other", [("cityscapes_linear", 10_000), ("cityscapes", 500)])
def test_runs_outside_the_tables_are_not_averaged(other: tuple[str, int], tmp_path: Path) -> None:
    """A linear head, or a run that stopped early, is in the separate table. So it is no second
    sample, in any order of the arguments.
    """
    recipe, step = other
    aside = result(tmp_path / "aside", recipe, value=0.5, step=step, metadata=COCO)
    run = result(tmp_path / "run", value=0.76, metadata=COCO)
    for runs in ((aside, run), (run, aside)):
        assert users_rows(made(tmp_path, *runs))[7][0]["figures"] == ["76.0"]


def test_a_run_without_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without it, a run that still trains would stop the table of all others."""
    training = tmp_path / "training"
    training.mkdir()
    (training / "config.yaml").write_text("name: training\n")
    run = result(tmp_path / "run", metadata=COCO)
    content = made(tmp_path, training, run)
    assert users_rows(content)[7][0]["figures"] == ["70.0"]
    assert content["runs"][0]["in_tables"] is False
    line = next(n for n in capsys.readouterr().out.splitlines() if n.startswith("training"))
    assert line.endswith("  has no result.json")


@pytest.mark.parametrize("option", ["--json", "--markdown"])
def test_a_result_is_not_overwritten(option: str, tmp_path: Path) -> None:
    """A result holds weeks of work, and the table must not replace it. Nor may the table take the
    place of a result that a run has not written yet.
    """
    run = result(tmp_path / "run", metadata=COCO)
    before = (run / "result.json").read_bytes()
    (tmp_path / "link").symlink_to(run)
    with pytest.raises(UserError, match=f"{option} .*: is a result to read"):
        call(main, run, option, tmp_path / "link" / "result.json")
    assert (run / "result.json").read_bytes() == before
    (run / "config.yaml").touch()
    (run / "result.json").unlink()
    with pytest.raises(UserError, match=f"{option} .*: is a result to read"):
        call(main, run, option, run / "result.json")


def test_random_and_supervised_have_their_tables(tmp_path: Path) -> None:
    """The user's baselines appear beside the published ones."""
    random = result(tmp_path / "r", "ade20k", kind="random")
    supervised = result(tmp_path / "s", "ade20k", kind="supervised")
    rows = users_rows(made(tmp_path, random, supervised))
    assert [row["method"] for row in rows[2]] == ["* random init."]
    assert [row["method"] for row in rows[4]] == ["* random init.", "* supervised (torchvision)"]
    assert rows.keys() == {2, 4}  # no ADE column in table 7


@pytest.mark.parametrize(
    ("recipe", "argv", "changes", "says"),
    [
        ("cityscapes", ["--optim.steps", "82000"], {}, "optim.steps 82000, not 90000"),
        ("cityscapes", ["--optim.lr", "0.02"], {}, "optim.lr 0.02, not 0.01"),
        ("cityscapes", ["--init.frozen", "5"], {}, "init.frozen 5, not 0"),
        ("cityscapes", ["--init.arch", "resnet18"], {}, "init.arch resnet18, not resnet50"),
        ("cityscapes_linear", [], {}, "init.frozen 5, not 0"),
        ("cityscapes", ["--augment.flip", "0"], {}, "augment.flip 0.0, not 0.5"),
        ("cityscapes", ["--inference.stride", "769"], {}, "inference.stride 769, not 513"),
        ("cityscapes", ["--model.convs", "1"], {}, "model.convs 1, not 2"),
        ("cityscapes", ["--data.val_split", "test"], {}, "data.val_split test, not val"),
        ("coco_1x", ["--data.val_side", "600"], {}, "data.val_side 600, not 800"),
        ("cityscapes", [], {"images": 2_900}, "2,900 training images, not 2,975"),
        (
            "voc",
            [],
            {"scored": {"images": 1_400, "fingerprint": "5e"}},
            "scored on 1,400 images, not 1,449",
        ),
        ("cityscapes", [], {"step": 500}, "ended at step 500 of 90,000"),
        ("coco_2x", [], {}, "optim.steps 180000, not 90000"),
        ("camvid", [], {}, "the paper has no camvid"),
    ],
)
def test_other_recipes_stay_apart(
    recipe: str,
    argv: list[str],
    changes: dict[str, Any],
    says: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A figure of another schedule in the paper's column would look like a gain or a loss."""
    run = result(tmp_path / "run", recipe, *argv, metadata=COCO, **changes)
    content = made(tmp_path, run)
    assert not users_rows(content)
    printed = capsys.readouterr().out
    assert "not comparable with the above" in printed
    assert says in printed
    assert content["runs"][0]["in_tables"] is False


def test_a_few_files_may_be_missing(tmp_path: Path) -> None:
    """Some files of the sets are no longer available."""
    run = result(
        tmp_path / "run", metadata=COCO, images=2_930, scored={"images": 495, "fingerprint": "5e"}
    )
    assert users_rows(made(tmp_path, run))[7][0]["figures"] == ["70.0"]


@pytest.mark.parametrize(
    ("data", "images", "tables"),
    [
        ("coco.beton", "118287", {2, 3, 7}),
        ("cocoplus.beton", "241690", {3}),
        ("COCO+", "241690", {3}),
        ("imagenet.beton", "1281167", {3, 4}),
        ("ImageNet-1K", "", {3, 4}),
        ("bdd100k.beton", "70000", {7}),
        ("bdd100k.beton", "90000", {7}),
    ],
)
def test_pretraining_has_its_tables(
    data: str, images: str, tables: set[int], tmp_path: Path
) -> None:
    """Whole sets are recognised by their usual names; the number of images is optional."""
    run = result(tmp_path / "run", metadata=COCO | {"data": data, "data_images": images})
    assert users_rows(made(tmp_path, run)).keys() == tables


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        (COCO | {"data": "camvid.beton", "data_images": "160"}, "pre-trained on camvid.beton"),
        (COCO | {"data_images": "100"}, "pre-trained on coco.beton"),
        (COCO | {"data_images": "115000"}, "pre-trained on coco.beton"),
        (COCO | {"data": "cocoplus.beton"}, "pre-trained on cocoplus.beton"),
        (COCO | {"data": "bdd100k.beton", "data_images": "5"}, "pre-trained on bdd100k.beton"),
        ({"imported": "backbone.pth"}, "pre-trained on not stated"),
    ],
)
def test_other_pretraining_stays_apart(
    metadata: dict[str, str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A hundred images called coco are not COCO."""
    assert not users_rows(made(tmp_path, result(tmp_path / "run", metadata=metadata)))
    assert says in capsys.readouterr().out


def test_layouts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Aligned text on the terminal, cells in Markdown."""
    run = result(tmp_path / "run", metadata=COCO | {"run": "a|b"})
    call(main, run / "result.json", "--markdown", tmp_path / "table.md")
    page = (tmp_path / "table.md").read_text()
    assert "| &#42; SlotCon: a&#124;b | COCO | 800 |" in page
    lines = [line for line in page.splitlines() if line.startswith("|")]
    assert all(line.count("|") in (13, 5) for line in lines)
    printed = capsys.readouterr().out.splitlines()
    head = next(line for line in printed if line.startswith("Method"))
    row = next(line for line in printed if line.startswith("* SlotCon"))
    assert row[head.index("City.") :].startswith("70.0")


def test_bad_input(tmp_path: Path) -> None:
    """An error is one line, and no file is written."""
    for path, message in (
        (tmp_path / "nowhere", "No such file"),
        (tmp_path, "No such file"),
    ):
        with pytest.raises(UserError, match=message):
            call(main, path)
    (tmp_path / "result.json").write_text("{}")
    with pytest.raises(UserError, match=r"result.json: not the result of a transfer"):
        call(main, tmp_path, "--json", tmp_path / "table.json")
    assert not (tmp_path / "table.json").exists()
    with pytest.raises(UserError, match="is a folder"):
        call(main, "--json", tmp_path)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"dataset": ["coco"]}, "dataset: expected str, got array"),
        ({"dataset": 5}, "dataset is 5: expected str, got int"),
        ({"results": [{"metric": "miou", "value": math.nan}]}, "results[0].value is NaN: expected"),
        ({"results": [{"metric": "miou", "value": -1}]}, "results[0].value is -1: expected f"),
        ({"results": [{"metric": "miou", "value": 1.5}]}, "results[0].value is 1.5: expected f"),
        ({"results": [{"metric": "miou"}]}, "results[0]: object missing required field value"),
        ({"results": {}}, "results: expected array, got object"),
        ({"step": 10**400}, "step is an integer of 1329 bits: expected int <= 1000000000000000"),
        ({"images": math.inf}, "images is Infinity: expected int, got float"),
        ({"images": "many"}, 'images is "many": expected int, got str'),
        ({"scored": None}, "scored is null: expected object, got null"),
        ({"schedule": {}}, "schedule: object missing required field steps"),
        ({"config": {"optim": {"seed": [1]}}}, "config.optim.seed is [1]: expected int"),
        ({"config": {"a": {"b": {"c": {"d": 1}}}}}, "config[...][...][...]: expected "),
        ({"init": {"kind": "file", "metadata": {"a": [1]}}}, "init.metadata[...]: expected "),
    ],
)
def test_bad_results(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    """An error is one line, not a row."""
    run = result(tmp_path / "run", metadata=COCO, **changes)
    with pytest.raises(UserError, match=re.escape(f"result.json: {says}")) as caught:
        call(main, run)
    assert str(caught.value).isprintable()


def test_odd_metadata_have_a_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without it numbers of thousands of digits, or half a surrogate pair, end in a traceback."""
    odd = {"epochs": "8" * 5000, "step": "9" * 5000, "data_images": "²", "method": "x" * 9999}
    odd |= {"config": '{"a": "\\ud800", "b": ' + "[" * 9999, "run": "\x1b[2J"}
    call(main, result(tmp_path / "run", metadata=COCO | odd))
    printed = capsys.readouterr().out
    assert all(line.isprintable() for line in printed.splitlines())
    assert max(map(len, printed.splitlines())) < 2000


def escaped(text: str) -> str:
    """All but letters and parentheses as character references, which any Markdown knows."""
    return "".join(one if one.isalnum() or one in " =;()" else f"&#{ord(one)};" for one in text)


def test_markdown_has_no_markup_of_a_file(tmp_path: Path) -> None:
    """Without it a table from elsewhere brings HTML and links into a page on GitHub."""
    names = {"run": "<img src=x>&amp;|`a`[b](c)\\", "data": "d|\n| e"}
    run = result(tmp_path / "run", metadata=COCO | names, name="![x](y)<b>", dataset="own")
    call(main, run, "--markdown", tmp_path / "table.md")
    page = (tmp_path / "table.md").read_text()
    assert f"{escaped(names['run'])} |" in page
    assert escaped("![x](y)<b>") in page
    assert "<" not in page
    assert all(line.startswith(("|", "**")) or not line for line in page.splitlines())


def test_a_name_keeps_its_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also if it holds a line break."""
    names = {"name": "a\nb", "dataset": "own"}
    call(main, result(tmp_path / "run", metadata=COCO | {"run": "c\nd"}, **names))
    assert r"'a\nb'  'SlotCon: c\nd'  own" in capsys.readouterr().out
