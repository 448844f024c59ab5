"""A run starts from the weights that it is given, and says which they were."""

import json
import pickle
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from model import ModelConfig, SlotCon
from model.encoder import Encoder
from model.guide import Guide
from pipeline.errors import UserError
from tests.helpers.training import (
    assert_same_tensors,
    run_dir,
    small_beton,
    small_run,
    train_in_two,
    trainer,
)
from train.config import DataConfig, RunConfig, TrainConfig, load_config
from train.encoders import image_stats
from train.init_config import InitConfig
from train.pretrained import build_model, load_model, read_record
from train.run import checkpoint
from train.start import in_words, start_from
from train.weights import Backbone, describe

SMALL = ModelConfig("resnet18", dim_hidden=16, dim_out=8, num_prototypes=8)


@pytest.fixture(scope="module")
def encoder() -> dict[str, Tensor]:
    torch.manual_seed(5)
    return {
        name: torch.randn_like(v).abs() if v.ndim else v for name, v in _new("resnet18").items()
    }


def _new(arch: str) -> dict[str, Tensor]:
    return {n: v.float() if v.ndim else v for n, v in Encoder(arch).state_dict().items()}


def start(weights: object, part: Any = "encoder", config: ModelConfig = SMALL) -> tuple:
    torch.manual_seed(0)
    model = SlotCon(config)
    return model, start_from(InitConfig(str(weights), part), model)


def is_in(model: SlotCon, encoder: dict[str, Tensor], up_to: int = 4) -> bool:
    later = tuple(f"layer{stage}" for stage in range(up_to + 1, 5))
    return all(
        torch.equal(branch.encoder.state_dict()[name], value)
        for branch in (model.student, model.teacher)
        for name, value in encoder.items()
        if not name.startswith(later)
    )


WRAPPERS = {
    "torchvision": lambda e: {**e, "fc.weight": torch.ones(1000, 512)},
    "lightning": lambda e: {"state_dict": {f"model.encoder.{n}": v for n, v in e.items()}},
    "solo-learn": lambda e: {
        "state_dict": {f"backbone.{n}": v for n, v in e.items()}
        | {f"momentum_backbone.{n}": v for n, v in e.items()}
        | {"classifier.weight": torch.ones(1000, 512)},
        "hyper_parameters": {"method": "byol", "lr": 0.3},
    },
    "lightly": lambda e: {
        "state_dict": {f"backbone.{_child(n)}": v for n, v in e.items()}
        | {"projection_head.layers.0.weight": torch.ones(8, 512)}
    },
    "lightly-train": lambda e: {
        "state_dict": {f"_embedding_model.wrapped_model._model.{n}": v for n, v in e.items()}
    },
    "moco": lambda e: {"state_dict": {f"module.encoder_q.{n}": v for n, v in e.items()}},
}


def _child(name: str) -> str:
    """A ResNet's names in nn.Sequential(*children), as lightly's examples build it."""
    top, _, rest = name.partition(".")
    numbers = {"conv1": 0, "bn1": 1, "layer1": 4, "layer2": 5, "layer3": 6, "layer4": 7}
    return f"{numbers[top]}.{rest}"


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_files_of_others(wrap: Any, encoder: dict[str, Tensor], tmp_path: Path) -> None:
    """Without it only our own files start a run, or the student alone gets the weights."""
    file = tmp_path / "w.ckpt"
    torch.save(wrap(encoder), file)
    model, about = start(file)
    assert is_in(model, encoder)
    digest = sha256(file.read_bytes()).hexdigest()
    assert about["kind"] == "file" and about["sha256"] == digest
    assert about["weights"] == str(file.resolve()) and about["fitted"] == 2 * len(encoder)
    assert about["new"][:2] == ["center", "student.projector"]
    assert in_words(about).startswith(f"starts from {file} (sha256 {digest[:12]}): ")


def test_the_rest_of_the_model_is_that_of_a_new_run(
    encoder: dict[str, Tensor], tmp_path: Path
) -> None:
    """Without it loading changes the draws: two starts would differ by more than their weights."""
    torch.save(encoder, tmp_path / "w.pth")
    model, _ = start(tmp_path / "w.pth")
    fresh, about = start("random")
    assert about == {"weights": "random", "kind": "random"} and not in_words(about)
    for name, value in fresh.state_dict().items():
        assert ".encoder." in name or torch.equal(value, model.state_dict()[name]), name


