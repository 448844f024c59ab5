"""Reads the files that torch.save writes, without torch.load: see `train.pickles`.

A file is a zip archive with a pickle and one record for each storage or, before PyTorch 1.6, a row
of pickles and the storages behind them. The pickle is read first: it says all sizes. They are
checked against the limits and the file before anything of these sizes is made.
"""

import io
import math
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from train.pickle_machine import (
    TENSORS,
    NotDense,
    Pending,
    Refused,
    Source,
    plain,
    room,
    whole_numbers,
)
from train.pickled_arrays import ArrayMachine

PICKLE_BYTES = 256 << 20
"""Most bytes of an archive's pickle: the names, shapes and settings, without the tensors. That of
SlotCon has 0.1 MB."""
DIRECTORY_BYTES = 16 << 20
"""Most bytes of an archive's table of contents: 800 a tensor."""
_PIECE = 16 << 20  # bytes that are read at a time
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
"""The first two pickles of a file from before PyTorch 1.6."""

_STORAGES = {
    "Double": torch.float64, "Float": torch.float32, "Half": torch.float16,
    "BFloat16": torch.bfloat16, "Long": torch.int64, "Int": torch.int32, "Short": torch.int16,
    "Char": torch.int8, "Byte": torch.uint8, "Bool": torch.bool,
    "ComplexFloat": torch.complex64, "ComplexDouble": torch.complex128,
}  # fmt: skip
_DTYPES = {*_STORAGES.values(), torch.uint16, torch.uint32, torch.uint64}
_QUANTISED = ("QInt8", "QInt32", "QUInt8", "QUInt4x2", "QUInt2x4")
_SCHEMES = (
    "per_tensor_affine", "per_tensor_symmetric", "per_channel_affine", "per_channel_symmetric",
    "per_channel_affine_float_qparams",
)  # fmt: skip


@dataclass(eq=False)
class _Storage:
    """Memory that tensors share."""

    dtype: torch.dtype | None
    """None: quantised."""
    size: int
    """Elements."""
    data: Tensor | None = None
    """The elements [size], after they are read."""
    root: "_Storage | None" = None
    start: int = 0
    """The storage that this one is a part of, and its first element there."""

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize if self.dtype else 0

    def elements(self, dtype: torch.dtype) -> Tensor:
        if self.root:
            return self.root.elements(dtype)[self.start : self.start + self.size]
        if self.data is None:
            raise Refused("a tensor whose values are not in the file")
        return self.data.view(dtype)


@dataclass(eq=False, frozen=True)
class _Strided:
    """A tensor to be made: all of it lies in its storage."""

    storage: _Storage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def tensor(self) -> Tensor:
        elements = self.storage.elements(self.dtype)
        return elements.as_strided(self.shape, self.strides, self.offset)


