"""Post-training: prototypes that begin as clusters, and a frozen teacher, in a run."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from model import SlotCon
from model.encoder import Encoder
from model.guide import Guide
from model.kmeans import kmeans
from model.timm_encoder import TimmEncoder
from pipeline.errors import UserError
from pipeline.views import ViewConfig
from tests import ROOT
from tests.helpers.tiny_slotcon import tiny_batch, tiny_model
from tests.helpers.training import (
    assert_same_tensors,
    run_dir,
    small_beton,
    small_run,
    train_in_two,
    trainer,
)
from train.config import RunConfig, load_config
from train.init_config import InitConfig
from train.metrics import progress_line
from train.pretrained import load_model, read_record
from train.prototypes import place_prototypes
from train.run import checkpoint

SIDE, K = 64, 6


class Alone:
    """All that `place_prototypes` needs of an Accelerator."""

    num_processes = 1

    def gather(self, value: Any) -> Any:
        return value

    def autocast(self) -> Any:
        return torch.no_grad()


class Views:
    def __init__(self, seed: int) -> None:
        self.views = torch.randn(2, 3, 3, 2 * SIDE, 2 * SIDE, generator=torch.manual_seed(seed))


def test_prototypes_are_clusters_of_the_frozen_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the teacher are k-means of its cells without their mean; each of the student is the
    mean direction of its own cells there. Without it the student begins with labels at random."""
    monkeypatch.setattr("train.prototypes.broadcast", lambda value: value)
    torch.manual_seed(0)
    model = SlotCon(
        tiny_model(num_prototypes=K, norm="eval").config, Guide("resnet18", (3, 4), K, 2)
    )
    guide, batches = model.guide, [Views(1), Views(2)]
    assert guide is not None
    before = model.student.grouping.prototypes.detach().clone()
    model.eval()  # so that the cells below are those that it sees
    with torch.no_grad():
        views = [view for batch in batches for view in batch.views]
        cells = torch.cat([guide.features(v, (2, 2)).movedim(1, -1).flatten(0, 2) for v in views])
        own = torch.cat(
            [model.student(guide.shrunk(v)).features.movedim(1, -1).flatten(0, 2) for v in views]
        )
    place_prototypes(model, batches, Alone(), seed=4)  # type: ignore[arg-type]
    torch.testing.assert_close(guide.mean, cells.mean(dim=0))
    centres = kmeans(cells - cells.mean(dim=0), K, 4).centres
    torch.testing.assert_close(guide.prototypes, centres)
    for k in range(K):
        mine = [
            F.normalize(own[n], dim=0)
            for n in range(len(cells))
            if (F.normalize(cells[n] - guide.mean, dim=0) @ centres.T).argmax() == k
        ]
        expected = F.normalize(torch.stack(mine).sum(dim=0), dim=0) * 16**0.5 if mine else before[k]
        for branch in (model.student, model.teacher):
            torch.testing.assert_close(branch.grouping.prototypes[k].detach(), expected)


def test_so_many_cells_are_clustered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it a batch of many small cells is clustered whole, however long that takes."""
    monkeypatch.setattr("train.prototypes.broadcast", lambda value: value)
    monkeypatch.setattr("train.prototypes.MOST_CELLS", 10)
    seen = list[int]()

    def counted(cells: Tensor, *args: Any, **options: Any) -> Any:
        seen.append(len(cells))
        return kmeans(cells, *args, **options)

    monkeypatch.setattr("train.prototypes.kmeans", counted)
    for guide in (None, Guide("resnet18", (4,), K, 2)):
        model = SlotCon(tiny_model(num_prototypes=K).config, guide)
        place_prototypes(model, [Views(1), Views(2)], Alone(), seed=0)  # type: ignore[arg-type]
    assert seen == [10, 10]


def test_prototypes_without_a_frozen_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it SlotCon's own losses begin with prototypes that win no cell."""
    monkeypatch.setattr("train.prototypes.broadcast", lambda value: value)
    model = tiny_model(num_prototypes=K)
    place_prototypes(model, [Views(1)], Alone(), seed=0)  # type: ignore[arg-type]
    won = model(*tiny_batch(side=2 * SIDE)).usage
    assert torch.equal(model.student.grouping.prototypes, model.teacher.grouping.prototypes)
    lengths = model.student.grouping.prototypes.norm(dim=1)
    torch.testing.assert_close(lengths, torch.full((K,), 4.0))
    assert (won > 0).sum() > 1
    with pytest.raises(UserError, match=r"2 cells are fewer than 6 prototypes"):
        views = Views(1)
        views.views = views.views[:, :1, :, :32, :32]
        place_prototypes(model.eval(), [views], Alone(), seed=0)  # type: ignore[arg-type]


