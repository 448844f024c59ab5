"""The settings of what a run starts from, and what they must fit."""

from dataclasses import dataclass, field
from typing import Any, Literal

from model.config import ModelConfig
from pipeline.bounds import Bounded
from pipeline.errors import require

LIBRARIES = ("torchvision", "timm")
_MOST_PIXELS = 4096  # of a view's side


@dataclass(frozen=True)
class InitConfig(Bounded):
    """The weights that a run starts from. Only its first start reads them: checkpoints hold all."""

    weights: str = field(default="random", metadata={"random, torchvision, timm or a path": bool})
    """"random"; "torchvision" or "timm", what they publish for model.arch; or the path of a run, a
    checkpoint or a file of weights, as tools.export reads them."""
    part: Literal["encoder", "all"] = "encoder"
    """What to take. "encoder": its weights, for student and teacher alike. "all": also projectors,
    prototypes, predictor and centre, each as it is there, from a run, a checkpoint or a file of the
    authors' code; parts of other sizes begin anew."""

    def __post_init__(self) -> None:
        super().__post_init__()
        whole = self.part == "encoder" or self.weights not in ("random", *LIBRARIES)
        require(whole, "part", self.part, f"encoder with init.weights {self.weights}")


def check_start(config: Any) -> None:
    """New weights cannot rest: they are noise, and so are their statistics. `config`: a RunConfig.
    Raises ValueError.
    """
    model, train = config.model, config.train
    count, stages = train.trainable_stages, model.stages
    fits = count is None or count < stages
    require(fits, "train.trainable_stages", count, f"below model.stages ({stages}), or null")
    if config.init.weights != "random":
        return
    needs = {
        "model.norm": (model.norm, "train"),
        "train.trainable_stages": (count, None),
        "train.freeze_encoder_epochs": (train.freeze_encoder_epochs, 0),
    }
    for name, (value, plain) in needs.items():
        shown = "null" if plain is None else plain
        require(value == plain, name, value, f"{shown} with init.weights random")
    frozen = train.teacher == "frozen"
    require(not frozen, "init.weights", "random", "given with train.teacher frozen")


def check_frozen(config: Any) -> None:
    """What a frozen teacher, and prototypes from k-means, can be used with. `config`: a RunConfig.
    Raises ValueError.
    """
    model, train = config.model, config.train
    placed = model.prototype_init == "kmeans"
    last = "empty with model.prototype_init kmeans"
    require(not (placed and model.supervise), "model.supervise", model.supervise, last)
    if train.teacher != "frozen":
        return
    needs = {
        "prototype_init": "kmeans",
        "image_loss_weight": 0,
        "cell_loss_weight": 0,
    }
    for name, value in needs.items():
        given = getattr(model, name)
        require(given == value, f"model.{name}", given, f"{value} with train.teacher frozen")
    share = model.group_loss_weight
    plain = share == 1 or model.relation_loss_weight
    alone = "1 with train.teacher frozen, unless model.relation_loss_weight is above 0"
    require(plain, "model.group_loss_weight", share, alone)
    stages, last_stage = train.teacher_stages, model.stages
    known = bool(train.teacher_arch) or not stages or stages[-1] <= last_stage
    require(known, "train.teacher_stages", stages, f"at most model.stages ({last_stage})")
    factor = train.teacher_resolution
    fits = config.views.size * factor <= _MOST_PIXELS
    require(fits, "train.teacher_resolution", factor, f"so that views have {_MOST_PIXELS} pixels")
    try:
        teacher = ModelConfig(train.teacher_arch or model.arch, stages=max(stages or (last_stage,)))
    except ValueError as error:
        raise ValueError(f"train.teacher_{error}") from None  # it begins with arch or stages
    own = model.strides[last_stage]
    finest = min(teacher.strides[stage] for stage in stages or (teacher.stages,))
    require(
        finest <= factor * own,
        "train.teacher_resolution",
        factor,
        f"so that the teacher's cells of {finest} pixels are not larger than the student's, {own}",
    )
    for side in {size for _, size in train.view_sizes} | {config.views.size}:
        refused = teacher.refused_side(side * factor)
        require(
            refused is None,
            "train.teacher_resolution",
            factor,
            f"so that views of {side} pixels become {refused}",
        )
