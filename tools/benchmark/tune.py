"""Finds the settings with which training is fastest on this machine, and says how to give them.

Each try trains on batches of the loader, because both may share the processor. Tries that are
compared take turns. What the model sees stays: views, order, and the images of a step; backends
differ by rounding. Only micro-batches, which --micro-batches must ask for, change batch statistics.
"""

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from model.timm_encoder import first_line
from pipeline.choices import CROPS, Crops
from pipeline.commands import arguments
from pipeline.errors import UserError
from pipeline.image_folder import ImageFolder
from pipeline.loader import choose
from tools.benchmark.decoders import has_dali
from tools.benchmark.stages import batches
from tools.benchmark.step import Step, make_step
from tools.benchmark.timing import Bench, Result, Work, to_result
from tools.benchmark.verdict import table
from train.pretrained import build_model
from train.run.launch import share_of_cores

GAIN = 1.03
"""A setting replaces the one before only if it is faster by this factor, and faster in each of
several turns: less is noise."""
ROUNDS = 3
DRAINED = 2
"""Batches that a loader has decoded while it waited for its turn, which are not measured."""
LEAST_COMPILE = 20.0
"""Seconds that are given to torch.compile at least."""


@dataclass(frozen=True)
class Setting:
    """What a try changes."""

    backend: str
    crops: Crops
    threads: int
    micro_batches: int = 1

    def options(self) -> dict[str, dict[str, Any]]:
        """As sections of a configuration."""
        data = {"backend": self.backend, "crops": self.crops, "threads": self.threads}
        return {"data": data, "efficiency": {"accumulation": self.micro_batches}}

    @property
    def whole_name(self) -> str:
        return f"{self.backend}, crops {self.crops}, {self.name}"

    @property
    def name(self) -> str:
        """In the table, which has columns for the rest."""
        parts = f"micro-batches {self.micro_batches}" if self.micro_batches > 1 else ""
        return ", ".join(filter(None, [f"{self.threads} threads", parts]))


@dataclass
class Trial:
    """A setting and the images/s of its turns, or why it failed."""

    setting: Setting
    rates: list[float] = field(default_factory=list)
    failure: str = ""
    ratio: float = 0.0
    """To the configuration's own settings, by turns; 0 without a rate."""
    better: bool = False
    """Whether it was faster in each of several turns."""


def tune(bench: Bench, args: Namespace) -> dict[str, Any]:
    """Try for about `--minutes`, print, and return the entries of the --json file."""
    end = time.perf_counter() + 60 * args.minutes

    def share(parts: int) -> float:
        """Seconds, if so many parts of the work are left; compile counts for two."""
        return max(0.0, end - time.perf_counter()) / parts

    first = configured(bench)
    train = _step(bench)
    tries = [Trial(first, ratio=1.0)]
    best = faster(bench, train, tries, first, paths(bench, first), share(4))
    best = faster(bench, train, tries, best, threads(bench, best), share(3))
    if args.micro_batches:
        counts = [n for n in args.micro_batches if bench.batch % n == 0]
        others = [replace(best, micro_batches=n) for n in counts if n != best.micro_batches]
        best = faster(bench, train, tries, best, others, share(3))
    del train
    compiled = try_compile(bench, args, max(LEAST_COMPILE, end - time.perf_counter()))
    gain = next(trial.ratio for trial in tries if trial.setting == best)
    same = best == first and compiled == bench.config.efficiency.compile
    chosen = best.options()
    chosen["efficiency"]["compile"] = compiled
    verdict = in_words(chosen, gain, same, compiled)
    if any(len(trial.rates) < 2 for trial in tries if not trial.failure):
        verdict = f"Tries of a single turn decide nothing: give more --minutes. {verdict}"
    print(f"{table(bench.results)}\n\n{verdict}")
    return {"settings": {}, "verdict": verdict, "best": chosen}


def configured(bench: Bench) -> Setting:
    """The settings of the configuration on this device."""
    config = bench.config
    backend, crops = choose(config.data.backend, config.data.crops, bench.device)
    count = config.data.threads or share_of_cores(bench.device)
    return Setting(backend, crops, count, config.efficiency.accumulation)


