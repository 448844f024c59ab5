"""What comes after a run of SlotMIM: one small run, and all that is done with it."""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("timm")

import timm

from evaluation import probe, slots, unsupervised_segmentation
from evaluation.pictures import __main__ as pictures
from model import ModelConfig, SlotCon
from model.architectures import IMAGENET
from pipeline.errors import UserError
from tests.helpers.betons import varied, write_beton
from tests.helpers.exported import call
from tests.helpers.labelled_sets import write_folder_set
from tests.helpers.runs import in_this_process
from tests.helpers.training import run_dir, trainer
from tests.model_golden import rebuild_images
from tests.slotmim_golden import RECORD, build_model, settings
from tests.train.test_slotmim_run import slotmim_run
from tools import export, import_official
from tools.benchmark import __main__ as benchmark
from tools.benchmark.step import gflop_of
from tools.report.__main__ import main as report
from train.eval_config import EvalConfig
from train.pretrained import load_model
from train.run.settings import to_dict
from transfer.config import EfficiencyConfig, InitConfig, LogConfig, OptimConfig
from transfer.detection.config import DataConfig as DetectionData
from transfer.detection.config import DetectionConfig
from transfer.segmentation.config import (
    AugmentConfig,
    DataConfig,
    InferenceConfig,
    SegmentationConfig,
)
from transfer.segmentation.config import ModelConfig as HeadConfig
from transfer.segmentation.task import Segmentation
from transfer.trainer import Trainer

pytestmark = pytest.mark.usefixtures("no_flush")
SIDE = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """images.beton, and data/{train,val}/{images,labels}."""
    folder = tmp_path_factory.mktemp("slotmim")
    write_beton(folder / "images.beton", varied(8))
    write_folder_set(folder / "data", 10, 10, (SIDE, 80))  # whitening needs many cells
    return folder


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    """Two epochs of two steps, scored before and after."""
    config = slotmim_run(folder / "images.beton", folder, "small")
    data = {
        name: str(folder / "data" / part / what)
        for name, part, what in (
            ("images", "val", "images"), ("labels", "val", "labels"),
            ("train_images", "train", "images"), ("train_labels", "train", "labels"),
        )
    }  # fmt: skip
    scored = EvalConfig(every=4, size=SIDE, memory=200, **data)  # type: ignore[arg-type]
    log = replace(config.log, every=1, checkpoint_every=2)
    trainer(replace(config, eval=scored, log=log)).train()
    return run_dir(config)


def labelled(folder: Path, part: str, prefix: str = "") -> list[object]:
    data = folder / "data" / part
    return [f"--{prefix}images", data / "images", f"--{prefix}labels", data / "labels"]


def last_maps(model: SlotCon, branch: str = "teacher") -> Tensor:
    with torch.inference_mode():
        return getattr(model, branch).encoder(images())


def images() -> Tensor:
    return torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


def timm_maps(net: Any) -> Tensor:
    """The last map of timm's network on the same images, normalised as it wants them."""
    mean, std = (torch.tensor(each)[:, None, None] for each in IMAGENET)
    config = timm.data.resolve_model_data_config(net)
    own = [torch.tensor(config[name])[:, None, None] for name in ("mean", "std")]
    given = (images() * std + mean - own[0]) / own[1]
    with torch.inference_mode():
        maps: list[Tensor] = net.eval().forward_intermediates(
            given, norm=True, intermediates_only=True
        )
    return maps[-1]


# ---- Evaluation ----


