"""A network: an encoder, and a head for each of its stages that has losses.

B images, K prototypes, D features, H W cells, S side of a view.
"""

from typing import NamedTuple

from torch import Tensor, nn
from torch.profiler import record_function

from model.config import ModelConfig
from model.encoder import build_encoder
from model.grouping import SemanticGrouping
from model.heads import build_projector


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
        self.projector = build_projector(dim, config.dim_hidden, config.dim_out)
        # Both branches assign cells to slots with the teacher's temperature.
        self.grouping = SemanticGrouping(config.num_prototypes, config.dim_out, config.teacher_temp)

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

    def forward(self, images: Tensor) -> Grouped:
        """Group one view [B, 3, S, S]; BatchNorm normalises the B images together."""
        return grouped(self, self.encoder(images))

    def stages(self, images: Tensor) -> list[Grouped]:
        """As `forward`, at each supervised stage; the last stage comes last."""
        numbers = [*map(int, self.heads), self.encoder.stages]
        maps = self.encoder.maps(images, numbers)
        earlier = [head(each) for head, each in zip(self.heads.values(), maps, strict=False)]
        return [*earlier, grouped(self, maps[-1])]

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
