"""The command `slotstream NAME …`: each name stands for a module that `python -m` runs as well."""

import difflib
import runpy
import sys
from importlib.metadata import version

from pipeline.commands import COMMANDS, PREFIX, call_by_name


def main() -> None:
    """Run the command that sys.argv names, as `python -m` would run its module."""
    call_by_name()
    words = sys.argv[1:]
    name = next((n for n in COMMANDS if n.split() == words[: len(n.split())]), None)
    if name is not None:
        sys.argv = [sys.argv[0], *words[len(name.split()) :]]
        runpy.run_module(PREFIX + COMMANDS[name].module, run_name="__main__", alter_sys=True)
    elif words == ["--version"]:
        print(f"slotstream {version('slotstream')}")
    elif words and words[-1] in ("-h", "--help") and (listed := _beginning_with(words[:-1])):
        print(_help(listed))
        sys.exit(0)
    else:
        _refuse(words)


def _beginning_with(words: list[str]) -> list[str]:
    """The commands whose names begin with these words."""
    return [name for name in COMMANDS if name.split()[: len(words)] == words]


def _help(names: list[str]) -> str:
    lines = [f"  {name:<22} {COMMANDS[name].about}" for name in names]
    usage = "usage: slotstream COMMAND [option ...]     options, examples: COMMAND --help"
    return "\n".join([usage, "", *lines, "", "on GPUs: accelerate launch -m slotstream train ..."])


def _refuse(words: list[str]) -> None:
    """Say in one line why `words` name no command, and exit with 2."""
    from train.run.cli import print_error  # not for --help, which it would slow down

    if not words:
        reason = "name a command"
    elif further := [name for name in COMMANDS if name.split()[0] == words[0]]:
        reason = f"name one of: {', '.join(further)}"
    else:
        near = difflib.get_close_matches(words[0][:100], COMMANDS, n=1)
        hint = f", did you mean {near[0]}?" if near else ""
        reason = f"unknown command {words[0][:100]!r}{hint}"
    print_error(f"{reason} (see slotstream --help)")
    sys.exit(2)


if __name__ == "__main__":
    main()