def paths(bench: Bench, first: Setting) -> list[Setting]:
    """Other backends and places of the crops, with the same threads."""
    on_gpu = bench.device.type == "cuda"
    backends = [name for name in bench.backends if name != "reference"]  # for comparisons only
    backends = [name for name in backends if on_gpu or name != "triton"]
    dali = not isinstance(bench.beton, ImageFolder) and has_dali(bench, "tune")
    places = [crops for crops in CROPS if crops != "dali" or dali]
    found = [replace(first, backend=name, crops=crops) for name in backends for crops in places]
    return [setting for setting in found if setting != first]


def threads(bench: Bench, best: Setting) -> list[Setting]:
    """Other numbers of threads: those of --threads, half of the cores, one."""
    counts = {1, max(1, bench.cores // 2), max(1, bench.cores - 1), *bench.threads} - {best.threads}
    return [replace(best, threads=count) for count in sorted(counts)]


def faster(
    bench: Bench,
    train: Step,
    tries: list[Trial],
    best: Setting,
    others: Sequence[Setting],
    seconds: float,
) -> Setting:
    """The fastest of `best`, which is among the `tries`, and `others`, which take turns for about
    so many seconds. Notes these in `tries` and in `bench.results`. Raises UserError if `best`
    cannot be measured.
    """
    before = next(trial for trial in tries if trial.setting == best)
    base = Trial(best)
    trials = [base, *map(Trial, others)]
    _take_turns(bench, train, trials, seconds)
    if base.failure or not base.rates:
        raise UserError(f"tune: the configuration cannot be measured: {base.failure}")
    for trial in trials:
        if trial.rates and not trial.failure:
            turns = [own / of for own, of in zip(trial.rates, base.rates, strict=False)]
            trial.ratio = before.ratio * statistics.median(turns)
            trial.better = len(turns) > 1 and min(turns) > 1
    fresh = trials[bool(before.rates) :]  # what was measured before keeps that row
    for trial in fresh:
        _note(bench, trial, "configured" if trial is base else trial.setting.name)
    before.rates = before.rates or base.rates
    tries += trials[1:]
    bench.keep()
    better = [trial for trial in trials if trial.better and trial.ratio > GAIN * before.ratio]
    return max(better, key=lambda trial: trial.ratio).setting if better else best


def _take_turns(bench: Bench, train: Step, trials: Sequence[Trial], seconds: float) -> None:
    """Fill in rates and failures."""
    end = time.perf_counter() + seconds
    streams: list[Any] = []
    try:
        for trial in trials:
            stream = None
            print(f"tune: {trial.setting.whole_name}", file=sys.stderr, flush=True)
            with _reported(trial):
                stream = batches_of(bench, trial.setting)
                train(*next(stream))  # allocates
            streams.append(stream)
        length = max(0.0, end - time.perf_counter()) / (ROUNDS * max(1, len(trials)))
        for turn in range(ROUNDS):
            for trial, stream in zip(trials, streams, strict=True):
                late = time.perf_counter() > end and turn
                if stream is not None and not trial.failure and not late:
                    with _reported(trial):
                        trial.rates.append(_turn(bench, train, stream, trial.setting, length))
    finally:
        for stream in filter(None, streams):
            stream.close()


def _turn(bench: Bench, train: Step, stream: Any, setting: Setting, seconds: float) -> float:
    """images/s of training on the stream for so long, at least one batch."""
    for _ in range(DRAINED):
        next(stream)
    _wait(bench)
    began, count = time.perf_counter(), 0
    while not count or time.perf_counter() - began < seconds:
        train(*next(stream))
        count += 1
    _wait(bench)
    return count * _images(bench, setting) / (time.perf_counter() - began)


def _images(bench: Bench, setting: Setting) -> int:
    return bench.batch // setting.micro_batches


def batches_of(bench: Bench, setting: Setting) -> Iterator[tuple[Any, ...]]:
    """Endless arguments of a step by the loader of a setting, which has started."""
    own = replace(bench, threads=(setting.threads,))
    stream = batches(own, setting.backend, setting.crops, _images(bench, setting))

    def endless() -> Iterator[tuple[Any, ...]]:
        with closing(stream):
            for batch in stream:
                yield batch.views, batch.overlap, batch.flipped, batch.masks

    return endless()


def _wait(bench: Bench) -> None:
    if bench.device.type == "cuda":
        torch.cuda.synchronize(bench.device)


def _step(bench: Bench) -> Step:
    """The configuration's step, not compiled: that is tried apart."""
    config = replace(bench.config, efficiency=replace(bench.config.efficiency, compile=False))
    return make_step(build_model(config).to(bench.device), config, "fast", bench.dtype)


@contextmanager
def _reported(trial: Trial) -> Iterator[None]:
    """What fails inside is the trial's failure."""
    try:
        yield
    except Exception as error:  # of any library: it is reported, and the next setting is tried
        trial.failure = first_line(error)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _note(bench: Bench, trial: Trial, name: str) -> None:
    """Add the trial to the results, or to what was skipped."""
    setting, number = trial.setting, _images(bench, trial.setting)
    if not trial.ratio:
        failed = trial.failure or "no time left (--minutes)"
        bench.skip(f"tune {setting.whole_name}", failed)
        return
    work = Work(
        "tune", setting.backend, lambda: None, number, number, setting.threads, operation=name,
        crops=setting.crops,
    )  # fmt: skip
    result = to_result(work, trial.rates, [number / rate for rate in trial.rates])
    bench.results.append(replace(result, ratio=trial.ratio, ratio_to="configured"))


def try_compile(bench: Bench, args: Namespace, seconds: float) -> bool:
    """Whether efficiency.compile makes the step faster: tried in another process, which is ended
    after so many seconds.
    """
    if bench.config.efficiency.checkpointing:
        bench.skip("tune compile", "not with efficiency.checkpointing")
        return bench.config.efficiency.compile
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "step.json")
        line = [
            *arguments("tools.benchmark step --synthetic --also compile --repeats 3"),
            *("--batch", str(bench.batch), "--device", bench.device.type, "--json", str(out)),
            *map(str, args.config),
        ]
        print(f"tune: compile, at most {seconds:.0f} s", file=sys.stderr, flush=True)
        failure = _child(line, seconds)
        if failure:
            bench.skip("tune compile", failure)
            return bench.config.efficiency.compile
        rows = [row for row in json.loads(out.read_text())["results"] if row["backend"] == "fast"]
    plain, compiled = (
        next(row for row in rows if row["operation"] == operation)
        for operation in (None, "compile")
    )
    bench.results += [
        replace(_as_result(plain), ratio=None, ratio_to=None),
        replace(_as_result(compiled), ratio=compiled["images_per_s"] / plain["images_per_s"],
                ratio_to="step"),
    ]  # fmt: skip
    return bool(compiled["images_per_s"] > GAIN * plain["images_per_s"])


def _as_result(row: dict[str, Any]) -> Result:
    return Result(**{**row, "detail": None})


def _child(line: Sequence[str], seconds: float) -> str:
    """Run a command for at most so long. Why it failed, or ""."""
    process = subprocess.Popen(
        line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True, text=True
    )
    try:
        _, said = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return f"not finished in {seconds:.0f} s: more --minutes would try it"
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    last = (said.strip().splitlines() or [""])[-1]
    return last.removeprefix("error: ")[:200] if process.returncode else ""


def in_words(chosen: dict[str, dict[str, Any]], gain: float, same: bool, compiled: bool) -> str:
    """The best setting as options and as YAML; `gain`: its images/s by those of the configuration,
    `same` if it is that.
    """
    head = f"Best: {gain:.2f} times the images/s of the configuration's settings"
    head += ", without what compile adds." if compiled else "."
    head = "The configuration's own settings are the fastest of these." if same else head
    options = " ".join(
        f"--{section}.{name} {str(value).lower()}"
        for section, values in chosen.items()
        for name, value in values.items()
    )
    return f"{head}\n\n{options}\n\n{yaml.safe_dump(chosen, sort_keys=False)}"
