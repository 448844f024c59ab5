"""Whether the weights that a file holds can be those of a network."""

from collections.abc import Mapping

from torch import Tensor

STATISTICS = ("running_mean", "running_var")
"""BatchNorm's buffers besides its count of batches."""


def fault_of(name: str, value: Tensor) -> str | None:
    """What is wrong with the numbers of a tensor; None if nothing is."""
    if not value.isfinite().all():
        return f"{name} is not finite"
    if name.endswith("running_var") and (value < 0).any():  # its root would be NaN
        return f"{name} is negative"
    return None


def check_weights(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raises ValueError unless names and shapes are equal and no tensor has a fault."""
    if missing := [name for name in expected if name not in weights]:
        if all(name.endswith(STATISTICS) for name in missing):
            raise ValueError(f"it lacks running statistics of BatchNorm, as {missing[0]}")
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(f"it lacks {missing[0]}{more}, of {len(expected)} tensors")
    if unknown := sorted(weights.keys() - expected.keys()):
        raise ValueError(f"{unknown[0]} is unknown")
    for name, value in expected.items():
        if weights[name].shape != value.shape:
            raise ValueError(
                f"{name} has shape {list(weights[name].shape)}, not {list(value.shape)}"
            )
        if fault := fault_of(name, weights[name]):
            raise ValueError(fault)
