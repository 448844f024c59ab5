"""A network: an encoder, and a head for each of its stages that has losses.

B images, K prototypes, D features, H W cells, S side of a view.
"""

from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.profiler import record_function

from model.config import ModelConfig
from model.encoder import build_encoder
from model.grouping import SemanticGrouping
from model.heads import build_norm, build_projector


class Grouped(NamedTuple):
    """The maps and slots of one view at one stage."""

    features: Tensor
    """[B, D, H, W] output of the projector."""
    slots: Tensor
    """[B, K, D]"""
    scores: Tensor
    """[B, K, H, W] cosine of cell and prototype."""
    prototypes: Tensor
    """[K, D] with which the cells were scored."""

    def detached(self) -> "Grouped":
        """The same values, through which no gradient flows."""
        return Grouped(*(tensor.detach() for tensor in self))


class Head(nn.Module):
    """Projector and prototypes on the map of one stage."""

    def __init__(self, dim: int, config: ModelConfig) -> None:
        super().__init__()
        self.projector: nn.Module
        if config.projector == "mlp":
            self.projector = build_projector(
                dim, config.dim_hidden, config.dim_out, norms=not config.hides_patches
            )
        elif dim == config.dim_out:
            self.projector = build_norm(dim)
        else:
            raise ValueError(f"dim_out must be {dim}, the encoder's width, with projector norm")
        # Both branches assign cells to slots with the teacher's temperature.
        self.grouping = SemanticGrouping(
            config.num_prototypes, config.dim_out, config.teacher_temp, config.assignment_floor
        )

    def forward(self, maps: Tensor) -> Grouped:
        """Group the map [B, dim, H, W] of a stage."""
        return grouped(self, maps)


class Branch(nn.Module):
    """Encoder, projector and prototypes; student and teacher each are one."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.encoder = build_encoder(config)
        last = Head(self.encoder.dim, config)
        self.projector, self.grouping = last.projector, last.grouping
        self.heads = nn.ModuleDict()
        """Heads of the supervised stages before the last one, by number."""
        weights = self.encoder.named_parameters()
        self._learning = frozenset(name for name, weight in weights if weight.requires_grad)
        self._resting = frozenset[str]()
        self._keeps_statistics = config.norm == "eval"
        self.train()

    @property
    def prototypes(self) -> list[nn.Parameter]:
        """Those of each supervised stage, the last stage first."""
        heads = (self, *self.heads.values())
        return [head.grouping.prototypes for head in heads]  # type: ignore[union-attr,misc]

    def forward(self, images: Tensor) -> Grouped:
        """Group one view [B, 3, S, S]; BatchNorm normalises the B images together."""
        return grouped(self, self.encoder(images))

    def stages(self, images: Tensor, masks: Tensor | None = None) -> list[Grouped]:
        """As `forward`, at each supervised stage; the last stage comes last. A ViT of SlotMIM does
        not see the patches in `masks`, bool [B, H, W].
        """
        numbers = [*map(int, self.heads), self.encoder.stages]
        hidden = () if masks is None else (masks,)
        maps = self.encoder.maps(images, numbers, *hidden)
        earlier = [head(each) for head, each in zip(self.heads.values(), maps, strict=False)]
        return [*earlier, grouped(self, maps[-1])]

    def train(self, mode: bool = True) -> "Branch":
        """As nn.Module's. Norms that keep their running statistics stay in eval mode: all of the
        encoder with model.norm "eval", else those of the stages that rest.
        """
        super().train(mode)
        for name, module in self.encoder.named_modules():
            if isinstance(module, _BatchNorm) and (
                self._keeps_statistics or f"{name}.weight" in self._resting
            ):
                module.eval()
        return self

    def train_stages(self, count: int | None, *, learns: bool) -> None:
        """Let only the last `count` stages of the encoder learn; None: all of it. No gradients are
        computed for the stages before them. Without `learns`, as in a teacher, nothing needs
        gradients, but the norms are treated alike.
        """
        last = 0 if count is None else self.encoder.stages - count
        resting = self.encoder.weights_up_to(last) if last else frozenset()
        if count == 0:
            resting = self._learning  # a last normalisation belongs to no stage
        if resting == self._resting:
            return  # modes that a caller has set stay
        self._resting = resting
        for name, weight in self.encoder.named_parameters():
            weight.requires_grad_(learns and name in self._learning - self._resting)
        self.train(self.training)

    def add_head(self, stage: int, config: ModelConfig) -> None:
        """A head with the sizes of `config` on a further stage."""
        self.heads[str(stage)] = Head(self.encoder.stage_dims[stage], config)


def grouped(head: Head | Branch, maps: Tensor) -> Grouped:
    """Group the map [B, dim, H, W] of a head's stage. A branch is the head of its last stage, under
    the authors' names."""
    features = head.projector(maps)
    with record_function("slotcon.grouping"):
        slots, scores = head.grouping(features)
    return Grouped(features, slots, scores, head.grouping.prototypes)
