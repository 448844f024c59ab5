"""The triton backend in Triton's interpreter, in a separate process.

Triton decides at its import, for the whole process, whether kernels are compiled or interpreted.
"""

import os
import pickle
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from multiprocessing import get_context
from typing import Any

import numpy as np
import pytest
from packaging.version import Version

from pipeline.augment import Backend, get_backend


class Interpreter:
    """Use as a context manager; `backend` is the triton backend for tensors on the CPU."""

    def __enter__(self) -> "Interpreter":
        old = Version(version("triton")) < Version("3.7")
        if old and Version(np.__version__) >= Version("2.4"):
            pytest.skip("the interpreter of Triton 3.6 does not work with NumPy 2.4 and later")
        self._pool = ProcessPoolExecutor(1, get_context("spawn"), initializer=_interpret)
        self.backend = Backend(
            lambda *arguments: self._call("apply", *arguments),
            lambda *arguments: self._call("colour", *arguments),
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def _call(self, name: str, *arguments: Any) -> Any:
        # Pickle here, so that tensors are sent as bytes: torch would use shared memory.
        return pickle.loads(self._pool.submit(_run, name, pickle.dumps(arguments)).result())


def _interpret() -> None:
    os.environ["TRITON_INTERPRET"] = "1"


def _run(name: str, arguments: bytes) -> bytes:
    backend = get_backend("triton")._asdict()
    return pickle.dumps(backend[name](*pickle.loads(arguments)))
