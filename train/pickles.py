"""Reads pickles of other projects without executing code in them; writes pickles of arrays.

A pickle can call any Python function by its name. Here it may only name the constructors of tensors
and arrays, and argparse's Namespace, which holds the settings of the authors' code.
"""

import argparse
import io
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.errors import UserError

_ALLOWED: dict[str, Callable[..., Any]] = {
    **{
        f"numpy.{core}.{module}.{name}": getattr(getattr(np._core, module), name)  # type: ignore[attr-defined]
        for core in ("core", "_core")  # NumPy 1 and 2
        for module, name in (
            ("multiarray", "_reconstruct"),
            ("multiarray", "scalar"),
            ("numeric", "_frombuffer"),
        )
    },
    "numpy.ndarray": np.ndarray,
    "numpy.dtype": np.dtype,
    "collections.OrderedDict": OrderedDict,
    "builtins.bytearray": bytearray,
    "__builtin__.bytearray": bytearray,
    "_codecs.encode": lambda text, encoding: str(text).encode("latin1"),  # bytes in protocol 2
}

_DTYPES = [type(np.dtype(code)) for code in np.typecodes["All"] if code not in "OV"]
_TORCH_ALLOWED: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    argparse.Namespace,
    *_DTYPES,
    *((made, name) for name, made in _ALLOWED.items()),
]
"""The same for torch, which also needs the classes of NumPy's types."""


class Foreign(pickle.UnpicklingError):
    """A pickle names a class or function that is not allowed."""


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[f"{module}.{name}"]
        except KeyError:
            raise Foreign(f"{module}.{name}") from None


class _ArrayPickler(pickle.Pickler):
    """Pickles arrays so that NumPy 1 can read them: NumPy 2 would name modules that 1 lacks."""

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, np.ndarray):
            return NotImplemented
        return np.ndarray, (value.shape, value.dtype.str, bytearray(value.tobytes()))


def read_pickle(path: Path) -> Any:
    """The content of a .pkl file of arrays, or of a file of torch's (any other suffix).

    Raises:
        UserError: the file names a class or function that is not allowed; the message says which.
        OSError: the file cannot be read.
        Exception: almost any other one, if the file is damaged.
    """
    try:
        if path.suffix == ".pkl":
            with path.open("rb") as file:
                return _ArrayUnpickler(file, encoding="latin1").load()
        with torch.serialization.safe_globals(_TORCH_ALLOWED):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        foreign = re.search(r"GLOBAL (\S+) (?:was not|whose module)", str(error))
        name = str(error) if isinstance(error, Foreign) else foreign and foreign[1]
        if name is None:
            raise
        raise UserError(f"{path}: refused: holds more than weights: it names {name}") from None


def pickle_arrays(content: dict[str, Any]) -> bytes:
    """Pickle `content` (dicts, lists, plain values, arrays) for `read_pickle` and any NumPy."""
    buffer = io.BytesIO()
    _ArrayPickler(buffer, protocol=4).dump(content)
    return buffer.getvalue()


def torch_bytes(content: Any) -> bytes:
    """`content` as the bytes of a file that torch.load reads."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()
