"""The console command `slotstream NAME`, beside `python -m MODULE`."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import commands
from pipeline.commands import COMMANDS, arguments, as_called
from slotstream.__main__ import main
from tests import ROOT
from tests.test_start import COMMANDS as MODULES
from train.config import load_config
from train.run.provenance import provenance


@pytest.fixture(autouse=True)
def called_by_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `main` changes for the whole process is put back."""
    monkeypatch.setitem(commands._called, "by name", False)


@pytest.fixture
def called_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(commands._called, "by name", True)


def test_every_command_has_a_name() -> None:
    """Without it a new command works from the source tree alone: the package has no other way."""
    assert {command.module for command in COMMANDS.values()} == {*MODULES} - {"slotstream"}


def test_the_list_fits_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without it the first lines of --help scroll away on a screen of 24 lines."""
    monkeypatch.setattr(sys, "argv", ["slotstream", "--help"])
    with pytest.raises(SystemExit) as ended:
        main()
    lines = capsys.readouterr().out.splitlines()
    assert ended.value.code == 0
    assert len(lines) <= 24 and max(map(len, lines)) <= 80
    assert [name for name in COMMANDS if not any(f"  {name} " in line for line in lines)] == []


def test_the_list_imports_next_to_nothing() -> None:
    """Without it `slotstream --help` takes longer than a third of a second."""
    code = (
        "import sys; sys.argv = ['slotstream', '--help']; before = {*sys.modules}\n"
        "from slotstream.__main__ import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "tops = {name.partition('.')[0] for name in {*sys.modules} - before}\n"
        "print(tops - sys.stdlib_module_names)"
    )
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    imported = process.stdout.splitlines()[-1]
    assert set(re.findall(r"\w+", imported)) == {"slotstream", "pipeline"}


@pytest.mark.parametrize("name", COMMANDS)
def test_help_says_the_name_that_was_called(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without it --help tells a user of the installed package to run modules that it has not."""
    monkeypatch.setattr(sys, "argv", ["slotstream", *name.split(), "--help"])
    module = COMMANDS[name].module
    executed = f"{module}.__main__" if (ROOT / module.replace(".", "/")).is_dir() else module
    monkeypatch.delitem(sys.modules, executed, raising=False)  # as in a fresh process
    with pytest.raises(SystemExit) as ended:
        main()
    shown = capsys.readouterr().out
    assert ended.value.code == 0
    assert shown.startswith(f"usage: slotstream {name} ")
    assert "python -m" not in shown
    others = {*MODULES} - {"slotstream"}
    assert not [module for module in others if re.search(rf"\b{re.escape(module)}\b", shown)]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("", "name a command"),
        ("pakc", "unknown command 'pakc', did you mean pack?"),
        ("--verbose", "unknown command '--verbose'"),
        ("nonsense --help", "unknown command 'nonsense'"),
        ("transfer", "name one of: transfer detection, transfer segmentation, transfer table"),
        ("transfer detect --help", "name one of: transfer detection"),
    ],
)
def test_no_such_command(
    words: str, reason: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without it a mistyped command ends in a traceback, or does nothing without a word."""
    monkeypatch.setattr(sys, "argv", ["slotstream", *words.split()])
    with pytest.raises(SystemExit) as ended:
        main()
    captured = capsys.readouterr()
    assert ended.value.code == 2 and not captured.out
    assert captured.err.startswith(f"error: {reason}") and captured.err.count("\n") == 1


def test_bad_input_is_one_line_with_the_name_that_was_called() -> None:
    """Without it the line that refuses an option names a module to ask for help."""
    process = subprocess.run(
        [sys.executable, "-m", "slotstream", "inspect", "a.beton", "--nothing"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert process.returncode == 2 and not process.stdout
    expected = "error: unrecognized arguments: --nothing (see slotstream inspect --help)\n"
    assert process.stderr == expected


@pytest.mark.usefixtures("called_by_name")
@pytest.mark.parametrize(
    ("text", "called"),
    [
        ("$ python -m tools.build_dataset coco", "$ slotstream pack coco"),
        ("accelerate launch -m train.pretrain --x", "accelerate launch -m slotstream train --x"),
        ("torchrun -m transfer.detection", "torchrun -m slotstream transfer detection"),
        ("written by tools.export.", "written by slotstream export."),
        ("a report (tools.report)", "a report (slotstream report)"),
        ("tools.report.page", "tools.report.page"),
        ("tools.reports", "tools.reports"),
        ("/data/tools.report", "/data/tools.report"),
        ("my.tools.report", "my.tools.report"),
        ("tools.report/x", "tools.report/x"),
        ("python -m pytest", "python -m pytest"),
    ],
)
def test_texts_name_commands_as_called(text: str, called: str) -> None:
    """Without it examples are wrong, or names of files and modules change."""
    assert as_called(text) == called


def test_texts_stay_as_they_are_in_the_source_tree() -> None:
    """Without it `python -m` commands recommend a program that need not be on the path."""
    assert as_called("python -m tools.report runs/demo") == "python -m tools.report runs/demo"


@pytest.mark.usefixtures("called_by_name")
def test_the_demo_runs_the_commands_that_it_shows() -> None:
    """Without it the installed demo looks for modules of the source tree."""
    run = [sys.executable, "-m", "slotstream", "transfer", "table", "--json", "a b"]
    assert arguments("transfer.table --json 'a b'") == run


def test_the_demo_runs_modules_in_the_source_tree() -> None:
    """Without it `make demo` depends on the package being installed."""
    assert arguments("tools.report runs/x") == [sys.executable, "-m", "tools.report", "runs/x"]


@pytest.mark.parametrize("name", ["scenes_cpu", "scenes_cpu.yaml", "configs/scenes_cpu.yaml"])
def test_a_configuration_is_found_by_its_name_from_anywhere(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without it the installed commands have no configuration to begin with."""
    monkeypatch.chdir(tmp_path)
    given = ["--config", name, "--data.path", "x.beton"]
    config, _ = load_config(given)
    assert config.model.num_prototypes == 12
    further, _ = load_config([*given, "--config", "ablations/k1024"])
    assert further.model.num_prototypes == 1024
    (tmp_path / "configs").mkdir()
    (tmp_path / name).write_text("model: {num_prototypes: 5}\nname: mine\n")
    assert load_config(given)[0].model.num_prototypes == 5, "a user's own file comes first"


def test_a_result_names_the_console_command_that_made_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it the command in a result is one that cannot be typed on another machine."""
    script = "/opt/venv/bin/slotstream"
    monkeypatch.setattr(sys, "orig_argv", ["/usr/bin/python3", script, "slots", "--data", "a b"])
    assert provenance()["command"] == "slotstream slots --data 'a b'"
    monkeypatch.setattr(sys, "orig_argv", ["/usr/bin/python3", "-m", "evaluation.slots"])
    assert provenance()["command"] == "python3 -m evaluation.slots"
