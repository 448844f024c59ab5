"""Whether a run uses all its prototypes, during training and after it.

K prototypes, D features.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

DUPLICATE = 0.9
"""Cosine above which two prototypes count as near duplicates."""
FEWEST_SLOTS = 2.0
"""With fewer active slots an image, the model groups nothing."""
FEWEST_CELLS, FEWEST_PROTOTYPES = 9, 4
"""With fewer cells in a view, or fewer prototypes, fewer than two slots an image are normal."""
LOWEST_ENTROPY = 0.25
"""A share of log K. At this entropy, the fourth root of K prototypes (4 of 256) is in use."""
UNIFORM = 0.99
"""A share of log K. With a larger grouping loss the student does not predict the assignments."""
PATIENCE = {"slots": (2, 0), "usage": (2, 0), "loss": (10, 200)}
"""For each symptom: bad log lines in a row, and the steps that they must span. A single bad line
raises no alarm. At the start of training the loss stays near log K for some time."""


def usage_entropy(usage: Tensor) -> float:
    """Entropy of the share of cells that each prototype wins (`usage` [K], any scale), divided by
    log K: 1 if all win equally many, 0 if one wins all.
    """
    share = usage.double() / usage.sum()
    entropy = -torch.special.xlogy(share, share).sum().item()
    return abs(entropy) / math.log(len(usage)) if len(usage) > 1 else 1.0


def prototype_cosines(prototypes: Tensor) -> Tensor:
    """Cosine of each pair of prototypes [K, D]: [K, K], zero on and below the diagonal."""
    unit = F.normalize(prototypes.detach().float(), dim=1)
    return (unit @ unit.T).triu(diagonal=1)


def near_duplicates(prototypes: Tensor) -> Tensor:
    """Number of pairs of prototypes [K, D] with a cosine above `DUPLICATE`; a scalar on their
    device.
    """
    return (prototype_cosines(prototypes) > DUPLICATE).sum()


class CollapseAlarm:
    """Checks the log lines of one stage after the warm-up; during the warm-up the prototypes still
    spread. The active slots of stages before the last one are not logged, so not checked.
    """

    def __init__(self, num_prototypes: int, warmup_steps: int, groups: bool = True) -> None:
        """`groups`: whether the grouping loss is learnt. Else it may well be at chance."""
        self._prototypes, self._warmup_steps = num_prototypes, warmup_steps
        self._groups = groups
        self.reset()

    def reset(self) -> None:
        """Forget the lines so far, for example after a roll-back."""
        self._begun: dict[str, list[int]] = {}  # the first step of each bad line in a row
        self._reported: set[str] = set()

    def check(self, begin: int, end: int, cells: int, values: Mapping[str, float]) -> str:
        """The symptoms that have lasted as long as `PATIENCE` says, each reported once; else "".

        The log line holds `values` of the steps from `begin` to `end`, with views of `cells` cells.
        """
        symptoms = self._symptoms(cells, values) if begin >= self._warmup_steps else {}
        self._begun = {kind: [*self._begun.get(kind, []), begin] for kind in symptoms}
        lasting = {kind for kind in symptoms if self._has_lasted(kind, end)}
        new, self._reported = lasting - self._reported, lasting
        return "; ".join(symptoms[kind] for kind in symptoms if kind in new)

    def _has_lasted(self, kind: str, end: int) -> bool:
        (lines, steps), begun = PATIENCE[kind], self._begun[kind]
        return len(begun) >= lines and end - begun[0] >= steps

    def _symptoms(self, cells: int, values: Mapping[str, float]) -> dict[str, str]:
        slots, entropy = values.get("active_slots", math.inf), values["usage_entropy"]
        loss = (values["grouping_12"] + values["grouping_21"]) / 2
        log_k = math.log(self._prototypes)
        large_enough = cells >= FEWEST_CELLS and self._prototypes >= FEWEST_PROTOTYPES
        symptoms = {}
        if large_enough and slots < FEWEST_SLOTS:
            symptoms["slots"] = f"{slots:.1f} active slots an image (fewer than {FEWEST_SLOTS:g})"
        if entropy < LOWEST_ENTROPY:
            symptoms["usage"] = (
                f"usage entropy {entropy:.2f} of log K (less than {LOWEST_ENTROPY:g})"
            )
        if self._groups and loss > UNIFORM * log_k:
            symptoms["loss"] = f"a grouping loss of {loss:.2f}, about log K: chance"
        return symptoms
