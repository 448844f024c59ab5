"""Translate between our parameter names and those of the authors' code (CVMI-Lab/SlotCon).

Only names differ: layouts and shapes are the same.
"""

from collections.abc import Iterable, Mapping

from torch import Tensor

PREFIXES = (
    ("student.encoder.", "encoder_q."),
    ("teacher.encoder.", "encoder_k."),
    ("student.projector.", "projector_q.mlp."),
    ("teacher.projector.", "projector_k.mlp."),
    ("student.grouping.prototypes", "grouping_q.slot_embed.weight"),
    ("teacher.grouping.prototypes", "grouping_k.slot_embed.weight"),
    ("predictor.", "predictor_slot.mlp."),
    ("center", "center"),
)
"""(our prefix, the authors' prefix) of the same weights."""
OURS_ALONE = (
    "image_predictor.", "cell_predictor.", "further.", "student.heads.", "teacher.heads.", "guide.",
)  # fmt: skip
"""Prefixes of names that the authors' code lacks: of variants that they did not publish."""


def official_name(name: str) -> str:
    """The authors' name of one of our state-dict entries."""
    for ours, theirs in PREFIXES:
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    raise KeyError(name)


def official_names(names: Iterable[str]) -> dict[str, str]:
    """The authors' names by ours, of those of our state-dict entries that they have."""
    return {name: official_name(name) for name in names if _shared(name)}


def to_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict under the authors' names (without `module.`), without `OURS_ALONE`."""
    return {theirs: state[name] for name, theirs in official_names(state).items()}


def from_official(official: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The authors' state dict, with or without `module.`, under our names.

    `ours` is the state dict of the model to fill; its entries `OURS_ALONE` are kept.
    Raises ValueError, which names entries that are missing, unknown, or of another shape than in
    `ours`.
    """
    given = {name.removeprefix("module."): value for name, value in official.items()}
    wanted = {theirs: name for name, theirs in official_names(ours).items()}
    kept = {name: value for name, value in ours.items() if not _shared(name)}
    problems = [
        _listing("missing", wanted.keys() - given.keys()),
        _listing("unknown", given.keys() - wanted.keys()),
        _listing(
            "of another shape",
            (
                f"{theirs} {_shape(given[theirs])} instead of {_shape(ours[name])}"
                for theirs, name in wanted.items()
                if theirs in given and _shape(given[theirs]) != _shape(ours[name])
            ),
        ),
    ]
    if any(problems):
        raise ValueError(
            "not a SlotCon state dict for this configuration; entries "
            + "; ".join(problem for problem in problems if problem)
        )
    return kept | {name: given[theirs] for theirs, name in wanted.items()}


def _shared(name: str) -> bool:
    return not name.startswith(OURS_ALONE)


def _shape(value: object) -> tuple[int, ...] | None:
    return tuple(value.shape) if isinstance(value, Tensor) else None


def _listing(kind: str, names: Iterable[str], shown: int = 4) -> str:
    """`kind: a, b, c, d and 7 more`; empty if there are no names."""
    ordered = sorted(names)
    more = f" and {len(ordered) - shown} more" if len(ordered) > shown else ""
    return f"{kind}: {', '.join(ordered[:shown])}{more}" if ordered else ""
