"""Configurations are data: no file runs code, grows, or ends in a traceback."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import yaml

from model import ModelConfig, SlotCon
from pipeline.errors import UserError
from tests import ROOT
from tests.helpers.betons import varied, write_beton
from tests.helpers.checkpoints import rewrite_record, write_checkpoint
from tests.helpers.coloured import write_scenes
from train.config import SETTINGS
from train.run.settings import Settings, flatten, to_dict, to_yaml
from train.run.text import DEEPEST, LARGEST_YAML, MOST_VALUES, read_text, read_yaml
from transfer.command import settings_of
from transfer.detection.config import DetectionConfig
from transfer.segmentation.config import SegmentationConfig

ALL: dict[str, Settings[Any]] = {
    "pretrain": SETTINGS,
    "detection": settings_of(DetectionConfig),
    "segmentation": settings_of(SegmentationConfig),
}
_OPTIM = {"steps": 10, "batch_size": 2, "lr": 0.1}
WHOLE: dict[str, dict[str, Any]] = {
    "pretrain": {"name": "x", "data": {"path": "x.beton"}},
    "detection": {"name": "x", "data": {"root": "coco"}, "optim": _OPTIM},
    "segmentation": {"name": "x", "data": {"root": "voc"}, "optim": _OPTIM},
}
"""The shortest configurations."""


def refusal(argv: list[str], settings: Settings[Any] = SETTINGS) -> str:
    with pytest.raises(UserError) as refused:
        settings.load(argv)
    assert str(refused.value).isprintable() and len(str(refused.value)) < 1000
    return str(refused.value)


# ---- nothing is imported ----

SPECS: tuple[dict[str, Any], ...] = (
    {"data": {"class_path": "planted.X"}},
    {"data": {"class_path": "planted.X", "init_args": {"path": "x"}}},
    {"data": "planted.X"},
    {"data": '{"class_path": "planted.X"}'},
    {"class_path": "planted.X"},
    {"train": {"epochs": {"class_path": "planted.X"}}},
    {"train": {"view_sizes": [{"class_path": "planted.X"}]}},
    {"log": {"trackers": ["planted.X", {"class_path": "planted.X"}]}},
    {"data": {"__path__": "planted.py", "path": "x"}},
    {"data": "planted.yaml"},
    {"config": "planted.yaml"},
    {"print_config": "planted.X"},
)
"""What made jsonargparse import a module or open a file."""
TEXTS = ("!!python/name:planted.X", "!!python/object/apply:planted.X []", "!!python/module:planted")


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A module on the path that leaves a mark when it is imported."""
    (tmp_path / "planted.py").write_text(
        f"open({str(tmp_path / 'mark')!r}, 'w').close()\nclass X: pass\n"
    )
    (tmp_path / "planted.yaml").write_text("path: planted.beton\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    assert "planted" not in sys.modules and not (tmp_path / "mark").exists()


@pytest.mark.parametrize("task", ALL)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_no_value_is_imported_or_opened(planted: Path, task: str, spec: dict[str, Any]) -> None:
    """Without it a configuration from elsewhere runs the code that it names."""
    content = WHOLE[task] | spec
    settings = ALL[task]
    (planted / "sweep.yaml").write_text(yaml.safe_dump(content))
    assert "sweep.yaml: " in refusal(["--config", "sweep.yaml"], settings)
    refusal(["--config", json.dumps(content)], settings)
    with pytest.raises(UserError):
        settings.from_dict(content)
    with pytest.raises(UserError):
        settings.load([], content)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--data.class_path", "planted.X"],
        ["--data.init_args.path", "x", "--data.class_path=planted.X"],
        ["--data", "planted.X"],
        ["--data", '{"class_path": "planted.X"}'],
        ["--data.help", "planted.X"],
        ["--class_path", "planted.X"],
        ["--train.view_sizes", '[{"class_path": "planted.X"}]'],
        ["--train.epochs", "!!python/name:planted.X"],
        ["--print_config=planted.X"],
        ["planted.X"],
    ],
)
def test_no_argument_is_imported(planted: Path, arguments: list[str]) -> None:
    """Without it `--data planted.X` runs a file of the present folder."""
    refusal(["--name", "x", "--data.path", "x", *arguments])


