"""How many instructions a compiled kernel executes, from NVIDIA's disassembly.

The compiler tells for each instruction its line of the source. So the loops and branches of the
machine code can be named by lines of the kernels, and what they do on a batch is known from the
batch's parameters.
"""

import linecache
import re
from collections.abc import Mapping
from typing import NamedTuple

_FILE = re.compile(r'//## File "([^"]+)", line (\d+)')
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(@!?U?P\d+\s+)?([A-Z][A-Z0-9_.]*)\s*([^;]*)")

MOST_OF_A_CALL = 12
"""Instructions around the call of a subroutine for divisions."""


class Instruction(NamedTuple):
    predicated: bool
    name: str
    target: str
    """Label of a branch, or ""."""
    line: str
    """The line of the kernel's source."""

    @property
    def kind(self) -> str:
        return self.name.split(".")[0]


def parse(text: str) -> tuple[list[Instruction], dict[str, int]]:
    """Instructions of `nvdisasm -g -c`, and the position of each label."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    line = ""
    for row in text.splitlines():
        if file := _FILE.search(row):
            line = linecache.getline(file[1], int(file[2])).strip()
        elif row.startswith(".L_"):
            labels[row.partition(":")[0]] = len(instructions)
        elif found := _INSTRUCTION.search(row):
            predicate, name, operands = found.groups()
            label = re.search(r"\.L_x_\d+", operands)
            instructions.append(Instruction(bool(predicate), name, label[0] if label else "", line))
    return instructions, labels


def executed(text: str, trips: Mapping[str, float], shares: Mapping[str, float]) -> float:
    """Instructions that a warp executes, on average over a batch.

    trips: how often the body of a loop runs, by the beginning of its `for` line.
    shares: how often a branch is taken, by the beginning of a line in it; the first that applies.
    Raises KeyError for a loop or branch that neither names.
    """
    code, labels = parse(text)
    times, arriving = [0.0] * len(code), [0.0] * len(code)
    loops = []
    flow = 1.0  # how often the instruction runs, in one iteration of the loops around it
    for i, at in enumerate(code):
        flow += arriving[i]
        times[i] = flow
        if at.kind not in ("BRA", "EXIT") or not flow:
            continue
        target = labels.get(at.target, len(code))
        if target <= i:
            loops.append((target, i + 1, _trips(trips, at.line)))
            continue
        stays = _stays(code, labels, i, trips, shares) if at.predicated else 0.0
        if target < len(code):
            arriving[target] += flow * (1 - stays)
        flow *= stays
    for begin, end, count in loops:
        times[begin:end] = [count * time for time in times[begin:end]]
    return sum(times)


def _stays(
    code: list[Instruction],
    labels: Mapping[str, int],
    i: int,
    trips: Mapping[str, float],
    shares: Mapping[str, float],
) -> float:
    """How often the branch forward at `i` is not taken."""
    if any(code[i].line.startswith(begin) for begin in trips):
        return 1.0  # it skips a loop without iterations, whose number is already a mean
    target = labels.get(code[i].target, len(code))
    if target - i <= MOST_OF_A_CALL and any(at.kind == "CALL" for at in code[i:target]):
        return 0.0  # a division of numbers that are too large or small for the fast way
    end = _next_jump(code, i + 1, target)
    here, there = code[i + 1 : end], []
    if here[-1].kind in ("BRA", "EXIT") and not here[-1].predicated:  # it has an else
        there = code[target : labels.get(here[-1].target, _next_jump(code, target, len(code)))]
    for begin, share in shares.items():
        found = [any(at.line.startswith(begin) for at in part) for part in (here, there)]
        if found[0] != found[1]:
            return share if found[0] else 1 - share
    raise KeyError(f"no share for the branch to {sorted({at.line for at in here})}")


def _next_jump(code: list[Instruction], begin: int, end: int) -> int:
    """The position after the first jump from `begin` on, or `end`."""
    jumps = (i + 1 for i in range(begin, end) if code[i].kind in ("BRA", "EXIT"))
    return next((i for i in jumps if not code[i - 1].predicated), end)


def _trips(trips: Mapping[str, float], line: str) -> float:
    for begin, count in trips.items():
        if line.startswith(begin):
            return count
    raise KeyError(f"no trips for the loop {line!r}")
