"""Rebuild the recorded runs in `tests/golden/` and measure the distance of our runs from them.

`python -m tests.model_golden` prints the parity table.
B images, K prototypes, W processes; names of parameters are the authors' throughout.
"""

import json
import zlib
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from model import ModelConfig, ModelOutput, SlotCon, objective, prepare
from model.grouping import winning_slots
from model.losses import slot_loss
from model.official import official_names
from model.slots import SlotCapacity
from tests import GOLDEN
from tests.helpers.processes import run_workers
from train.lars import LARS

TERMS = ("grouping_12", "grouping_21", "slot_12", "slot_21")
Arrays = dict[str, NDArray[Any]]

LOSS_TOLERANCE = 1e-4
ROUNDING_FACTOR = 10.0
"""The allowed multiple of the recorded float32-to-float64 distance: builds round differently."""
OTHER_KERNELS = 3.0
"""A further factor for channels-last layout, whose convolutions sum in another order. The float64
runs prove that nothing else differs."""
ROUNDING_FLOOR = 1e-6
"""A few float32 roundings, for quantities with an even smaller recorded distance."""
FLOAT64_TOLERANCE = 1e-11


def load(name: str, folder: Path = GOLDEN) -> Arrays:
    with np.load(folder / name) as file:
        return {key: file[key] for key in file.files}


def settings(folder: Path = GOLDEN) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return loaded


@dataclass(frozen=True)
class Mode:
    """One way to compute the same steps."""

    name: str
    dtype: torch.dtype = torch.float32
    capacity: SlotCapacity | None = None
    channels_last: bool = False
    checkpointing: bool = False
    compile: bool = False
    autocast: bool = False

    @property
    def slack(self) -> float:
        """Factor of the rounding tolerance."""
        return OTHER_KERNELS if self.channels_last else 1.0

    def build(self) -> SlotCon:
        model = build_model(self.dtype).train()
        prepare(
            model,
            channels_last=self.channels_last,
            checkpointing=self.checkpointing,
            compile=self.compile,
        )
        model.capacity = self.capacity
        return model


# A rank's eight images have 9 cells per view, so at most 72 active slots. The record has fewer.
ROOM = SlotCapacity(queries=72, keys=72)
FLOAT32 = Mode("float32")
FLOAT64 = Mode("float64", torch.float64)
STATIC = Mode("static selection", capacity=ROOM)
FEATURES: dict[str, dict[str, Any]] = {
    "channels_last": {"channels_last": True},
    "checkpointing": {"checkpointing": True},
    "compile": {"compile": True},
    "static selection, channels_last, checkpointing": {
        "capacity": ROOM, "channels_last": True, "checkpointing": True
    },
    "static selection, channels_last, compile": {
        "capacity": ROOM, "channels_last": True, "compile": True
    },
}  # fmt: skip
MODES = (
    FLOAT32,
    FLOAT64,
    STATIC,
    Mode("static selection, float64", torch.float64, ROOM),
    *(Mode(name, **settings) for name, settings in FEATURES.items()),
    *(Mode(f"{name}, float64", torch.float64, **settings) for name, settings in FEATURES.items()),
)
TWO_PROCESS_MODES = (FLOAT32, STATIC)
BFLOAT16 = Mode("bfloat16 autocast", capacity=ROOM, autocast=True)
"""Without a tolerance: only its distance is printed."""


def build_model(dtype: torch.dtype = torch.float32) -> SlotCon:
    """The model of the recorded run, with its weights."""
    config = settings()
    fields = ModelConfig.__dataclass_fields__.keys() & config.keys()
    model = SlotCon(ModelConfig(**{name: config[name] for name in fields}))
    model.load_official_state_dict(rebuild_state(model.official_state_dict()))
    return model.to(dtype)


