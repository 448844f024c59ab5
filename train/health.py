"""Whether the prototypes are all put to use, while a run trains and after it.

K prototypes, D features.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

DUPLICATE = 0.9
"""Cosine above which two prototypes count as one."""
FEWEST_SLOTS = 2.0
"""Active slots of an image below which its grouping is none."""
FEWEST_CELLS, FEWEST_PROTOTYPES = 9, 4
"""What a view and a model must have for an image without two slots to be a bad sign."""
LOWEST_ENTROPY = 0.25
"""In shares of log K: as if only the fourth root of K prototypes (4 of 256) were in use."""
UNIFORM = 0.99
"""In shares of log K: a grouping loss above which the student knows nothing of the assignments."""
PATIENCE = {"slots": (2, 0), "usage": (2, 0), "loss": (10, 200)}
"""Log lines in a row, and steps that they are to span, so that neither one odd interval is an alarm
nor the start of a grouping, whose loss is near log K for some time."""


class Collapsed(RuntimeError):
    """The grouping has collapsed, and the run is to stop then."""


def usage_entropy(usage: Tensor) -> float:
    """Entropy of the share of cells that each prototype wins (`usage` [K], any scale) in shares of
    log K: 1 if all win as many, 0 if one wins all.
    """
    share = usage.double() / usage.sum()
    entropy = -torch.special.xlogy(share, share).sum().item()
    return abs(entropy) / math.log(len(usage)) if len(usage) > 1 else 1.0


def prototype_cosines(prototypes: Tensor) -> Tensor:
    """Cosine of each pair of prototypes [K, D], once: [K, K], zero but above the diagonal."""
    unit = F.normalize(prototypes.detach().float(), dim=1)
    return (unit @ unit.T).triu(diagonal=1)


def near_duplicates(prototypes: Tensor) -> Tensor:
    """Pairs of prototypes [K, D] whose cosine is above `DUPLICATE`, a number on their device."""
    return (prototype_cosines(prototypes) > DUPLICATE).sum()


class CollapseAlarm:
    """Watches the log lines after the warm-up, in which prototypes find their places."""

    def __init__(self, num_prototypes: int, warmup_steps: int) -> None:
        self._prototypes, self._warmup_steps = num_prototypes, warmup_steps
        self.reset()

    def reset(self) -> None:
        """Forget the lines so far, as after a roll-back."""
        self._begun: dict[str, list[int]] = {}  # the first step of each bad line in a row
        self._told: set[str] = set()

    def check(self, begin: int, end: int, cells: int, values: Mapping[str, float]) -> str:
        """What is wrong, told once, when it has been so for as long as `PATIENCE` says; else "".

        The line holds `values` of the steps from `begin` to `end`, with views of `cells` cells.
        """
        found = self._symptoms(cells, values) if begin >= self._warmup_steps else {}
        self._begun = {kind: [*self._begun.get(kind, []), begin] for kind in found}
        lasting = {kind for kind in found if self._has_lasted(kind, end)}
        new, self._told = lasting - self._told, lasting
        return "; ".join(found[kind] for kind in found if kind in new)

    def _has_lasted(self, kind: str, end: int) -> bool:
        (lines, steps), begun = PATIENCE[kind], self._begun[kind]
        return len(begun) >= lines and end - begun[0] >= steps

    def _symptoms(self, cells: int, values: Mapping[str, float]) -> dict[str, str]:
        slots, entropy = values["active_slots"], values["usage_entropy"]
        loss = (values["grouping_12"] + values["grouping_21"]) / 2
        log_k = math.log(self._prototypes)
        telling = cells >= FEWEST_CELLS and self._prototypes >= FEWEST_PROTOTYPES
        found = {}
        if telling and slots < FEWEST_SLOTS:
            found["slots"] = f"{slots:.1f} active slots an image (fewer than {FEWEST_SLOTS:g})"
        if entropy < LOWEST_ENTROPY:
            found["usage"] = f"usage entropy {entropy:.2f} of log K (less than {LOWEST_ENTROPY:g})"
        if loss > UNIFORM * log_k:
            found["loss"] = f"a grouping loss of {loss:.2f}, about log K: chance"
        return found
