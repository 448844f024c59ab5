"""Inverse augmentation: align the maps of two views on the pixels they share.

Each view's overlap box is cut out of its map, resampled to H×W cells and un-flipped. Cell (i, j) of
both aligned maps then covers the same pixels of the image (paper, section 3.1). The aligned maps
are scores or, in a variant, features that are scored afterwards (table 8c).
"""

import torch
from torch import Tensor

from model.precision import full_precision


def has_area(overlap: Tensor) -> Tensor:
    """Whether each box (x1, y1, x2, y2) [..., 4] has a positive width and height: bool [...]."""
    x1, y1, x2, y2 = overlap.unbind(dim=-1)
    return (x2 > x1) & (y2 > y1)


@full_precision
def align_to_overlap(maps: Tensor, overlap: Tensor, flipped: Tensor) -> Tensor:
    """Cut each map's overlap box out, resample it to H×W and undo the view's flip.

    maps [B, C, H, W]; overlap [B, 4] as x1, y1, x2, y2 in (0..1) of the flipped view;
    flipped bool [B]. Returns [B, C, H, W] in channels_last. A box without area gives zeros on every
    device. So does the authors' code, except on a CPU, where RoIAlign raises an error for an
    inverted box.

    RoIAlign takes one sample for each cell here, and rows and columns are independent, so it is a
    product with two small matrices. Its gradient is another one: faster than torchvision's, whose
    sums on a GPU also depend on the order in which threads arrive.
    """
    height, width = maps.shape[2:]
    usable = has_area(overlap)
    x1, y1, x2, y2 = torch.where(usable[:, None], overlap, 0.0).to(maps.dtype).unbind(dim=1)
    down = _bilinear(y1, y2, height) * usable[:, None, None]
    across = _bilinear(x1, x2, width)
    across = torch.where(flipped[:, None, None], across.flip(1), across)

    rows = down @ maps.movedim(1, 3).flatten(2)  # [B, H, W·C]
    aligned = across[:, None] @ rows.unflatten(2, (width, -1))  # [B, H, W, C]
    return aligned.movedim(3, 1)


def _bilinear(start: Tensor, end: Tensor, cells: int) -> Tensor:
    """How the cells of a line make those of its part from `start` [B] to `end`, in (0..1): weights
    [B, cells, cells], linear between centres of cells, constant beyond the outermost."""
    cell = torch.arange(cells, device=start.device, dtype=start.dtype)
    first, last = start * cells - 0.5, end * cells - 0.5
    centre = first[:, None] + (cell + 0.5) * ((last - first) / cells)[:, None]
    distance = centre.clamp(0, cells - 1)[:, :, None] - cell
    return (1 - distance.abs()).clamp(min=0)