def test_it_is_scored_while_it_trains(run: Path) -> None:
    """Without it nobody sees whether a run learns before it ends."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    scored = [line for line in lines if "results" in line]
    assert [line["step"] for line in scored] == [0, 4]
    names = {row["metric"] for row in scored[-1]["results"]}
    assert names >= {"knn_miou", "kmeans_miou", "prototypes_miou", "active_slots"}


def test_its_features_are_scored(run: Path, folder: Path, tmp_path: Path) -> None:
    """By prototypes, clusters and probes, at single and joined stages, whitened, by a published
    protocol. Without it a ViT that never saw a whole view in training could not be judged.
    """
    val, train = labelled(folder, "val"), labelled(folder, "train", "train-")
    common = ["--checkpoint", run, *val, "--json", tmp_path / "rows.json"]
    call(
        unsupervised_segmentation.main, *common, "--size", SIDE, "--features", "teacher", "student",
        "--stage", 2, "3+4", "--whiten", "--baseline", "none",
    )  # fmt: skip
    rows = json.loads((tmp_path / "rows.json").read_text())["results"]
    networks = {row["network"] for row in rows if row["metric"] == "miou"}
    assert {"trained", "teacher, stage 2, whitened, k-means"} <= networks and len(networks) == 5
    merged = ["--merge", "--unlabelled", folder / "images.beton", "--baseline", "none"]
    call(unsupervised_segmentation.main, *common, "--protocol", "picie", *merged)
    rows = json.loads((tmp_path / "rows.json").read_text())["results"]
    assert {row["protocol"] for row in rows} == {"picie"}
    probes = ["--size", SIDE, "--stage", "3+4", "--whiten", "--baseline", "none"]
    call(probe.main, "knn", *common, *train, *probes, "--memory", 100)
    call(probe.main, "linear", *common, *train, *probes, "--steps", 5)
    rows = json.loads((tmp_path / "rows.json").read_text())["results"]
    assert all(0 <= row["value"] <= 1 for row in rows if row["metric"] == "miou")


def test_it_is_drawn(run: Path, folder: Path, tmp_path: Path) -> None:
    """Groups, prototypes, masks, the course of the grouping, slots. Without it one cannot see what
    it groups."""
    data = ["--data", folder / "data/val/images", "--out"]
    sized = ["--size", SIDE]
    for name in ("grouping", "prototypes", "features"):
        call(pictures.main, name, "--checkpoint", run, *data, tmp_path / f"{name}.png", *sized)
    call(pictures.main, "views", "--checkpoint", run, *data, tmp_path / "views.png")
    call(pictures.main, "attention", "--run", run, *data, tmp_path / "attention.png", *sized)
    call(slots.main, "--checkpoint", run, "--data", folder / "images.beton", *sized)
    call(report, run, "--out", tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "Loss of hidden patches" in page
    assert len(list(tmp_path.glob("*.png"))) == 5


# ---- Weights ----


def test_exported_weights_have_equal_features(run: Path, tmp_path: Path) -> None:
    """In timm, from a file and from a folder of the hub, and read back by us. Without it others get
    another network than the one that was trained, or one under the name of SlotCon.
    """
    model = load_model(run)[0]
    assert not torch.allclose(last_maps(model), last_maps(model, "student"), atol=1e-4)
    call(export.main, run, "--to", "timm", "--out", tmp_path / "vit.safetensors")
    call(export.main, run, "--to", "timm", "--out", tmp_path / "student.pth", "--student")
    call(export.main, run, "--to", "huggingface", "--out", tmp_path / "hub")
    size = {"num_classes": 0, "dynamic_img_size": True}
    for file, branch in (("vit.safetensors", "teacher"), ("student.pth", "student")):
        net = timm.create_model("test_vit", checkpoint_path=str(tmp_path / file), **size)
        torch.testing.assert_close(timm_maps(net), last_maps(model, branch), rtol=0, atol=1e-5)
    net = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True, **size)
    torch.testing.assert_close(timm_maps(net), last_maps(model), rtol=0, atol=1e-5)
    card = (tmp_path / "hub/README.md").read_text()
    assert "of a SlotMIM model" in card and "- slotmim\n" in card and "slotcon" not in card.lower()
    assert "2503.06960" in card and "| Method | SlotMIM (arXiv 2503.06960) |" in card
    for to, out in (("detectron2", "d.pkl"), ("mmseg", "m.pth"), ("torchvision", "t.pth")):
        with pytest.raises(UserError, match=f"--to {to}: for the ResNets of torchvision alone"):
            call(export.main, run, "--to", to, "--out", tmp_path / out)


def test_there_and_back(run: Path, tmp_path: Path) -> None:
    """Under the authors' names and settings. Without it their tools could not read our runs, or
    ours would read them back as another recipe."""
    call(export.main, run, "--to", "official", "--out", tmp_path / "full.pth")
    arch = ["--arch", "timm:test_vit"]
    call(import_official.main, tmp_path / "full.pth", "--out", tmp_path / "again", *arch)
    (one, a), (other, b) = load_model(run), load_model(tmp_path / "again")
    ours, theirs = one.state_dict(), other.state_dict()
    own = {
        f"{branch}.encoder.{name}"
        for branch in ("student", "teacher")
        for name in ("scale", "shift")
    }
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[n]) for n, value in ours.items() if n not in own)
    assert b.model == replace(a.model, image_stats=IMAGENET)
    assert (a.train, a.views) == (b.train, b.views)


def their_checkpoint() -> dict[str, Any]:
    """A whole checkpoint of the recorded run, as the authors' code writes it."""
    named = {
        "dataset": "COCO", "arch": "vit_tiny_patch16", "world_size": 2, "num_instances": 17,
        "optimizer": "adamw", "warmup_multiplier": 100, "use_bn_in_head": False,
    }  # fmt: skip
    names = (
        "image_size", "dim_hidden", "dim_out", "num_prototypes", "batch_size", "epochs",
        "teacher_momentum", "student_temp", "warmup_teacher_temp", "teacher_temp",
        "warmup_teacher_temp_epochs", "center_momentum", "group_loss_weight", "drop_path_rate",
        "base_lr", "min_lr", "warmup_epoch", "weight_decay", "weight_decay_end", "clip_grad",
        "freeze_slots", "min_scale",
    )  # fmt: skip
    known = settings(RECORD)
    args = named | {name: known[name] for name in names} | {"pred_ratio": [0.3]}
    args |= {"pred_ratio_var": [0.2]}
    state = build_model().official_state_dict()
    return {"args": argparse.Namespace(**args), "model": state, "optimizer": {}, "epoch": 5}