@pytest.mark.parametrize("tagged", TEXTS)
def test_no_tag_is_followed(planted: Path, tagged: str) -> None:
    """Without it YAML makes objects of any class."""
    for content in (tagged, f"name: {tagged}", f"data: {{path: {tagged}}}"):
        (planted / "sweep.yaml").write_text(content)
        assert "sweep.yaml: " in refusal(["--config", "sweep.yaml"])


_PRETRAIN = (
    "train.pretrain --data.path x.beton --log.dir runs --model.arch resnet18 --model.dim_hidden 8 "
    "--train.batch_size 2 --views.size 64 --log.trackers []"
)
_SEGMENTATION = (
    "transfer.segmentation --name z --optim.steps 2 --optim.batch_size 2 --optim.lr 1 "
    "--data.train_images train/images --data.train_labels train/labels --data.val_images images "
    "--data.val_labels labels --init.weights runs/x --init.arch resnet18 --log.dir runs"
)
COMMANDS = (
    "tools.report runs/x --out out.html",
    "tools.compare runs/x other --out out.html",
    "tools.export runs/x --to timm --out out.safetensors",
    "tools.benchmark cost --config sweep.yaml --data x.beton",
    "tools.benchmark step --synthetic --config sweep.yaml",
    "tools.benchmark all --config sweep.yaml --data x.beton",
    "evaluation.unsupervised_segmentation --checkpoint runs/x --images images --labels labels",
    "evaluation.probe knn --checkpoint runs/x --images images --labels labels "
    "--train-images train/images --train-labels train/labels",
    "evaluation.slots --checkpoint runs/x --data x.beton",
    "evaluation.pictures grouping --checkpoint runs/x --data x.beton --out out.png",
    "evaluation.pictures prototypes --checkpoint runs/x --data x.beton --out out.png",
    "evaluation.pictures views --checkpoint runs/x --data x.beton --out out.png",
    "evaluation.pictures attention --run runs/x --data x.beton --out out.png",
    "train.pretrain --config sweep.yaml",
    "train.pretrain --config sweep.yaml --print_config",
    "train.pretrain --name x --data.path x --data section.yaml",
    f"{_PRETRAIN} --name x --resume auto",
    f"{_PRETRAIN} --name y --resume runs/x",
    "transfer.detection --config sweep.yaml",
    "transfer.detection --evaluate runs/x",
    "transfer.segmentation --config sweep.yaml --print_config",
    "transfer.segmentation --evaluate runs/x",
    f"{_SEGMENTATION}",
    "transfer.table runs/x",
)
"""Every command that takes a run or a configuration."""

_RUN_ALL = """
import contextlib, io, json, runpy, sys
for command in json.load(sys.stdin):
    module, *sys.argv[1:] = command.split()
    sys.argv[0], said = module, io.TextIOWrapper(io.BytesIO(), "utf-8")
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            runpy.run_module(module, run_name="__main__", alter_sys=False)
        code = 0
    except SystemExit as ended:
        code = ended.code
    except BaseException as error:
        code = repr(error)
    said.flush()
    print("ENDED", json.dumps([command, code, said.buffer.getvalue().decode()]), flush=True)
"""


