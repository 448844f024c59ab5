"""Find operations that would make the host wait for a GPU, on a machine without one."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

OPERATORS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "equal")
"""Operators that return a number, or a tensor of a size that only the device knows."""
METHODS = ("tolist", "numpy", "cpu")
"""Methods that read a tensor in host memory without an operator."""


@contextmanager
def host_syncs() -> Iterator[Counter[str]]:
    """Counts by name the operations inside the `with` that would wait for a GPU, also in backward.

    It does not see other copies to the host; CUDA's `set_sync_debug_mode` sees those too.
    """
    found: Counter[str] = Counter()
    with _Operators(found), _Methods(found):
        yield found


class _Operators(TorchDispatchMode):
    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put", "index_put_") else ()
        masked = any(index is not None and not index.dtype.is_signed for index in indices)
        if name in OPERATORS or masked:
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


class _Methods(TorchFunctionMode):
    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name in METHODS:
            self.found[name] += 1
        return func(*args, **(kwargs or {}))
