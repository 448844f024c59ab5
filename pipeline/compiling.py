"""Numba's compiler, with a cache on disk that is safe to trust.

Numba's own cache looks at one file: code that was compiled together with a function of another file
stays in use when that other one changes. It ends in a traceback when its files are damaged, when
the disk is full, or when no folder can be written. And of two processes that store two signatures
of a function at once, one may find the other's code. Here all of this means only: compile again.
Where no folder can be written, as in a read-only container, code that is kept already is used.
"""

import contextlib
import hashlib
import pickle
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numba
import numpy as np
from numba.core.caching import CompileResultCacheImpl, FunctionCache, IndexDataCacheFile

from pipeline.commands import as_called

_PLAIN = (bool, int, float, str, bytes, np.generic)
"""Types of the constants that compiled code may have from another file, alone or in tuples."""
_DIGEST = hashlib.sha256().digest_size
_SETTINGS = ("OPT", "BOUNDSCHECK", "DEBUGINFO_DEFAULT", "LOOP_VECTORIZE", "SLP_VECTORIZE")
"""Of Numba, by which the same functions become other code."""

numba.config.DISABLE_JIT = 0  # type: ignore[attr-defined]
"""NUMBA_DISABLE_JIT has no effect: Python cannot call the C functions that compiled code calls."""


def njit(*, cache: bool, **options: Any) -> Callable[[Any], Any]:
    """`numba.njit`, whose code is kept for the next process if `cache` is set."""

    def compiled(function: Any) -> Any:
        dispatcher = numba.njit(**options)(function)
        if cache:
            with contextlib.suppress(RuntimeError):  # no folder
                dispatcher._cache = _Kept(function)
        return dispatcher

    return compiled


def _readable(locator: Any) -> Any:
    """Numba's `locator` of a folder, content with one that holds compiled code."""

    def ensure_cache_path(self: Any) -> None:
        if not any(Path(self.get_cache_path()).glob("*.nbi")):
            raise FileNotFoundError

    return type(locator.__name__, (locator,), {"ensure_cache_path": ensure_cache_path})


class _Folders(CompileResultCacheImpl):
    """Where code is kept: in the first folder of Numba's that can be written, else read."""

    _locator_classes: Any = (
        *CompileResultCacheImpl._locator_classes,
        *map(_readable, CompileResultCacheImpl._locator_classes),
    )


class _Kept(FunctionCache):
    """The cache of one function."""

    _impl_class = _Folders

    def __init__(self, function: Any) -> None:
        """Raises RuntimeError if there is no folder for it."""
        super().__init__(function)
        self.stamp = _stamp(function)
        self._cache_file = _Files(self.cache_path, self._impl.filename_base, self.stamp)

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        code = super().load_overload(sig, target_context)
        if code is None:
            _say_that_it_takes_time()
        return code

    def save_overload(self, sig: Any, data: Any) -> None:
        with contextlib.suppress(OSError):  # a full disk, or one that can only be read
            super().save_overload(sig, data)


@cache
def _say_that_it_takes_time() -> None:
    print(
        "compiling for this processor, once: some seconds, or 30 for all of the data path "
        f"({as_called('python -m tools.warm_up')} does that beforehand)",
        file=sys.stderr,
    )


class _Files(IndexDataCacheFile):
    """The files of a function. Each holds the key of its code and ends with a checksum."""

    def save(self, key: Any, data: Any) -> None:
        super().save(key, (key, data))

    def load(self, key: Any) -> Any:
        found = super().load(key)
        return found[1] if found and found[0] == key else None

    def _load_index(self) -> dict[Any, str]:
        version = pickle.dumps(self._version, protocol=-1)
        try:
            content = Path(self._index_path).read_bytes()
            stamp, overloads = _unpickled(content.removeprefix(version), self._index_path)
        except Exception:  # none, damaged, of another version: pickle raises many types
            return {}
        found: dict[Any, str] = overloads if stamp == self._source_stamp else {}
        return found

    def _load_data(self, name: str) -> Any:
        return _unpickled(Path(self._data_path(name)).read_bytes(), name)

    def _dump(self, obj: Any) -> bytes:
        content: bytes = super()._dump(obj)
        return content + hashlib.sha256(content).digest()


def _unpickled(content: bytes, name: str) -> Any:
    """What was pickled, if the checksum behind it is right: damaged pickles do anything."""
    if hashlib.sha256(content[:-_DIGEST]).digest() != content[-_DIGEST:]:
        raise OSError(f"{name}: damaged")  # to Numba the same as a file that is gone
    return pickle.loads(content)


def _stamp(function: Any) -> str:
    """A checksum of all that the code of a function is made of: its file, and the compiled
    functions and constants that its file has from others, this file, and settings.
    """
    digest = hashlib.sha256(_text(function.__code__.co_filename) + _text(__file__))
    digest.update(repr([getattr(numba.config, name) for name in _SETTINGS]).encode())
    for name, value in sorted(function.__globals__.items()):
        kept = getattr(value, "_cache", None)
        if isinstance(kept, _Kept):
            digest.update(f"{name} {kept.stamp};".encode())
        elif _is_constant(value) and not name.startswith("__"):
            digest.update(f"{name} {value!r};".encode())
    return digest.hexdigest()


def _is_constant(value: Any) -> bool:
    """Whether compiled code may have it as a constant. Then its text is the same in each process,
    unlike that of a tuple of objects, which holds their addresses."""
    if isinstance(value, tuple):
        return all(map(_is_constant, value))
    return isinstance(value, _PLAIN)


@cache
def _text(path: str) -> bytes:
    return Path(path).read_bytes()
