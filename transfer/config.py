"""The configuration that both tasks share; `transfer.detection.config` and
`transfer.segmentation.config` add their data and their model.
"""

from dataclasses import dataclass, field, replace
from typing import Literal, TypeVar

from model.config import ARCHITECTURES
from pipeline.bounds import BELOW_1, POSITIVE, Bounded, at_least, one_of, optional, within
from pipeline.errors import require
from train.run.settings import RUN_NAME, SEED

STAGES = ("conv1 and bn1", "layer1", "layer2", "layer3", "layer4")
"""What `InitConfig.frozen` counts."""


@dataclass(frozen=True)
class InitConfig(Bounded):
    """The backbone: where it comes from, and how much of it learns."""

    weights: str = field(default="random", metadata={"random, supervised or a path": bool})
    """"random"; "supervised" (torchvision's IMAGENET1K_V1); or the path of a run, a checkpoint or a
    file of weights, see tools.export."""
    arch: str = field(default="resnet50", metadata=one_of(ARCHITECTURES))
    """The ResNet, which has to be that of the weights."""
    branch: Literal["teacher", "student"] = "teacher"
    """Which encoder of a run or checkpoint of slotstream."""
    frozen: int = field(default=0, metadata=within(0, len(STAGES)))
    """How many leading stages keep their weights and their BatchNorm statistics: 0 none, 1 the
    stem, 2 also layer1, … 5 the whole encoder."""


@dataclass(frozen=True)
class OptimConfig(Bounded):
    """SGD with momentum, and its schedule, counted in steps."""

    steps: int = field(metadata=at_least(1))
    """Steps of the whole schedule."""
    batch_size: int = field(metadata=at_least(1))
    """Images of one step, over all processes."""
    lr: float = field(metadata=POSITIVE)
    """Learning rate after the warm-up, for this batch size: it is not scaled."""
    momentum: float = field(default=0.9, metadata=BELOW_1)
    """What a step keeps of the last one's direction."""
    weight_decay: float = field(default=1e-4, metadata=at_least(0))
    """Decay of all weights, those of norms included unless norm_weight_decay says otherwise."""
    norm_weight_decay: float | None = field(default=None, metadata=optional(at_least(0)))
    """Decay of the weights and biases of norms; null = weight_decay."""
    schedule: Literal["step", "poly"] = "poly"
    """"step": times gamma at each of the milestones; "poly": (1 - step / steps) ** power, from lr
    down to min_lr."""
    milestones: tuple[int, ...] = ()
    """"step" only: the first steps of the lower learning rates."""
    gamma: float = field(default=0.1, metadata=POSITIVE)
    """"step" only: factor at each milestone."""
    power: float = field(default=0.9, metadata=POSITIVE)
    """"poly" only: 1 is a straight line."""
    min_lr: float = 0.0
    """"poly" only: the learning rate at the end."""
    warmup_steps: int = 0
    """Steps at the start whose learning rate rises in a straight line to what the schedule says."""
    warmup_factor: float = field(default=0.001, metadata=within(0, 1))
    """Share of it that the first of them has."""
    precise_bn: int = field(default=0, metadata=at_least(0))
    """Before each evaluation, measure BatchNorm's statistics anew on so many training batches; the
    running ones are put back after it. 0: evaluate with the running ones."""
    seed: int = field(default=0, metadata=SEED)
    """Of new weights, of the order of the images, and of whatever is drawn for them."""
    max_steps: int | None = field(default=None, metadata=optional(at_least(1)))
    """Stop after this many steps; the schedule still aims at `steps`. null = run to the end."""

    def __post_init__(self) -> None:
        super().__post_init__()
        stones = self.milestones
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

    @property
    def last_step(self) -> int:
        """How many steps the run does."""
        return min(self.steps, self.max_steps or self.steps)


@dataclass(frozen=True)
class EfficiencyConfig(Bounded):
    """Settings of speed and memory. They may change from one resume to the next, which then goes
    on with the same images but, but for workers, no longer bit for bit."""

    precision: Literal["no", "fp16", "bf16"] = "no"
    """Mixed precision: "no" (float32), "bf16", or "fp16" with loss scaling, which needs CUDA and a
    run that began with it."""
    channels_last: bool = True
    """Keep weights and activations in channels-last layout."""
    workers: int = field(default=2, metadata=at_least(0))
    """Processes that read and augment images, of each training process; 0: it does so itself."""


@dataclass(frozen=True)
class LogConfig(Bounded):
    """What a run writes down, when and where."""

    every: int = field(default=50, metadata=at_least(1))
    """Steps between two log lines; their losses are averages over these steps."""
    evaluate_every: int = field(default=0, metadata=at_least(0))
    """Steps between two evaluations; 0 = after the last step only, which is always evaluated."""
    checkpoint_every: int = field(default=5000, metadata=at_least(0))
    """Steps between two checkpoints; 0 = only the last step, which always gets one."""
    keep: int = field(default=1, metadata=at_least(1))
    """How many of the newest checkpoints to keep."""
    dir: str = field(default="runs", metadata={"the name of a folder": bool})
    """Folder of all runs; this one writes to DIR/NAME."""


@dataclass(frozen=True, kw_only=True)
class TransferConfig(Bounded):
    """What every run has. A task's own configuration inherits from this and adds sections."""

    name: str = field(metadata=RUN_NAME)
    """Names the run and its folder: letters, digits, '.', '_', '-'."""
    init: InitConfig = field(default_factory=InitConfig)
    """Backbone"""
    optim: OptimConfig
    """Optimisation"""
    efficiency: EfficiencyConfig = field(default_factory=EfficiencyConfig)
    """Efficiency"""
    log: LogConfig = field(default_factory=LogConfig)
    """Log"""


Config = TypeVar("Config", bound=TransferConfig)


def without_weights(config: Config) -> Config:
    """The same, its backbone not read from where it once came from: a checkpoint holds it."""
    init = config.init
    return replace(config, init=InitConfig(arch=init.arch, frozen=init.frozen))
