"""Helpers for ViewParams."""

from collections.abc import Sequence
from dataclasses import fields

import numpy as np
from numpy.typing import NDArray

from pipeline.views import ViewParams


def take(params: ViewParams, rows: Sequence[int] | slice | NDArray[np.int64]) -> ViewParams:
    """The parameters of some of the images."""
    arrays = (getattr(params, f.name) for f in fields(params))
    return ViewParams(*(array if array is None else array[:, rows] for array in arrays))


def assert_same(a: ViewParams, b: ViewParams) -> None:
    for field in fields(ViewParams):
        x, y = getattr(a, field.name), getattr(b, field.name)
        np.testing.assert_array_equal(x, y, err_msg=field.name, strict=True)
