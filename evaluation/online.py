"""Scores the teacher of a run while it trains (`train.evaluations`), on labelled images.

The figures are those of evaluation.probe knn, evaluation.unsupervised_segmentation and
evaluation.slots for a checkpoint of the same step, on the same images. Each process reads and
encodes its batches. What is fitted, every process fits to all of them; pixels are counted apart and
added up. So the scores do not depend on the number of processes.

Letters: B images, R the side of an evaluated image in pixels, D features, h w cells of an image, K
prototypes or clusters, C classes.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext, redirect_stderr
from dataclasses import replace
from io import StringIO
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, gather_object
from torch import Tensor, nn

from evaluation.confusion import confusion_matrix
from evaluation.datasets.curated import curated
from evaluation.datasets.images import evaluation_size, spread
from evaluation.datasets.labelled_images import LabelledImages
from evaluation.datasets.labelled_squares import LabelledSquares
from evaluation.datasets.open import CURATED, open_labelled
from evaluation.datasets.squares import Squares
from evaluation.features import in_one_line
from evaluation.networks import calibrate_branch
from evaluation.probes.memory import LabelledFeatures, gather_memory
from evaluation.probes.retrieval import Retrieval
from evaluation.probes.scores import scores_of_cells
from evaluation.protocols import Match
from evaluation.scoring import Counting, scored
from evaluation.segment import assign
from model import ModelConfig, SlotCon
from model.architectures import is_timm
from model.branch import Branch
from model.grouping import won_cells
from model.kmeans import kmeans, sample_cells
from model.timm_encoder import TimmEncoder
from pipeline.errors import UserError, about
from train.config import RunConfig
from train.health import usage_entropy

SEED = 0
"""Of the cells in the memory and of k-means: all evaluations of a run, and all runs, have the same.
"""
MATCH: dict[str, Match] = {"knn": "none", "kmeans": "pixels", "prototypes": "pixels"}
"""How the predictions of each protocol become classes."""

Logits = Callable[[Tensor, Tensor], Tensor]
"""Features [B, D, h, w] of the encoder and scores [B, K, h, w] of the prototypes → scores of the
classes or clusters [B, *, h, w]."""
Pulse = Callable[[], None]


class OnlineEvaluation:
    """A `train.evaluations.Evaluation`."""

    def __init__(self, config: RunConfig, accelerator: Accelerator) -> None:
        """Open what `config.eval` names, and read all of it once: bad data are refused now, not
        after hours of training. Raises UserError.
        """
        self._config, self._accelerator = config, accelerator
        self._protocols = config.eval.protocols
        with main_prints(accelerator):
            self._val = open_part(config, "", accelerator.device)
            parts = [self._val]
            if "knn" in self._protocols:
                self._train = open_part(config, "train_", accelerator.device)
                parts.append(self._train)
            check_counts(config, self._val.images)
            for train in parts[1:]:
                self._val.images.require_apart(train.images)
            for part in parts:
                check_images(part)
        self._clusters = config.eval.clusters or self._val.images.num_classes

    def __call__(self, teacher: nn.Module, pulse: Pulse) -> dict[str, float]:
        """As in `Evaluation`. Raises UserError for an image that can no longer be read."""
        with torch.inference_mode(), torch.autocast(self._val.device.type, enabled=False):
            scores = self._scores(teacher, pulse)
        if self._val.device.type == "cuda":
            torch.cuda.empty_cache()  # training needs the memory
        return scores

    def _scores(self, teacher: nn.Module, pulse: Pulse) -> dict[str, float]:
        branch = copy_of(teacher, self._config.model, self._accelerator)
        with main_prints(self._accelerator):
            part = self._train if "knn" in self._protocols else self._val
            calibrate_branch(branch, part, heads=bool({"prototypes", "slots"} & {*self._protocols}))
        network = _Encoder(branch)
        heads = {name: self._fit(name, network, pulse) for name in self._protocols if name in MATCH}
        data, size = self._val.images, self._val.size
        counts = {name: np.zeros((self._rows(name), data.num_classes), np.int64) for name in heads}
        slots = np.zeros(1 + self._config.model.num_prototypes, np.int64)
        for batch in self._rounds(self._val, pulse):
            if batch is None:
                continue
            features, prototypes = network(batch.normalised(self._val.device))
            truth = self._val.labels(batch)
            for name, logits in heads.items():
                predicted = assign(logits(features, prototypes).float(), size).cpu().numpy()
                counts[name] += confusion_matrix(predicted, truth, *counts[name].shape)
            won = won_cells(prototypes).cpu().numpy()
            slots += [(won > 0).sum(), *won.sum(axis=0)]
        if self._sum(np.array([network.bad]))[0]:
            return {"not_finite": 1.0}
        results: dict[str, float] = {}
        for name in heads:
            score = scored(Counting([MATCH[name]]), self._sum(counts[name]), MATCH[name], data)
            results |= {f"{name}_miou": score.miou, f"{name}_pixel_accuracy": score.accuracy}
        if "slots" in self._protocols:
            active, *cells = self._sum(slots).tolist()
            results["active_slots"] = active / len(data)
            results["usage_entropy"] = usage_entropy(torch.tensor(cells))
            results["dead_prototypes"] = float(cells.count(0))
        return results

    def _rows(self, name: str) -> int:
        """The rows of a confusion matrix."""
        rows = {"knn": self._val.images.num_classes, "kmeans": self._clusters}
        return rows.get(name, self._config.model.num_prototypes)

    def _fit(self, name: str, network: "_Encoder", pulse: Pulse) -> Logits:
        """A protocol's predictions. Raises UserError."""
        if name == "prototypes":
            temperature = self._config.model.teacher_temp
            return lambda _, scores: scores / temperature
        part = self._train if name == "knn" else self._val
        batches, count = self._everyones(network, part, pulse), len(part.images)
        with about(f"eval.protocols: {name}"):
            if name == "kmeans":
                cells = sample_cells((each.features for each in batches), count, SEED)
                clusters = kmeans(cells, self._clusters, SEED)
                return lambda features, _: clusters.logits(features)
            capacity, classes = self._config.eval.memory, part.images.num_classes
            memory = gather_memory(
                batches, count, classes, capacity=capacity, seed=SEED, balanced=True
            )
        retrieval = Retrieval(memory)
        return lambda features, _: scores_of_cells(retrieval, features)

    def _rounds(self, squares: LabelledSquares, pulse: Pulse) -> Iterator[Squares | None]:
        """In each round every process gets one of the next batches; None if there are none left.
        The batches are those of a single process.
        """
        world, rank = self._accelerator.num_processes, self._accelerator.process_index
        numbers = np.arange(len(squares.images))
        batches = [
            numbers[first : first + squares.batch_size]
            for first in range(0, len(numbers), squares.batch_size)
        ]
        own = iter(squares.batches(indices=np.concatenate([numbers[:0], *batches[rank::world]])))
        for _ in range(0, len(batches), world):
            yield next(own, None)
            pulse()

    def _everyones(
        self, network: "_Encoder", squares: LabelledSquares, pulse: Pulse
    ) -> Iterator[LabelledFeatures]:
        """The features of all images, batch by batch, each encoded by one process."""
        for batch in self._rounds(squares, pulse):
            own: list[LabelledFeatures] = []
            if batch is not None:
                features, _ = network(batch.normalised(squares.device))
                labels = squares.labels(batch)
                own = [LabelledFeatures(replace(batch, pixels=batch.pixels[:0]), features, labels)]
            for each in self._gathered(own):
                yield replace(each, features=each.features.to(squares.device))

    def _gathered(self, own: list[LabelledFeatures]) -> list[LabelledFeatures]:
        """The batches of all processes, in order."""
        if self._accelerator.num_processes == 1:
            return own
        gathered: list[LabelledFeatures] = gather_object(
            [replace(each, features=each.features.cpu()) for each in own]
        )
        return gathered

    def _sum(self, counts: np.ndarray) -> np.ndarray:
        """Counts int64 of this process → those of all processes."""
        on_device = torch.from_numpy(counts).to(self._accelerator.device)
        total: Tensor = self._accelerator.reduce(on_device, "sum")
        return total.cpu().numpy()