def test_stages_that_do_not_fit_are_named(encoder: dict[str, Tensor], tmp_path: Path) -> None:
    """Both ways: a model that ends earlier, and a file that does. Without it a part of the encoder
    begins at random and nobody knows."""
    torch.save(encoder, tmp_path / "whole.pth")
    model, about = start(tmp_path / "whole.pth", config=replace(SMALL, stages=2))
    assert is_in(
        model, {n: v for n, v in encoder.items() if n in model.student.encoder.state_dict()}
    )
    assert "student.encoder.layer3" in about["unused"]
    torch.save({n: v for n, v in encoder.items() if "layer4" not in n}, tmp_path / "early.pth")
    model, about = start(tmp_path / "early.pth")
    assert is_in(model, {n: v for n, v in encoder.items() if "layer4" not in n})
    assert about["new"][1] == "student.encoder.layer4"
    assert "new: center, student.encoder.layer4, student.projector" in in_words(about)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    folder = tmp_path_factory.mktemp("run")
    config = replace(small_run(small_beton(folder), folder, max_steps=1), model=SMALL)
    trainer(config).train()
    return config


def test_a_whole_model(run: RunConfig, tmp_path: Path) -> None:
    """Of a run, of its file, of the authors' code. Without it `all` loses the heads, or gives the
    student's to the teacher."""
    source, _ = load_model(run_dir(run))
    save_file(source.state_dict(), tmp_path / "ours.safetensors")
    theirs = {f"module.{n}": v for n, v in source.official_state_dict().items()}
    torch.save({"model": theirs, "epoch": 3}, tmp_path / "theirs.pth")
    for path in (run_dir(run), tmp_path / "ours.safetensors", tmp_path / "theirs.pth"):
        model, about = start(path, "all")
        for name, value in source.state_dict().items():
            assert torch.equal(model.state_dict()[name], value), (path, name)
        assert about["fitted"] == len(source.state_dict()) and not about["new"]
    model, about = start(run_dir(run), "all", replace(SMALL, num_prototypes=5))
    assert about["new"] == about["unused"]
    assert about["new"] == ["center", "student.grouping", "teacher.grouping"]
    assert torch.equal(model.predictor[0].weight, source.predictor[0].weight)