def test_no_command_imports_what_a_run_names(tmp_path: Path) -> None:
    """Without it a run folder from elsewhere runs its own code in the command that opens it."""
    model = ModelConfig("resnet18", dim_hidden=8, dim_out=4, num_prototypes=4)
    checkpoints = tmp_path / "runs" / "x" / "checkpoints"
    checkpoints.mkdir(parents=True)
    step = write_checkpoint(checkpoints / "step_1", SlotCon(model), model)
    spec = {"class_path": "planted.X", "init_args": {"path": "x"}}
    rewrite_record(step, config={"name": "x", "data": spec})
    (tmp_path / "runs/x/config.yaml").write_text(yaml.safe_dump({"name": "x", "data": spec}))
    (tmp_path / "runs/x/metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump({"name": "x", "data": spec}))
    (tmp_path / "section.yaml").write_text(yaml.safe_dump(spec))
    (tmp_path / "planted.py").write_text("open('mark', 'w').close()\nclass X: pass\n")
    shutil.copytree(tmp_path / "runs/x", tmp_path / "other")
    write_beton(tmp_path / "x.beton", varied(4))
    write_scenes(tmp_path, [np.array([[0, 1], [1, 0]])] * 2)
    (tmp_path / "classes.json").write_text('["red", "green"]')
    write_scenes(tmp_path / "train", [np.array([[0, 1], [0, 0]])] * 2)
    done = subprocess.run(
        [sys.executable, "-c", _RUN_ALL],
        input=json.dumps(COMMANDS), capture_output=True, text=True, cwd=tmp_path, check=False,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{tmp_path}", "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith("ENDED ")]
    ended = [json.loads(line.removeprefix("ENDED ")) for line in lines]
    assert [command for command, _, _ in ended] == [*COMMANDS], done.stderr[-2000:]
    assert not (tmp_path / "mark").exists()
    shown = {"tools.report", "tools.compare", "transfer.table"}  # they do not use the record
    for command, code, said in ended:
        reads = command.split()[0] not in shown
        assert code == (2 if reads else 0), (command, code, said)
        assert not reads or "unknown key data.class_path" in said, (command, said)


# ---- texts that grow ----


def bomb(levels: int) -> str:
    """Ten lines of aliases for 9**levels values."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, levels)]
    return "\n".join(lines)


def chain(levels: int) -> str:
    """Each line is one list deeper than the line before."""
    return "\n".join(["a0: &a0 [x]", *(f"a{n}: &a{n} [*a{n - 1}]" for n in range(1, levels))])


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (bomb(10), f"more than {MOST_VALUES:,} values"),
        ("a: &a {x: 1}\n" + bomb(9).replace("x,", "{<<: *a0},"), "stands for nothing before it"),
        (chain(100), f"more than {DEEPEST} lists and mappings inside each other"),
        ("[" * 100_000, f"more than {DEEPEST} lists and mappings inside each other"),
        ("a: " + "{a: " * 1000, f"more than {DEEPEST} lists and mappings inside each other"),
        ("- " * 1000, f"more than {DEEPEST} lists and mappings inside each other"),
        ("a: [" + "1, " * MOST_VALUES + "]", f"more than {MOST_VALUES:,} values"),
        ("a: &a [*a]", "the alias *a stands for nothing before it"),
        ("a: " + "9" * 5000, "is no integer of 64 bits"),
        ("a: 0x" + "f" * 5000, "is no integer of 64 bits"),
        ("a: 0x_", "is no integer of 64 bits"),
        ("a: 010", "line 1: 010: write a number in plain digits"),  # 8 in YAML 1.1
        ("a: 1:30", "line 1: 1:30: write a number in plain digits"),  # 90 in YAML 1.1
        ("a: b\0c", "special characters are not allowed"),
        ("a: !!timestamp x", "only plain values are read"),
        ("a: 1\nb: 2\na: 3", "line 3: a is given a second time"),
        ("a: {b: 1, b: 2}", "line 1: b is given a second time"),
        ("a: 1\n---\nb: 2", "but found another document"),
        ("#" * (LARGEST_YAML + 1), f"more than {LARGEST_YAML:,} bytes"),
    ],
)
def test_texts_that_grow_or_hide_are_refused(tmp_path: Path, content: str, says: str) -> None:
    """Without it ten lines fill the memory, or a value is lost without a word."""
    with pytest.raises(UserError, match=r"^name: ") as refused:
        read_yaml(content, "name")
    assert says in str(refused.value) and str(refused.value).isprintable()
    file = tmp_path / "run.yaml"
    file.write_text(content)
    assert f"{file}: " in refusal(["--config", str(file)])


def test_aliases_within_the_limits_are_read() -> None:
    """Anchors are common in YAML files."""
    content = "base: &b {x: 1, y: [1, 2]}\nother: {<<: *b, x: 3}\nsame: *b\nfew: 1e-3\n"
    base = {"x": 1, "y": [1, 2]}
    assert read_yaml(content, "") == {
        "base": base, "other": base | {"x": 3}, "same": base, "few": 1e-3,
    }  # fmt: skip
    assert read_yaml("", "") is None


def test_a_text_in_a_value_is_no_bomb_either() -> None:
    """A list may be given as a text, which is parsed too."""
    deep = "[" * 4000
    assert "view_sizes must be" in refusal(["--name", "x", "--train.view_sizes", deep])
    with pytest.raises(UserError, match=r"train\.view_sizes must be"):
        SETTINGS.from_dict(WHOLE["pretrain"] | {"train": {"view_sizes": deep}})
    with pytest.raises(UserError, match="more than 20 keys inside each other"):
        SETTINGS.from_dict({"a": json.loads('{"a":' * 900 + "1" + "}" * 900)})


def test_files_that_are_no_text_are_refused(tmp_path: Path) -> None:
    """Without it a pipe stops a command for ever, and another encoding ends in a traceback."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="pipe: not a regular file"):
        read_text(tmp_path / "pipe", 10)
    with pytest.raises(UserError, match=r"/dev/zero: too large: .* at most 10 are read"):
        read_text(Path("/dev/zero"), 10)
    with pytest.raises(UserError, match="Is a directory"):
        read_text(tmp_path, 10)
    file = tmp_path / "run.yaml"
    file.write_bytes("name: é".encode("latin-1"))
    assert "run.yaml: not UTF-8" in refusal(["--config", str(file)])
    file.write_bytes(b"\xef\xbb\xbfname: x\ndata: {path: y}\n")
    assert SETTINGS.load(["--config", str(file)])[0].name == "x"
    with file.open("ab") as sparse:
        sparse.truncate(1 << 40)
    assert f"at most {LARGEST_YAML:,} are read" in refusal(["--config", str(file)])


def test_a_shell_may_give_a_pipe() -> None:
    """`--config <(…)` is one."""
    reading, writing = os.pipe()
    os.write(writing, b"name: x\ndata: {path: y}\n")
    os.close(writing)
    assert SETTINGS.load(["--config", f"/dev/fd/{reading}"])[0].data.path == "y"
    os.close(reading)


# ---- values ----


def numbers(settings: Settings[Any]) -> Iterator[tuple[str, Any]]:
    """Each key whose values are numbers, and the type."""

    def below(kind: Any, prefix: str) -> Iterator[tuple[str, Any]]:
        for field in fields(kind):
            if is_dataclass(field.type):
                yield from below(field.type, f"{prefix}{field.name}.")
            elif "int" in str(field.type) or "float" in str(field.type):
                yield f"{prefix}{field.name}", field.type

    return below(settings.kind, "")


@pytest.mark.parametrize("task", ALL)
@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan", "1e300", "1e12", "9" * 5000, "-1e300"])
def test_no_number_is_without_bounds(task: str, value: str) -> None:
    """Without it a time of 1e300 overflows, and sizes beyond any memory end in a traceback."""
    settings = ALL[task]
    known = [f"--{k}={v}" for k, v in flatten(WHOLE[task]).items()]
    for key, kind in numbers(settings):
        count = len([arg for arg in get_args(kind) if arg is not ...])
        listed = "tuple" in str(kind)
        given = f"[{', '.join([value] * count)}]" if listed else value
        given = f"[[0, {value}]]" if "tuple[tuple" in str(kind) else given
        for each in (given, str(int(1e12)) if value == "1e12" and not listed else given):
            assert refusal([*known, f"--{key}={each}"], settings).startswith(f"{key} must be"), key


def test_bounds_are_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    """Else a user meets them only by their errors."""
    with pytest.raises(SystemExit):
        SETTINGS.load(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "Must be a positive number. Must be at most 100,000. (type: float, default: 10)" in said


@pytest.mark.parametrize("task", ALL)
def test_defaults_are_read_back(task: str, tmp_path: Path) -> None:
    """Without it a checkpoint of the default recipe cannot be opened."""
    config = ALL[task].from_dict(WHOLE[task])
    (tmp_path / "x.yaml").write_text(to_yaml(config))
    assert ALL[task].load(["--config", str(tmp_path / "x.yaml")])[0] == config
    assert ALL[task].from_dict(json.loads(json.dumps(to_dict(config)))) == config


@pytest.mark.parametrize("name", ["1e3", "20240131", "null", "on", "2024-01-31", ".5", "0x1f", "~"])
def test_names_that_look_like_numbers_are_read_back(name: str) -> None:
    """A run may have the name 1e3. Without it its config.yaml is refused: 1000.0 is no name."""
    config, _ = SETTINGS.load(["--name", "x", "--data.path", name])
    assert read_yaml(to_yaml(config), "")["data"]["path"] == name
    assert SETTINGS.load(["--config", to_yaml(config)])[0] == config


def test_names_that_are_no_text_in_unicode_are_read_back(tmp_path: Path) -> None:
    """Linux allows any bytes in a path. Without it the report of such a run fails."""
    config, _ = SETTINGS.load(["--name", "x", "--data.path", os.fsdecode(b"caf\xe9.beton")])
    assert read_yaml(to_yaml(config), "")["data"]["path"] == config.data.path
    assert SETTINGS.from_dict(json.loads(json.dumps(to_dict(config)))) == config


def test_print_config_shows_all_values(capsys: pytest.CaptureFixture[str]) -> None:
    """It makes a first file: with values that are not given yet, and with those that are."""
    with pytest.raises(SystemExit) as ended:
        SETTINGS.load(["--train.epochs", "7", "--print_config"])
    assert not ended.value.code
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["name"] is None and shown["data"]["path"] is None and shown["resume"] is None
    assert shown["train"]["epochs"] == 7 and shown["train"]["batch_size"] == 512


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--train.epochs"], "--train.epochs needs a value"),
        (["--train.epochs", "--name", "x"], "--train.epochs needs a value"),
        (["epochs"], "unknown argument epochs"),
        (["--data", "{path: x, on_corrupt: 3}"], "data.on_corrupt must be one of stop, replace"),
        (["--a\nb", "x"], "unknown key 'a\\nb'"),
        (["--data.path", "x", "--name", "x\ny"], "name must be made of"),
        (["--data.path", "x", "--name", "-x"], "name must be made of"),
        (["--data.path", "x", "--name", ".x"], "name must be made of"),
        (["--data.path", "x", "--name", "[" * 3000], "name must be made of"),
        (["--data.path", "x", "--name", "x" * 300], "name must be at most 200 characters long"),
        (["--data.path", "x" * 5000], "data.path must be text"),
        (["--train.epochs", "-3", "--print_config"], "train.epochs must be at least 1, not -3"),
        (
            ["--name", "x" * 300, "--print_config"],
            f"name must be at most 200 characters long, not '{'x' * 99}…",
        ),
        (
            ["--data.path", "x", "--name", "x", "--train.view_sizes", "[[0, 9]]", "--print_config"],
            "train.view_sizes",
        ),
        (
            ["--data.path", "x", "--name", "x", "--log.trackers", "[wandb, wandb]"],
            "log.trackers must be without repetition",
        ),
        (["--log.trackers+", "x"], "unknown key log.trackers+ (did you mean log.trackers?)"),
    ],
)
def test_command_lines_are_refused_in_one_line(arguments: list[str], says: str) -> None:
    """Without it a forgotten value swallows the next option."""
    assert refusal(arguments).startswith(says)


