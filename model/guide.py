"""A frozen teacher: a network that stays as it was, whose cells lie near prototypes of their own.

B images, K prototypes, C channels of its joined stages, h w cells of the student's map, S side of
a view.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.architectures import Statistics
from model.branch import Grouped
from model.config import ModelConfig
from model.encoder import build_encoder
from model.grouping import cosine_scores


class Guide(nn.Module):
    """Scores of K prototypes in the teacher's own space: what a student learns to predict.

    The teacher may have another architecture, and sees each view at `factor` times the student's
    resolution. Nothing of it learns. Its maps are joined as `evaluation` joins stages.
    """

    mean: Tensor
    """[C] mean of the cells, taken off before they are scored."""
    prototypes: Tensor
    """[K, C] centres of cells without their mean, see train.prototypes."""

    def __init__(
        self,
        arch: str,
        stages: Sequence[int],
        num_prototypes: int,
        factor: int = 1,
        image_stats: Statistics | None = None,
    ) -> None:
        """`image_stats`: as `ModelConfig.image_stats`. Raises ValueError."""
        super().__init__()
        config = ModelConfig(arch, stages=max(stages), image_stats=image_stats)
        self.encoder = build_encoder(config)
        self.stages, self.factor = tuple(stages), factor
        dim = sum(self.encoder.stage_dims[stage] for stage in stages)
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("prototypes", torch.randn(num_prototypes, dim))
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "Guide":
        """It stays in eval mode."""
        return super().train(False)

    def shrunk(self, views: Tensor) -> Tensor:
        """Views [B, 3, f·S, f·S] as the student sees them, [B, 3, S, S]: means of f × f pixels."""
        if self.factor == 1:
            return views
        return F.avg_pool2d(views, self.factor)

    @torch.no_grad()
    def features(self, views: Tensor, cells: Sequence[int]) -> Tensor:
        """Views [B, 3, f·S, f·S] → directions [B, C, h, w] of the student's `cells`, h and w.

        Each stage's cells have length 1; coarser maps are brought to the finest grid (bilinear);
        the joined cells are averaged within a cell of the student.
        """
        maps = self.encoder.maps(views, self.stages)
        grid = max((each.shape[-2:] for each in maps), key=lambda size: size[0])
        joined = torch.cat([_at(F.normalize(each.float(), dim=1), grid) for each in maps], dim=1)
        return F.normalize(F.adaptive_avg_pool2d(joined, (cells[0], cells[1])), dim=1)

    @torch.no_grad()
    def forward(self, views: Tensor, cells: Sequence[int]) -> Grouped:
        """Score the cells of `features`. There are no slots: a student's are of another space."""
        features = self.features(views, cells) - self.mean[:, None, None]
        scores = cosine_scores(features, self.prototypes)
        return Grouped(features, features.new_empty(0), scores, self.prototypes)


def _at(maps: Tensor, grid: torch.Size) -> Tensor:
    """Maps [B, C, h, w] on a finer grid."""
    if maps.shape[-2:] == grid:
        return maps
    return F.interpolate(maps, size=grid, mode="bilinear", align_corners=False)