def refused(message: str, weights: object, part: Any = "encoder") -> None:
    torch.manual_seed(0)
    model = SlotCon(SMALL)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UserError, match=message) as caught:
        start_from(InitConfig(str(weights), part), model)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Touch:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_bad_weights_are_refused_in_one_line(
    encoder: dict[str, Tensor], run: RunConfig, tmp_path: Path
) -> None:
    """Without it a run trains from weights that are not there, or executes a file's code."""
    file = tmp_path / "w.pth"
    refused("No such file", tmp_path / "nowhere.pth")
    torch.save(_new("resnet50"), file)
    refused("weights of a resnet50, not of the resnet18 that is needed", file)
    torch.save({"fc.weight": torch.ones(1000, 512), "fc.bias": torch.ones(1000)}, file)
    refused("no weights of a ResNet in it; its names begin with 'fc'", file)
    torch.save({"blocks.0.attn.qkv.weight": torch.ones(6, 2)}, file)
    refused("no weights of a ResNet in it; its names begin with 'blocks'", file)
    torch.save(encoder | {"bn1.bias": torch.full((64,), torch.inf)}, file)
    refused("bn1.bias is not finite", file)
    torch.save(encoder, file)
    refused("no whole SlotCon in it", file, "all")
    file.write_bytes(pickle.dumps({"model": encoder, "args": Touch(tmp_path / "trace")}))
    refused("refused", file)
    assert not (tmp_path / "trace").exists()
    refused("holds no whole checkpoint", tmp_path)
    whole = load_model(run_dir(run))[0].state_dict()
    save_file(whole | {"center": torch.full((1, 8), torch.nan)}, tmp_path / "w.safetensors")
    refused("center is not finite", tmp_path / "w.safetensors", "all")


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_weights_of_a_library(
    library: str, encoder: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without it `timm` and `torchvision` are taken for files, or a classifier is."""
    reader = {"torchvision": "published_weights", "timm": "timm_weights"}[library]
    monkeypatch.setattr(f"train.published.{reader}", lambda arch: encoder if arch else {})
    model, about = start(library)
    assert is_in(model, encoder) and about["kind"] == library and "sha256" not in about


def test_timm_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it an offline machine gets a trace of Hugging Face's hub."""
    timm = pytest.importorskip("timm")

    def offline(name: str, pretrained: bool) -> None:
        assert name == "resnet18" and pretrained
        raise OSError("no network\nand a second line")

    monkeypatch.setattr(timm, "create_model", offline)
    refused("timm's weights of resnet18 cannot be loaded .no network and a second line.", "timm")


def test_settings_that_cannot_work(tmp_path: Path) -> None:
    """Without it `all` of a library silently is its encoder."""
    for weights in ("random", "timm"):
        with pytest.raises(UserError, match=r"init\.part must be encoder with init.weights"):
            load_config(
                ["--name", "x", "--data.path", "x", "--init.part", "all", "--init.weights", weights]
            )


def test_a_run_records_its_start_and_resumes_without_it(
    encoder: dict[str, Tensor], tmp_path: Path
) -> None:
    """The file is gone when the run resumes, and it is exact. Without it a resumed run starts over
    from the file, fails for want of it, or forgets what it started from."""
    file = tmp_path / "w.pth"
    gentle = _new("resnet18")
    torch.save({"state_dict": gentle}, file)
    digest = sha256(file.read_bytes()).hexdigest()
    beton = small_beton(tmp_path)
    whole = small_run(beton, tmp_path / "whole")
    whole = replace(whole, model=SMALL, init=InitConfig(str(file)))
    cut = replace(whole, log=replace(whole.log, dir=str(tmp_path / "cut")))
    trainer(whole).train()
    trainer(replace(cut, train=replace(cut.train, max_steps=6))).train()
    file.unlink()
    trainer(cut, "auto").train()
    one, other = (load_model(run_dir(config))[0].state_dict() for config in (whole, cut))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    record = read_record(checkpoint.find(run_dir(cut)))
    assert record.provenance["init"]["sha256"] == digest
    assert describe(record)["start"] == f"w.pth (sha256 {digest[:12]})"
    assert "start" not in describe(replace(record, provenance={}))
    changed = replace(cut, init=InitConfig(str(tmp_path / "other.pth")))
    with pytest.raises(UserError, match=r"init\.weights"):
        trainer(changed, "auto")


GENTLE: dict[str, Any] = {
    "optimizer": "adamw",
    "base_lr": 0.05,
    "encoder_lr_scale": 0.5,
    "freeze_encoder_epochs": 1,
    "trainable_stages": 2,
}


@pytest.fixture(scope="module")
def gentle(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A finished run with all of a gentle start's settings."""
    folder = tmp_path_factory.mktemp("gentle")
    torch.manual_seed(5)
    torch.save(_new("resnet18"), folder / "w.pth")
    plain = small_run(small_beton(folder), folder)
    config = replace(
        plain,
        model=replace(SMALL, norm="eval"),
        train=replace(plain.train, **GENTLE),
        init=InitConfig(str(folder / "w.pth")),
    )
    trainer(config).train()
    return config


@pytest.mark.parametrize("at", [4, 6])
def test_a_gentle_run_resumes_bit_for_bit(gentle: RunConfig, tmp_path: Path, at: int) -> None:
    """Stopped while the encoder rests, and after. Without it a resumed run trains other parts, or
    begins with moments of zero."""
    config = replace(gentle, log=replace(gentle.log, dir=str(tmp_path)))
    trainer(replace(config, train=replace(config.train, max_steps=at))).train()
    cut = load_model(run_dir(config))[0].student.encoder.state_dict()
    trainer(config, "auto").train()
    assert_same_tensors(*(checkpoint.find(run_dir(each)) for each in (gentle, config)))
    before = torch.load(config.init.weights, weights_only=True)
    last = load_model(run_dir(config))[0].student.encoder.state_dict()
    assert at > 5 or all(torch.equal(cut[name], value) for name, value in before.items())
    moved = {name.split(".")[0] for name in before if not torch.equal(last[name], before[name])}
    assert moved == {"layer3", "layer4"}


def test_clusters_do_not_move_the_statistics_of_what_rests(
    gentle: RunConfig, tmp_path: Path
) -> None:
    """Prototypes are placed before the first step. Without it this measures the statistics of an
    encoder that rests anew, where its norms do not keep them in any case."""
    config = replace(
        gentle,
        model=replace(gentle.model, norm="train", prototype_init="kmeans"),
        train=replace(gentle.train, trainable_stages=None, max_steps=1),
        log=replace(gentle.log, dir=str(tmp_path)),
    )
    trainer(config).train()
    before = torch.load(config.init.weights, weights_only=True)
    model = load_model(run_dir(config))[0]
    assert is_in(model, before)
    assert model.student.projector[1].num_batches_tracked > 1  # the clusters' own pass


def test_two_processes_rest_and_wake_together(gentle: RunConfig, tmp_path: Path) -> None:
    """Gradients are averaged over processes whether the encoder rests or not. Without it the first
    step of the second epoch hangs or fails, or the processes train different models."""
    config = replace(gentle, log=replace(gentle.log, dir=str(tmp_path)))
    train_in_two(config)
    ranks = [torch.load(tmp_path / f"run.rank{rank}", weights_only=True) for rank in (0, 1)]
    learnt = [name for name in ranks[0] if "running" not in name and "batches" not in name]
    assert all(torch.equal(ranks[0][name], ranks[1][name]) for name in learnt)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--train.optimizer", "adamw"], r"train\.base_lr must be at most 0\.1"),
        (["--train.trainable_stages", "1"], r"train\.trainable_stages must be null"),
        (["--model.norm", "eval"], r"model\.norm must be train with init\.weights random"),
        (["--train.freeze_encoder_epochs", "2"], r"freeze_encoder_epochs must be 0"),
        (["--init.weights", "w", "--model.stages", "2", "--train.trainable_stages", "3"], "below"),
        (["--init.weights", "w", "--train.freeze_encoder_epochs", "800"], "below epochs"),
        (["--train.optimizer", "sgd"], r"train\.optimizer must be one of lars, adamw"),
    ],
)
def test_a_gentle_start_that_cannot_work(change: list[str], message: str) -> None:
    """Without it LARS' rate destroys a trained network, or noise is frozen."""
    with pytest.raises(UserError, match=message):
        load_config(["--name", "x", "--data.path", "x", *change])