def rebuild_state(like: Mapping[str, Tensor], folder: Path = GOLDEN) -> dict[str, Tensor]:
    """The recorded initial weights. They are not stored: each follows from its name."""
    state: dict[str, Tensor] = {}
    config = settings(folder)
    # A teacher's entry is the student's plus noise, so q comes before k.
    for name in sorted(like, key=lambda name: ("_k." in name, name)):
        if like[name].is_floating_point():
            shape = tuple(like[name].shape)
            state[name] = torch.from_numpy(_initial_value(name, shape, state, config))
        else:
            state[name] = torch.zeros_like(like[name])
    return state


def _initial_value(
    name: str, shape: tuple[int, ...], state: Mapping[str, Tensor], config: Mapping[str, Any]
) -> NDArray[np.float32]:
    last = name.rpartition(".")[2]
    if last in ("center", "running_mean"):
        return np.zeros(shape, np.float32)
    if last == "running_var":
        return np.ones(shape, np.float32)
    noise = _generator(name, config["seed"]).standard_normal(shape)
    if "_k." in name:
        twin: NDArray[np.float32] = state[name.replace("_k.", "_q.", 1)].numpy()
        return twin + (0.01 * noise).astype(np.float32)
    if "slot_embed" in name or "prototypes_patch" in name:
        value = noise
    elif last in ("cls_token", "mask_token", "pos_embed"):
        value = 0.5 * noise
    elif len(shape) >= 2:
        value = noise * np.sqrt(2 / np.prod(shape[1:]))
    elif last == "weight":
        ends_block = name.startswith("encoder_") and name.endswith("bn2.weight")
        value = (1 + 0.1 * noise) * (config["block_end_bn_factor"] if ends_block else 1.0)
    else:
        value = 0.1 * noise
    return value.astype(np.float32)


