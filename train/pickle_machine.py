"""Runs pickles without executing code in them.

A pickle is a program for a stack machine, which can call any Python function by its name. `Machine`
runs such programs: it knows the operations that data need, and the names in its table only. Behind
these names are stand-ins, which check all sizes before they make an array. No other code gets to
see a type, a size or a pointer of the file.
"""

import argparse
import math
from collections.abc import Callable, Iterable
from pickletools import genops
from types import FunctionType, MethodType
from typing import IO, Any, cast

import numpy as np
import torch

from pipeline.errors import printable

BYTES = 4 << 30
"""Most bytes of the tensors of one file, as stored and with their shapes filled. SlotCon's largest
checkpoint, a ResNet-152 with its optimiser, has 0.8 GiB."""
TENSORS = 20_000
"""Most tensors of one file. SlotCon's checkpoint has 700."""
VALUES = 4_000_000
"""Most operations of a pickle (a tensor takes 35), and most values in what it makes; 16 characters
count as a value. A bomb of lists that share lists counts as what it would be without sharing."""
DEPTH = 100
"""Most levels of containers."""
DIMENSIONS = 32
"""Most dimensions of a tensor."""
_INT_BITS, _KEY_BITS = 1024, 60
"""Most bits of an integer, and of one that is a key: larger ones can be chosen to collide."""


class Refused(ValueError):
    """A file holds what is not allowed, or more than a limit. The message says what."""


class NotDense:
    """Stands for a tensor that is sparse, quantised, of a device without memory, or a subclass."""


class Pending:
    """Stands for an object whose content the pickle gives after it has named the object."""

    def __init__(self, finish: Callable[[Any], Any]) -> None:
        self._finish = finish
        self.value: Any = self

    def build(self, state: Any) -> None:
        self.value = self._finish(state)


class Machine:
    """Runs pickles. The limits are those of all of them together."""

    def __init__(self) -> None:
        self.names: dict[str, Any] = {
            "collections.OrderedDict": self._dict,
            "collections.Counter": self._dict,
            "builtins.bytearray": self._bytearray,
            "builtins.set": self._set,
            "builtins.complex": complex_number,
            "argparse.Namespace": namespace,
            "_codecs.encode": self._encode,  # bytes in protocol 2
            "builtins.bytes": self._encode,  # none of them
        }
        """What a pickle may name: functions, which it may call, and constants."""
        self.persistent: Callable[[Any], Any] | None = None
        """Called with the identity of a storage; None: there may be none."""
        self._operations = self._tensors = self._bytes = 0
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[Any, Any] = {}

    def load(self, file: "IO[bytes] | Source") -> Any:
        """The object that the pickle makes. It may hold instances of `Pending`, see `plain`.

        Raises Refused; any Exception if the pickle is damaged.
        """
        self._stack, self._marks, self._memo = [], [], {}
        for opcode, argument, _ in genops(cast(IO[bytes], file)):
            self._spend(1)
            name = opcode.name
            if name in _VALUES:
                if type(argument) is int and argument.bit_length() > _INT_BITS:
                    raise Refused(f"an integer of more than {_INT_BITS} bits")
                self._stack.append(argument)
            elif name in _PUT:
                place = len(self._memo) if argument is None else _key(argument)
                self._memo[place] = self._stack[-1]
            elif name in _GET:
                self._stack.append(self._memo[argument])
            elif name == "STOP":
                return self._stack.pop()
            elif name in _OPERATIONS:
                _OPERATIONS[name](self, argument)
            elif name not in ("PROTO", "FRAME"):
                raise ValueError(f"unknown operation {name}")
        raise EOFError

    # --- operations ---

    def _above_mark(self) -> list[Any]:
        mark = self._marks.pop()
        items = self._stack[mark:]
        del self._stack[mark:]
        return items

    def _mark(self, _: Any) -> None:
        self._marks.append(len(self._stack))

    def _pop(self, _: Any) -> None:
        self._stack.pop()

    def _pop_mark(self, _: Any) -> None:
        self._above_mark()

    def _tuple(self, count: int | None = None) -> None:
        if count is None:
            items = self._above_mark()
        else:
            items = [self._stack.pop() for _ in range(count)][::-1]
        self._stack.append(tuple(items))

    def _append(self, items: list[Any]) -> None:
        of_type(self._stack[-1], list).extend(items)

    def _set_items(self, items: list[Any]) -> None:
        _fill(of_type(self._stack[-1], dict), zip(items[::2], items[1::2], strict=True))

    def _list(self, _: Any) -> None:
        self._stack.append(self._above_mark())

    def _dictionary(self, _: Any) -> None:
        items = self._above_mark()
        self._stack.append({})
        self._set_items(items)

    def _global(self, argument: str) -> None:
        self._name(*argument.split(" ", 1))

    def _stack_global(self, _: Any) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        self._name(of_type(module, str), of_type(name, str))

    def _name(self, module: str, name: str) -> None:
        full = f"{'builtins' if module == '__builtin__' else module}.{name}"
        if full not in self.names:
            raise Refused(f"holds more than weights: it names {printable(full[:100])}")
        self._stack.append(self.names[full])

    def _reduce(self, _: Any) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        self._stack.append(self.call(function, arguments))

    def call(self, function: Any, arguments: Any) -> Any:
        """Call a function of the table, with a tuple of arguments. The stack holds no others."""
        if not isinstance(function, FunctionType | MethodType):
            raise Refused("holds more than weights: it calls what is no function")
        return function(*of_type(arguments, tuple))

    def _build(self, _: Any) -> None:
        state, target = self._stack.pop(), self._stack[-1]
        if isinstance(target, Pending):
            target.build(state)
        elif type(target) is not dict:  # attributes of an OrderedDict, which nobody reads
            raise Refused(f"holds more than weights: a {type(target).__name__} with attributes")

    def _persistent(self, _: Any) -> None:
        if self.persistent is None:
            raise Refused("holds storages: it is not a .pkl of arrays")
        self._stack.append(self.persistent(self._stack.pop()))

    # --- limits ---

    def _spend(self, operations: int) -> None:
        self._operations += operations
        if self._operations > VALUES:
            raise Refused(f"a pickle of more than {VALUES:,} operations")

    def take(self, size: int, tensors: int = 0) -> None:
        """Count `size` bytes, and tensors, that are about to be made. Raises Refused."""
        self._bytes += size
        self._tensors += tensors
        if self._tensors > TENSORS:
            raise Refused(f"more than {TENSORS:,} tensors")
        if self._bytes > BYTES:
            raise Refused(f"tensors of {self._bytes / 2**30:,.1f} GiB, the limit is {BYTES >> 30}")

    # --- stand-ins ---

    def _dict(self, pairs: Any = ()) -> dict[Any, Any]:
        pairs = list(pairs.items()) if type(pairs) is dict else pairs
        self._spend(len(pairs))
        return _fill({}, pairs)

    def _set(self, items: Any = ()) -> set[Any]:
        self._spend(len(items))
        return set(map(_key, items))

    def bytes_of(self, data: Any) -> bytes | bytearray:
        """Bytes, which Python 2 wrote as text."""
        if type(data) not in (str, bytes, bytearray):
            raise Refused(f"bytes that are a {type(data).__name__}")
        self.take(len(data))
        result: bytes | bytearray = data.encode("latin1") if type(data) is str else data
        return result

    def _bytearray(self, data: Any = b"", _: Any = None) -> bytearray:
        return bytearray(self.bytes_of(data))

    def _encode(self, data: Any = b"", _: Any = None) -> bytes | bytearray:
        return self.bytes_of(data)


