"""Rebuild the recorded runs in `tests/golden/slotmim/` and measure the distance of our runs from
them. `python -m tests.slotmim_golden` prints the parity table.

Names of parameters are the authors' throughout. The steps go through the parts that the trainer
uses: schedules, clipping, resting prototypes, AdamW and its groups.
"""

import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from timm.models import build_model_with_cfg, register_model
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from model import ModelConfig, ModelOutput, SlotCon
from model.architectures import IMAGENET
from model.grouping import winning_slots
from model.official import official_names
from model.slots import SlotCapacity
from tests import GOLDEN
from tests.helpers.processes import run_workers
from tests.model_golden import Arrays, Parity, batch, load, rebuild_state, settings, table
from train.config import TrainConfig
from train.optimizer import build_optimizer, clip_each, set_rate
from train.schedule import learning_rate, teacher_momentum, teacher_temp, weight_decay

RECORD = GOLDEN / "slotmim"
TERMS = ("grouping_12", "grouping_21", "masked_1", "masked_2", "slot_12", "slot_21")
STEPS = {1: 6, 2: 3}
FLOAT64 = 1e-12
FLOOR, FACTOR = 1e-6, 10.0
"""Tolerances of float32: a few roundings, and a multiple of the recorded distance to float64."""
ROOM = SlotCapacity(queries=64, keys=64)
"""All slots of a rank's four images: static selection."""
PER_PARAMETER = (
    "grad_norm", "grad_norm_clipped", "student_norm", "student_delta_norm", "adam_m_norm",
    "adam_v_norm", "teacher_norm",
)  # fmt: skip
FIRST8 = {
    "grad_first8": "grad_norm",
    "student_first8": "student_norm",
    "teacher_first8": "teacher_norm",
}
"""First values, whose distance is relative to the whole tensor's norm."""


@register_model
def golden_vit(pretrained: bool = False, **options: Any) -> Any:
    """timm's ViT in the sizes of the record."""
    config = settings(RECORD)
    size, (mean, std) = config["image_size"], IMAGENET
    known = {
        "input_size": (3, size, size),
        "mean": mean,
        "std": std,
        "first_conv": "patch_embed.proj",
    }
    names = ("patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio")
    sizes = {name: config[name] for name in names} | {"img_size": size}
    options = sizes | options | {"pretrained_cfg": known}
    return build_model_with_cfg(VisionTransformer, "golden_vit", pretrained, **options)


def train_settings(world: int) -> TrainConfig:
    """Of the recorded run, as a run of ours has them."""
    config = settings(RECORD)
    return TrainConfig(
        epochs=config["epochs"],
        batch_size=config["batch_size"] * world,
        base_lr=config["base_lr"],
        warmup_epochs=config["warmup_epoch"],
        warmup_multiplier=None,
        warmup_reaches_peak=True,
        final_lr=config["min_lr"],
        optimizer="adamw",
        weight_decay=config["weight_decay"],
        final_weight_decay=config["weight_decay_end"],
        decay_positions=True,
        clip_grad=config["clip_grad"],
        freeze_prototypes_epochs=config["freeze_slots"],
        teacher_momentum=config["teacher_momentum"],
        warmup_teacher_temp=config["warmup_teacher_temp"],
        warmup_teacher_temp_epochs=config["warmup_teacher_temp_epochs"],
    )


def rates(step: int, train: TrainConfig) -> dict[str, float]:
    """The recorded quantities that follow from the number of a step."""
    config = settings(RECORD)
    per_epoch = config["steps_per_epoch"]
    total = train.epochs * per_epoch
    assert train.final_weight_decay and train.warmup_teacher_temp
    return {
        "lr": learning_rate(
            step,
            peak=train.base_lr * train.batch_size / 256,
            warmup_steps=round(train.warmup_epochs * per_epoch),
            warmup_multiplier=train.warmup_multiplier,
            total_steps=total,
            reaches_peak=train.warmup_reaches_peak,
            final=train.final_lr,
        ),
        "weight_decay": weight_decay(
            step, first=train.weight_decay, last=train.final_weight_decay, total_steps=total
        ),
        "teacher_momentum": teacher_momentum(step, base=train.teacher_momentum, total_steps=total),
        "teacher_temp": teacher_temp(
            step // per_epoch,
            first=train.warmup_teacher_temp,
            last=config["teacher_temp"],
            warmup_epochs=train.warmup_teacher_temp_epochs,
        ),
    }


