"""The configuration: which values are read, which are refused, and the messages."""

import json
from pathlib import Path

import pytest
import yaml
from accelerate.tracking import LOGGER_TYPE_TO_CLASS

from pipeline.errors import UserError
from tests import ROOT
from train.config import TRACKERS, from_dict, load_config
from train.pretrain import main
from train.run.settings import flatten, to_dict, to_yaml

CONFIGS = ROOT / "configs"
BASE = ["--name", "test", "--data.path", "some.beton"]


def refusal(argv: list[str]) -> str:
    with pytest.raises(UserError) as refused:
        load_config(argv)
    return str(refused.value)


def test_command_line_wins_over_file_over_defaults(tmp_path: Path) -> None:
    """Each layer must override the one below. Otherwise a run silently uses wrong values."""
    file = tmp_path / "run.yaml"
    file.write_text("name: a\ndata: {path: x}\ntrain: {epochs: 7, weight_decay: 1e-4, seed: 3}\n")
    config, resume = load_config(["--config", str(file), "--train.seed", "5", "--resume", "auto"])
    assert (config.train.epochs, config.train.weight_decay, config.train.seed) == (7, 1e-4, 5)
    assert config.train.batch_size == 512 and resume == "auto"


def test_the_command_line_wins_wherever_it_stands(tmp_path: Path) -> None:
    """Without it `--train.epochs 2 --config FILE` trains the file's epochs into the file's run."""
    first, second, part = (tmp_path / f"{name}.yaml" for name in ("first", "second", "part"))
    first.write_text("name: a\ndata: {path: x}\ntrain: {epochs: 7, seed: 3, batch_size: 8}\n")
    second.write_text("train: {epochs: 9, seed: 4, warmup_epochs: 1}\n")
    part.write_text("eta: 0.5\nseed: 5\n")
    files = [f"--config={first}", "--config", str(second), "--train", str(part)]
    own = ["--train.epochs", "2", "--name", "trial", "--train", "{warmup_epochs: 0}"]
    middle = [*files[:1], *own, *files[1:]]
    for argv in (own + files, files + own, middle):
        config, _ = load_config(argv)
        train = config.train
        assert (config.name, train.epochs, train.warmup_epochs) == ("trial", 2, 0)
        assert (train.seed, train.batch_size, train.eta) == (5, 8, 0.5)  # a later file wins


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("train: {epochs: 3}\ntrain: {seed: 1}\n", "line 4: train is given a second time"),
        ("train: {epochs: 3, epochs: 4}\n", "line 3: epochs is given a second time"),
        ('train: {epochs: 3, "epochs": 4}\n', "line 3: epochs is given a second time"),
        ("train: {epochs: 3}\ntrain.epochs: 4\n", "train.epochs is given 2 times"),
    ],
)
def test_a_key_that_is_given_twice_is_refused(tmp_path: Path, content: str, says: str) -> None:
    """Without it the first value is lost without a word."""
    file = tmp_path / "run.yaml"
    file.write_text(f"name: a\ndata: {{path: x}}\n{content}")
    message = refusal(["--config", str(file)])
    assert str(file) in message and says in message and "\n" not in message


@pytest.mark.parametrize("value", ["wandb", "[wandb]", '["wandb"]'])
def test_one_tracker_needs_no_brackets(tmp_path: Path, value: str) -> None:
    """Without it the commonest choice of a tracker is refused."""
    file = tmp_path / "run.yaml"
    file.write_text(f"log: {{trackers: {value}}}\n")
    assert load_config([*BASE, "--log.trackers", value])[0].log.trackers == ("wandb",)
    assert load_config([*BASE, "--config", str(file)])[0].log.trackers == ("wandb",)


def test_round_trip(tmp_path: Path) -> None:
    """A checkpoint and config.yaml must give the same configuration again."""
    config, _ = load_config(
        [*BASE, "--views.blur_sigma", "[0.5, 1]", "--log.trackers", "[]", "--train.max_steps", "3"]
    )
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config))
    assert load_config(["--config", str(file)]) == (config, None)


@pytest.mark.parametrize(
    ("name", "epochs", "prototypes"),
    [
        ("coco_r50_800ep", 800, 256),
        ("cocoplus_r50_800ep", 800, 256),
        ("imagenet_r50_100ep", 100, 2048),
        ("imagenet_r50_200ep", 200, 2048),
    ],
)
def test_recipes_are_the_authors(name: str, epochs: int, prototypes: int) -> None:
    """One wrong value here would waste 800 epochs."""
    config, _ = load_config(["--config", str(CONFIGS / f"{name}.yaml")])
    train, model = config.train, config.model
    assert (config.name, train.epochs, model.num_prototypes) == (name, epochs, prototypes)
    assert (model.arch, model.dim_hidden, model.dim_out) == ("resnet50", 4096, 256)
    assert (train.batch_size, train.base_lr, train.warmup_epochs) == (512, 1.0, 5)
    assert (train.warmup_multiplier, train.momentum, train.weight_decay) == (100, 0.9, 1e-5)
    assert (train.eta, train.teacher_momentum) == (0.001, 0.99)
    temperatures = (model.teacher_temp, model.student_temp, model.contrast_temp)
    assert temperatures == (0.07, 0.1, 0.2)
    assert (model.center_momentum, model.group_loss_weight) == (0.9, 0.5)
    assert (config.views.size, config.views.min_scale) == (224, 0.08)
    assert config.efficiency.precision == "fp16"