def test_a_checkpoint_of_the_authors_has_their_features(tmp_path: Path) -> None:
    """The whole of it, and its encoder alone as their converter writes it. Without it the published
    weights would be read as another network: these are the features that their code gave.
    """
    content, arch = their_checkpoint(), ["--arch", "timm:golden_vit"]
    torch.save(content, tmp_path / "ckpt.pth")
    call(import_official.main, tmp_path / "ckpt.pth", "--out", tmp_path / "run", *arch)
    model, config = load_model(tmp_path / "run")
    record = np.load(RECORD / "features.npz")["student_features_unmasked"]
    for view in (0, 1):
        image = torch.from_numpy(rebuild_images(f"image/ws1/rank0/step0/view{view}", RECORD)[:2])
        with torch.inference_mode():
            found = model.student.encoder(image).flatten(2).transpose(1, 2)
        np.testing.assert_allclose(found.numpy(), record[view], rtol=0, atol=3e-5)
    train, known = config.train, settings(RECORD)
    assert (config.views.size, config.views.mask_ratio, config.views.mask_ratio_spread) == (
        96, 0.3, 0.2,
    )  # fmt: skip
    assert (train.batch_size, train.base_lr, train.clip_grad) == (8, known["base_lr"], 0.3)
    assert (train.freeze_prototypes_epochs, train.warmup_teacher_temp_epochs) == (1, 3)
    assert train.warmup_multiplier is None and train.warmup_reaches_peak
    assert config.model.drop_path == 0 and config.model.image_stats == IMAGENET
    step = json.loads((tmp_path / "run/metrics.jsonl").read_text())["step"]
    assert step == 5 * (9 // 4)  # of two processes, each with 9 of 17 images in batches of 4

    encoder = {
        name.removeprefix("encoder_k."): value
        for name, value in content["model"].items()
        if name.startswith("encoder_k.")
    }
    torch.save({"state_dict": encoder}, tmp_path / "vit.pth")
    both = {name: value for name, value in content["model"].items() if name.startswith("encoder")}
    torch.save({"state_dict": both}, tmp_path / "both.pth")
    for file, branch in (("vit", "teacher"), ("both", "teacher"), ("both", "student")):
        out = tmp_path / f"{file}_{branch}.safetensors"
        more = ["--student"] if branch == "student" else ["--data", "COCO"]
        call(import_official.main, tmp_path / f"{file}.pth", "--out", out, *arch, *more)
        net = timm.create_model("golden_vit", num_classes=0)
        net.load_state_dict(timm.models.load_state_dict(out))
        expected = getattr(model, branch).encoder.net.state_dict()
        assert all(torch.equal(v, expected[name]) for name, v in net.state_dict().items())
    with pytest.raises(UserError, match="its encoder is none of vit_tiny_patch16_224"):
        call(import_official.main, tmp_path / "ckpt.pth", "--out", tmp_path / "unknown")


# ---- Transfer ----


def test_segmentation_starts_from_it(run: Path, folder: Path, tmp_path: Path) -> None:
    """From the run and from its exported folder; detection says what it needs. Without it a ViT
    could be pre-trained and not used."""
    parts = {
        f"{part}_{what}": str(folder / "data" / part / what)
        for part in ("train", "val")
        for what in ("images", "labels")
    }
    config = SegmentationConfig(
        name="seg",
        data=DataConfig(**parts),  # type: ignore[arg-type]
        augment=AugmentConfig(crop=48, size=(80, 64)),
        model=HeadConfig(output_stride=None, channels=8, convs=1, dilation=1),
        inference=InferenceConfig(window=48, stride=32),
        init=InitConfig(arch="timm:test_vit", weights=str(run)),
        optim=OptimConfig(steps=2, batch_size=2, lr=0.05),
        efficiency=EfficiencyConfig(workers=0),
        log=LogConfig(every=1, checkpoint_every=0, dir=str(tmp_path)),
    )
    in_this_process(lambda: Trainer(config, Segmentation, to_dict(config), None)).train()
    result = json.loads((tmp_path / "seg/result.json").read_text())
    assert result["init"]["metadata"]["method"] == "SlotMIM (arXiv 2503.06960)"
    with pytest.raises(ValueError, match=r"init.arch must be one of resnet18.* for detection"):
        DetectionConfig(
            name="det",
            init=InitConfig(arch="timm:test_vit", weights=str(run)),
            optim=OptimConfig(steps=1, batch_size=1, lr=0.1),
            data=DetectionData(str(tmp_path)),
        )


# ---- Cost ----


def test_the_benchmark_knows_the_step(run: Path, tmp_path: Path) -> None:
    """As a variant of SlotCon on the same ViT, by turns, with its operations: each view of the
    student's three times, forward and backward, and the teacher's once. On a ResNet it is refused.
    """
    small = (
        "name: vit\ndata: {path: none}\nviews: {size: 64}\n"
        "model: {arch: '%s', dim_hidden: 8, dim_out: 8, num_prototypes: 8}\n"
    )
    (tmp_path / "vit.yaml").write_text(small % "timm:test_vit")
    (tmp_path / "resnet.yaml").write_text(small % "resnet18")
    words = ["step", "--synthetic", "--also", "slotmim", "--batch", 2, "--repeats", 1]
    words += ["--seconds", 0.001, "--device", "cpu", "--json", tmp_path / "step.json", "--config"]
    call(benchmark.main, *words, tmp_path / "vit.yaml")
    rows = json.loads((tmp_path / "step.json").read_text())["results"]
    assert rows[-1]["operation"] == "slotmim" and rows[-1]["images_per_s"] > 0
    net = load_model(run)[0].teacher.encoder.net
    dim, hidden = net.embed_dim, net.blocks[0].mlp.fc1.out_features
    patches, tokens = (SIDE // 16) ** 2, net.pos_embed.shape[1] - 100 + (SIDE // 16) ** 2
    block = tokens * (4 * dim**2 + 2 * dim * hidden) + 2 * tokens**2 * dim
    embedding = patches * 3 * 16**2 * dim  # images need no gradient
    least = 2 * 2 * (4 * len(net.blocks) * block + 3 * embedding)
    assert least <= rows[-1]["detail"]["gflop"] * 1e9 <= 1.15 * least
    with pytest.raises(UserError, match="--also slotmim: arch must be a ViT of timm"):
        call(benchmark.main, *words, tmp_path / "resnet.yaml")
    config = load_model(run)[1]
    whole = replace(config, model=replace(config.model, objective="slotcon"),
                    views=config.views.unmasked())  # fmt: skip
    assert gflop_of(config, SIDE) == pytest.approx(gflop_of(whole, SIDE), rel=0.05)
    assert ModelConfig("timm:test_vit", objective="slotmim").hides_patches
