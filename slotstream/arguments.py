"""Arguments from Python: what is wrong is said in one line, before a library stumbles over it."""

import operator
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from pipeline.errors import UserError

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def path_of(path: Any) -> Path:
    """Raises UserError for what is no path."""
    if not isinstance(path, str | os.PathLike) or not os.fspath(path):
        raise UserError(f"a path is needed, not {path!r}")
    return Path(path)


def device_of(device: Any) -> torch.device:
    """The device of this name; by default the GPU, if there is one. Raises UserError if there is no
    such one.
    """
    on_gpu = torch.cuda.is_available()
    if device is None:
        return torch.device("cuda" if on_gpu else "cpu")
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        raise UserError(f"device must be 'cpu', 'cuda' or 'cuda:N', not {device!r}") from None
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device {found}: PyTorch finds {torch.cuda.device_count()} CUDA GPUs here")
    return found


def dtype_of(dtype: Any) -> torch.dtype:
    """Raises UserError for another type than views can have."""
    if dtype not in DTYPES:
        raise UserError(f"dtype must be one of {', '.join(map(str, DTYPES))}, not {dtype!r}")
    found: torch.dtype = dtype
    return found


def one_of(name: str, word: Any, words: Sequence[str]) -> Any:
    """Raises UserError for a word that is none of these."""
    if word not in words:
        raise UserError(f"{name} must be one of {', '.join(words)}, not {word!r}")
    return word


def whole(name: str, number: Any, least: int, below: int) -> int:
    """Raises UserError for what is no whole number from `least` on, below `below`."""
    try:
        found = operator.index(number)
    except TypeError:
        found = least - 1
    if not least <= found < below:
        raise UserError(
            f"{name} must be a whole number from {least} to {below - 1}, not {number!r}"
        )
    return found
