"""The log of a run: the progress line, metrics.jsonl, and the time that training takes."""

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import msgspec

from pipeline.errors import UserError

if TYPE_CHECKING:
    import torch

LONGEST_LINE = 1 << 20
"""Bytes. A line with the scores of 1,000 classes takes about 60 kB; a longer one is damaged."""

_Value = float | list[dict[str, float | str]]  # a figure, or the rows of an evaluation


class _Line(msgspec.Struct):
    """The keys that a line of metrics.jsonl must have; see also `_Value`."""

    step: Annotated[int, msgspec.Meta(ge=0, lt=2**53)]
    results: list[dict[str, float | str]] | None = None


class Journal:
    """Prints progress lines and writes metrics.jsonl, one JSON object a line.

    A line that cannot be written raises nothing: `problem` says why, and all processes end
    together. A folder that is deleted, renamed or replaced is not made again.
    """

    def __init__(self, folder: Path) -> None:
        """Raises UserError."""
        self._folder, self._path = folder, folder / "metrics.jsonl"
        self._problem: UserError | None = None
        self.scored = -1
        """The step of the last line with results."""
        try:
            # Open, it keeps its number: no other folder can be taken for it.
            self._handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            raise UserError(f"{folder}: {error.strerror}") from None

    def problem(self) -> UserError | None:
        """Why no more lines can be written, if so."""
        if not self._problem and not _is_same(self._handle, self._folder):
            self._problem = UserError(
                f"{self._folder}: deleted, renamed or replaced while the run trained"
            )
        return self._problem

    def rewind(self, step: int) -> None:
        """Cut the lines after `step`: a run that was killed repeats those steps. The earlier lines
        are safe from a power cut at any moment. If one of them is damaged, it is left out with a
        warning, and metrics.jsonl.damaged keeps the file as it was.

        Raises UserError.
        """
        if problem := self.problem():
            raise problem
        try:
            if not self._path.exists():
                if step:
                    tell(f"warning: {self._path} is missing: it begins anew after step {step}")
                self._create()
            elif not self._path.is_file():
                raise UserError(f"{self._path}: is not a file")
            self._cut(step)
        except OSError as error:
            raise UserError(f"{self._path}: {error.strerror}") from None

    def write(self, values: Mapping[str, Any], progress: str) -> None:
        """One log line. Results that the file holds already, from before a resume, are only
        printed.
        """
        tell(progress, sys.stdout)
        if self.problem() or ("results" in values and values["step"] == self.scored):
            return
        try:
            if not self._path.exists():
                tell(f"warning: {self._path} was deleted: it begins anew at step {values['step']}")
                self._create()
            with open(self._path, "ab", opener=_at_once) as file:
                file.write(json.dumps(values).encode() + b"\n")
        except OSError as error:
            self._problem = UserError(f"{self._path}: cannot be written ({error.strerror})")
        if "results" in values:
            self.scored = values["step"]

    def _create(self) -> None:
        self._path.open("xb").close()
        parent = os.open(self._folder.parent, os.O_RDONLY)
        for folder in (self._handle, parent):  # the names must survive a power cut, too
            os.fsync(folder)
        os.close(parent)

    def _cut(self, step: int) -> None:
        """What is kept is never written again in place: only a cut file, or a whole one that is
        on the disk before it takes the name, survives a power cut at every moment.
        """
        kept, first, count = self._scan(step)
        if count:
            self._replace(kept)
            tell(
                f"warning: {self._path}: line {first} is damaged ({count} in all): left out; "
                f"{self._path.name}.damaged is the file as it was"
            )
            return
        end = kept[-1][1] if kept else 0
        with self._path.open("r+b") as file:
            if file.seek(0, os.SEEK_END) != end:
                file.truncate(end)
            if end and file.seek(end - 1) is not None and file.read(1) != b"\n":
                file.write(b"\n")
            file.flush()
            os.fsync(file.fileno())

    def _scan(self, step: int) -> tuple[list[tuple[int, int]], int, int]:
        """Begin and end of the lines up to `step`, joined where they touch; the number of the first
        damaged line before the last good one, and how many such lines there are. Of a file without
        any good line up to `step`, all that cannot be read counts. A damaged end is cut anyway.
        """
        kept: list[tuple[int, int]] = []
        others = [0, 0]  # since the last line that was kept: the number of the first, and how many
        torn = [0, 0]  # of these, those that cannot be read
        first, count, end, self.scored = 0, 0, 0, -1
        with self._path.open("rb") as file:
            for number, text in enumerate(iter(lambda: file.readline(LONGEST_LINE), b""), 1):
                begin, end = end, end + len(text)
                line = _read(text)
                if line is None or line.step > step:
                    others = [others[0] or number, others[1] + 1]
                    if line is None:
                        torn = [torn[0] or number, torn[1] + 1]
                    else:
                        first, count, torn = first or torn[0], count + torn[1], [0, 0]
                    continue
                first, count = first or others[0], count + others[1]
                others, torn = [0, 0], [0, 0]
                touches = kept and kept[-1][1] == begin
                kept.append((kept.pop()[0] if touches else begin, end))
                self.scored = line.step if line.results else self.scored
        if not kept and torn[1]:
            first, count = first or torn[0], count + torn[1]
        return kept, first, count

    def _replace(self, kept: list[tuple[int, int]]) -> None:
        content = self._path.read_bytes()
        whole = [content[begin:end].rstrip(b"\n") + b"\n" for begin, end in kept]
        beside = self._path.with_name(f"{self._path.name}.partial")
        for path, parts in (
            (self._path.with_name(f"{self._path.name}.damaged"), [content]),
            (beside, whole),
        ):
            with path.open("wb") as file:
                file.writelines(parts)
                file.flush()
                os.fsync(file.fileno())
        os.fsync(self._handle)
        beside.replace(self._path)
        os.fsync(self._handle)