_VALUES = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
    "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE",
    "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8",
}  # fmt: skip
_PUT = {"PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"}
_GET = {"GET", "BINGET", "LONG_BINGET"}
_OPERATIONS: dict[str, Callable[[Machine, Any], None]] = {
    "NONE": lambda machine, _: machine._stack.append(None),
    "NEWTRUE": lambda machine, _: machine._stack.append(True),
    "NEWFALSE": lambda machine, _: machine._stack.append(False),
    "EMPTY_TUPLE": lambda machine, _: machine._stack.append(()),
    "EMPTY_LIST": lambda machine, _: machine._stack.append([]),
    "EMPTY_DICT": lambda machine, _: machine._stack.append({}),
    "MARK": Machine._mark,
    "POP": Machine._pop,
    "POP_MARK": Machine._pop_mark,
    "TUPLE": Machine._tuple,
    "TUPLE1": lambda machine, _: machine._tuple(1),
    "TUPLE2": lambda machine, _: machine._tuple(2),
    "TUPLE3": lambda machine, _: machine._tuple(3),
    "LIST": Machine._list,
    "DICT": Machine._dictionary,
    "APPEND": lambda machine, _: machine._append([machine._stack.pop()]),
    "APPENDS": lambda machine, _: machine._append(machine._above_mark()),
    "SETITEM": lambda machine, _: machine._set_items(
        [machine._stack.pop(-2), machine._stack.pop()]
    ),
    "SETITEMS": lambda machine, _: machine._set_items(machine._above_mark()),
    "GLOBAL": Machine._global,
    "STACK_GLOBAL": Machine._stack_global,
    "REDUCE": Machine._reduce,
    "NEWOBJ": Machine._reduce,
    "BUILD": Machine._build,
    "BINPERSID": Machine._persistent,
}  # fmt: skip
"""The other operations by pickletools' names. Missing: instances of classes (OBJ, INST,
NEWOBJ_EX), extensions, buffers, sets, DUP."""


