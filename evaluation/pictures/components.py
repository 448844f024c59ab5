"""Principal components of features as colours.

Letters: B images, D features, h w cells.
"""

import numpy as np
import torch
from torch import Tensor

from evaluation.reduction import fit_reduction

COLOURS = 3
SHOWN = (0.01, 0.99)
"""Quantiles of a component that become the darkest and the brightest value."""


def component_colours(maps: Tensor) -> np.ndarray:
    """Features [B, D, h, w] → uint8 [B, h, w, 3]: the first principal component of all cells as
    red, the second as green, the third as blue.

    Each is stretched over its own range, so a colour says which cells are alike, not how much they
    differ. The sign of a component is free; here its largest weight is positive. A component beyond
    the features, or one that is the same in all cells, is grey.
    """
    fitted = fit_reduction([maps], standardise=False, pca=min(COLOURS, maps.shape[1]))
    largest = fitted.matrix.abs().argmax(dim=0)
    signs = fitted.matrix.gather(0, largest[None])[0].sign()
    colours = maps.new_full((len(maps), COLOURS, *maps.shape[2:]), 0.5)
    for number, values in enumerate((fitted(maps) * signs[:, None, None]).unbind(dim=1)):
        ends = torch.from_numpy(np.quantile(values.cpu().numpy(), SHOWN)).to(values)
        if ends[1] > ends[0]:
            colours[:, number] = ((values - ends[0]) / (ends[1] - ends[0])).clamp(0, 1)
    return (colours * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
