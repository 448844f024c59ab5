"""The log of a run: the progress line, metrics.jsonl, and the time that training takes."""

import json
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from pipeline.errors import UserError
from train.run.provenance import write_bytes


class Journal:
    """Prints progress lines and writes metrics.jsonl, one JSON object a line."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def rewind(self, step: int) -> None:
        """Delete the lines after `step`: a run that was killed repeats those steps.

        Raises UserError.
        """
        if not self._path.exists():
            return
        kept = [line for line in self._path.read_text().splitlines() if _step_of(line) <= step]
        write_bytes(self._path, "".join(f"{line}\n" for line in kept).encode())

    def write(self, values: Mapping[str, Any], progress: str) -> None:
        """One log line. Raises UserError."""
        try:
            with self._path.open("a") as file:
                file.write(json.dumps(values) + "\n")
        except OSError as error:
            raise UserError(f"{self._path}: {error.strerror}") from None
        print(progress, flush=True)


class Stopwatch:
    """Time since the last log line, and the share of it that was spent waiting for data.

    On a GPU this is the device's share: from the end of one step to the views of the next. The host
    runs ahead of the device, so its own waiting costs nothing while the device has work.
    """

    def __init__(self, device: torch.device) -> None:
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
        """Time spent inside does not count at all."""
        began = time.perf_counter()
        yield
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


def _step_of(line: str) -> float:
    """The step of a line of metrics.jsonl; infinity for the torn last line of a killed run."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf
