"""The user's transfer results beside the published ones, and never where they do not belong."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import UserError
from tests.exported import call
from train.settings import to_dict
from transfer.command import settings_of
from transfer.detection.config import DetectionConfig
from transfer.published import COLUMNS, RECIPES, TABLES
from transfer.segmentation.config import SegmentationConfig
from transfer.table import CONFIGS, main

ROOT = Path(__file__).parents[1]
COCO = {"method": "SlotCon (arXiv 2205.15288)", "run": "coco_r50", "epochs": "800",
        "data": "coco.beton", "data_images": "118287", "branch": "teacher"}  # fmt: skip


def result(
    folder: Path,
    recipe: str = "cityscapes",
    *argv: str,
    value: float = 0.7,
    metadata: dict[str, str] | None = None,
    kind: str = "file",
    **changes: Any,
) -> Path:
    """The folder of a run of configs/transfer/RECIPE with a result.json as trainers write it."""
    detection = recipe.startswith("coco")
    settings: Any = settings_of(DetectionConfig if detection else SegmentationConfig)
    file = str(CONFIGS / f"{recipe}.yaml")
    config, _ = settings.load(["--config", file, "--data.root", "/data", *argv])
    dataset = "coco" if detection else config.data.dataset
    metrics = ("box_ap", "box_ap50", "mask_ap") if detection else ("miou", "pixel_accuracy")
    rows = [{"metric": metric, "value": value} for metric in metrics]
    content = {
        "hardware": {},
        "name": config.name,
        "task": "detection" if detection else "segmentation",
        "dataset": dataset,
        "images": next((r.images for r in RECIPES if r.dataset == dataset), 367),
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
    """The JSON file of these runs."""
    call(main, *runs, "--json", tmp_path / "table.json")
    return dict(json.loads((tmp_path / "table.json").read_text()))


def own(content: dict[str, Any]) -> dict[int, list[dict[str, Any]]]:
    """The user's rows by table."""
    tables = {t["number"]: [row for row in t["rows"] if row["own"]] for t in content["tables"]}
    return {number: rows for number, rows in tables.items() if rows}


def test_published_figures_are_plausible() -> None:
    """A figure read from the wrong column breaks the order of its row's average precisions."""
    assert [table.number for table in TABLES] == [2, 3, 4, 7]
    for table in TABLES:
        for row in table.rows:
            assert len(row.figures) == len(table.columns)
            assert row.data in table.data
            if len(row.figures) == len(COLUMNS) and None not in row.figures[:3]:
                for ap, ap50, ap75 in (row.figures[:3], row.figures[3:6]):
                    assert ap is None or ap < ap75 < ap50  # type: ignore[operator]
                assert row.figures[3] is None or row.figures[3] < row.figures[0]  # type: ignore[operator]
    # What the authors' own README repeats, and the text of the paper.
    slotcon = {
        (r.data, r.epochs): r.figures for t in TABLES[:3] for r in t.rows if "Slot" in r.method
    }
    assert {key: (figures[0], figures[3]) for key, figures in slotcon.items()} == {
        ("COCO", 800): (41.0, 37.0),
        ("COCO+", 800): (41.8, 37.8),
        ("ImageNet", 100): (41.4, 37.2),
        ("ImageNet", 200): (41.8, 37.8),
    }
    city = {row.figures[6] for table in TABLES[:2] for row in table.rows}
    assert {row.figures[0] for row in TABLES[3].rows} - {73.9} <= city


def test_runs_of_one_backbone_make_a_row(tmp_path: Path) -> None:
    """Each result in its column; seeds are averaged."""
    runs = [
        result(tmp_path / "a", "coco_1x", value=0.411, metadata=COCO),
        result(tmp_path / "b", "cityscapes", value=0.75, metadata=COCO),
        result(tmp_path / "c", "cityscapes", "--optim.seed", "1", value=0.77, metadata=COCO),
        result(tmp_path / "d", "voc", "--log.dir", "elsewhere", value=0.72, metadata=COCO),
    ]
    rows = own(made(tmp_path, *runs))
    assert rows.keys() == {2, 3, 7}
    assert len(rows[2]) == 1
    row = rows[2][0]
    assert (row["method"], row["data"], row["epochs"]) == ("* SlotCon: coco_r50", "COCO", "800")
    figures = dict(zip((column.title for column in COLUMNS), row["figures"], strict=True))
    assert figures == {
        "AP^b": "41.1", "AP^b_50": "41.1", "AP^b_75": "", "AP^m": "41.1", "AP^m_50": "",
        "AP^m_75": "", "City.": "76.0 ± 1.4", "VOC": "72.0", "ADE": "",
    }  # fmt: skip
    assert rows[7][0]["figures"] == ["76.0 ± 1.4"]


def test_random_and_supervised_have_their_tables(tmp_path: Path) -> None:
    """The baselines, too, are the user's own."""
    random = result(tmp_path / "r", "ade20k", kind="random")
    supervised = result(tmp_path / "s", "ade20k", kind="supervised")
    rows = own(made(tmp_path, random, supervised))
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
        ("cityscapes", [], {"images": 100}, "100 training images, not 2,975"),
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
    """A figure of another schedule in the paper's column would be read as a win or a loss."""
    run = result(tmp_path / "run", recipe, *argv, metadata=COCO, **changes)
    content = made(tmp_path, run)
    assert not own(content)
    printed = capsys.readouterr().out
    assert "not comparable with the above" in printed
    assert says in printed
    assert content["runs"][0]["in_tables"] is False


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        (COCO | {"data": "camvid.beton", "data_images": "160"}, "pre-trained on camvid.beton"),
        (COCO | {"data_images": "100"}, "pre-trained on coco.beton"),
        ({"imported": "backbone.pth"}, "pre-trained on not stated"),
    ],
)
def test_other_pretraining_stays_apart(
    metadata: dict[str, str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A hundred images called coco are not COCO."""
    assert not own(made(tmp_path, result(tmp_path / "run", metadata=metadata)))
    assert says in capsys.readouterr().out


def test_layouts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Text in columns, Markdown in cells."""
    run = result(tmp_path / "run", metadata=COCO | {"run": "a|b"})
    call(main, run / "result.json", "--markdown", tmp_path / "table.md")
    page = (tmp_path / "table.md").read_text()
    assert r"| * SlotCon: a\|b | COCO | 800 |" in page
    lines = [line for line in page.splitlines() if line.startswith("|")]
    assert all(line.count("|") - line.count(r"\|") in (13, 5) for line in lines)
    printed = capsys.readouterr().out.splitlines()
    head = next(line for line in printed if line.startswith("Method"))
    row = next(line for line in printed if line.startswith("* SlotCon"))
    assert row[head.index("City.") :].startswith("70.0")


def test_bad_input(tmp_path: Path) -> None:
    """One line, and no file."""
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