class _TorchMachine(ArrayMachine):
    """Also knows the names of tensors and storages."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[str, _Storage] = {}
        self._parts: dict[str, _Storage] = {}
        self.persistent = self._storage
        for device in ("", "cuda."):
            for name, dtype in _STORAGES.items():
                self.names[f"torch.{device}{name}Storage"] = _Storage(dtype, 0)
        self.names |= {f"torch.{name}Storage": _Storage(None, 0) for name in _QUANTISED}
        self.names |= {f"torch.{name}": NotDense() for name in _SCHEMES}
        for dtype in vars(torch).values():  # None: a tensor of it becomes a NotDense
            if isinstance(dtype, torch.dtype):
                self.names[str(dtype)] = dtype if dtype in _DTYPES else None
        for name in ("UntypedStorage", "_UntypedStorage"):
            self.names[f"torch.storage.{name}"] = _Storage(torch.uint8, 0)
        self.names |= {
            "torch._utils._rebuild_tensor": self._tensor,
            "torch._utils._rebuild_tensor_v2": self._tensor_v2,
            "torch._utils._rebuild_tensor_v3": self._tensor_v3,
            "torch._utils._rebuild_parameter": _first,
            "torch._utils._rebuild_parameter_with_state": _first,
            "torch._utils._rebuild_device_tensor_from_cpu_tensor": _first,
            "torch._utils._rebuild_device_tensor_from_numpy": _array,
            "torch._utils._rebuild_qtensor": _not_dense,
            "torch._utils._rebuild_sparse_tensor": _not_dense,
            "torch._utils._rebuild_meta_tensor_no_storage": _not_dense,
            "torch._utils._rebuild_wrapper_subclass": _not_dense,
            "torch._tensor._rebuild_from_type_v2": self._with_attributes,
            "torch.Tensor": self._legacy_tensor,
            "torch.nn.parameter.Parameter": self._legacy_tensor,
            "torch.serialization._get_layout": _text,
            "torch.Size": whole_numbers,
            "torch.device": _text,
        }

    def _storage(self, identity: Any) -> _Storage:
        """The storage of a persistent identity. Views of storages exist before PyTorch 1.6."""
        word, kind, key, _device, size, *view = identity
        if word != "storage" or type(kind) is not _Storage or type(key) is not str:
            raise Refused("holds more than weights: an unknown kind of storage")
        (size,) = whole_numbers(size)
        if key not in self.storages:
            self.storages[key] = _Storage(kind.dtype, size)
            self.take(self.storages[key].nbytes)
        root = self.storages[key]
        if (root.dtype, root.size) != (kind.dtype, size):
            raise Refused("a storage of two types or sizes")
        if view in ([], [None]):
            return root
        [(part, start, length)] = view
        if type(part) is not str:
            raise Refused("a part of a storage without a name")
        start, length = whole_numbers((start, length))
        if start + length > size:
            raise Refused("a part that is larger than its storage")
        return self._parts.setdefault(part, _Storage(kind.dtype, length, root=root, start=start))

    def _strided(
        self, storage: Any, dtype: Any, offset: Any, shape: Any, strides: Any
    ) -> _Strided | NotDense:
        if type(storage) is not _Storage or not (dtype is None or isinstance(dtype, torch.dtype)):
            raise Refused("a tensor without a storage or a type")
        shape, strides = whole_numbers(shape), whole_numbers(strides)
        (offset,) = whole_numbers(offset)
        size = math.prod(shape)
        if storage.dtype is None or dtype is None:
            return NotDense()
        if dtype != storage.dtype and (storage.root or torch.bool in (dtype, storage.dtype)):
            raise Refused("a tensor of another type than its storage")
        self.take(room(shape, dtype.itemsize), tensors=1)
        end = offset + 1 + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
        if size and end * dtype.itemsize > storage.nbytes:
            raise Refused("a tensor that is larger than its storage")
        return _Strided(storage, dtype, offset if size else 0, shape, strides)

    def _tensor(self, storage: Any, offset: Any, shape: Any, strides: Any) -> _Strided | NotDense:
        return self._strided(storage, getattr(storage, "dtype", None), offset, shape, strides)

    def _tensor_v2(
        self, storage: Any, offset: Any, shape: Any, strides: Any, _grad: Any, _hooks: Any,
        bits: Any = None,
    ) -> _Strided | NotDense:  # fmt: skip
        tensor = self._tensor(storage, offset, shape, strides)
        return NotDense() if bits else tensor  # conjugated or negated: only of complex numbers

    def _tensor_v3(
        self, storage: Any, offset: Any, shape: Any, strides: Any, _grad: Any, _hooks: Any,
        dtype: Any, bits: Any = None,
    ) -> _Strided | NotDense:  # fmt: skip
        tensor = self._strided(storage, dtype, offset, shape, strides)
        return NotDense() if bits else tensor

    def _with_attributes(self, function: Any, kind: Any, arguments: Any, _state: Any) -> Any:
        if kind != self._legacy_tensor:
            raise Refused("holds more than weights: a tensor of a subclass")
        return self.call(function, arguments)

    def _legacy_tensor(self, *data: Any) -> Any:
        """A Tensor or Parameter of PyTorch 0.1, whose state follows: that of its storage, or its
        values, gradient and hooks.
        """
        if data:
            return _first(*data)

        def finish(state: Any) -> Any:
            return self._tensor(*state) if len(state) == 4 else _first(*state)

        return Pending(finish)


def _first(data: Any, *_: Any) -> Any:
    if not isinstance(data, _Strided | NotDense | Pending | np.ndarray):
        raise Refused(f"a tensor made of a {type(data).__name__}")
    return data


def _array(data: Any, *_: Any) -> Any:
    return _first(data)


def _not_dense(*_: Any) -> NotDense:
    return NotDense()


def _text(*parts: Any) -> str:
    """A device or a layout."""
    if not all(type(part) in (str, int) for part in parts):
        raise Refused("a device without a name")
    return ":".join(map(str, parts))


def _made(value: Any) -> Any:
    return value.tensor() if isinstance(value, _Strided) else value


def read_torch(path: Path) -> Any:
    """The content of a file of torch.save: dicts, lists, plain values, dense tensors on the CPU.

    Raises Refused; any Exception if the file is damaged.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        zipped = file.read(4) == b"PK\x03\x04"
        file.seek(0)
        return _read_zip(file) if zipped else _read_row(file, size)