def test_the_command_line_wins_and_then_the_later_file(tmp_path: Path) -> None:
    """Without it an option before --config is lost, and a run is another one than was asked for."""
    (tmp_path / "all.yaml").write_text("name: x\ndata: {path: y}\ntrain: {epochs: 7, seed: 1}\n")
    (tmp_path / "train.yaml").write_text("epochs: 8\nwarmup_epochs: 2\n")
    argv = ["--train.epochs=9", "--config", str(tmp_path / "all.yaml")]
    assert SETTINGS.load(argv)[0].train.epochs == 9
    assert SETTINGS.load(argv[1:])[0].train.epochs == 7
    train = SETTINGS.load([*argv, "--train", str(tmp_path / "train.yaml")])[0].train
    assert (train.epochs, train.warmup_epochs, train.seed) == (9, 2, 1)
    train = SETTINGS.load([*argv[1:], "--train", str(tmp_path / "train.yaml")])[0].train
    assert (train.epochs, train.warmup_epochs, train.seed) == (8, 2, 1)
    under = {"name": "z", "data": {"path": "z"}, "train": {"seed": 5, "momentum": 0.5}}
    config = SETTINGS.load(argv, under)[0]
    assert (config.name, config.train.seed, config.train.momentum) == ("x", 1, 0.5)


def test_half_of_a_pair_of_characters_is_refused(tmp_path: Path) -> None:
    """Without it a path that no file can have ends in a traceback of the operating system's."""
    (tmp_path / "half.yaml").write_text('name: x\ndata: {path: "a\\uD800b"}\n')
    assert "data.path must be text" in refusal(["--config", str(tmp_path / "half.yaml")])
