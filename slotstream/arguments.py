"""Arguments from Python: what is wrong is said in one line, before a library stumbles over it."""

import os
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
