"""The configuration that both tasks share; `transfer.detection.config` and
`transfer.segmentation.config` add their data and their model.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Literal, TypeVar

from model.config import ARCHITECTURES
from pipeline.errors import require
from train.run.settings import check_run_name, check_seed_and_end

STAGES = ("conv1 and bn1", "layer1", "layer2", "layer3", "layer4")
"""What `InitConfig.frozen` counts."""


@dataclass(frozen=True)
class InitConfig:
    """The backbone: where it comes from, and how much of it learns."""

    weights: str = "random"
    """"random"; "supervised" (torchvision's IMAGENET1K_V1); or the path of a run, a checkpoint or a
    file of weights, see tools.export."""
    arch: str = "resnet50"
    """The ResNet, which has to be that of the weights."""
    branch: Literal["teacher", "student"] = "teacher"
    """Which encoder of a run or checkpoint of slotstream."""
    frozen: int = 0
    """How many leading stages keep their weights and their BatchNorm statistics: 0 none, 1 the
    stem, 2 also layer1, … 5 the whole encoder."""

    def __post_init__(self) -> None:
        require(bool(self.weights), "weights", self.weights, "random, supervised or a path")
        known = ", ".join(ARCHITECTURES)
        require(self.arch in ARCHITECTURES, "arch", self.arch, f"one of {known}")
        require(0 <= self.frozen <= len(STAGES), "frozen", self.frozen, f"in 0..{len(STAGES)}")


@dataclass(frozen=True)
class OptimConfig:
    """SGD with momentum, and its schedule, counted in steps."""

    steps: int
    """Steps of the whole schedule."""
    batch_size: int
    """Images of one step, over all processes."""
    lr: float
    """Learning rate after the warm-up, for this batch size: it is not scaled."""
    momentum: float = 0.9
    """What a step keeps of the last one's direction."""
    weight_decay: float = 1e-4
    """Decay of all weights, those of norms included unless norm_weight_decay says otherwise."""
    norm_weight_decay: float | None = None
    """Decay of the weights and biases of norms; null = weight_decay."""
    schedule: Literal["step", "poly"] = "poly"
    """"step": times gamma at each of the milestones; "poly": (1 - step / steps) ** power, from lr
    down to min_lr."""
    milestones: tuple[int, ...] = ()
    """"step" only: the first steps of the lower learning rates."""
    gamma: float = 0.1
    """"step" only: factor at each milestone."""
    power: float = 0.9
    """"poly" only: 1 is a straight line."""
    min_lr: float = 0.0
    """"poly" only: the learning rate at the end."""
    warmup_steps: int = 0
    """Steps at the start whose learning rate rises in a straight line to what the schedule says."""
    warmup_factor: float = 0.001
    """Share of it that the first of them has."""
    precise_bn: int = 0
    """Before each evaluation, measure BatchNorm's statistics anew on so many training batches; the
    running ones are put back after it. 0: evaluate with the running ones."""
    seed: int = 0
    """Of new weights, of the order of the images, and of whatever is drawn for them."""
    max_steps: int | None = None
    """Stop after this many steps; the schedule still aims at `steps`. null = run to the end."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("lr", "gamma", "power"):
            value = getattr(self, name)
            require(0 < value < math.inf, name, value, "a positive number")
        for name in ("weight_decay", "norm_weight_decay"):
            value = getattr(self, name)
            require(value is None or 0 <= value < math.inf, name, value, "0 or positive")
        require(0 <= self.momentum < 1, "momentum", self.momentum, "at least 0 and less than 1")
        stones = tuple(self.milestones)
        object.__setattr__(self, "milestones", stones)
        grow = list(stones) == sorted(set(stones)) and all(0 < s < self.steps for s in stones)
        require(grow, "milestones", stones, f"growing steps within 1..{self.steps - 1}")
        stepped = self.schedule == "step"
        require(stepped or not stones, "milestones", stones, 'empty, or schedule "step"')
        require(0 <= self.min_lr <= self.lr, "min_lr", self.min_lr, f"in 0..lr ({self.lr})")
        require(
            0 <= self.warmup_steps < self.steps,
            "warmup_steps",
            self.warmup_steps,
            f"at least 0 and less than steps ({self.steps})",
        )
        require(0 <= self.warmup_factor <= 1, "warmup_factor", self.warmup_factor, "in 0..1")
        require(self.precise_bn >= 0, "precise_bn", self.precise_bn, "0 or more")
        check_seed_and_end(self.seed, self.max_steps)

    @property
    def last_step(self) -> int:
        """How many steps the run does."""
        return min(self.steps, self.max_steps or self.steps)


@dataclass(frozen=True)
class EfficiencyConfig:
    """Settings of speed and memory. They may change from one resume to the next, which then goes
    on with the same images but, but for workers, no longer bit for bit."""

    precision: Literal["no", "fp16", "bf16"] = "no"
    """Mixed precision: "no" (float32), "bf16", or "fp16" with loss scaling, which needs CUDA and a
    run that began with it."""
    channels_last: bool = True
    """Keep weights and activations in channels-last layout."""
    workers: int = 2
    """Processes that read and augment images, of each training process; 0: it does so itself."""

    def __post_init__(self) -> None:
        require(self.workers >= 0, "workers", self.workers, "0 or more")


@dataclass(frozen=True)
class LogConfig:
    """What a run writes down, when and where."""

    every: int = 50
    """Steps between two log lines; their losses are averages over these steps."""
    evaluate_every: int = 0
    """Steps between two evaluations; 0 = after the last step only, which is always evaluated."""
    checkpoint_every: int = 5000
    """Steps between two checkpoints; 0 = only the last step, which always gets one."""
    keep: int = 1
    """How many of the newest checkpoints to keep."""
    dir: str = "runs"
    """Folder of all runs; this one writes to DIR/NAME."""

    def __post_init__(self) -> None:
        for name in ("every", "keep"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("evaluate_every", "checkpoint_every"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        require(bool(self.dir), "dir", self.dir, "the name of a folder")


@dataclass(frozen=True, kw_only=True)
class TransferConfig:
    """What every run has. A task's own configuration inherits from this and adds sections."""

    name: str
    """Names the run and its folder: letters, digits, '.', '_', '-'."""
    init: InitConfig = field(default_factory=InitConfig)
    """Backbone"""
    optim: OptimConfig
    """Optimisation"""
    efficiency: EfficiencyConfig = field(default_factory=EfficiencyConfig)
    """Efficiency"""
    log: LogConfig = field(default_factory=LogConfig)
    """Log"""

    def __post_init__(self) -> None:
        check_run_name(self.name)


Config = TypeVar("Config", bound=TransferConfig)


def without_weights(config: Config) -> Config:
    """The same, its backbone not read from where it once came from: a checkpoint holds it."""
    init = config.init
    return replace(config, init=InitConfig(arch=init.arch, frozen=init.frozen))