ABLATIONS = {
    "k128": {"model.num_prototypes": 128},
    "k512": {"model.num_prototypes": 512},
    "k1024": {"model.num_prototypes": 1024},
    "lambda_0.3": {"model.group_loss_weight": 0.3},
    "lambda_0.7": {"model.group_loss_weight": 0.7},
    "lambda_1.0": {"model.group_loss_weight": 1.0},
    "teacher_temp_0.04": {"model.teacher_temp": 0.04},
    "batch_256": {"train.batch_size": 256, "log.checkpoint_every": 4620},
    "batch_1024": {"train.batch_size": 1024, "log.checkpoint_every": 1150},
    "slot_regression": {"model.slot_loss": "regression"},
    "align_projections": {"model.align": "projections"},
    "image_level_512": {"model.image_loss_weight": 0.5},
    "image_level_1024": {
        "model.image_loss_weight": 0.5,
        "train.batch_size": 1024,
        "log.checkpoint_every": 1150,
    },
    "no_geometry": {"views.geometry": False},
    "progressive_160_224": {"train.view_sizes": [[0, 160], [0.5, 224]]},
}
"""Differences from the recipe: one entry for each row of the paper's tables 6 and 8 except the
defaults, and one for each ablation that is not in the paper."""


@pytest.mark.parametrize(
    ("name", "stages", "cells"),
    [("scenes_cpu", (2,), 512), ("camvid_cpu", (2, 3, 4), 128)],
)
def test_fast_recipes(name: str, stages: tuple[int, ...], cells: int) -> None:
    """Without it a recipe that docs/fast.md describes is refused, or is another one."""
    config, _ = load_config(["--config", str(CONFIGS / "fast" / f"{name}.yaml")])
    model, train = config.model, config.train
    assert (model.supervised, model.targets, model.cell_loss_weight) == (stages, "balanced", 1)
    assert (train.teacher, train.teacher_momentum, config.views.size) == ("student", 0, 64)
    assert train.batch_size * model.cells == cells
    assert {model.at(stage).cells * train.batch_size for stage in stages[:-1]} <= {512}
    assert train.base_lr * train.batch_size / 256 == 2


def test_every_ablation_is_listed() -> None:
    """Each ablation must be tested here, and each one that is named must exist."""
    assert {file.stem for file in (CONFIGS / "ablations").iterdir()} == set(ABLATIONS)


@pytest.mark.parametrize("name", ABLATIONS)
def test_ablations_change_one_thing(name: str) -> None:
    """A second difference from the recipe would be attributed to the ablated part."""
    recipe = ["--config", str(CONFIGS / "coco_r50_800ep.yaml")]
    file = CONFIGS / "ablations" / f"{name}.yaml"
    before, _ = load_config(recipe)
    config, _ = load_config([*recipe, "--config", str(file)])
    old, new = flatten(to_dict(before)), flatten(to_dict(config))
    changed = {key: value for key, value in new.items() if value != old[key]}
    assert changed == {"name": f"coco_r50_800ep_{name}", **ABLATIONS[name]}
    assert f"--config configs/ablations/{name}.yaml" in file.read_text()


def test_every_config_loads() -> None:
    """The README promises that each config in the repository works."""
    for file in CONFIGS.glob("*.yaml"):
        load_config(["--config", str(file)])