class Source:
    """The bytes of an open file, read as pickletools wants them. No read makes room for more bytes
    than the file has.
    """

    def __init__(self, file: IO[bytes], size: int) -> None:
        self._read, self._size = file.read, size
        self.readline = file.readline

    def read(self, count: int) -> bytes:
        return self._read(min(count, self._size))


def plain(value: Any, made: Callable[[Any], Any] = lambda value: value) -> Any:
    """What a machine has made, as new dicts, lists, tuples, sets and Namespaces of plain values,
    arrays and `NotDense`, without `Pending`.

    `made` makes the tensors: it is called with each other object, and raises Refused for those that
    it does not know. Raises Refused.
    """
    return _Plain(made).of(value, 0)[0]


class _Plain:
    def __init__(self, made: Callable[[Any], Any]) -> None:
        self._made = made
        self._done: dict[int, tuple[Any, int, int]] = {}

    def of(self, value: Any, depth: int) -> tuple[Any, int, int]:
        """The plain value, the number of values in it, and its levels."""
        if type(value) in _PLAIN:
            return value, 1 + (len(value) // 16 if type(value) in _TEXT else 0), 0
        if id(value) not in self._done:
            if depth <= DEPTH:
                result, values, levels = self._container(value, depth + 1)
            if depth > DEPTH or levels > DEPTH:
                raise Refused(f"more than {DEPTH} levels of containers, or one that holds itself")
            if values > VALUES:
                raise Refused(f"more than {VALUES:,} values, in containers that share containers")
            self._done[id(value)] = result, values, levels
        return self._done[id(value)]

    def _container(self, value: Any, depth: int) -> tuple[Any, int, int]:
        if isinstance(value, Pending):
            if value.value is value:
                raise Refused("an object without content")
            return self.of(value.value, depth)
        if isinstance(value, argparse.Namespace):
            state, values, levels = self.of(vars(value), depth)
            return _namespace_of(state), values, levels
        if type(value) is dict:
            keys, of_keys, _ = self._all(value, depth)
            items, values, levels = self._all(value.values(), depth)
            return dict(zip(keys, items, strict=True)), values + of_keys, levels
        if type(value) in (list, tuple, set):
            items, values, levels = self._all(value, depth)
            return type(value)(items), values, levels
        if type(value) is np.ndarray or isinstance(value, NotDense):
            return value, 1, 0
        made = self._made(value)
        if made is value:
            raise Refused(f"holds more than weights: a {type(value).__name__} as a value")
        return made, 1, 0

    def _all(self, items: Iterable[Any], depth: int) -> tuple[list[Any], int, int]:
        found = [self.of(item, depth) for item in items]
        levels = 1 + max((levels for *_, levels in found), default=0)
        return [item for item, *_ in found], 1 + sum(values for _, values, _ in found), levels


_TEXT = (str, bytes, bytearray)
_PLAIN = (*_TEXT, int, float, bool, complex, type(None), torch.dtype)


# --- stand-ins that make nothing large -----------------------------------------------------------


def namespace() -> Pending:
    """argparse's, which holds the settings of the authors' code."""

    return Pending(_namespace_of)


def _namespace_of(state: Any) -> argparse.Namespace:
    made = argparse.Namespace()
    made.__dict__ = of_type(state, dict)  # not a copy: many could share one large dictionary
    if not all(type(name) is str for name in state):
        raise Refused("a Namespace with a name that is no text")
    return made


def complex_number(real: Any, imaginary: Any) -> complex:
    return complex(of_type(real, float), of_type(imaginary, float))


def whole_numbers(shape: Any) -> tuple[int, ...]:
    """A shape, or strides. Raises Refused."""
    shape = tuple(shape) if type(shape) in (tuple, list) else (shape,)
    if len(shape) > DIMENSIONS or not all(type(n) is int and 0 <= n < 2**62 for n in shape):
        raise Refused("a tensor with an impossible shape")
    return shape


def room(shape: Iterable[int], itemsize: int) -> int:
    """The bytes of a tensor; a side of 0 counts as 1: what is made of the others would overflow."""
    return math.prod(side or 1 for side in shape) * itemsize


def _key(value: Any) -> Any:
    """A key of a dictionary: its hash takes no time, and many of them do not collide."""
    if type(value) in (str, bytes, bool, type(None)):
        return value
    if type(value) is int and value.bit_length() <= _KEY_BITS:
        return value
    raise Refused(f"a {type(value).__name__} as a key")


def _fill(target: dict[Any, Any], pairs: Iterable[Any]) -> dict[Any, Any]:
    for key, value in pairs:
        target[_key(key)] = value
    return target


def of_type(value: Any, wanted: type) -> Any:
    if type(value) is not wanted:
        raise Refused(f"a {type(value).__name__} instead of a {wanted.__name__}")
    return value
