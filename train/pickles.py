"""Reads pickles and files of torch without executing code in them; writes them.

What is read holds dicts, lists, plain values, argparse's Namespaces (the settings of the authors'
code), arrays and dense tensors on the CPU, and nothing else. `train.pickle_machine` states the
limits.
"""

import io
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.errors import UserError
from train.pickle_machine import Refused, Source, plain
from train.pickled_arrays import ArrayMachine
from train.torch_files import read_torch


def read_pickle(path: Path) -> Any:
    """The content of a .pkl file of arrays, or of a file of torch's (any other suffix).

    Raises:
        UserError: the file holds what is not allowed or more than a limit; the message says what.
        OSError: the file cannot be read.
        Exception: almost any other one, if the file is damaged.
    """
    try:
        if path.suffix != ".pkl":
            return read_torch(path)
        with path.open("rb") as file:
            return plain(ArrayMachine().load(Source(file, path.stat().st_size)))
    except Refused as error:
        raise UserError(f"{path}: refused: {error}") from None


class _ArrayPickler(pickle.Pickler):
    """Pickles arrays so that NumPy 1 can read them: NumPy 2 would name modules that 1 lacks."""

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, np.ndarray):
            return NotImplemented
        return np.ndarray, (value.shape, value.dtype.str, bytearray(value.tobytes()))


def pickle_arrays(content: Mapping[str, Any]) -> bytes:
    """Pickle `content` (dicts, lists, plain values, arrays) for `read_pickle` and any NumPy."""
    buffer = io.BytesIO()
    _ArrayPickler(buffer, protocol=4).dump(content)
    return buffer.getvalue()


def torch_bytes(content: Any) -> bytes:
    """`content` as the bytes of a file that torch.load reads."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()
