"""SlotCon: self-supervised learning by joint semantic grouping and contrast of slots.

Wen et al., NeurIPS 2022, arXiv 2205.15288. Its successor SlotMIM (CVPR 2025, arXiv 2503.06960) is
the same model with a ViT that is kept from seeing some patches.
B images, K prototypes, D features, H W cells, S side of a view, two views each.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from hashlib import blake2b
from typing import Literal

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from model.branch import Branch
from model.config import ModelConfig
from model.distributed import rank
from model.encoder import Encoder
from model.grouping import SemanticGrouping
from model.guide import Guide
from model.objective import Geometry, ModelOutput, Objective
from model.official import from_official, to_official
from model.slots import read_capacities

__all__ = ["Branch", "ModelOutput", "SlotCon"]


class SlotCon(Objective):
    """Student, teacher, and the objectives of the supervised stages; `forward` computes the loss of
    one batch.

    It is itself the objective of the last stage, so that its names are the authors'. Earlier stages
    that have losses are in `further`, their heads in the branches.

    The trainer calls `update_teacher` once before the first forward of a step. BatchNorms see one
    rank's images; `nn.SyncBatchNorm.convert_sync_batchnorm` synchronises them over ranks.
    `record_function` names the parts of a step for profilers; `tools.benchmark` sums the time of
    each.
    """

    def __init__(self, config: ModelConfig, guide: Guide | None = None) -> None:
        """With a `guide`, a frozen teacher, the student learns to predict its scores, and nothing
        else: there is no loss of slots, and no teacher but a copy of the student, to be stored.
        """
        nn.Module.__init__(self)
        self.student = Branch(config)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        if not isinstance(self.teacher.encoder, Encoder):
            self.teacher.encoder.keep_all_paths()
        self.add_parts(config)
        self.further = nn.ModuleDict()
        for stage in config.supervised[:-1]:  # last: their draws do not change the other weights
            sizes = config.at(stage)
            self.student.add_head(stage, sizes)
            self.further[str(stage)] = Objective(sizes)
        self.teacher.heads = copy.deepcopy(self.student.heads).requires_grad_(False)
        self.guide = guide
        self.predictor.requires_grad_(guide is None)

    @property
    def objectives(self) -> dict[str, Objective]:
        """The objective of each supervised stage, by the beginning of its terms' names."""
        further = {f"stage{stage}_": one for stage, one in self.further.items()}
        return {**further, "": self}  # type: ignore[dict-item]

    def forward(
        self,
        views: Tensor,
        overlap: Tensor,
        flipped: Tensor,
        masks: Tensor | None = None,
        micro_batches: int = 1,
        draw: tuple[int, int] = (0, 0),
        own_teacher: bool = False,
    ) -> ModelOutput:
        """Loss of a batch of pairs.

        views [2, B, 3, S, S]; overlap [2, B, 4], x1 y1 x2 y2 of the shared pixels in (0..1) of each
        view after its flip; flipped bool [2, B]; masks bool [2, B, H, W], with slotmim alone: the
        cells that the student does not see. B is equal on all ranks. With `micro_batches` n,
        this batch is one of the n of a step: the centre moves by 1/n of a step. `draw` is (seed,
        number of the batch in the run): the sample of cells and the drop paths follow from it.
        With `own_teacher` the student's outputs, without gradients, are the teacher's too. The
        teacher's network is not used, and does not change until `copy_to_teacher`. With a guide it
        is never used, and the views are the guide's, [2, B, 3, f·S, f·S] with its factor f.
        In training (train mode, gradients on) the centre is used first and updated afterwards.
        """
        _check_batch(views, overlap, flipped, micro_batches)
        self._check_masks(views, masks)
        hidden = (None, None) if masks is None else masks
        paths = drawn_from(draw, views.device) if self.config.drop_path else nullcontext()
        with record_function("slotcon.student"), paths:
            seen = views if self.guide is None else map(self.guide.shrunk, views)
            student = [self.student.stages(*view) for view in zip(seen, hidden, strict=True)]
        if self.guide is not None:
            with record_function("slotcon.teacher"):
                grids = [maps[-1].scores.shape[-2:] for maps in student]
                teacher = [
                    [self.guide(view, grid)] for view, grid in zip(views, grids, strict=True)
                ]
        elif own_teacher:
            teacher = [[stage.detached() for stage in view] for view in student]
        else:
            with record_function("slotcon.teacher"), torch.no_grad():
                teacher = [self.teacher.stages(view) for view in views]

        batch = Geometry(overlap, flipped, micro_batches, draw, masks)
        pairs = zip(zip(*student, strict=True), zip(*teacher, strict=True), strict=True)
        outputs = {
            name: objective.measure(*pair, batch, has_slots=self.guide is None)
            for (name, objective), pair in zip(self.objectives.items(), pairs, strict=True)
        }
        last = outputs[""]
        dropped = [output.stats["dropped_pairs"] for output in outputs.values()]
        return ModelOutput(
            loss=sum((output.loss for name, output in outputs.items() if name), start=last.loss),
            terms={
                f"{name}{term}": value
                for name, output in outputs.items()
                for term, value in output.terms.items()
            },
            stats=last.stats | {"dropped_pairs": torch.stack(dropped).sum()},
            usage=torch.cat([output.usage for output in outputs.values()]),
        )

    @property
    def term_names(self) -> tuple[str, ...]:
        """The keys of `ModelOutput.terms`, in order."""
        return tuple(
            f"{name}{term}"
            for name, objective in self.objectives.items()
            for term in objective.own_term_names
        )

    @property
    def prototype_counts(self) -> dict[str, int]:
        """The prototypes of each supervised stage, by the beginning of its terms' names."""
        return {name: one.config.num_prototypes for name, one in self.objectives.items()}

    def train_stages(self, count: int | None) -> None:
        """Let only the last `count` stages of the encoder learn; None: all of it. The BatchNorms of
        the others keep their running statistics, in student and teacher.
        """
        self.student.train_stages(count, learns=True)
        self.teacher.train_stages(count, learns=False)

    def set_teacher_temp(self, temperature: float) -> None:
        """The temperature of the teacher's targets, and of the slots of both networks, from now on;
        at first it is `ModelConfig.teacher_temp`."""
        for module in self.modules():
            if isinstance(module, Objective):
                module.teacher_temp = temperature
            elif isinstance(module, SemanticGrouping):
                module.temperature = temperature

    def _check_masks(self, views: Tensor, masks: Tensor | None) -> None:
        """Raises ValueError. Wrong grids would be spread over the batch without an error."""
        if (masks is not None) != self.config.hides_patches:
            raise ValueError("masks must be given with slotmim, and only with it")
        if masks is None:
            return
        side = views.shape[-1] // self.config.strides[self.config.stages]
        side //= 1 if self.guide is None else self.guide.factor
        shape = (2, views.shape[1], side, side)
        if masks.shape != shape or masks.dtype != torch.bool:
            given = f"{masks.dtype} {list(masks.shape)}"
            raise ValueError(f"masks must be bool {list(shape)}, not {given}")

    @record_function("slotcon.teacher update")
    @torch.no_grad()
    def update_teacher(self, momentum: float) -> None:
        """Teacher = momentum·teacher + (1 − momentum)·student, parameters only.

        Buffers are excluded: the teacher's BatchNorms keep separate running statistics.
        """
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum must lie between 0 and 1, not {momentum!r}")
        teacher: list[Tensor] = list(self.teacher.parameters())
        student: list[Tensor] = list(self.student.parameters())
        torch._foreach_lerp_(teacher, student, 1 - momentum)

    @torch.no_grad()
    def copy_to_teacher(self) -> None:
        """Teacher = student, with the statistics of its BatchNorms."""
        pairs = zip(
            self.teacher.state_dict().values(), self.student.state_dict().values(), strict=True
        )
        for teacher, student in pairs:
            teacher.copy_(student)

    def adapt_capacity(self) -> None:
        """Set the size of the slots' buffers: a quarter more than the largest count so far.

        All ranks call it together, after at least one forward. The host waits for the device here,
        so call it seldom, for example at log lines. Afterwards no forward waits; before, each one
        has to read the number of active slots. Pairs beyond `capacity` are dropped and counted in
        `dropped_pairs`.
        """
        objectives = list(self.objectives.values())
        counts = read_capacities([objective.largest_counts for objective in objectives])
        for objective, most in zip(objectives, counts, strict=True):
            objective.fit_buffers(most)

    def forget_capacity(self) -> None:
        """Size the buffers by the next batch, for example after views of another size."""
        for objective in self.objectives.values():
            objective.capacity = None

    @torch.no_grad()
    def segment(
        self, images: Tensor, network: Literal["teacher", "student"] = "teacher"
    ) -> tuple[Tensor, Tensor]:
        """Group whole images [B, 3, S, S] with the running BatchNorm statistics, at the last stage.

        Returns (scores [B, K, H, W], features [B, D, H, W]). Mode and buffers do not change.
        """
        if network not in ("teacher", "student"):
            raise ValueError(f'network must be "teacher" or "student", not {network!r}')
        branch = self.teacher if network == "teacher" else self.student
        with _eval_mode(branch):
            grouped = branch(images)
        return grouped.scores, grouped.features

    def official_state_dict(self) -> dict[str, Tensor]:
        """The state dict under the names of the authors' code, without `module.`."""
        return to_official(self.state_dict())

    def load_official_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load the authors' state dict, with or without `module.` (their file's "model" entry).

        Raises ValueError, without a change to the model, if entries are missing, unknown or of
        another shape.
        """
        self.load_state_dict(from_official(state, self.state_dict()))


@contextmanager
def _eval_mode(module: nn.Module) -> Iterator[None]:
    """Eval mode inside the block; afterwards each submodule has its previous mode again."""
    modes = {child: child.training for child in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for child, training in modes.items():
            child.training = training


@contextmanager
def drawn_from(draw: tuple[int, int], device: torch.device) -> Iterator[None]:
    """Inside the block torch's random numbers follow from `draw` and the rank alone, so a resumed
    run draws the same; afterwards they are what they would have been."""
    seed = blake2b(f"{draw[0]} {draw[1]} {rank()}".encode(), digest_size=7).digest()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(int.from_bytes(seed))
        yield


def _check_batch(views: Tensor, overlap: Tensor, flipped: Tensor, micro_batches: int) -> None:
    if views.ndim != 5 or views.shape[0] != 2 or views.shape[2] != 3:
        raise ValueError(f"views must have shape [2, B, 3, S, S], not {list(views.shape)}")
    batch = views.shape[1]
    if overlap.shape != (2, batch, 4):
        raise ValueError(f"overlap must have shape [2, {batch}, 4], not {list(overlap.shape)}")
    if flipped.shape != (2, batch) or flipped.dtype != torch.bool:
        raise ValueError(
            f"flipped must be bool [2, {batch}], not {flipped.dtype} {list(flipped.shape)}"
        )
    if micro_batches < 1:
        raise ValueError(f"micro_batches must be at least 1, not {micro_batches}")