SETTINGS: dict[str, Any] = {
    "teacher": "frozen",
    "teacher_momentum": 0.0,
    "teacher_stages": (3, 4),
    "teacher_resolution": 2,
    "optimizer": "adamw",
    "base_lr": 0.05,
    "trainable_stages": 1,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    folder = tmp_path_factory.mktemp("post")
    torch.manual_seed(5)
    torch.save(Encoder("resnet18").state_dict(), folder / "w.pth")
    plain = small_run(small_beton(folder), folder, epochs=1, warmup_epochs=0)
    model = replace(
        plain.model,
        stages=4,
        dim_out=512,
        projector="norm",
        norm="eval",
        prototype_init="kmeans",
        targets="balanced",
        group_loss_weight=1.0,
        relation_loss_weight=1.0,
        cells=1,
    )
    config = replace(
        plain,
        views=ViewConfig(size=32),  # one cell: the teacher makes the run four times as large
        model=model,
        train=replace(plain.train, **SETTINGS),
        init=InitConfig(str(folder / "w.pth")),
    )
    trainer(config).train()
    return config


def test_a_run_keeps_its_teacher_and_resumes_bit_for_bit(run: RunConfig, tmp_path: Path) -> None:
    """The teacher is the start, also after a resume without the file; what is stored as the
    teacher, and so evaluated and exported, is the student. Without it the start is exported."""
    config = replace(run, log=replace(run.log, dir=str(tmp_path)))
    trainer(replace(config, train=replace(config.train, max_steps=2))).train()
    trainer(config, "auto").train()
    assert_same_tensors(*(checkpoint.find(run_dir(each)) for each in (run, config)))
    model, _ = load_model(run_dir(run))
    start = torch.load(run.init.weights, weights_only=True)
    assert model.guide is not None
    kept = model.guide.encoder.state_dict()
    assert all(torch.equal(kept[name], value) for name, value in start.items())
    student, teacher = model.student.state_dict(), model.teacher.state_dict()
    assert all(torch.equal(teacher[name], value) for name, value in student.items())
    moved = {n.split(".")[0] for n, v in start.items() if not v.equal(student[f"encoder.{n}"])}
    assert moved == {"layer4"}
    record = read_record(checkpoint.find(run_dir(run)))
    assert record.provenance["init"]["fitted"] == 3 * len(start)


def test_relations_are_logged(run: RunConfig) -> None:
    """Without it nobody sees whether the term that teaches alone falls."""
    lines = (run_dir(run) / "metrics.jsonl").read_text().splitlines()
    values = json.loads(lines[0])
    assert 0 < values["relations"] < values["loss"]
    assert f"relations {values['relations']:.3f})" in progress_line(values, 1, 5, 4)


def test_the_recipe_resumes_bit_for_bit(tmp_path: Path) -> None:
    """configs/posttrain_cpu.yaml on a small network, stopped while only the prototypes learn.
    Without it a run that goes on is another run: its prototypes are placed again, or its encoder
    wakes too late."""
    net = TimmEncoder("timm:test_efficientnet").net
    torch.save(net.state_dict(), tmp_path / "w.pth")
    small = {
        "data.path": small_beton(tmp_path), "init.weights": tmp_path / "w.pth",
        "model.arch": "timm:test_efficientnet", "model.dim_out": 64, "model.num_prototypes": 8,
        "model.relation_loss_weight": 1, "model.cells": 4,
        "views.size": 64, "data.threads": 1, "train.epochs": 2, "train.max_steps": 7,
        "log.trackers": "[]", "log.checkpoint_every": 3, "log.history": 0,
    }  # fmt: skip
    options = [f"--{name}={value}" for name, value in small.items()]
    file = ROOT / "configs" / "posttrain_cpu.yaml"
    configs = [
        load_config(["--config", str(file), *options, f"--log.dir={tmp_path / name}"])[0]
        for name in ("whole", "parts")
    ]
    trainer(configs[0]).train()
    trainer(replace(configs[1], train=replace(configs[1].train, max_steps=3))).train()
    trainer(configs[1], "auto").train()
    assert_same_tensors(*(checkpoint.find(run_dir(each)) for each in configs))
    model, _ = load_model(run_dir(configs[0]))
    after, names = model.teacher.encoder.net.state_dict(), model.teacher.encoder.names_up_to(3)
    for name, value in net.state_dict().items():
        rests = name in names or "running_" in name
        assert torch.equal(after[name], value) or not rests, name
    last = net.blocks[-1][0].conv_pwl.weight
    assert not torch.equal(after["blocks.4.0.conv_pwl.weight"], last)


def test_two_processes_share_their_prototypes(run: RunConfig, tmp_path: Path) -> None:
    """Without it each process clusters its own cells, and their losses have nothing in common."""
    config = replace(run, log=replace(run.log, dir=str(tmp_path)))
    train_in_two(replace(config, train=replace(config.train, max_steps=1)))
    ranks = [torch.load(tmp_path / f"run.rank{rank}", weights_only=True) for rank in (0, 1)]
    for name in ("guide.prototypes", "guide.mean", "student.grouping.prototypes"):
        assert torch.equal(ranks[0][name], ranks[1][name]), name


FROZEN = [
    "--train.teacher", "frozen", "--train.teacher_momentum", "0", "--init.weights", "w",
    "--model.prototype_init", "kmeans", "--model.group_loss_weight", "1",
]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--train.teacher_momentum", "0.9"], "0 with train.teacher frozen"),
        (["--init.weights", "random"], r"init\.weights must be given with train\.teacher frozen"),
        (["--model.prototype_init", "random"], r"model\.prototype_init must be kmeans"),
        (["--model.group_loss_weight", "0.5"], r"model\.group_loss_weight must be 1"),
        (["--model.cell_loss_weight", "1"], r"model\.cell_loss_weight must be 0"),
        (["--model.supervise", "[3, 4]"], r"model\.supervise must be empty"),
        (["--model.stages", "3", "--train.teacher_stages", "[4]"], r"at most model\.stages"),
        (["--train.teacher_stages", "[4, 3]"], r"a growing list of whole numbers"),
        (["--train.teacher_resolution", "5"], r"in 1\.\.4"),
        (["--views.size", "2048", "--train.teacher_resolution", "4"], "teacher_resolution"),
        (
            [
                "--model.stages",
                "2",
                "--train.teacher_stages",
                "[4]",
                "--train.teacher_arch",
                "resnet50",
                "--train.teacher_weights",
                "w",
            ],
            r"train\.teacher_resolution must .*cells of 32 pixels are not larger .*, 8, not 1",
        ),
        (["--views.size", "16"], r"views\.size must be at least 32, a cell of stage 4, not 16"),
        (["--train.teacher_arch", "resnet50"], r"given with train\.teacher_arch, or both not"),
        (["--train.teacher", "student", "--train.teacher_stages", "[4]"], "unless train.teacher"),
        (
            [
                "--views.size",
                "64",
                "--train.teacher_arch",
                "timm:vit_small_patch14_dinov2",
                "--train.teacher_weights",
                "w",
            ],
            r"train\.teacher_resolution must be so that views of 64 pixels .*a multiple of 14",
        ),
        (
            ["--train.teacher_arch", "timm:mixr_s16_224", "--train.teacher_weights", "w"],
            r"^train\.teacher_arch timm:mixr_s16_224: .*no such network; near it: mixer_s16_224",
        ),
    ],
)
def test_settings_that_cannot_work(change: list[str], message: str) -> None:
    """Without it a setting has no effect, or fails deep in the run."""
    with pytest.raises(UserError, match=message):
        load_config(["--name", "x", "--data.path", "x", *FROZEN, *change])


