"""Bounds of settings, written beside the fields of a configuration.

The metadata of a dataclass field are its bounds: words after "must be", and a test of the value.

    @dataclass(frozen=True)
    class Config(Bounded):
        epochs: int = field(default=800, metadata=at_least(1))

`Config(epochs=0)` raises ValueError("epochs must be at least 1, not 0").
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from pipeline.errors import require

Bound = dict[str, Callable[[Any], bool]]
"""The words that follow "must be", and the test of a value; all of them must hold."""

LARGEST = 10**9
"""No count, rate or weight of a run is larger. Larger ones overflow in clocks and in float32."""
LONGEST_SIDE = 16_384
"""Pixels: a square of this side has 0.8 GB."""
WIDEST = 65_536
"""Features or prototypes: a square matrix of this side has 17 GB."""
MOST_PROCESSES = 1024
"""Threads or processes of one process: no machine has more cores."""


def at_most(high: float) -> Bound:
    return {f"at most {high:,}": lambda value: value <= high}


def positive(high: float = LARGEST) -> Bound:
    return {"a positive number": lambda value: 0 < value < math.inf} | at_most(high)


POSITIVE = positive()
BELOW_1: Bound = {"at least 0 and less than 1": lambda value: 0 <= value < 1}
UP_TO_1: Bound = {"above 0 and at most 1": lambda value: 0 < value <= 1}

RANGE: Bound = {
    "two growing positive numbers": lambda pair: (
        len(pair) == 2 and 0 < pair[0] <= pair[1] < math.inf
    ),
    "in 0.01..100": lambda pair: pair[0] >= 0.01 and pair[1] <= 100,
}


def at_least(low: float, high: float = LARGEST) -> Bound:
    words = "0 or more" if low == 0 else f"at least {low}"
    return {words: lambda value: low <= value < math.inf} | at_most(high)


def within(low: float, high: float) -> Bound:
    return {f"in {low}..{high}": lambda value: low <= value <= high}


def one_of(names: Iterable[str]) -> Bound:
    return {f"one of {', '.join(names)}": lambda value: value in names}


def some_of(names: Iterable[str]) -> Bound:
    return {
        f"some of {', '.join(names)}": lambda values: set(values) <= set(names),
        "without repetition": lambda values: len(set(values)) == len(values),
    }


def optional(bound: Bound) -> Bound:
    """The same bound, for a setting that may also be null."""

    def or_null(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
        return lambda value: value is None or holds(value)

    return {f"{meaning}, or null": or_null(holds) for meaning, holds in bound.items()}


@dataclass(frozen=True)
class Bounded:
    """A configuration that checks the bounds of its fields when it is created.

    A list becomes a tuple: YAML and JSON have no tuples, and a configuration that is read back must
    equal the one that was written. Raises ValueError, which names the field, the bound and the
    value. A subclass checks rules between fields in its `__post_init__`, after this one.
    """

    def __post_init__(self) -> None:
        for field in fields(self):
            value = _as_tuple(getattr(self, field.name))
            object.__setattr__(self, field.name, value)
            check(field.name, value, field.metadata)


def check(name: str, value: Any, bound: Mapping[str, Callable[[Any], bool]]) -> None:
    """Refuse a value beyond its bound with a ValueError that names the setting."""
    for meaning, holds in bound.items():
        require(holds(value), name, value, meaning)


def _as_tuple(value: Any) -> Any:
    return tuple(map(_as_tuple, value)) if isinstance(value, list | tuple) else value