def rebuild_images(name: str, folder: Path = GOLDEN) -> NDArray[np.float32]:
    """One recorded batch of one view [B, 3, S, S]: two octaves of interpolated noise."""
    config = settings(folder)
    count, size = config["batch_size"], config["image_size"]
    rng = _generator(name, config["seed"])
    out = np.zeros((count, 3, size, size))
    for cells, amplitude in ((size // 16, 1.0), (size // 4, 0.5)):
        grid = rng.standard_normal((count, 3, cells, cells))
        position = (np.arange(size) + 0.5) * cells / size - 0.5
        low = np.floor(position).astype(int)
        part = position - low
        before, after = low.clip(0, cells - 1), (low + 1).clip(0, cells - 1)
        rows = grid[:, :, before] * (1 - part)[:, None] + grid[:, :, after] * part[:, None]
        out += amplitude * (rows[..., before] * (1 - part) + rows[..., after] * part)
    return out.astype(np.float32)


def _generator(name: str, seed: int) -> np.random.Generator:
    return np.random.default_rng([seed, zlib.crc32(name.encode())])


def image_names(world: int, rank: int, step: int) -> list[str]:
    return [f"image/ws{world}/rank{rank}/step{step}/view{view}" for view in (0, 1)]


def batch(
    record: Arrays,
    world: int,
    rank: int,
    step: int,
    dtype: torch.dtype = torch.float32,
    folder: Path = GOLDEN,
) -> tuple[Tensor, Tensor, Tensor]:
    """(views, overlap, flipped) of one recorded step."""
    at = step if world == 1 else (step, rank)
    views = np.stack([rebuild_images(name, folder) for name in image_names(world, rank, step)])
    return (
        torch.from_numpy(views).to(dtype),
        torch.from_numpy(record["coords"][at]).to(dtype),
        torch.from_numpy(record["flags"][at]),
    )


class Recorder:
    """Runs the recorded steps with our model and notes the same quantities."""

    def __init__(self, model: SlotCon, forward: nn.Module, autocast: bool = False) -> None:
        self.model, self.forward, self.autocast = model, forward, autocast
        config = settings()
        self.optimizer = LARS(
            [parameter for parameter in model.parameters() if parameter.requires_grad],
            lr=config["base_lr"],  # each step sets its recorded rate
            momentum=config["momentum"],
            weight_decay=config["weight_decay"],
        )
        weights = dict(model.named_parameters())
        self.parameters = {theirs: weights[n] for n, theirs in official_names(weights).items()}
        self.scores: dict[str, list[Tensor]] = defaultdict(list)
        for branch in ("student", "teacher"):
            self._note_scores(branch)

    def _note_scores(self, branch: str) -> None:
        def hook(_module: nn.Module, _args: Any, grouped: Any) -> None:
            self.scores[branch].append(grouped[1].detach())

        getattr(self.model, branch).grouping.register_forward_hook(hook)

    def step(self, inputs: tuple[Tensor, Tensor, Tensor], record: Arrays, step: int) -> Arrays:
        """One step with the recorded rates; returns the recorded quantities, by name."""
        students, teachers = list(record["student_names"]), list(record["teacher_names"])
        self.scores.clear()
        before = {name: p.detach().clone() for name, p in self.parameters.items()}
        for group in self.optimizer.param_groups:
            group["lr"] = float(record["lr"][step])

        self.model.update_teacher(float(record["teacher_momentum"][step]))
        mixed = torch.autocast("cpu", torch.bfloat16, enabled=self.autocast)
        with mixed, patch.object(objective, "slot_loss", wraps=slot_loss) as slot_losses:
            output: ModelOutput = self.forward(*inputs)
        self.optimizer.zero_grad()
        output.loss.backward()
        gradients = {name: self._gradient(name) for name in students}
        self.optimizer.step()

        state = self.model.official_state_dict()
        student_won = [winning_slots(scores) for scores in self.scores["student"]]
        teacher_won = [winning_slots(scores) for scores in self.scores["teacher"]]
        noted: dict[str, Any] = {
            "loss": output.loss.item(),
            "loss_terms": [output.terms[name].item() for name in TERMS],
            "grad_norm": _norms(gradients, students),
            "grad_first8": _first8(gradients, students),
            "student_mu_norm": _norms({n: self._momentum_buffer(n) for n in students}, students),
            "bn1_q_num_batches_tracked": state["encoder_q.bn1.num_batches_tracked"].item(),
            "center": self.model.center.numpy(),
            "active_q": torch.stack(student_won).numpy(),
            "active_k": torch.stack(teacher_won[::-1]).numpy(),
            "stats": {name: value.item() for name, value in output.stats.items()},
        }
        for direction, call in zip(("12", "21"), slot_losses.call_args_list, strict=True):
            _, keys, positive = contrasted(*call.args)
            noted[f"keys_{direction}"] = F.normalize(keys, dim=1).numpy()
            noted[f"labels_{direction}"] = positive.numpy()
        for kind, names in (("student", students), ("teacher", teachers)):
            noted[f"{kind}_norm"] = _norms(self.parameters, names)
            noted[f"{kind}_first8"] = _first8(self.parameters, names)
            change = {name: self.parameters[name].double() - before[name] for name in names}
            noted[f"{kind}_delta_norm"] = _norms(change, names)
        for letter in "qk":
            for statistic in ("running_mean", "running_var"):
                noted[f"bn1_{letter}_{statistic}"] = state[
                    f"encoder_{letter}.bn1.{statistic}"
                ].numpy()
        return {name: np.array(value) for name, value in noted.items()}

    def _gradient(self, name: str) -> Tensor:
        gradient = self.parameters[name].grad
        assert gradient is not None
        return gradient.clone()

    def _momentum_buffer(self, name: str) -> Tensor:
        parameter = self.parameters[name]
        state = self.optimizer.state[parameter].values()
        return next(value for value in state if value.shape == parameter.shape)


def contrasted(
    queries: Tensor,
    keys: Tensor,
    positive: Tensor,
    valid_queries: Tensor,
    valid_keys: Tensor,
    _: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and positives of a slot loss, without empty positions."""
    return (
        queries[valid_queries],
        keys[valid_keys],
        (valid_keys.cumsum(0) - 1)[positive[valid_queries]],
    )


def _norms(tensors: Mapping[str, Tensor], names: list[str]) -> list[float]:
    return [tensors[name].detach().double().norm().item() for name in names]


def _first8(tensors: Mapping[str, Tensor], names: list[str]) -> NDArray[Any]:
    return np.stack([tensors[name].detach().flatten()[:8].numpy() for name in names])


PER_PARAMETER = tuple(
    f"{kind}_{statistic}"
    for kind, statistics in (
        ("grad", ("norm", "first8")),
        ("student", ("norm", "first8", "delta_norm", "mu_norm")),
        ("teacher", ("norm", "first8", "delta_norm")),
    )
    for statistic in statistics
)
WHOLE = ("center", *(f"bn1_{b}_running_{statistic}" for b in "qk" for statistic in ("mean", "var")))


@dataclass(frozen=True)
class Parity:
    """The largest distance of one quantity from the record over all steps, and its tolerance."""

    quantity: str
    worst: float
    tolerance: float

    @property
    def holds(self) -> bool:
        return self.worst <= self.tolerance


def relative(ours: Any, theirs: Any, axis: int | None = None) -> NDArray[np.float64]:
    """L2 distance over L2 norm, over everything or along `axis`."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    distance = np.linalg.norm(np.atleast_1d(ours - theirs), axis=axis)
    return np.asarray(distance / np.linalg.norm(np.atleast_1d(theirs), axis=axis))


def compare(
    steps: list[Arrays],
    record: Callable[[str, int], NDArray[Any]],
    noise: Mapping[str, Any] | None,
    slack: float = 1.0,
) -> list[Parity]:
    """Compare our steps with `record(quantity, step)`.

    `noise` is the recorded distance between float32 and float64. It gives the tolerances, except
    those of the losses. It is None for a float64 run, which has no such noise.
    """
    distances: dict[str, list[Any]] = defaultdict(list)
    for index, ours in enumerate(steps):
        for name in ("loss", *WHOLE):
            distances[name].append(relative(ours[name], record(name, index)))
        for name in PER_PARAMETER:
            theirs = record(name, index)
            axis = 1 if theirs.ndim == 2 else None
            each = (
                relative(ours[name], theirs, axis) if axis else np.abs(ours[name] - theirs) / theirs
            )
            distances[name].append(each)
        terms = record("loss_terms", index)
        distances["loss_terms"].append(np.abs(ours["loss_terms"] - terms) / terms)

    def tolerance(name: str, statistic: str) -> float:
        if noise is None:
            return FLOAT64_TOLERANCE
        if name.startswith("loss"):
            return LOSS_TOLERANCE
        return max(
            ROUNDING_FLOOR, slack * ROUNDING_FACTOR * max(noise[name][f"{statistic}_per_step"])
        )

    rows = []
    for name in ("loss", "loss_terms", *WHOLE, *PER_PARAMETER):
        worst = float(np.max(distances[name]))
        rows.append(Parity(name, worst, tolerance(name, "max")))
        if name in PER_PARAMETER:
            middle = max(float(np.median(each)) for each in distances[name])
            rows.append(Parity(f"{name} (median)", middle, tolerance(name, "median")))
    return rows


def noise(run: str) -> Mapping[str, Any]:
    distances: dict[str, Any] = json.loads((GOLDEN / "float32_vs_float64.json").read_text())
    result: Mapping[str, Any] = distances[run]
    return result


def table(title: str, rows: list[Parity]) -> str:
    """The comparison as a Markdown table."""
    lines = [
        f"{title}",
        "",
        "| quantity | max relative difference | tolerance |",
        "|---|---|---|",
    ]
    for row in rows:
        verdict = "" if row.holds else " EXCEEDED"
        lines.append(f"| {row.quantity} | {row.worst:.1e} | {row.tolerance:.1e}{verdict} |")
    return "\n".join(lines) + "\n"


def one_process(mode: Mode = FLOAT32, count: int = 6) -> list[Arrays]:
    """Our steps for the record of one process."""
    record = load("steps_ws1.npz")
    model = mode.build()
    recorder = Recorder(model, model, mode.autocast)
    inputs = (batch(record, 1, 0, step, mode.dtype) for step in range(count))
    return [recorder.step(each, record, step) for step, each in enumerate(inputs)]


def two_processes(folder: Path) -> list[dict[str, list[Arrays]]]:
    """Our steps for the record of two processes, in `TWO_PROCESS_MODES`: [rank][mode's name]."""
    run_workers(_golden_worker, folder)
    return [torch.load(folder / f"golden{rank}.pt", weights_only=False) for rank in (0, 1)]


def _golden_worker(rank: int, folder: Path) -> None:
    record = load("steps_ws2.npz")
    inputs = [batch(record, 2, rank, step) for step in range(3)]
    steps = {}
    for mode in TWO_PROCESS_MODES:
        model = mode.build()
        recorder = Recorder(model, nn.parallel.DistributedDataParallel(model))
        steps[mode.name] = [recorder.step(each, record, step) for step, each in enumerate(inputs)]
    torch.save(steps, folder / f"golden{rank}.pt")


def compare_one_process(mode: Mode, steps: list[Arrays]) -> list[Parity]:
    if mode.dtype == torch.float64:
        return compare(steps, _reader(load("steps_ws1_f64.npz")), None)
    return compare(steps, _reader(load("steps_ws1.npz")), noise("steps_ws1"), mode.slack)


def compare_two_processes(rank: int, steps: list[Arrays]) -> list[Parity]:
    return compare(steps, _reader(load("steps_ws2.npz"), rank), noise(f"steps_ws2_rank{rank}"))


def _reader(record: Arrays, rank: int | None = None) -> Callable[[str, int], NDArray[Any]]:
    """Read (quantity, step) of a record. In a record of two processes, some quantities have an axis
    for the rank."""

    def read(quantity: str, step: int) -> NDArray[Any]:
        value = record[quantity][step]
        by_rank = rank is not None and quantity.startswith(("loss", "bn1", "active"))
        return np.asarray(value[rank] if by_rank else value)

    return read


def summary(rows: dict[str, list[Parity]]) -> str:
    """One line per mode: its largest differences, and the largest share of a tolerance."""
    lines = [
        "| mode | losses | weights after the last step | largest share of a tolerance |",
        "|---|---|---|---|",
    ]
    for name, parities in rows.items():
        worst = {row.quantity: row.worst for row in parities}
        share = max(row.worst / row.tolerance for row in parities)
        losses = max(worst["loss"], worst["loss_terms"])
        verdict = "" if share <= 1 else " EXCEEDED"
        lines.append(
            f"| {name} | {losses:.1e} | {worst['student_norm']:.1e} | {share:.2f}{verdict} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Print the distance of every quantity from its record, for every recorded run and mode."""
    torch.set_num_threads(1)
    rows = {}
    for mode in MODES:
        rows[mode.name] = compare_one_process(mode, one_process(mode))
        print(table(f"One process, 6 steps, {mode.name}", rows[mode.name]))
    with TemporaryDirectory() as folder:
        ranks = two_processes(Path(folder))
    for mode in TWO_PROCESS_MODES:
        for rank, steps in enumerate(ranks):
            name = f"two processes, {mode.name}, rank {rank}"
            rows[name] = compare_two_processes(rank, steps[mode.name])
            print(table(f"{name}, 3 steps", rows[name]))
    first = compare_one_process(BFLOAT16, one_process(BFLOAT16, count=1))
    print(summary(rows))
    print("Another precision; distances of the first step, no tolerance:\n")
    for row in first:
        print(f"| {row.quantity} | {row.worst:.1e} |")


if __name__ == "__main__":
    main()