def build_model(dtype: torch.dtype = torch.float32) -> SlotCon:
    """The model of the recorded run, with its weights."""
    config = settings(RECORD)
    fields = ModelConfig.__dataclass_fields__.keys() & config.keys()
    own: dict[str, Any] = {
        "arch": "timm:golden_vit",
        "objective": "slotmim",
        "image_stats": IMAGENET,
    }
    model = SlotCon(ModelConfig(**{name: config[name] for name in fields} | own))
    model.load_official_state_dict(rebuild_state(model.official_state_dict(), RECORD))
    return model.to(dtype).train()


def inputs(
    record: Arrays, world: int, rank: int, step: int, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """The arguments of the model in one recorded step."""
    views, overlap, flipped = batch(record, world, rank, step, dtype, RECORD)
    masks = torch.from_numpy(record["masks"][step if world == 1 else (step, rank)])
    return {"views": views, "overlap": overlap, "flipped": flipped, "masks": masks}


class Recorder:
    """Runs the recorded steps with our model and notes the same quantities."""

    def __init__(self, model: SlotCon, forward: nn.Module, world: int) -> None:
        self.model, self.forward = model, forward
        self.train = train_settings(world)
        self.optimizer = build_optimizer(model, self.train)
        weights = dict(model.named_parameters())
        self.parameters = {theirs: weights[n] for n, theirs in official_names(weights).items()}
        self.scores: list[Tensor] = []
        for branch in (model.student, model.teacher):
            branch.grouping.register_forward_hook(
                lambda _module, _args, grouped: self.scores.append(grouped[1].detach())
            )

    def step(self, given: dict[str, Tensor], record: Arrays, step: int) -> Arrays:
        students, teachers = list(record["student_names"]), list(record["teacher_names"])
        at, per_epoch = rates(step, self.train), settings(RECORD)["steps_per_epoch"]
        before = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.scores.clear()
        set_rate(self.optimizer, at["lr"], at["weight_decay"])
        self.model.set_teacher_temp(at["teacher_temp"])
        self.model.update_teacher(at["teacher_momentum"])
        output: ModelOutput = self.forward(**given)
        self.optimizer.zero_grad()
        output.loss.backward()
        noted: dict[str, Any] = dict(at)
        noted |= self._of("grad", {name: self._gradient(name) for name in students})
        assert self.train.clip_grad
        clip_each(self.model.parameters(), self.train.clip_grad)
        noted["grad_norm_clipped"] = [norm(name, self._gradient(name)) for name in students]
        if step < self.train.freeze_prototypes_epochs * per_epoch:
            for prototypes in self.model.student.prototypes:
                prototypes.grad = None
        self.optimizer.step()

        noted["loss"] = output.loss.item()
        noted["loss_terms"] = [output.terms[name].item() for name in TERMS]
        noted["n_slot"] = output.stats["active_slots"].item()
        noted["active"] = torch.stack([winning_slots(scores) for scores in self.scores]).numpy()
        noted["center"] = self.model.center[0].clone().numpy()
        noted |= self._of("student", {name: self.parameters[name].detach() for name in students})
        noted |= self._of("teacher", {name: self.parameters[name].detach() for name in teachers})
        change = {name: self.parameters[name].detach() - before[name] for name in students}
        noted["student_delta_norm"] = [norm(name, change[name]) for name in students]
        for ours, theirs in (("exp_avg", "adam_m_norm"), ("exp_avg_sq", "adam_v_norm")):
            noted[theirs] = [norm(name, self._moment(name, ours)) for name in students]
        noted["adam_step"] = [int(self._moment(name, "step")) for name in students]
        return {name: np.array(value) for name, value in noted.items()}

    def _of(self, kind: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
        return {
            f"{kind}_norm": [norm(name, value) for name, value in tensors.items()],
            f"{kind}_first8": np.stack([value.flatten()[:8].numpy() for value in tensors.values()]),
        }

    def _gradient(self, name: str) -> Tensor:
        gradient = self.parameters[name].grad
        assert gradient is not None, name
        return gradient.clone()

    def _moment(self, name: str, kind: str) -> Tensor:
        return self.optimizer.state[self.parameters[name]].get(kind, torch.zeros(()))


def norm(name: str, value: Tensor) -> float:
    """L2 norm. Of a bias of queries, keys and values without the keys': no output depends on it."""
    if name.endswith("attn.qkv.bias"):
        first, _, last = value.chunk(3)
        value = torch.cat((first, last))
    return float(value.double().norm())


def distance(ours: Any, theirs: Any, scale: Any = None) -> float:
    """The largest distance relative to `scale`, if None to each value itself; what is exactly zero
    there must be here."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    scale = np.abs(theirs if scale is None else scale)
    return float((np.abs(ours - theirs) / np.where(scale == 0, 1e-30, scale)).max())


def compare(steps: list[Arrays], world: int, rank: int, dtype: torch.dtype) -> list[Parity]:
    """The largest distance of each quantity over all steps. Raises AssertionError if what is
    counted differs."""
    suffix = "_f64" if dtype == torch.float64 else ""
    record = load(f"steps_ws{world}{suffix}.npz", RECORD)
    read = reader(record, world, rank)
    worst: dict[str, float] = defaultdict(float)
    for index, ours in enumerate(steps):
        for name in ("active", "adam_step"):
            assert np.array_equal(ours[name], read(name, index)), (name, index)
        plain = ("loss", "loss_terms", "n_slot", "lr", "weight_decay", "teacher_momentum")
        for name in (*plain, "teacher_temp", *PER_PARAMETER):
            worst[name] = max(worst[name], distance(ours[name], read(name, index)))
        for name, of in FIRST8.items():
            scale = read(of, index)[:, None]
            worst[name] = max(worst[name], distance(ours[name], read(name, index), scale))
        theirs = read("center", index)
        worst["center"] = max(
            worst["center"], distance(ours["center"], theirs, np.linalg.norm(theirs))
        )
    return [Parity(name, value, tolerance(name, world, dtype)) for name, value in worst.items()]


def tolerance(name: str, world: int, dtype: torch.dtype) -> float:
    if dtype == torch.float64 or name in ("lr", "weight_decay", "teacher_momentum", "teacher_temp"):
        return FLOAT64
    noise = json.loads((RECORD / "float32_vs_float64.json").read_text())[f"steps_ws{world}"]
    names = (name, f"{name}_max", f"{name}_over_norm")
    known = next((noise[each] for each in names if each in noise), [0.0])
    return max(FLOOR, FACTOR * max(known))


def reader(record: Arrays, world: int, rank: int) -> Callable[[str, int], NDArray[Any]]:
    """Read (quantity, step) of a record; with two processes some have an axis for the rank."""

    def read(name: str, step: int) -> NDArray[Any]:
        value = record[name][step]
        own = world == 2 and name in ("loss", "loss_terms", "n_slot", "active")
        return np.asarray(value[rank] if own else value)

    return read


def one_process(
    dtype: torch.dtype = torch.float32, capacity: SlotCapacity | None = None, count: int = STEPS[1]
) -> list[Arrays]:
    """Our steps for the record of one process."""
    record = load("steps_ws1.npz", RECORD)
    model = build_model(dtype)
    model.capacity = capacity
    recorder = Recorder(model, model, 1)
    return [recorder.step(inputs(record, 1, 0, n, dtype), record, n) for n in range(count)]


def two_processes(folder: Path) -> list[dict[torch.dtype, list[Arrays]]]:
    """Our steps for the record of two processes: [rank][precision]."""
    run_workers(_worker, folder)
    return [torch.load(folder / f"slotmim{rank}.pt", weights_only=False) for rank in (0, 1)]


def _worker(rank: int, folder: Path) -> None:
    record, steps = load("steps_ws2.npz", RECORD), {}
    for dtype in (torch.float32, torch.float64):
        model = build_model(dtype)
        recorder = Recorder(model, nn.parallel.DistributedDataParallel(model), 2)
        given = (inputs(record, 2, rank, step, dtype) for step in range(STEPS[2]))
        steps[dtype] = [recorder.step(each, record, step) for step, each in enumerate(given)]
    torch.save(steps, folder / f"slotmim{rank}.pt")


def main() -> None:
    """Print the distance of every quantity from its record."""
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, timm {timm.__version__}\n")
    for dtype in (torch.float32, torch.float64):
        rows = compare(one_process(dtype), 1, 0, dtype)
        print(table(f"One process, {STEPS[1]} steps, {dtype}", rows))
    with TemporaryDirectory() as folder:
        ranks = two_processes(Path(folder))
    for rank, of_rank in enumerate(ranks):
        for dtype, steps in of_rank.items():
            rows = compare(steps, 2, rank, dtype)
            print(table(f"Two processes, rank {rank}, {STEPS[2]} steps, {dtype}", rows))


if __name__ == "__main__":
    main()
