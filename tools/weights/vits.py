"""Which of timm's ViTs some weights are of: for files that do not say it."""

import re
from collections.abc import Mapping

from torch import Tensor

VITS = {
    (16, 192, 12): "vit_tiny_patch16_224",
    (16, 384, 12): "vit_small_patch16_224",
    (16, 768, 12): "vit_base_patch16_224",
    (16, 1024, 24): "vit_large_patch16_224",
    (14, 1280, 32): "vit_huge_patch14_224",
}
"""(Pixels of a patch, width, blocks): timm's name. Those that SlotMIM's authors have: their number
of heads, which no weight shows, is that of timm's network."""
PATCHES = "patch_embed.proj.weight"


def vit_of(state: Mapping[str, Tensor], prefix: str) -> str | None:
    """timm:NAME of the ViT whose weights have this prefix; None if there is none, or it is none of
    `VITS`.
    """
    patches = state.get(f"{prefix}{PATCHES}")
    if patches is None or patches.ndim != 4:
        return None
    block = re.compile(rf"{re.escape(prefix)}blocks\.(\d+)\.")
    blocks = {match[1] for name in state if (match := block.match(name))}
    name = VITS.get((patches.shape[2], patches.shape[0], len(blocks)))
    return None if name is None else f"timm:{name}"
