"""Inverse augmentation: align the maps of two views on the pixels they share.

Each view's overlap box is cut out of its map, resampled to H×W cells and un-flipped. Cell (i, j) of
both aligned maps then covers the same pixels of the image (paper, section 3.1). The aligned maps
are scores or, in a variant, features that are scored afterwards (table 8c).
"""

import torch
from torch import Tensor
from torchvision.ops import roi_align

from model.precision import full_precision


def has_area(overlap: Tensor) -> Tensor:
    """Whether each box (x1, y1, x2, y2) [..., 4] has a positive width and height: bool [...]."""
    x1, y1, x2, y2 = overlap.unbind(dim=-1)
    return (x2 > x1) & (y2 > y1)


@full_precision
def align_to_overlap(maps: Tensor, overlap: Tensor, flipped: Tensor) -> Tensor:
    """Cut each map's overlap box out, resample it to H×W and undo the view's flip.

    maps [B, C, H, W]; overlap [B, 4] as x1, y1, x2, y2 in (0..1) of the flipped view;
    flipped bool [B]. Returns [B, C, H, W]. A box without area gives zeros on every device. So does
    the authors' code, except on a CPU, where RoIAlign raises an error for an inverted box.
    """
    index = torch.arange(len(maps), device=maps.device, dtype=maps.dtype)
    height, width = maps.shape[2:]
    usable = has_area(overlap)
    whole = torch.arange(4, device=overlap.device) >= 2  # 0, 0, 1, 1: built without a host copy
    x1, y1, x2, y2 = torch.where(usable[:, None], overlap, whole).to(maps.dtype).unbind(dim=1)
    boxes = torch.stack((index, x1 * width, y1 * height, x2 * width, y2 * height), dim=1)

    aligned = roi_align(maps, boxes, (height, width), aligned=True)
    aligned = torch.where(flipped[:, None, None, None], aligned.flip(-1), aligned)
    return torch.where(usable[:, None, None, None], aligned, 0.0)
