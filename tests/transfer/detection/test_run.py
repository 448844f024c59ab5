"""The command: a run with its files, resuming, scoring alone, bad input."""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from pipeline.errors import UserError
from tests import ROOT
from tests.helpers.coco_sets import varied_set
from tests.helpers.killed import curve, killed
from tests.helpers.runs import in_this_process
from tests.transfer.detection.test_model import SMALL
from train.run.settings import to_dict, to_yaml
from transfer.command import settings_of
from transfer.config import EfficiencyConfig, InitConfig, LogConfig, OptimConfig
from transfer.detection.__main__ import build, main
from transfer.detection.config import DataConfig, DetectionConfig
from transfer.detection.dataset import resized
from transfer.trainer import Trainer

CONFIGS = ROOT / "configs" / "transfer"


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("coco")
    varied_set(root, "train2017")
    varied_set(root, "val2017", images=3)
    return root


def small_config(coco: Path, folder: Path, name: str = "run", **init: Any) -> DetectionConfig:
    """Two epochs of two steps."""
    return DetectionConfig(
        name=name,
        init=InitConfig(arch="resnet18", **init),
        data=DataConfig(str(coco), train_sides=(48, 64), val_side=64, longest_side=96),
        model=SMALL,
        optim=OptimConfig(steps=4, batch_size=2, lr=0.001, precise_bn=1),
        efficiency=EfficiencyConfig(workers=0),
        log=LogConfig(every=2, checkpoint_every=3, keep=3, dir=str(folder)),
    )


def trained(config: DetectionConfig, resume: str | None = None) -> Path:
    """The folder of the run."""
    settings = settings_of(DetectionConfig)
    in_this_process(lambda: Trainer(config, build, settings, resume).train())
    return Path(config.log.dir) / config.name


def result(run: Path) -> dict[str, Any]:
    return json.loads((run / "result.json").read_text())  # type: ignore[no-any-return]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_predictions_of_a_run_are_cocos_results(
    coco: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Without it detections cannot be scored by others. An earlier scoring's files do not stay, and
    an evaluation writes into the run only if asked to.
    """
    pytest.importorskip("pycocotools")
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    config = small_config(coco, tmp_path)
    log = replace(config.log, predictions=True, evaluate_every=2, dir=str(tmp_path / "runs"))
    run = trained(replace(config, log=log))
    folder = run / "predictions"
    assert sorted(path.name for path in folder.iterdir()) == ["bbox.json", "segm.json"]
    assert not [path for path in run.iterdir() if path.name.startswith(".predictions")]
    rows = {row["metric"]: row["value"] for row in result(run)["results"]}
    truth = COCO(str(coco / "annotations/instances_val2017.json"))
    for name, kind in (("box", "bbox"), ("mask", "segm")):
        scores = COCOeval(truth, truth.loadRes(str(folder / f"{kind}.json")), kind)
        scores.evaluate()
        scores.accumulate()
        scores.summarize()
        assert rows[f"{name}_ap"] == pytest.approx(scores.stats[0], abs=1e-6)
    written = (folder / "segm.json").read_bytes()
    (folder / "segm.json").write_text("of before")
    (folder / "old.json").write_text("of before")
    in_this_process(lambda: main(["--evaluate", str(run)]))
    assert (folder / "old.json").exists()
    in_this_process(lambda: main(["--evaluate", str(run), "--log.predictions", "true"]))
    assert sorted(path.name for path in folder.iterdir()) == ["bbox.json", "segm.json"]
    assert (folder / "segm.json").read_bytes() == written


def test_boxes_alone_make_a_run(
    coco: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without it a set without masks cannot be learned; or its scores are said to be of masks."""
    for split in ("train2017", "val2017"):
        file = varied_set(tmp_path, split)
        content = json.loads(file.read_text())
        for one in content["annotations"]:
            del one["segmentation"]
        file.write_text(json.dumps(content))
    config = small_config(tmp_path, tmp_path)
    with pytest.raises(UserError, match=r"train2017\.json: no object has a mask: give --model\."):
        build(config)
    log = replace(config.log, predictions=True)
    run = trained(replace(config, model=replace(config.model, masks=False), log=log))
    assert {row["metric"].partition("_")[0] for row in result(run)["results"]} == {"box"}
    assert [path.name for path in (run / "predictions").iterdir()] == ["bbox.json"]