def test_a_network_of_timm(tmp_path: Path) -> None:
    """Its weights, its resting stages, a frozen teacher of another architecture. Without it only
    ResNets start from weights."""
    timm = pytest.importorskip("timm")
    arch, other = "timm:test_efficientnet", "timm:test_resnet"
    for name in ("test_efficientnet", "test_resnet"):
        torch.save(timm.create_model(name).state_dict(), tmp_path / f"{name}.pth")
    config = ModelConfig(arch, dim_hidden=16, dim_out=8, num_prototypes=5)
    model = SlotCon(config, Guide(other, (3, 4), 5))
    train = TrainConfig(
        teacher="frozen",
        teacher_momentum=0.0,
        teacher_arch=other,
        teacher_weights=str(tmp_path / "test_resnet.pth"),
    )
    about = start_from(InitConfig(str(tmp_path / "test_efficientnet.pth")), model, train)
    assert about["teacher"]["sha256"] != about["sha256"]
    assert about["unused"] == ["classifier"]
    assert about["new"] == [
        "center",
        "student.projector",
        "student.grouping",
        "teacher.projector",
        "teacher.grouping",
        "predictor",
    ]
    assert model.guide is not None
    for name, net in (
        ("test_efficientnet", model.student.encoder.net),
        ("test_efficientnet", model.teacher.encoder.net),
        ("test_resnet", model.guide.encoder.net),
    ):
        source = torch.load(tmp_path / f"{name}.pth", weights_only=True)
        assert all(torch.equal(value, source[key]) for key, value in net.state_dict().items())
    model.train_stages(1)
    learning = {n for n, w in model.student.encoder.named_parameters() if w.requires_grad}
    assert learning and not any("conv_stem" in name or "blocks.0" in name for name in learning)
    with pytest.raises(UserError, match=r"torchvision has no weights of timm:test_efficientnet"):
        start_from(InitConfig("torchvision"), model)
    with pytest.raises(UserError, match=r"of another model|no weights of this model"):
        start_from(InitConfig(str(tmp_path / "test_resnet.pth")), model)


def test_what_else_a_file_of_timm_holds_is_named(tmp_path: Path) -> None:
    """Without it the line of a run's start says that all of the file was taken."""
    timm = pytest.importorskip("timm")
    net = timm.create_model("test_efficientnet").state_dict()
    file = tmp_path / "w.ckpt"
    networks = {"teacher": net, "student": {n: v + 1 for n, v in net.items()}}
    torch.save(networks | {"head": {"last.weight": torch.ones(2)}}, file)
    config = ModelConfig("timm:test_efficientnet", dim_hidden=16, dim_out=8, num_prototypes=5)
    _, about = start(file, config=config)
    assert about["unused"] == ["student", "head", "classifier"]