class _Encoder:
    """A branch in evaluation mode. Features that are not finite are counted, and become 0: nothing
    that is fitted to them fails, and no score of theirs is used.
    """

    def __init__(self, branch: Branch) -> None:
        self.branch, self.bad = branch, 0

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised images [B, 3, R, R] → features of the encoder [B, D, h, w], scores of the
        prototypes [B, K, h, w].
        """
        encoder = self.branch.encoder
        any_size = not isinstance(encoder, TimmEncoder)
        with nullcontext() if any_size else in_one_line("eval.size: the encoder", images):
            features = encoder(images)
        _, scores = self.branch.grouping(self.branch.projector(features))
        return self._finite(features.float()), self._finite(scores.float())

    def _finite(self, maps: Tensor) -> Tensor:
        if bool(maps.isfinite().all()):
            return maps
        self.bad += 1
        return maps.nan_to_num(0.0, 0.0, 0.0)


def main_prints(accelerator: Accelerator) -> AbstractContextManager[object]:
    """In its `with` only the main process prints on stderr: all do the same."""
    return nullcontext() if accelerator.is_main_process else redirect_stderr(StringIO())


def copy_of(teacher: nn.Module, config: ModelConfig, accelerator: Accelerator) -> Branch:
    """The teacher of the main process, as its checkpoint holds it, in evaluation mode: without
    compilation, mixed precision and SyncBatchNorm. The teacher itself is not used: its mode, its
    buffers and its compiled code stay as they are.

    On CPUs each process has its own running statistics; a checkpoint holds the main process's.
    """
    state = {
        name: value.detach().clone(memory_format=torch.contiguous_format)
        for name, value in teacher.state_dict().items()
    }
    # timm's networks have buffers that no state dict holds, as Swin's: their values are needed.
    with torch.random.fork_rng(devices=[]), torch.device("cpu" if is_timm(config.arch) else "meta"):
        branch = SlotCon(config).teacher
    branch.load_state_dict(broadcast(state), assign=True)
    return branch.requires_grad_(False).eval().to(accelerator.device)


def open_part(config: RunConfig, part: str, device: torch.device) -> LabelledSquares:
    """At most `max_images` of the images to score, or with `part` "train_" of those for the memory.
    Raises UserError.
    """
    settings = config.eval

    def path(name: str) -> Path | None:
        value = getattr(settings, name)
        return None if value is None else Path(value)

    split = getattr(settings, f"{part}split")
    data = open_labelled(
        settings.dataset,
        root=path("root"),
        split=split,
        images=path(f"{part}images"),
        labels=path(f"{part}labels"),
        classes=path("classes"),
        section="eval.",
        part=part,
    )
    if settings.dataset in CURATED and split == "val":
        data = curated(data)
    chosen = spread(len(data), settings.max_images)
    data = data.only(chosen, f"{len(chosen)} of {len(data)}")
    size = settings.size or evaluation_size(config.views.size)
    return LabelledSquares(data, size, device, settings.batch_size)


def check_counts(config: RunConfig, data: LabelledImages) -> None:
    """Refuse fewer clusters or prototypes than classes: they are matched one to one. Raises
    UserError.
    """
    wanted, classes = config.eval.protocols, len(data.names or [])
    if "kmeans" in wanted and config.eval.clusters is None and data.names is None:
        raise UserError("eval.clusters: no class table says how many clusters kmeans needs")
    for protocol, key, count in (
        ("kmeans", "eval.clusters", config.eval.clusters or classes),
        ("prototypes", "model.num_prototypes", config.model.num_prototypes),
    ):
        if protocol in wanted and count < classes:
            raise UserError(
                f"{key}: {count} are fewer than the {classes} classes of eval.dataset, and each "
                f"class needs its own: leave {protocol} out of eval.protocols, or raise it"
            )


def check_images(squares: LabelledSquares) -> None:
    """Read all images and label maps; print what is odd about them. Raises UserError for the first
    that cannot be used, and if no pixel of any has a class.
    """
    data = squares.images
    labelled = [
        bool((squares.labels(batch) < data.num_classes).any())
        for batch in squares.batches("eval.dataset: reading")
    ]
    if not any(labelled):
        raise UserError(f"{data.source}: no labelled pixel: the label maps are all void")
    for note in data.notes():
        print(f"note: {note}", file=sys.stderr)
