"""The commands of the demo fit their parsers and each other, and one runs as it would alone."""

import importlib
import itertools
import json
import shlex
from pathlib import Path

import pytest

from tests import ROOT
from tests.helpers.betons import varied, write_beton
from tools.demo import BETON, CONFIG, IN_TWO, LEARNT, RUN, STEPS, call
from tools.report.parts import PICTURES, RESULTS
from train.config import SETTINGS

COMMANDS = [shlex.split(command.removeprefix(IN_TWO)) for command in STEPS.values()]
PARSERS = {
    "evaluation.pictures": "evaluation.pictures.__main__",
    "tools.benchmark": "tools.benchmark.options",
}
"""Where the parser of a package is."""


@pytest.mark.parametrize("words", COMMANDS, ids=[words[0] for words in COMMANDS])
def test_options_are_known(words: list[str]) -> None:
    """Without it an option that is renamed stops the demo after minutes of training."""
    name, *options = words
    module = importlib.import_module(PARSERS.get(name, name))
    if hasattr(module, "parse"):
        args = module.parse(options)
        if name.startswith(("evaluation.probe", "evaluation.unsupervised")):
            module.check(args)
    assert (ROOT / CONFIG).is_file()


def test_files_are_made_before_they_are_read() -> None:
    """Without it a step reads what a later one writes, or the report misses a part."""
    made = {str(LEARNT)}
    for words in COMMANDS:
        given = dict(itertools.pairwise(words))
        outputs = {given[o] for o in ("--out", "--json", "--picture") if o in given}
        inputs = {given[o] for o in ("--data.path", "--data", "--unlabelled") if o in given}
        assert inputs <= made, words
        made |= outputs
    assert str(BETON) in made
    shown = {str(RUN / part.file) for part in (*RESULTS, *PICTURES)}
    assert {file for file in made if file.endswith((".json", ".png"))} <= shown


def test_the_run_is_the_one_that_is_scored() -> None:
    """Without it the steps after training find no run, or one of another recipe."""
    words = COMMANDS[1]
    config, _ = SETTINGS.load(
        ["--config", str(ROOT / CONFIG), *words[words.index("--data.path") :]]
    )
    assert f"{config.log.dir}/{config.name}" == str(RUN)


def test_a_command_runs_as_it_would_alone(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Without it a step that fails does not stop the demo, or the results name the demo as the
    command that made them, which nobody can run for one of them.
    """
    beton, out = write_beton(tmp_path / "few.beton", varied(2)), tmp_path / "rates.json"
    words = f"--data {beton} --batch 2 --repeats 1 --seconds 0.01"
    assert call(f"tools.benchmark params {words} --json {out}") == 0
    command = json.loads(out.read_text())["command"]
    assert command.endswith(f"python -m tools.benchmark params {words} --json {out}"), command
    capfd.readouterr()
    assert call("tools.benchmark params --data nowhere.beton") == 2
    assert capfd.readouterr().err.count("error: nowhere.beton") == 1
    assert call("no_such_module") == 1