def test_a_whole_vit_can_rest() -> None:
    """Its last norm belongs to no stage. Without it the map that the new parts learn from moves
    while the encoder rests."""
    pytest.importorskip("timm")
    model = SlotCon(ModelConfig("timm:test_vit", dim_hidden=16, dim_out=8, num_prototypes=5))
    model.train_stages(0)
    assert not [n for n, w in model.student.encoder.named_parameters() if w.requires_grad]
    model.train_stages(1)
    assert model.student.encoder.net.norm.weight.requires_grad


STATISTICS = ((0.1, 0.2, 0.3), (0.5, 0.6, 0.7))


def test_the_start_as_teacher_gets_its_images_as_the_start_does(tmp_path: Path) -> None:
    """Without it the frozen teacher sees colours that its weights were not made for."""
    pytest.importorskip("timm")
    model = ModelConfig(
        "timm:test_vit",
        dim_hidden=16,
        dim_out=8,
        num_prototypes=5,
        group_loss_weight=1.0,
        prototype_init="kmeans",
        image_stats=STATISTICS,
    )
    train = TrainConfig(teacher="frozen", teacher_momentum=0.0)
    config = RunConfig("x", DataConfig("x"), model=model, train=train, init=InitConfig("w"))
    built = build_model(config)
    assert built.guide is not None
    assert built.guide.encoder.image_stats == built.student.encoder.image_stats == STATISTICS


@pytest.mark.parametrize("stated", [json.dumps(STATISTICS), "x", "[" * 100_000])
def test_a_teacher_of_other_statistics_is_refused(tmp_path: Path, stated: str) -> None:
    """No setting changes how a teacher of another architecture gets its images. Without it it sees
    wrong colours, or what a file says ends in a traceback."""
    timm = pytest.importorskip("timm")
    config = ModelConfig("timm:test_vit", dim_hidden=16, dim_out=8, num_prototypes=5)
    weights = timm.create_model("test_vit", num_classes=0).state_dict()
    plain, other = (tmp_path / f"{name}.safetensors" for name in ("plain", "other"))
    save_file(weights, plain)
    save_file(weights, other, {"arch": "timm:test_vit", "image_stats": stated})
    train = TrainConfig(
        teacher="frozen",
        teacher_momentum=0.0,
        teacher_arch="timm:test_vit",
        teacher_weights=str(other),
    )
    model = SlotCon(config, Guide("timm:test_vit", (4,), 5))
    with pytest.raises(UserError, match=r"^train\.teacher_weights: .* gets its images by"):
        start_from(InitConfig(str(plain)), model, train)
    with pytest.raises(UserError, match=r"^init\.weights: .* gets its images by other statistics"):
        start_from(InitConfig(str(other)), SlotCon(config))


@pytest.mark.parametrize(
    ("norm", "train", "refused"),
    [
        ("eval", {}, True),
        ("train", {"freeze_encoder_epochs": 1}, True),
        ("train", {"trainable_stages": 1}, True),
        ("train", {"trainable_stages": 2}, False),
        ("train", {}, False),
    ],
)
def test_stages_that_the_start_lacks_cannot_rest(
    encoder: dict[str, Tensor], tmp_path: Path, norm: Any, train: dict[str, int], refused: bool
) -> None:
    """Weights up to stage 2 leave stages 3 and 4 new. Without it noise rests, and so do its
    statistics."""
    early = {n: v for n, v in encoder.items() if not n.startswith(("layer3", "layer4"))}
    save_file(early, tmp_path / "w.safetensors", {"arch": "resnet18", "stages": "2"})
    model = SlotCon(replace(SMALL, norm=norm))
    init, settings = InitConfig(str(tmp_path / "w.safetensors")), TrainConfig(**train)
    if not refused:
        assert "student.encoder.layer3" in start_from(init, model, settings)["new"]
        return
    with pytest.raises(UserError, match=r"^init\.weights: without student\.encoder\.layer3"):
        start_from(init, model, settings)


@pytest.mark.parametrize("stated", ["[" * 100_000, "[[NaN, 0, 0], [1, 1, 1]]", "\x1b[2J"])
def test_statistics_that_a_file_cannot_mean(stated: str) -> None:
    """Export and transfer read them. Without it they end in a traceback, normalise by NaN, or clear
    the user's terminal."""
    with pytest.raises(UserError, match=r"^timm:test_vit: damaged: image_stats [^\x1b]*$"):
        image_stats(Backbone("timm:test_vit", {}, {"image_stats": stated}))