def test_training_images_are_not_scored(tmp_path: Path) -> None:
    """Without it scores on training images look like scores of others. The same split for both is
    a choice.
    """
    varied_set(tmp_path, "train2017")
    file = varied_set(tmp_path, "val2017", images=3)
    config = small_config(tmp_path, tmp_path)
    build(config)
    one = tmp_path / "val2017/000000000002.png"
    shutil.copy(tmp_path / "train2017" / "000000000003.png", one)  # under another name
    message = r"val2017\.json: {} of the 3 images to score are in the training set .*{}\.png"
    with pytest.raises(UserError, match=message.format(1, "0002")):
        build(config)
    images = replace(config.data, images="train2017")  # a folder that both share
    with pytest.raises(UserError, match=message.format(3, "0001")):
        build(replace(config, data=images))
    build(replace(config, data=replace(config.data, val="train2017")))
    one.write_bytes(b"")  # of the same name, but no copy
    with pytest.raises(UserError, match=r"0002\.png: empty file"):
        build(config)
    assert file.exists()


def test_odd_objects_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without it a wrong convention of boxes, or missing masks, are learned without a word."""
    for split in ("train2017", "val2017"):
        file = varied_set(tmp_path, split)
        content = json.loads(file.read_text())
        objects = content["annotations"]
        objects[0]["bbox"] = [-10, 0, 12, 4]
        objects[1]["segmentation"] = []
        del objects[2]["bbox"], objects[2]["area"]
        file.write_text(json.dumps(content))
    build(small_config(tmp_path, tmp_path))
    notes = capsys.readouterr().err
    for split in ("train2017", "val2017"):
        assert f"{split}.json: 1 boxes share less than half with the bounds of" in notes
        assert f"{split}.json: 1 boxes reach out of their image" in notes
        assert f"{split}.json: 1 objects have no box" in notes
    assert "train2017.json: 1 of 9 objects have no mask: they teach boxes alone" in notes
    assert "val2017.json: mask AP leaves out 1 of 6 images" in notes
    assert "val2017.json: 1 objects have no area" in notes


@pytest.fixture(scope="module")
def whole(coco: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without an interruption."""
    return trained(small_config(coco, tmp_path_factory.mktemp("whole")))


def test_a_run_writes_its_scores(whole: Path, coco: Path) -> None:
    """transfer.table reads this file."""
    written = result(whole)
    assert (written["task"], written["dataset"], written["step"]) == ("detection", "coco", 4)
    assert {row["metric"] for row in written["results"]} >= {
        f"{kind}_{metric}" for kind in ("box", "mask") for metric in ("ap", "ap50", "ap75")
    }
    assert all(0 <= row["value"] <= 1 for row in written["results"])
    scored = written["scored"]
    assert (scored["dataset"], scored["images"], written["images"]) == ("coco", 3, 5)
    assert scored["classes"] == ["box", "disc", "bar"]
    annotations = coco / "annotations/instances_val2017.json"
    assert scored["fingerprint"] == hashlib.sha256(annotations.read_bytes()).hexdigest()


def test_a_resumed_run_is_the_same_run(whole: Path, coco: Path, tmp_path: Path) -> None:
    """Sizes, mirroring and the sampling of proposals are drawn at each step: a resumed run has to
    draw the same.
    """
    config = small_config(coco, tmp_path)
    trained(replace(config, optim=replace(config.optim, max_steps=3)))
    resumed = trained(config, "auto")
    place = Path("checkpoints") / "step_4" / "model.safetensors"
    one, other = load_file(whole / place), load_file(resumed / place)
    assert one.keys() == other.keys()
    assert all(one[name].equal(other[name]) for name in one)
    assert result(resumed)["results"] == result(whole)["results"]


def test_a_killed_run_has_the_same_curve(whole: Path, coco: Path, tmp_path: Path) -> None:
    """Without it the line after a resume averages over other steps than it says."""
    config = small_config(coco, tmp_path)
    assert killed(14, trained, config)  # after the checkpoint of step 3
    assert curve(trained(config, "auto")) == curve(whole)


def test_a_checkpoint_is_scored_alone(whole: Path, tmp_path: Path) -> None:
    """The checkpoint brings its configuration; its scores are those at the end of the training."""
    out = tmp_path / "scores.json"
    in_this_process(lambda: main(["--evaluate", str(whole), "--json", str(out)]))
    assert json.loads(out.read_text())["results"] == result(whole)["results"]