def test_relations_can_teach_alone() -> None:
    """Without it a frozen teacher whose slots can't be compared is always asked for groups too; or
    a sample is larger than a view."""
    options = ["--name", "x", "--data.path", "x", *FROZEN, "--model.group_loss_weight", "0"]
    config, _ = load_config([*options, "--model.relation_loss_weight", "1"])
    assert config.model.group_loss_weight == 0
    with pytest.raises(UserError, match=r"unless model\.relation_loss_weight is above 0"):
        load_config(options)
    with pytest.raises(UserError, match=r"model\.cells must be at most the 16 cells"):
        load_config(
            [*options, "--model.relation_loss_weight=1", "--model.cells=17", "--views.size=128"]
        )


def test_the_teacher_needs_all_its_weights(run: RunConfig, tmp_path: Path) -> None:
    """Without it a teacher teaches noise."""
    start = torch.load(run.init.weights, weights_only=True)
    early = {name: value for name, value in start.items() if "layer4" not in name}
    torch.save(early, tmp_path / "early.pth")
    config = replace(
        run,
        init=InitConfig(str(tmp_path / "early.pth")),
        log=replace(run.log, dir=str(tmp_path)),
    )
    with pytest.raises(UserError, match=r"its weights lack guide\.encoder\.layer4"):
        trainer(config)
