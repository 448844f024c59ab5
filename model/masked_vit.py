"""The ViT of SlotMIM (arXiv 2503.06960): timm's, which can be kept from seeing some patches.

B images, D channels, h w patches of an image.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from model.timm_encoder import TimmEncoder


class MaskedVit(TimmEncoder):
    """A ViT of timm that takes a learned token in place of hidden patches.

    The token stands before the positions are added, so the network knows where a patch is missing.
    New weights start as those of MAE (He et al., arXiv 2111.06377), whose ViT is the authors'.
    """

    mask_token: nn.Parameter
    """[1, D], in place of the embedding of each hidden patch."""

    def __init__(self, arch: str, stages: int = 4, **options: Any) -> None:
        """See `TimmEncoder`. Raises ValueError."""
        super().__init__(arch, stages, **options)
        self.mask_token = nn.Parameter(torch.zeros(1, self.net.embed_dim))
        self._masks: Tensor | None = None
        self.net.patch_embed.register_forward_hook(self._hide)
        start_as_mae(self.net)

    def maps(
        self, images: Tensor, stages: Sequence[int], masks: Tensor | None = None
    ) -> list[Tensor]:
        """See `TimmEncoder.maps`. The patches in `masks`, bool [B, h, w], are hidden."""
        self._masks = masks
        maps = super().maps(images, stages)
        self._masks = None
        return maps

    def weights_up_to(self, stage: int) -> frozenset[str]:
        """See `TimmEncoder.weights_up_to`; the mask token comes before every stage."""
        return super().weights_up_to(stage) | {"mask_token"}

    def _hide(self, _module: nn.Module, _images: Any, patches: Tensor) -> Tensor:
        """Patch embeddings [B, h, w, D] → the same, with the token in the hidden places."""
        if self._masks is None:
            return patches
        return torch.where(self._masks[..., None], self.mask_token.to(patches.dtype), patches)


@torch.no_grad()
def start_as_mae(net: Any) -> None:
    """Give timm's ViT `net` the initial weights of MAE, from torch's generator: matrices, and the
    patch convolution as one, from Xavier's uniform distribution; positions of sines and cosines.
    """
    patches = net.patch_embed.proj.weight
    nn.init.xavier_uniform_(patches.view(len(patches), -1))  # its bias stays torch's default
    for module in net.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    if getattr(net, "cls_token", None) is not None:
        nn.init.normal_(net.cls_token, std=0.02)
    if getattr(net, "pos_embed", None) is not None:
        rows, columns = net.patch_embed.grid_size
        table = sine_table(rows, columns, net.embed_dim)
        before = net.pos_embed.shape[1] - len(table)  # of class and register tokens
        net.pos_embed[0, :before] = 0
        net.pos_embed[0, before:] = table


def sine_table(rows: int, columns: int, dim: int) -> Tensor:
    """Positions of rows × columns patches, row by row: float64 [rows · columns, dim].

    The first half of the channels has the column x, the second half the row y. Each half is
    sin(p·ω_i) for all i, then cos(p·ω_i), with ω_i = 10000^(−i / (dim / 4)) (MAE, appendix A.1).
    `dim` is a multiple of 4.
    """
    omega = torch.exp(-math.log(10_000) * torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    row, column = (torch.arange(count, dtype=torch.float64) for count in (rows, columns))
    halves = []
    for position in (column.repeat(rows), row.repeat_interleave(columns)):
        angle = position[:, None] * omega
        halves += [angle.sin(), angle.cos()]
    return torch.cat(halves, dim=1)
