"""Makes NumPy's arrays from the shapes, types and bytes that a pickle states."""

import math
import re
from typing import Any

import numpy as np

from pipeline.errors import printable
from train.pickle_machine import Machine, Pending, Refused, of_type, whole_numbers


class ArrayMachine(Machine):
    """Also knows the names of arrays. All stand for functions of this module: NumPy itself sees a
    type of a plain kind, a shape, and exactly the bytes that they need.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names |= {"numpy.ndarray": self._ndarray, "numpy.dtype": plain_dtype}
        for core in ("core", "_core"):  # NumPy 1 and 2
            self.names |= {
                f"numpy.{core}.multiarray._reconstruct": self._reconstruct,
                f"numpy.{core}.multiarray.scalar": self._scalar,
                f"numpy.{core}.numeric._frombuffer": self._frombuffer,
            }

    def _array(self, shape: Any, dtype: Any, data: Any, order: str = "C") -> np.ndarray:
        """A new array of exactly these bytes."""
        kind, data = _dtype_of(dtype), self.bytes_of(data)
        shape = whole_numbers(shape)
        if (size := math.prod(shape) * kind.itemsize) != len(data):
            raise Refused(f"an array of {size:,} bytes in {len(data):,}")
        self.take(0, tensors=1)
        if kind.kind == "b":  # any byte but 0 and 1 would be neither true nor false
            return np.frombuffer(data, np.uint8).reshape(shape, order=_order(order)) != 0
        return np.frombuffer(data, kind).reshape(shape, order=_order(order)).copy("K")

    def _ndarray(self, shape: Any, dtype: Any, data: Any) -> np.ndarray:
        return self._array(shape, dtype, data)

    def _reconstruct(self, base: Any, *_: Any) -> Pending:
        if base != self._ndarray:
            raise Refused("an array of a subclass")

        def finish(state: Any) -> np.ndarray:
            _version, shape, dtype, columns_first, data = of_type(state, tuple)
            return self._array(shape, dtype, data, "F" if columns_first else "C")

        return Pending(finish)

    def _scalar(self, dtype: Any, data: Any) -> Any:
        return self._array((), dtype, data).item()

    def _frombuffer(
        self, data: Any, dtype: Any, shape: Any, order: str, axes: Any = None
    ) -> np.ndarray:
        if order != "K" or axes is None:
            return self._array(shape, dtype, data, order)
        return self._array(shape, dtype, data).transpose(whole_numbers(axes))


_DTYPES = re.compile(r"([<>=|]?)(b1|[iu][1248]|f[248]|c8|c16|[SU][1-9]\d{0,5})")


def plain_dtype(code: Any, *_: Any) -> Pending:
    """numpy.dtype of one of the plain kinds; the byte order comes after it."""
    known = _named_dtype(code)

    def finish(state: Any) -> np.dtype[Any]:
        _version, order, base, names, fields, _size, _alignment, flags, *_ = of_type(state, tuple)
        if (base, names, fields) != (None, None, None) or flags not in (0, 8):  # 8: text
            raise Refused("holds more than weights: an array of a type with parts")
        if order not in ("<", ">", "|", "="):
            raise Refused("an array in an unknown byte order")
        return np.dtype(known.newbyteorder(order).str)

    pending = Pending(finish)
    pending.value = known
    return pending


def _named_dtype(code: Any) -> np.dtype[Any]:
    if type(code) is not str or not _DTYPES.fullmatch(code):
        shown = printable(code[:40]) if type(code) is str else type(code).__name__
        raise Refused(f"holds more than weights: an array of type {shown}")
    return np.dtype(code)


def _dtype_of(value: Any) -> np.dtype[Any]:
    """A dtype from its stand-in, or from its code."""
    if isinstance(value, Pending) and isinstance(value.value, np.dtype):
        return value.value
    return _named_dtype(value)


def _order(order: Any) -> Any:
    if order not in ("C", "F"):
        raise Refused("an array in an unknown order")
    return order
