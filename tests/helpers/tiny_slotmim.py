"""A SlotMIM small enough for a test, and batches with masks."""

import torch
from torch import Tensor

from model import ModelConfig, SlotCon

IMAGES, SIDE, CELLS = 3, 64, 4
"""Views of 64 pixels have 4 × 4 patches of 16."""


def tiny_slotmim(**fields: object) -> SlotCon:
    """A trainable model with timm's test_vit and eight prototypes, the same on every call. Its mask
    token is not zero."""
    torch.manual_seed(0)
    sizes = {"dim_hidden": 16, "dim_out": 16, "num_prototypes": 8, "objective": "slotmim"}
    model = SlotCon(ModelConfig(arch="timm:test_vit", **{**sizes, **fields}))  # type: ignore[arg-type]
    torch.nn.init.normal_(model.student.encoder.get_parameter("mask_token"))
    return model.train()


def masked_batch(
    seed: int = 1, side: int = SIDE, hidden: int = 5, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Arguments of the model: both views of an image are similar, and each has `hidden` patches."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(3, IMAGES, 3, side, side, generator=generator).to(dtype)
    cells = side // 16
    order = torch.rand(2, IMAGES, cells**2, generator=generator).argsort(dim=-1)
    return {
        "views": noise[2] + 0.3 * noise[:2],
        "overlap": torch.tensor([0.1, 0.0, 1.0, 0.9], dtype=dtype).expand(2, IMAGES, 4),
        "flipped": torch.tensor([True, False, True]).expand(2, IMAGES),
        "masks": (order < hidden).view(2, IMAGES, cells, cells),
    }