@pytest.mark.parametrize(
    ("argument", "value", "says"),
    [
        ("--train.epoch", "3", "unknown key train.epoch (did you mean train.epochs?)"),
        ("--train.epochs", "many", "train.epochs must be a whole number, not many"),
        ("--train.epochs", "0", "train.epochs must be at least 1, not 0"),
        ("--train.batch_size", "1.5", "train.batch_size must be a whole number, not 1.5"),
        ("--train.base_lr", ".nan", "train.base_lr must be a positive number, not nan"),
        ("--train.base_lr", "-1", "train.base_lr must be"),
        ("--train.warmup_epochs", "800", "train.warmup_epochs must be at least 0 and less than"),
        ("--train.teacher_momentum", "1.1", "train.teacher_momentum must be"),
        ("--train.max_steps", "0", "train.max_steps must be"),
        ("--train.seed", "-1", "train.seed must be"),
        ("--model.arch", "vit", "model.arch must be"),
        ("--model.num_prototypes", "0", "model.num_prototypes must be"),
        ("--model.slot_loss", "byol", "model.slot_loss must be one of contrastive, regression, n"),
        ("--model.align", "features", "model.align must be one of assignments, projections"),
        ("--model.image_loss_weight", "-1", "model.image_loss_weight must be 0 or a positive"),
        ("--views.geometry", "maybe", "views.geometry must be true or false, not maybe"),
        ("--views.min_scale", "2", "views.min_scale must be"),
        ("--views.blur", "[1, 2, 3]", "views.blur must be"),
        ("--data.backend", "magic", "data.backend must be one of"),
        ("--data.crops", "gpu", "data.crops must be one of"),
        ("--data.order", "shuffled", "data.order must be one of"),
        ("--data.window_gb", "0", "data.window_gb must be a positive number, not 0"),
        ("--data.threads", "-1", "data.threads must be"),
        ("--efficiency.precision", "fp8", "efficiency.precision must be one of"),
        ("--efficiency.accumulation", "0", "efficiency.accumulation must be"),
        ("--log.trackers", "[paper]", "log.trackers must be some of"),
        ("--log.every", "0", "log.every must be"),
        ("--log.keep", "0", "log.keep must be"),
        ("--name", "a/b", "name must be made of"),
        ("--name", "..", "name must be made of"),
    ],
)
def test_impossible_values_are_named(argument: str, value: str, says: str) -> None:
    """Without the key and the value in one line, a user of fifty settings does not know which one
    to change."""
    message = refusal([*BASE, argument, value])
    assert message.startswith(says) and "\n" not in message


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"trian": {"epochs": 3}}, "unknown key trian.epochs (did you mean train.epochs?)"),
        ({"train": {"epoch": 3}}, "unknown key train.epoch (did you mean train.epochs?)"),
        ({"efficiency": {"precision": False}}, 'in YAML, "no" needs its quotes'),
        ([1, 2], "run.yaml holds no keys and values"),
        ("train: [", "--config: "),
        ({"log": 3}, "log must be keys and values, not 3"),
        ({"log": None}, "log must be keys and values, not null"),
        ({"train": {"base_lr": None}}, "train.base_lr must be a number, not null"),
        ({"train": {"max_steps": "x"}}, "train.max_steps must be a whole number or null, not x"),
        ({"views": {"blur": [1]}}, "views.blur must be a list [a number, a number], not [1]"),
    ],
)
def test_wrong_files_are_refused(tmp_path: Path, content: object, says: str) -> None:
    """A typing error in a file must not silently leave a default in place."""
    file = tmp_path / "run.yaml"
    if isinstance(content, dict):
        content = {"name": "a", "data": {"path": "x"}} | content
    file.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    message = refusal(["--config", str(file)])
    assert says in message and "\n" not in message


def test_masks_that_cannot_be_are_refused() -> None:
    """Without it a run would end with a traceback, at its first batch or at the first one of a
    later size of its views.
    """
    masked = [*BASE, "--views.mask_ratio", "0.3"]
    nothing = refusal([*masked, "--views.mask_ratio_spread", "0.3"])
    assert nothing.startswith("views.mask_ratio must be such that") and "\n" not in nothing
    size = refusal([*masked, "--views.mask_cell", "20"])
    assert size == "views.size must be a multiple of mask_cell (20), not 224"
    grown = ["--train.view_sizes", "[[0, 160], [0.5, 224]]", "--views.mask_cell", "56"]
    assert refusal([*masked, *grown]) == (
        "train.view_sizes has views of 160 pixels: size must be a multiple of mask_cell (56),"
        " not 160"
    )


def test_compiled_blocks_are_not_recomputed() -> None:
    """The compiler chooses the activations to keep, so checkpointing would save no memory."""
    both = ["--efficiency.compile", "true", "--efficiency.checkpointing", "true"]
    assert "checkpointing must be false with compile" in refusal([*BASE, *both])


def test_missing_values_and_files_are_named() -> None:
    """The data path has no default, and a missing --config must not start a run with defaults."""
    assert refusal([]).startswith("missing: name, data.path; set each in the --config file or as")
    assert refusal(["--name", "a"]).startswith("missing: data.path; set each in")
    assert "does not exist" in refusal(["--config", "no/such.yaml"])


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    """ "Does not exist" would be false for a folder, another encoding, or a forgotten value."""
    (tmp_path / "latin.yaml").write_bytes(b"name: caf\xe9\n")
    assert refusal(["--config", str(tmp_path)]).endswith(f"{tmp_path}: Is a directory")
    latin = refusal(["--config", str(tmp_path / "latin.yaml")])
    assert "latin.yaml: not UTF-8" in latin and "\n" not in latin
    assert refusal(["--config"]) == "--config needs a value"
    assert refusal(["--train", "--data.path", "x"]) == "--train needs a value"
    assert refusal([*BASE, "--train", "3"]) == "--train: 3 is no file of keys and values"


def test_command_prints_one_line_and_exits_with_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Scripts rely on this: no traceback, no usage text, exit code 2."""
    monkeypatch.setattr("sys.argv", ["pretrain", *BASE, "--model.arch", "vit"])
    with pytest.raises(SystemExit) as ended:
        main()
    output = capsys.readouterr()
    assert ended.value.code == 2 and output.out == ""
    assert output.err.startswith("error: model.arch must be") and output.err.count("\n") == 1


def test_trackers_are_those_of_accelerate() -> None:
    """The names stand in the configuration, so that --help does not import Accelerate. Without it
    a tracker that Accelerate gains or loses is refused or fails late.
    """
    assert list(TRACKERS) == sorted(LOGGER_TYPE_TO_CLASS)
