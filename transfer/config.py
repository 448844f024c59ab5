"""The configuration that both tasks share.

`transfer.detection.config` and `transfer.segmentation.config` add their data and their model.
"""

from dataclasses import dataclass, field, replace
from typing import Literal, TypeVar

from model.architectures import ARCH, is_timm
from pipeline.bounds import (
    BELOW_1,
    MOST_PROCESSES,
    POSITIVE,
    UP_TO_1,
    Bounded,
    at_least,
    optional,
    within,
)
from pipeline.errors import require
from train.run.settings import RUN_NAME, SEED

STAGES = ("conv1 and bn1", "layer1", "layer2", "layer3", "layer4")
"""The stages that `InitConfig.frozen` counts."""


@dataclass(frozen=True)
class InitConfig(Bounded):
    """The backbone: the source of its weights, and which part of it is trained."""

    weights: str = field(default="random", metadata={"random, supervised or a path": bool})
    """"random"; "supervised" (torchvision's IMAGENET1K_V1, or timm's weights of that name); or the
    path of a run, a checkpoint or a file of weights, see tools.export."""
    arch: str = field(default="resnet50", metadata=ARCH)
    """The encoder, a ResNet of torchvision or, for segmentation, timm:NAME (docs/backbones.md); it
    must match the weights."""
    branch: Literal["teacher", "student"] = "teacher"
    """Which encoder of a slotstream run or checkpoint to use."""
    frozen: int = field(default=0, metadata=within(0, len(STAGES)))
    """Number of leading stages whose weights and BatchNorm statistics stay frozen: 0 none, 1 the
    stem, 2 also layer1, … 5 the whole encoder. Of timm's networks 1 is not defined."""

    def __post_init__(self) -> None:
        super().__post_init__()
        defined = not (is_timm(self.arch) and self.frozen == 1)
        require(defined, "frozen", self.frozen, "0 or 2 to 5 with a network of timm")


@dataclass(frozen=True)
class OptimConfig(Bounded):
    """SGD with momentum, and its schedule, counted in steps."""

    steps: int = field(metadata=at_least(1))
    """Steps of the whole schedule."""
    batch_size: int = field(metadata=at_least(1, 10**6))
    """Images of one step, over all processes."""
    lr: float = field(metadata=POSITIVE)
    """Learning rate after the warm-up. It does not scale with the batch size."""
    momentum: float = field(default=0.9, metadata=BELOW_1)
    """Share of the last step's direction that a step keeps."""
    weight_decay: float = field(default=1e-4, metadata=at_least(0))
    """Decay of all weights; norm_weight_decay can set another value for norms."""
    norm_weight_decay: float | None = field(default=None, metadata=optional(at_least(0)))
    """Decay of the weights and biases of norms; null = weight_decay."""
    schedule: Literal["step", "poly"] = "poly"
    """"step": multiply by gamma at each milestone; "poly": (1 - step / steps) ** power, from lr
    down to min_lr."""
    milestones: tuple[int, ...] = ()
    """"step" only: the first step of each lower learning rate."""
    gamma: float = field(default=0.1, metadata=UP_TO_1)
    """"step" only: factor at each milestone."""
    power: float = field(default=0.9, metadata=POSITIVE)
    """"poly" only: 1 is a straight line."""
    min_lr: float = 0.0
    """"poly" only: the learning rate at the end."""
    warmup_steps: int = 0
    """Steps of linear warm-up, up to the learning rate of the schedule."""
    warmup_factor: float = field(default=0.001, metadata=within(0, 1))
    """The first step of the warm-up uses this share of the schedule's learning rate."""
    precise_bn: int = field(default=0, metadata=at_least(0))
    """Before each evaluation, measure BatchNorm's statistics again on this many training batches;
    the running statistics are restored afterwards. 0: evaluate with the running statistics."""
    seed: int = field(default=0, metadata=SEED)
    """Seed of new weights, of the order of the images, and of their augmentation."""
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
        """Number of steps that the run trains."""
        return min(self.steps, self.max_steps or self.steps)


@dataclass(frozen=True)
class EfficiencyConfig(Bounded):
    """Settings of speed and memory. A resume may change them. The run then continues with the same
    images; bit-exactness is lost unless only `workers` changes."""

    precision: Literal["no", "fp16", "bf16"] = "no"
    """Mixed precision: "no" (float32), "bf16", or "fp16" with loss scaling, which needs CUDA and
    must be set from the start of the run."""
    channels_last: bool = True
    """Keep weights and activations in channels-last layout."""
    workers: int = field(default=2, metadata=at_least(0, MOST_PROCESSES))
    """Processes that read and augment images for each training process; 0: the training process
    does it."""


@dataclass(frozen=True)
class LogConfig(Bounded):
    """What a run records, when and where."""

    every: int = field(default=50, metadata=at_least(1))
    """Steps between two log lines; their losses are averages over these steps."""
    evaluate_every: int = field(default=0, metadata=at_least(0))
    """Steps between two evaluations; 0 = only after the last step, which is always evaluated."""
    checkpoint_every: int = field(default=5000, metadata=at_least(0))
    """Steps between two checkpoints; 0 = only the last step, which always gets one."""
    keep: int = field(default=1, metadata=at_least(1))
    """How many of the newest checkpoints to keep."""
    predictions: bool = False
    """Write what the trained model says about the scored images to RUN/predictions/: detections as
    COCO's results, label maps as PNGs of the data set's ids."""
    dir: str = field(default="runs", metadata={"the name of a folder": bool})
    """Folder of all runs; this one writes to DIR/NAME."""


@dataclass(frozen=True, kw_only=True)
class TransferConfig(Bounded):
    """The sections of every run. A task inherits from this and adds sections."""

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
    """The same configuration without the source of the backbone: a checkpoint holds its weights."""
    init = config.init
    return replace(config, init=InitConfig(arch=init.arch, frozen=init.frozen))