def _read_zip(file: IO[bytes]) -> Any:
    end = zipfile._EndRecData(file)  # type: ignore[attr-defined]
    if end and end[5] > DIRECTORY_BYTES:  # before a million entries are made of it
        raise Refused(f"a table of {end[5]:,} bytes, the limit is {DIRECTORY_BYTES:,}")
    if end and end[4] > TENSORS + 100:  # each storage is a record
        raise Refused(f"{end[4]:,} records, the limit is {TENSORS:,}")
    with zipfile.ZipFile(file) as archive:
        entry = next(name for name in archive.namelist() if name.split("/")[1:] == ["data.pkl"])
        top = entry.removesuffix("data.pkl")
        machine = _TorchMachine()
        content = machine.load(io.BytesIO(_record(archive, entry, PICKLE_BYTES).tobytes()))
        swapped = f"{top}byteorder" in archive.NameToInfo and (
            _record(archive, f"{top}byteorder", 10).tobytes() == b"big"
        )
        for key, storage in machine.storages.items():
            if storage.dtype:
                data = _record(archive, f"{top}data/{key}", storage.nbytes)
                storage.data = _elements(data, storage, swapped)
        return plain(content, _made)


def _record(archive: zipfile.ZipFile, name: str, limit: int) -> np.ndarray:
    """The bytes of a record, uint8. Its checksum is checked."""
    size, filled = archive.getinfo(name).file_size, 0
    if size > limit:
        raise Refused(f"a record of {size:,} bytes, the limit is {limit:,}")
    data = np.empty(size, np.uint8)
    with archive.open(name) as record:
        while piece := record.read(_PIECE):
            data[filled : filled + len(piece)] = np.frombuffer(piece, np.uint8)
            filled += len(piece)
    if filled != size:
        raise EOFError
    return data


def _read_row(file: IO[bytes], size: int) -> Any:
    """Five pickles (a number, the version, the machine, the content, the storages' order), then of
    each storage its size and its elements.
    """
    source, machine = Source(file, size), _TorchMachine()
    if [machine.load(source), machine.load(source)] != [_MAGIC, _PROTOCOL]:
        raise EOFError
    machine.load(source)
    content, order = machine.load(source), machine.load(source)
    for key in order:
        storage = machine.storages[key]
        (length,) = struct.unpack("<q", file.read(8))
        if length != storage.size or not storage.dtype:
            raise Refused("a storage of another size or type than its elements")
        if storage.nbytes > size - file.tell():
            raise EOFError
        data = np.frombuffer(bytearray(file.read(storage.nbytes)), np.uint8)
        storage.data = _elements(data, storage, swapped=False)
    return plain(content, _made)


def _elements(data: np.ndarray, storage: _Storage, swapped: bool) -> Tensor:
    """The elements of a storage from their bytes."""
    if len(data) != storage.nbytes or not storage.dtype:
        raise Refused("a storage of another size than its record")
    if not len(data):
        return torch.empty(0, dtype=storage.dtype)
    if storage.dtype is torch.bool:  # any byte but 0 and 1 would be neither true nor false
        return torch.from_numpy(data != 0)
    if swapped:
        number = storage.dtype.itemsize // (2 if storage.dtype.is_complex else 1)
        data = data.view(f"u{number}").byteswap().view(np.uint8)
    return torch.from_numpy(data).view(storage.dtype)