class Blind(nn.Module):
    """A detector that finds nothing and records the sizes of its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, int]] = []

    def forward(self, batch: dict[str, Any]) -> list[dict[str, torch.Tensor]]:
        self.seen += [(image.shape[1], image.shape[2]) for image in batch["images"]]
        found = {"boxes": (0, 4), "scores": (0,), "labels": (0,), "masks": (0, 1, 28, 28)}
        return [{name: torch.zeros(shape) for name, shape in found.items()}]


def test_the_validation_split_is_scored_at_its_size(coco: Path, tmp_path: Path) -> None:
    """Figures from training images, or at other sizes, would look plausible."""
    config = small_config(coco, tmp_path)
    task = build(replace(config, data=replace(config.data, val_side=40, longest_side=64)))
    model = Blind()
    rows = in_this_process(lambda: task.evaluate(model, Accelerator(cpu=True)))
    stored = [(record.height, record.width) for record in task.val.records]
    assert len(stored) == 3 and model.seen == [resized(*size, 40, 64) for size in stored]
    assert {row["value"] for row in rows} == {0.0}


def test_nothing_to_score_is_refused(tmp_path: Path) -> None:
    """Otherwise the run would train to its end and then have no figures."""
    varied_set(tmp_path, "train2017")
    file = varied_set(tmp_path, "val2017")
    content = json.loads(file.read_text())
    content["annotations"] = [one for one in content["annotations"] if one["iscrowd"]]
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"instances_val2017.json: no object to score"):
        build(small_config(tmp_path, tmp_path))


def test_a_damaged_validation_image_is_refused_at_once(tmp_path: Path) -> None:
    """At the start, not after the last step."""
    varied_set(tmp_path, "train2017")
    varied_set(tmp_path, "val2017")
    file = tmp_path / "val2017/000000000002.png"
    whole = file.read_bytes()
    file.write_bytes(b"no image")
    with pytest.raises(UserError, match=r"000000000002.png: "):
        build(small_config(tmp_path, tmp_path))
    file.write_bytes(whole)
    Image.new("RGB", (7, 5)).save(file)
    with pytest.raises(UserError, match=r"000000000002.png: 7×5 pixels, but instances_val"):
        build(small_config(tmp_path, tmp_path))


def test_other_categories_are_refused(coco: Path, tmp_path: Path) -> None:
    """Label 3 of one split would be another class in the other split."""
    varied_set(tmp_path, "train2017")
    file = varied_set(tmp_path, "val2017")
    file.write_text(file.read_text().replace('"bar"', '"rod"'))
    with pytest.raises(
        UserError, match=r"instances_val2017.json: its categories differ from those"
    ):
        build(small_config(tmp_path, tmp_path))


def test_skipped_objects_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without the note, a set whose boxes follow another convention would silently train on few of
    them.
    """
    file = varied_set(tmp_path)
    varied_set(tmp_path, "val2017")
    content = json.loads(file.read_text())
    content["annotations"][1]["bbox"][2] = 0
    file.write_text(json.dumps(content))
    build(small_config(tmp_path, tmp_path))
    assert "training skips 1 objects" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("coco_1x", (90000, 16, 0.02, (60000, 80000), 0)),
        ("coco_2x", (180000, 16, 0.02, (120000, 160000), 0)),
        ("coco_frozen", (22500, 16, 0.02, (15000, 20000), 5)),
    ],
)
def test_configurations_are_the_published_settings(name: str, expected: tuple[Any, ...]) -> None:
    """Each file makes one row of the table. A wrong schedule would make it incomparable."""
    options = ["--config", str(CONFIGS / f"{name}.yaml"), "--data.root", "COCO"]
    config, _ = settings_of(DetectionConfig).load(options)
    optim = config.optim
    found = (optim.steps, optim.batch_size, optim.lr, optim.milestones, config.init.frozen)
    assert found == expected
    assert (optim.weight_decay, optim.norm_weight_decay, optim.precise_bn) == (1e-4, 0, 200)
    assert config.model == type(config.model)()  # see test_the_default_is_the_authors_setting
    assert to_dict(config)["data"] == {
        "root": "COCO",
        "train": "train2017",
        "val": "val2017",
        "annotations": "annotations/instances_{split}.json",
        "images": "{split}",
        "train_sides": [640, 672, 704, 736, 768, 800],
        "val_side": 800,
        "longest_side": 1333,
        "flip": 0.5,
    }


def test_the_small_proof_has_a_configuration(coco: Path) -> None:
    """docs/transfer.md gives its command."""
    options = ["--config", str(CONFIGS / "coco_overfit_cpu.yaml"), "--data.root", str(coco)]
    config, _ = settings_of(DetectionConfig).load(options)
    assert config.data.val == config.data.train
    torch.manual_seed(0)
    assert len(build(config)) == 5
    assert "coco_overfit" in to_yaml(config)
