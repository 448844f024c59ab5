"""Translate between our parameter names and those of the authors' code: CVMI-Lab/SlotCon and, for
models with a mask token, CVMI-Lab/SlotMIM.

Names differ, layouts don't. Shapes differ in the projector of SlotMIM alone: there a matrix is what
is a convolution of one pixel here.
"""

from collections.abc import Iterable, Mapping

from torch import Tensor

PREFIXES = (
    ("student.encoder.net.", "encoder_q."),
    ("teacher.encoder.net.", "encoder_k."),
    ("student.encoder.", "encoder_q."),
    ("teacher.encoder.", "encoder_k."),
    ("student.projector.", "projector_q.mlp."),
    ("teacher.projector.", "projector_k.mlp."),
    ("student.grouping.prototypes", "grouping_q.slot_embed.weight"),
    ("teacher.grouping.prototypes", "grouping_k.slot_embed.weight"),
    ("predictor.", "predictor_slot.mlp."),
    ("center", "center"),
)
"""(our prefix, the authors' prefix) of the same weights; the first one that fits."""
SLOTMIM_PROTOTYPES = "prototypes_patch"
"""What SlotMIM calls slot_embed."""
MASK_TOKEN = "student.encoder.mask_token"
OURS_ALONE = (
    "image_predictor.", "cell_predictor.", "further.", "student.heads.", "teacher.heads.", "guide.",
    "student.encoder.scale", "student.encoder.shift", "teacher.encoder.scale",
    "teacher.encoder.shift",
)  # fmt: skip
"""Prefixes of names that the authors' code lacks: of variants that they did not publish, and of how
an encoder gets its images."""


def official_names(names: Iterable[str]) -> dict[str, str]:
    """The authors' names by ours, of those of our state-dict entries that they have. Raises
    KeyError for a name that is not ours.
    """
    names = list(names)
    translated = {name: _official_name(name) for name in names if _shared(name)}
    if MASK_TOKEN not in names:
        return translated
    return {
        ours: theirs.replace("slot_embed", SLOTMIM_PROTOTYPES)
        for ours, theirs in translated.items()
    }


def to_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict under the authors' names (without `module.`), without `OURS_ALONE`."""
    slotmim = MASK_TOKEN in state
    return {
        theirs: state[name].flatten(1)
        if slotmim and _is_matrix(theirs, state[name])
        else state[name]
        for name, theirs in official_names(state).items()
    }


def from_official(official: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The authors' state dict, with or without `module.`, under our names.

    `ours` is the state dict of the model to fill; its entries `OURS_ALONE` are kept.
    Raises ValueError, which names entries that are missing, unknown, or of another shape than in
    `ours`.
    """
    given = {name.removeprefix("module."): value for name, value in official.items()}
    wanted = {theirs: name for name, theirs in official_names(ours).items()}
    expected = {theirs: _shape(value) for theirs, value in to_official(ours).items()}
    kept = {name: value for name, value in ours.items() if not _shared(name)}
    problems = [
        _listing("missing", wanted.keys() - given.keys()),
        _listing("unknown", given.keys() - wanted.keys()),
        _listing(
            "of another shape",
            (
                f"{theirs} {_shape(given[theirs])} instead of {shape}"
                for theirs, shape in expected.items()
                if theirs in given and _shape(given[theirs]) != shape
            ),
        ),
    ]
    if any(problems):
        raise ValueError(
            "not a SlotCon state dict for this configuration; entries "
            + "; ".join(problem for problem in problems if problem)
        )
    return kept | {name: shaped(given[theirs], ours[name]) for theirs, name in wanted.items()}


def shaped(value: Tensor, ours: Tensor) -> Tensor:
    """A matrix of the authors as the convolution of one pixel that `ours` is; all else as it is."""
    return value[:, :, None, None] if ours.shape == (*value.shape, 1, 1) else value


def _official_name(name: str) -> str:
    for ours, theirs in PREFIXES:
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    raise KeyError(name)


def _is_matrix(official_name: str, value: Tensor) -> bool:
    """Whether it is a layer of a projector, which SlotMIM's authors apply to rows, not to maps."""
    return official_name.startswith("projector_") and value.ndim == 4


def _shared(name: str) -> bool:
    return not name.startswith(OURS_ALONE)


def _shape(value: object) -> tuple[int, ...] | None:
    return tuple(value.shape) if isinstance(value, Tensor) else None


def _listing(kind: str, names: Iterable[str], shown: int = 4) -> str:
    """`kind: a, b, c, d and 7 more`; empty if there are no names."""
    ordered = sorted(names)
    more = f" and {len(ordered) - shown} more" if len(ordered) > shown else ""
    return f"{kind}: {', '.join(ordered[:shown])}{more}" if ordered else ""
