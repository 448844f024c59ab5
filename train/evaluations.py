"""The evaluations of a run while it trains: when they are due, what is written about them, which
checkpoint is the best, and when the score no longer rises.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Protocol

import msgspec
import torch
from accelerate import Accelerator
from msgspec import Meta
from torch import nn

from pipeline.errors import UserError
from train.config import RunConfig
from train.run import checkpoint
from train.run.ends import Plateau, Reason
from train.run.run import Run
from train.run.settings import to_dict

Step = Annotated[int, Meta(ge=-1, lt=2**53)]


class Evaluation(Protocol):
    """Scores a teacher on labelled images. `evaluation.online` has one; that room imports this one,
    and the command `train.pretrain` gives it to the trainer.
    """

    def __call__(self, teacher: nn.Module, pulse: Callable[[], None]) -> dict[str, float]:
        """Scores by name: those of `eval_config.METRICS` in 0..1, and others. All processes call
        it and get the same. It does not change the teacher. If the features are not finite, there
        is only a score "not_finite". All processes call `pulse` after each batch, which may raise.
        """
        ...


OpenEvaluation = Callable[[RunConfig, Accelerator], Evaluation]
"""Opens and checks what `RunConfig.eval` names. Raises UserError."""


@dataclass(frozen=True)
class Standing:
    """What the evaluations so far have shown. Each checkpoint holds it."""

    measure: dict[str, Any] = field(default_factory=dict)
    """The settings that the scores depend on: scores of others are not comparable."""
    last: Step = -1
    """The step of the last evaluation; -1: none."""
    best: Annotated[float, Meta(ge=0, le=1)] | None = None
    """The highest score of a step with a checkpoint: from step 1 on."""
    best_step: Step | None = None
    stale: Annotated[int, Meta(ge=0)] = 0
    """Evaluations since then, without those of an encoder that has rested so far."""

    def after(self, step: int, score: float | None, rested: bool = False) -> "Standing":
        """With one more evaluation; `score` is None if the features were not finite. Of an encoder
        that has `rested` so far no better score can be expected.
        """
        if step == 0:  # the untrained network has no checkpoint
            return replace(self, last=step)
        if score is not None and (self.best is None or score > self.best):
            return replace(self, last=step, best=score, best_step=step, stale=0)
        return replace(self, last=step, stale=self.stale + (not rested))


class _Interrupted(Exception):
    """All processes agree that the run has to end now."""

    def __init__(self, reason: Reason) -> None:
        self.reason = reason


class Evaluations:
    """The evaluations of one run. Without `eval.every` nothing is ever due."""

    def __init__(self, config: RunConfig, run: Run, open_evaluation: OpenEvaluation | None) -> None:
        """Raises UserError, if the labelled images cannot be used."""
        self._config, self._run = config, run
        self.rests_until = 0
        """The first step from which the encoder learns."""
        self._evaluation: Evaluation | None = None
        if config.eval.every is not None:
            if open_evaluation is None:
                raise ValueError("eval.every is set, and the trainer was given no evaluation")
            self._evaluation = open_evaluation(config, run.accelerator)
        free = ("every", "batch_size")
        measure = {k: v for k, v in to_dict(config.eval).items() if k not in free}
        self.standing = Standing(measure)

    def is_due(self) -> bool:
        """Whether the present step ends with an evaluation that has not been made yet."""
        every, step = self._config.eval.every, self._run.step
        return every is not None and self._run.is_due(every) and self.standing.last != step

    @property
    def is_best(self) -> bool:
        """Whether the present step has the best score so far."""
        return self.standing.best_step == self._run.step

    def evaluate(self, teacher: nn.Module) -> Reason:
        """Evaluate, if it is due, and log the scores.

        Nothing that training depends on changes, and the time does not count as training time. Like
        a log line it returns why the run has to end, on which all processes agree; for this it
        stops in the middle and has not been made.
        """
        if self._evaluation is None or not self.is_due():
            return Reason.NONE
        began, device = time.perf_counter(), self._run.accelerator.device
        forked = torch.random.fork_rng([device] if device.type == "cuda" else [])
        try:
            with self._run.stopwatch.paused(), forked:
                scores = self._evaluation(teacher, self._pulse)
                self._note(scores, time.perf_counter() - began)
        except _Interrupted as end:
            return end.reason
        return self._reason()

    def state(self) -> dict[str, Any]:
        """For the record of a checkpoint."""
        return {"eval": asdict(self.standing)} if self._evaluation else {}

    def read(self, origin: Path, record: checkpoint.Record) -> Standing:
        """The standing that `state` has put into the `record` of a checkpoint. One of another
        measure, or one whose best checkpoint is not in this run's folder, begins anew. Raises
        Damaged.
        """
        try:
            found = msgspec.convert(record.provenance.get("eval", {}), Standing)
        except msgspec.ValidationError as error:
            raise checkpoint.Damaged(f"{origin}: the state of its evaluations: {error}") from None
        if found.measure != self.standing.measure:
            if found.measure and self._evaluation:
                self._run.say(f"note: {origin}: scored by other settings of eval: best begins anew")
            return Standing(self.standing.measure)
        folder = self._run.folder / "checkpoints" / f"step_{found.best_step}"
        if found.best_step is not None and not checkpoint.is_checkpoint(folder):
            return Standing(found.measure, last=found.last)
        return found

    def resume(self, standing: Standing) -> None:
        """Continue from there. Raises UserError."""
        self.standing = standing
        if self._evaluation:
            self._mark_best()

    def end_if_flat(self, save: Callable[[], None]) -> None:
        """End the run if `train.stop_on_plateau` evaluations in a row brought nothing. Raises
        Plateau.
        """
        run, best, patience = self._run, self.standing, self._config.train.stop_on_plateau
        if patience is None or best.stale < patience or run.step == run.last_step:
            return
        better = f"a finite {self._config.eval.metric}"
        if best.best is not None:
            better = f"a better {self._config.eval.metric} than {best.best:.1%}"
            better += f" (step {best.best_step})"
        message = f"done at step {run.step}: {best.stale} evaluations without {better}"
        run.end(Plateau(f"{run.folder}: {message} (train.stop_on_plateau)"), save)

    def _pulse(self) -> None:
        """One batch is done. Before the first step a signal has to wait: there is no checkpoint."""
        self._run.watchdog.beat()
        if self._run.step and (reason := self._reason()) != Reason.NONE:
            raise _Interrupted(reason)

    def _reason(self) -> Reason:
        """Why the run has to end: the same on all processes."""
        accelerator, own = self._run.accelerator, self._run.reason_to_end()
        reasons = accelerator.gather(torch.tensor([int(own)], device=accelerator.device))
        return Reason(int(reasons.max()))

    def _note(self, scores: dict[str, float], seconds: float) -> None:
        run, metric = self._run, self._config.eval.metric
        rested = run.step <= self.rests_until
        self.standing = best = self.standing.after(run.step, scores.get(metric), rested)
        rows = [{"metric": name, "value": value} for name, value in scores.items()]
        text = f"step {run.step}/{run.last_step}  {in_words(scores)}  eval {seconds:.1f} s"
        if best.best is not None:
            text += f"  best {metric} {best.best:.1%} (step {best.best_step})"
        run.write({"step": run.step, "results": rows, "eval_seconds": seconds}, text)
        run.trackers.log({f"eval/{name}": value for name, value in scores.items()}, run.step)
        if run.is_saved and self.is_best:  # the run was resumed here
            self._mark_best()
        if "not_finite" in scores:
            run.say(f"warning: {run.folder}: the features are not finite at step {run.step}")

    def _mark_best(self) -> None:
        if self._run.is_main:
            try:
                checkpoint.mark_best(self._run.folder, self.standing.best_step)
            except OSError as error:
                raise UserError(f"{self._run.folder}/checkpoints/best: {error.strerror}") from None


def in_words(scores: Mapping[str, float]) -> str:
    """The main scores for the terminal: knn mIoU 24.1%, prototypes mIoU 14.2%, 5.3 slots/image"""
    texts = [
        f"{name.removesuffix('_miou')} mIoU {value:.1%}"
        for name, value in scores.items()
        if name.endswith("_miou")
    ]
    if "active_slots" in scores:
        texts.append(f"{scores['active_slots']:.1f} slots/image")
    return ", ".join(texts) or "no scores: the features are not finite"
