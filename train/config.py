"""The configuration of a pre-training run: one typed description of the whole run.

It is read from YAML files and the command line, and each checkpoint stores it. An impossible
configuration is refused before anything is loaded. The sections `data`, `views`, `model`, `train`
and `init` define the science; `efficiency`, `log` and `eval` do not.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from model import ModelConfig
from pipeline.bounds import (
    BELOW_1,
    MOST_PROCESSES,
    POSITIVE,
    Bounded,
    at_least,
    one_of,
    optional,
    positive,
    some_of,
    within,
)
from pipeline.choices import BACKENDS, CROPS, ORDERS, AnyCrops, OnCorrupt, Order
from pipeline.errors import require
from pipeline.views import ViewConfig
from train.eval_config import EvalConfig
from train.init_config import InitConfig, check_frozen, check_start
from train.mask_config import check_masks
from train.run.command import EXIT_CODES
from train.run.settings import RESUME, RUN_NAME, SEED, Settings

TRACKERS = (
    "aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb",
)  # fmt: skip
"""The trackers that Accelerate speaks to."""

_EXAMPLES = """examples:
  accelerate launch -m train.pretrain --config configs/coco_r50_800ep.yaml --data.path coco.beton
  accelerate launch -m train.pretrain --config configs/coco_r50_800ep.yaml --resume auto
  python -m train.pretrain --config configs/scenes_cpu.yaml --train.epochs 2 --name trial
  torchrun --nproc_per_node 8 -m train.pretrain --config configs/imagenet_r50_200ep.yaml
  accelerate launch -m train.pretrain --config configs/coco_r50_800ep.yaml \\
      --config configs/ablations/k1024.yaml     # a later file wins, and options over both
  python -m train.pretrain --config configs/camvid_cpu.yaml --eval.every 50 --eval.dataset camvid \\
      --eval.root CamVid     # score the teacher while it trains
  python -m train.pretrain --config configs/camvid_cpu.yaml --init.weights resnet18.pth
      # start from weights: a run, a file of anyone's, or torchvision and timm
  python -m train.pretrain --config configs/scenes_cpu.yaml --print_config

A run writes LOG.DIR/NAME/: config.yaml, metrics.jsonl, checkpoints/ and the trackers' files.

"""


def _begins(parts: tuple[tuple[Any, ...], ...]) -> bool:
    """Whether the first values are growing shares of a run, from 0 on."""
    shares = [share for share, *_ in parts]
    return shares == sorted(set(shares)) and shares[:1] in ([], [0]) and shares[-1:] < [1]


def _grows(parts: tuple[tuple[float, int], ...]) -> bool:
    sides = [side for _, side in parts]
    return _begins(parts) and sides == sorted(sides) and all(s > 0 and s % 32 == 0 for s in sides)


def _are_scales(parts: tuple[tuple[float, float, float], ...]) -> bool:
    return _begins(parts) and all(0 < low <= high <= 1 for _, low, high in parts)


_GROWING = {"pairs of a growing share, from 0 on, and a growing side, a multiple of 32": _grows}
_STAGES = {
    "a growing list of whole numbers in 1..4": lambda stages: (
        list(stages) == sorted(set(stages)) and set(stages) <= {1, 2, 3, 4}
    )
}
_SCALES = {"a growing share, from 0 on, and two growing scales in 0..1, for each": _are_scales}


@dataclass(frozen=True)
class DataConfig(Bounded):
    """Which images a run uses, and how they reach the device."""

    path: str = field(metadata={"the name of a beton": bool})
    """The beton, written by tools.build_dataset; or a folder of images, for a first hour: it is
    indexed at each start, and gives the same images and views as the beton of it."""
    backend: str = field(default="auto", metadata=one_of(("auto", *BACKENDS)))
    """Code that colours the views, and crops them if `crops` is "device": "reference", "compiled",
    "kornia" or "triton", which differ by rounding. "compiled" works on the CPU, with the bits of
    PIL. "auto" is triton on a GPU and compiled elsewhere."""
    crops: AnyCrops = field(default="auto", metadata=one_of(("auto", *CROPS)))
    """Where both crops are made. "device": on the device, from the whole image. "host": by the
    decoding threads, which saves time and memory of the GPU; with "compiled" they also colour, and
    a GPU gets finished views. "dali": by DALI, which also decodes, on the GPU if there is one.
    "auto" is host on a CPU or with "compiled", and device otherwise."""
    order: Order = field(default="random", metadata=one_of(ORDERS))
    """Order of the images: "random"; "quasi-random", shuffled within windows of the file, for a set
    larger than memory; "sequential", the order of the file."""
    window_gb: float = field(default=4.0, metadata=POSITIVE)
    """Size of a quasi-random window in 1e9 bytes of the file. Two windows should fit in memory. A
    larger window puts fewer neighbours in the file into the same step."""
    threads: int = field(default=0, metadata=at_least(0, MOST_PROCESSES))
    """Decoding threads of each process; 0 = an equal share of the cores of its machine, with a GPU
    less the one that launches the GPU's work."""
    on_corrupt: OnCorrupt = "stop"
    """If an image cannot be decoded: "stop" names it and ends the run; "replace" names it once and
    uses the next image of the beton instead."""
    max_replaced: float = field(default=0.05, metadata=within(0, 1))
    """With "replace": share of the images that may be replaced. More ends the run: the data are
    damaged. It counts from the first 1,000 images that a process reads, or a smaller set, on."""