def _at_once(path: str, flags: int) -> int:
    """Opens a file; a pipe that nobody reads is an error instead of a wait for ever."""
    return os.open(path, flags | os.O_NONBLOCK, 0o666)


def tell(line: str, stream: TextIO | None = None) -> None:
    """Print one line, on stderr by default. A terminal or pipe that is gone does not end a run:
    nothing more is printed there.
    """
    stream = stream or sys.stderr
    try:
        print(line, file=stream, flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        if stream is sys.stdout:
            tell(f"warning: standard output: {error.strerror}: only metrics.jsonl has the progress")


class Stopwatch:
    """Time since the last log line, and the share of it that was spent waiting for data.

    On a GPU this is the device's share: from the end of one step to the views of the next. The host
    runs ahead of the device, so its own waiting costs nothing while the device has work.
    """

    def __init__(self, device: "torch.device") -> None:
        self._device = device
        self.restart()

    def restart(self) -> None:
        """Start the next log line."""
        self.steps = 0
        self._began, self._waited = time.perf_counter(), 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def read(self) -> tuple[int, float, float]:
        """Steps (counted by the caller), seconds so far, share of waiting. Waits until the device
        has received the last batch.
        """
        if self._events:
            self._events[-1][1].synchronize()
        self._waited += sum(begun.elapsed_time(ended) for begun, ended in self._events) / 1e3
        self._events = []
        seconds = time.perf_counter() - self._began
        return self.steps, seconds, self._waited / seconds

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time spent inside counts as waiting."""
        if self._device.type == "cuda":
            import torch

            begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begun.record()
            yield
            ended.record()
            self._events.append((begun, ended))
            return
        began = time.perf_counter()
        yield
        self._waited += time.perf_counter() - began

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent inside does not count at all. The device first ends the work before it."""
        if self._device.type == "cuda":
            import torch

            torch.cuda.synchronize(self._device)
        began = time.perf_counter()
        try:
            yield
        finally:
            self._began += time.perf_counter() - began


def progress(values: Mapping[str, Any], last_step: int, batch_size: int, text: str) -> str:
    """step 3/10  14.8 images/s  TEXT  data wait 2%  45 s left"""
    left = (last_step - values["step"]) * batch_size / values["images_per_s"]
    return (
        f"step {values['step']}/{last_step}  {values['images_per_s']:.1f} images/s  {text}  "
        f"data wait {values['wait_share']:.0%}  {duration(left)} left"
    )


def duration(seconds: float) -> str:
    """45 s, 12 min, 3 h 05 min, 2 d 07 h."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60:02} min"
    return f"{minutes // 1440} d {minutes % 1440 // 60:02} h"


def _read(text: bytes) -> _Line | None:
    """A line of metrics.jsonl; None if it is damaged, or the torn last line of a killed run."""
    try:
        msgspec.json.decode(text, type=dict[str, _Value])
        return msgspec.json.decode(text, type=_Line)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


def _is_same(handle: int, folder: Path) -> bool:
    """Whether `folder` still is the one that was opened as `handle`."""
    try:
        return os.path.samestat(os.fstat(handle), folder.stat())
    except OSError:
        return False
