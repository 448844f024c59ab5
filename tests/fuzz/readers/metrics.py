"""metrics.jsonl: at a resume what is whole stays, the rest goes, and the report can read it."""

import contextlib
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import UserError
from tests.fuzz.damage import damage
from tools.report.results import read_lines
from train.run.log import Journal

Random = np.random.Generator

ODD: tuple[Any, ...] = (
    0, -1, 1, 7, True, None, "", "3", "\x1b[2J", [], [1], {}, {"step": 3}, 1e300, -0.0, 0.5, 2**53,
    2**63, 2**64, 10**400, float("nan"), float("inf"),
)  # fmt: skip
RAW = (
    b"", b"\n", b"\r\n", b"\0" * 4096, b"{}", b"[" * 20_000, b'{"step": ' * 2000, b"\xff\xfe",
    b"\xe2\x80\xa8", b'{"step": 3, "step": 6}', b'{"step": ' + b"9" * 5000 + b"}",
    b'{"step": 1e400}', b"null", b'{"step": 6}',
)  # fmt: skip


class Target:
    """A run's curve, and the journal of the run that resumes."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "metrics.jsonl"
        self.journal = Journal(folder)
        lines = [
            {
                "step": step,
                "epoch": step / 7,
                "loss": 9 / step,
                "images_per_s": 3.25,
                "seconds": step,
            }
            for step in range(3, 40, 3)
        ]
        self.training = [json.dumps(line).encode() for line in lines]
        rows = [{"metric": "iou", "value": 0.25, "class": name} for name in ("sky", "a \u00e9")]
        self.scored = list(self.training)
        for index in (9, 4):
            line = {"step": lines[index]["step"], "results": rows}
            self.scored.insert(index + 1, json.dumps(line).encode())

    def try_one(self, random: Random) -> str:
        with_results = bool(random.integers(2))
        original = self.scored if with_results else self.training
        changed = _structured if random.integers(2) else _generic
        content, step = changed(original, random), int(random.integers(45))
        self.path.write_bytes(content)
        said = self._rewind(step)
        kept = self.path.read_bytes()
        self._check(original, content, kept, step)
        assert not self._rewind(step) and self.path.read_bytes() == kept, "it changes again"
        self._write(kept, step)
        if not with_results and kept:
            self._report(kept)
        if said:
            assert said.startswith(f"warning: {self.path}: line ") and said.count("\n") == 1
            assert self.path.with_name("metrics.jsonl.damaged").read_bytes() == content
            return "left-out"
        return "whole" if kept == content else "cut" if kept else "emptied"

    def _rewind(self, step: int) -> str:
        with contextlib.redirect_stderr(io.StringIO()) as said:
            self.journal.rewind(step)
        return said.getvalue()

    def _check(self, original: list[bytes], content: bytes, kept: bytes, step: int) -> None:
        """Nothing is made up, and no line that the damage has spared is lost."""
        assert not kept or kept.endswith(b"\n")
        lines = kept.split(b"\n")[:-1]
        assert _is_part(lines, content.split(b"\n")), "a line was made up"
        for line in lines:
            assert 0 <= json.loads(line)["step"] <= step
        whole = {line for line in original if json.loads(line)["step"] <= step}
        spared = [line for line in content.split(b"\n") if line in whole]
        assert _is_part(spared, lines), "a whole line is lost"

    def _write(self, kept: bytes, step: int) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            self.journal.write({"step": step + 1, "loss": 0.5}, "progress")
        assert self.path.read_bytes() == kept + b'{"step": %d, "loss": 0.5}\n' % (step + 1)

    def _report(self, kept: bytes) -> None:
        self.path.write_bytes(kept)
        try:
            lines, _ = read_lines(self.path)
        except UserError as error:
            assert str(self.path) in str(error) and str(error).isprintable(), repr(str(error))
            return
        steps = [json.loads(line)["step"] for line in kept.split(b"\n") if line]
        read = [line["step"] for line in lines]  # a last line with an impossible time is skipped
        assert read in (steps, steps[:-1])


def _is_part(some: Iterable[bytes], of: Iterable[bytes]) -> bool:
    """Whether `some` come in `of`, in this order."""
    rest = iter(of)
    return all(any(other.rstrip(b"\r") == one.rstrip(b"\r") for other in rest) for one in some)


def _generic(lines: list[bytes], random: Random) -> bytes:
    return damage(b"\n".join(lines) + b"\n", random)


def _structured(lines: list[bytes], random: Random) -> bytes:
    """One to three lines changed, removed, doubled, exchanged, or something else between them."""
    lines = list(lines)
    for _ in range(int(random.integers(1, 4))):
        at, kind = int(random.integers(len(lines))), int(random.integers(6))
        if kind == 0:
            lines.insert(at, RAW[random.integers(len(RAW))])
        elif kind == 1 and len(lines) > 1:
            del lines[at]
        elif kind == 2:
            lines.insert(at, lines[int(random.integers(len(lines)))])
        elif kind == 3:
            lines[at] = lines[at][: int(random.integers(len(lines[at]) + 1))]
        else:
            lines[at] = _odd_value(lines[at], random)
    return b"\n".join(lines) + (b"", b"\n")[random.integers(2)]


def _odd_value(line: bytes, random: Random) -> bytes:
    """Another value, or another name, somewhere in a line."""
    try:
        content = json.loads(line)
        value = ODD[random.integers(len(ODD))]
        name = sorted(content)[int(random.integers(len(content)))]
    except (ValueError, TypeError, RecursionError):
        return line
    if random.integers(4) == 0 and isinstance(content[name], list) and content[name]:
        content[name][0] = value
    elif random.integers(6) == 0:
        content[("", "step", "results", "x" * 3000)[random.integers(4)]] = content.pop(name)
    else:
        content[name] = value
    return json.dumps(content).encode()