@dataclass(frozen=True)
class TrainConfig(Bounded):
    """The optimisation; defaults are the authors' for COCO (arXiv 2205.15288, section 4.1)."""

    epochs: int = field(default=800, metadata=at_least(1, 10**6))
    """Passes over the images; learning rate and teacher momentum are spread over all of them."""
    batch_size: int = field(default=512, metadata=at_least(1, 10**6))
    """Images of one optimiser step, over all processes and micro-batches."""
    base_lr: float = field(default=1.0, metadata=POSITIVE)
    """Peak learning rate for 256 images a step; it scales with the batch size."""
    warmup_epochs: float = 5
    """Epochs of linear warm-up before the cosine."""
    warmup_multiplier: float | None = field(default=100, metadata=optional(at_least(1)))
    """The warm-up starts at the peak learning rate divided by this; null: at 0."""
    warmup_reaches_peak: bool = False
    """Whether the last step of the warm-up has the peak learning rate, as the next one has."""
    final_lr: float = field(default=1e-6, metadata=at_least(0))
    """Learning rate at the end of the cosine, whatever the batch size."""
    optimizer: Literal["lars", "adamw"] = "lars"
    """"lars": the authors', for training from scratch. "adamw" (arXiv 1711.05101), with base_lr
    below 0.1: for weights that are good already."""
    encoder_lr_scale: float = field(default=1.0, metadata=POSITIVE)
    """The encoder's learning rate, as a share of that of projectors, prototypes and predictors."""
    freeze_encoder_epochs: int = field(default=0, metadata=at_least(0))
    """Epochs at first in which the encoder rests and only the new parts beside it learn."""
    trainable_stages: int | None = field(default=None, metadata=optional(within(0, 3)))
    """Train only so many of the encoder's last stages: 1 is the last one. What comes before rests:
    no gradients are computed for it, and its BatchNorms keep their statistics. null = all of it."""
    momentum: float = field(default=0.9, metadata=BELOW_1)
    """Share of the last step's direction that a step keeps; AdamW: beta 1 (beta 2 is 0.999)."""
    weight_decay: float = field(default=1e-5, metadata=at_least(0))
    """Decay of all weights except 1-D ones (biases, norms) and, with AdamW, positions."""
    final_weight_decay: float | None = field(default=None, metadata=optional(POSITIVE))
    """The decay at the end of the run, to which a cosine leads. null = weight_decay throughout."""
    decay_positions: bool = False
    """AdamW: the embeddings of positions and tokens decay too."""
    clip_grad: float | None = field(default=None, metadata=optional(POSITIVE))
    """The largest norm of a tensor's gradient; a larger one is scaled down, each tensor by itself.
    null = any."""
    freeze_prototypes_epochs: int = field(default=0, metadata=at_least(0))
    """Epochs at first in which the prototypes rest: no step, no decay, no moments."""
    eta: float = field(default=0.001, metadata=POSITIVE)
    """LARS: trust coefficient, the size of a layer's step relative to its weights."""
    teacher_momentum: float = field(default=0.99, metadata=within(0, 1))
    """Share of the teacher that one step keeps at first; a cosine raises it to 1 at the end."""
    warmup_teacher_temp: float | None = field(default=None, metadata=optional(POSITIVE))
    """model.teacher_temp in the first epoch. null = as later."""
    warmup_teacher_temp_epochs: int = field(default=0, metadata=at_least(0))
    """Epochs in which it goes from there to model.teacher_temp, linearly, both ends included."""
    teacher: Literal["ema", "student", "switch", "frozen"] = "ema"
    """Whose output teaches. "ema": that of an average of the student, as in the paper. "student":
    the student's own, without gradient, as in SwAV (arXiv 2006.09882), which saves a quarter of the
    networks' operations; teacher_momentum must be 0. On small sets it is better below about 100
    steps, level or worse beyond. "switch": the student's own first, then an average that begins as
    the student. "frozen": a network that never learns (docs/posttraining.md); what is stored and
    evaluated as the teacher is the student."""
    teacher_from: float = field(default=0.5, metadata=within(0, 1))
    """Switch: the share of the run after which the average begins."""
    teacher_arch: str = ""
    """Frozen: its architecture, with any width; empty: model.arch."""
    teacher_weights: str = ""
    """Frozen: its weights, as init.weights; empty: those of init.weights."""
    teacher_stages: tuple[int, ...] = field(default=(), metadata=_STAGES)
    """Frozen: its stages, whose maps are joined, as [3, 4]. Empty: the last one."""
    teacher_resolution: int = field(default=1, metadata=within(1, 4))
    """Frozen: how many times the student's resolution it sees. Views are made in its resolution,
    and the student sees means of their pixels."""
    view_sizes: tuple[tuple[float, int], ...] = field(default=(), metadata=_GROWING)
    """Progressive size of the views: pairs of a share of the epochs (0..1) and the views' side
    from then on, a multiple of 32. [[0, 160], [0.5, 224]] trains the first half on views of 160
    pixels. The last side must be views.size. Empty: views.size from the start."""
    view_scales: tuple[tuple[float, float, float], ...] = field(default=(), metadata=_SCALES)
    """Progressive scale of the crops: a share of the epochs (0..1), and min_scale and max_scale
    from then on. [[0, 0.08, 0.3], [0.5, 0.08, 1]] begins with small parts of the images. The last
    ones must be those of views. Empty: views.min_scale and max_scale from the start."""
    seed: int = field(default=0, metadata=SEED)
    """Seed of the weights, the order of the images and their views."""
    max_steps: int | None = field(default=None, metadata=optional(at_least(1)))
    """Stop after this many steps; the schedules still aim at `epochs`. null = run to the end."""
    stop_on_plateau: int | None = field(default=None, metadata=optional(at_least(1)))
    """Stop when so many evaluations in a row have not raised eval.metric. The run then ends as done
    (exit code 0), with a checkpoint. null = never."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            0 <= self.warmup_epochs < self.epochs,
            "warmup_epochs",
            self.warmup_epochs,
            f"at least 0 and less than epochs ({self.epochs})",
        )
        rest = self.freeze_encoder_epochs
        require(rest < self.epochs, "freeze_encoder_epochs", rest, f"below epochs ({self.epochs})")
        frozen = self.freeze_prototypes_epochs
        fits = frozen < self.epochs
        require(fits, "freeze_prototypes_epochs", frozen, f"below epochs ({self.epochs})")
        given = (self.warmup_teacher_temp is None) == (self.warmup_teacher_temp_epochs == 0)
        with_epochs = "given with train.warmup_teacher_temp_epochs, or both not"
        require(given, "warmup_teacher_temp", self.warmup_teacher_temp, with_epochs)
        decays = self.final_weight_decay is None or self.weight_decay > 0
        above = "above 0 with train.final_weight_decay"
        require(decays, "weight_decay", self.weight_decay, above)
        adam = self.optimizer == "adamw"
        require(adam or not self.decay_positions, "decay_positions", True, "false with lars")
        fits = not adam or self.base_lr <= 0.1
        require(fits, "base_lr", self.base_lr, "at most 0.1 with train.optimizer adamw")
        bound = {
            "ema": (True, ""),
            "student": (self.teacher_momentum == 0, "0 with train.teacher student"),
            "switch": (self.teacher_momentum > 0, "above 0 with train.teacher switch"),
            "frozen": (self.teacher_momentum == 0, "0 with train.teacher frozen"),
        }[self.teacher]
        require(bound[0], "teacher_momentum", self.teacher_momentum, bound[1])
        plain = self.teacher == "switch" or self.teacher_from == type(self).teacher_from
        words = f"{type(self).teacher_from} unless train.teacher is switch"
        require(plain, "teacher_from", self.teacher_from, words)
        for name in ("teacher_arch", "teacher_weights", "teacher_stages", "teacher_resolution"):
            value, default = getattr(self, name), getattr(type(self), name, ())
            plain = self.teacher == "frozen" or value == default
            require(plain, name, value, f"{default!r} unless train.teacher is frozen")
        both = bool(self.teacher_arch) == bool(self.teacher_weights)
        given_both = "given with train.teacher_arch, or both not"
        require(both, "teacher_weights", self.teacher_weights, given_both)


@dataclass(frozen=True)
class EfficiencyConfig(Bounded):
    """Settings of speed and memory. A resume may change them. The run then continues with the same
    images and views, but bit-exactness is lost."""

    precision: Literal["no", "fp16", "bf16"] = "no"
    """Mixed precision: "no" (float32; a GPU may convolve in TF32), "bf16", or "fp16" with loss
    scaling, which needs CUDA and must be set from the start of the run."""
    accumulation: int = field(default=1, metadata=at_least(1))
    """Micro-batches of one step. Batch statistics and the contrast of slots use one micro-batch, so
    more of them make a slightly different run."""
    channels_last: bool = True
    """Keep weights and activations in channels-last layout."""
    slot_selection: Literal["auto", "exact", "static"] = "auto"
    """How the active slots are selected. "exact": by their number; the host waits for it in each
    forward pass. "static": into buffers of fixed size, without waiting; the size is adapted at log
    lines, and pairs that do not fit are counted as dropped_pairs. "auto": static on a GPU."""
    compile: bool = False
    """Compile encoders and projectors with torch.compile. This takes minutes at the start and for
    each new size of view. If it fails, the run continues without. Not with checkpointing."""
    checkpointing: bool = False
    """Keep only the inputs of the encoder's residual blocks for the backward pass and recompute
    the rest: less memory, about a third more work, the same numbers."""

    def __post_init__(self) -> None:
        super().__post_init__()
        both = self.compile and self.checkpointing
        require(not both, "checkpointing", self.checkpointing, "false with compile")

    def selects_statically(self, device: str) -> bool:
        """Whether slots fill buffers of fixed size on this device, see SlotCon.adapt_capacity."""
        automatic = "static" if device == "cuda" else "exact"
        return (automatic if self.slot_selection == "auto" else self.slot_selection) == "static"


@dataclass(frozen=True)
class LogConfig(Bounded):
    """What a run records, when and where."""

    every: int = field(default=10, metadata=at_least(1))
    """Steps between two log lines; their values are averages over these steps."""
    trackers: tuple[str, ...] = field(default=("tensorboard",), metadata=some_of(TRACKERS))
    """Accelerate's trackers by name: wandb, or [wandb, mlflow]; [] for none. metrics.jsonl is
    always written."""
    checkpoint_every: int = field(default=1000, metadata=at_least(0))
    """Steps between two checkpoints; 0 = only the last step, which always gets one."""
    keep: int = field(default=3, metadata=at_least(1))
    """How many of the newest checkpoints to keep."""
    history: int = field(default=4, metadata=at_least(0))
    """Also keep this many checkpoints spread over the run, for evaluation.pictures attention: the
    last one of each of as many equal parts of the run. 0: none."""
    dir: str = field(default="runs", metadata={"the name of a folder": bool})
    """Folder of all runs; this one writes to DIR/NAME."""
    on_divergence: Literal["stop", "roll_back"] = "stop"
    """If a loss or weight is not finite, or all fp16 steps overflow: "stop" ends the run;
    "roll_back" continues from the last good checkpoint, at most three times without progress."""
    on_collapse: Literal["warn", "stop"] = "warn"
    """If training collapses: "warn" reports it once; "stop" ends the run. Signs of collapse, after
    the warm-up: two log lines in a row with fewer than two active slots an image, or with an
    entropy of prototype usage below a quarter of its maximum; ten with a grouping loss at
    chance."""
    timeout_minutes: float = field(default=10, metadata=positive(100_000))
    """Timeout of a process that waits for other processes, the disk or a tracker. It then ends with
    an error, or goes on without the tracker."""


@dataclass(frozen=True)
class RunConfig(Bounded):
    """A run."""

    name: str = field(metadata=RUN_NAME)
    """Names the run and its folder: letters, digits, '.', '_', '-'."""
    data: DataConfig
    """Data"""
    views: ViewConfig = field(default_factory=ViewConfig)
    """Views"""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Model"""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Training"""
    init: InitConfig = field(default_factory=InitConfig)
    """Initial weights"""
    efficiency: EfficiencyConfig = field(default_factory=EfficiencyConfig)
    """Efficiency"""
    log: LogConfig = field(default_factory=LogConfig)
    """Log"""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """Evaluation"""

    def __post_init__(self) -> None:
        super().__post_init__()
        sides = [side for _, side in self.train.view_sizes] or [self.views.size]
        for side in sides:
            refused = self.model.refused_side(side)
            require(refused is None, "views.size", side, refused or "")
        checkpointing = self.efficiency.checkpointing
        able = not checkpointing or self.model.can_checkpoint
        require(able, "efficiency.checkpointing", checkpointing, "false with this model.arch")
        self._check_stages(min(sides))
        require(
            sides[-1] == self.views.size,
            "train.view_sizes",
            self.train.view_sizes,
            f"of sides that end with views.size ({self.views.size})",
        )
        check_start(self)
        check_frozen(self)
        check_masks(self)
        patience = self.train.stop_on_plateau
        scored = patience is None or self.eval.every is not None
        require(scored, "train.stop_on_plateau", patience, "null without eval.every")

        scales = (self.views.min_scale, self.views.max_scale)
        require(
            not self.train.view_scales or self.train.view_scales[-1][1:] == scales,
            "train.view_scales",
            self.train.view_scales,
            f"of scales that end with views.min_scale and max_scale {scales}",
        )

    def loaded(self, views: ViewConfig) -> ViewConfig:
        """How views are made: in the resolution of a frozen teacher."""
        factor = self.train.teacher_resolution
        if factor == 1:
            return views
        low, high = views.blur_sigma
        sigma = (min(100.0, factor * low), min(100.0, factor * high))
        cell = factor * views.mask_cell
        return replace(views, size=factor * views.size, mask_cell=cell, blur_sigma=sigma)

    def _check_stages(self, side: int) -> None:
        """Whether the smallest views, of this side, have enough cells at each supervised stage."""
        last = self.model.supervised[-1]
        require(
            self.model.cells_of(side, last) > 1 or not self.model.supervise,
            "model.supervise",
            list(self.model.supervise),
            f"stages with more than one cell of a view (stage {last} has one of {side} pixels)",
        )
        for stage in self.model.supervised:
            cells, sample = self.model.cells_of(side, stage), self.model.at(stage).cells
            require(
                sample <= cells or not self.model.samples_cells,
                "model.cells",
                sample,
                f"at most the {cells} cells that stage {stage} has of a view of {side} pixels "
                "(model.stage_sizes has those of a stage)",
            )

    def view_size(self, epoch: int) -> int:
        """Side of the views of `epoch`, in pixels."""
        return self.views_of(epoch).size

    def views_of(self, epoch: int) -> ViewConfig:
        """How the views of `epoch` are drawn."""
        passed = (epoch + 1e-6) / self.train.epochs  # 0.55 · 100 is more than 55
        views = self.views
        for share, side in self.train.view_sizes:
            views = replace(views, size=side) if share <= passed else views
        for share, low, high in self.train.view_scales:
            if share <= passed:
                views = replace(views, min_scale=low, max_scale=high)
        return views


SETTINGS = Settings(
    RunConfig,
    prog="python -m train.pretrain",
    description="Pre-train SlotCon, or SlotMIM, on the images of a beton.",
    epilog=_EXAMPLES + EXIT_CODES,
    options={"resume": RESUME},
    fixed=("data.order", "data.window_gb", "views.", "model.", "train.", "init."),
    free=("train.max_steps", "train.stop_on_plateau"),
)


def load_config(argv: list[str] | None = None) -> tuple[RunConfig, str | None]:
    """The run that a command line describes, and its --resume ("auto", a path, or None).

    Raises UserError, which names the key, if a key is unknown or missing or a value impossible.
    """
    config, options = SETTINGS.load(argv)
    return config, options["resume"]


def from_dict(values: Mapping[str, Any]) -> RunConfig:
    """A configuration from nested plain values. Raises UserError, which names the key."""
    return SETTINGS.from_dict(values)
