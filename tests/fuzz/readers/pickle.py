"""Pickles of arrays: what is read has plain types only, and its own memory."""

import pickle
from collections.abc import Iterator
from pathlib import Path
from pickletools import genops
from typing import Any

import numpy as np
import torch

from pipeline.errors import UserError
from tests.fuzz.damage import NUMBERS, Random, damage
from tests.helpers.pickled import call, number, text
from train.pickle_machine import NotDense
from train.weights import read_file, state_in

NAMES = (
    "numpy.dtype", "numpy.ndarray", "numpy.core.multiarray._reconstruct", "builtins.bytearray",
    "numpy._core.multiarray.scalar", "numpy._core.numeric._frombuffer", "_codecs.encode",
    "collections.OrderedDict", "argparse.Namespace", "builtins.set", "builtins.complex",
    "os.system", "torch.Size", "torch._utils._rebuild_tensor_v2", "torch.FloatStorage",
)  # fmt: skip
TEXTS = (
    "f4",
    "<f8",
    "O8",
    "V8",
    "U3",
    "S2",
    "b1",
    "f4,O",
    "C",
    "F",
    "K",
    "latin1",
    "abcdefgh",
    "|",
)


class Target:
    """A pickle of arrays, and the code that alters and reads it."""

    suffix = ".pkl"

    def __init__(self, folder: Path) -> None:
        self.path = folder / f"w{self.suffix}"
        arrays = {
            "conv1.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
            "columns": np.asfortranarray(np.arange(6, dtype=">i4").reshape(3, 2)),
            "bool": np.array([True, False]), "text": np.array(["ab"]), "best": np.float64(0.5),
            "list": [1, (2, None), {"a": b"x"}],
        }  # fmt: skip
        self.contents = [pickle.dumps({"model": arrays}, protocol) for protocol in range(6)]

    def try_one(self, random: Random) -> str:
        content = self.contents[random.integers(len(self.contents))]
        self.path.write_bytes(self.altered(content, random))
        return self.read()

    def altered(self, content: bytes, random: Random) -> bytes:
        return program(content, random)

    def read(self) -> str:
        """What becomes of the file. All that is read is touched."""
        outcome = "refused"
        try:
            content, _ = read_file(self.path)
            for value in leaves(content):
                check(value)
            outcome = "read"
            state_in(content, self.path)
            outcome = "weights"
        except UserError as error:
            assert str(self.path) in str(error) and str(error).isprintable(), repr(str(error))
        return outcome


def program(content: bytes, random: Random) -> bytes:
    """A pickle with damaged bytes or operations, or one that is made of operations by chance."""
    kind = random.integers(4)
    if kind == 0:
        return damage(content, random)
    if kind == 1:
        return (
            b"\x80\x02" + b"".join(_operation(random) for _ in range(random.integers(2, 40))) + b"."
        )
    try:
        pieces = _pieces(content)
    except ValueError:
        return damage(content, random)
    for _ in range(int(random.integers(1, 4))):
        at, other = random.integers(len(pieces), size=2)
        match random.integers(5):
            case 0:
                pieces[at], pieces[other] = pieces[other], pieces[at]
            case 1:
                pieces[at:at] = pieces[min(at, other) : max(at, other)][:8] * 2
            case 2:
                pieces[at] = b""
            case 3:
                pieces[at] = pieces[at][:1] + random.bytes(len(pieces[at]) - 1)
            case 4:
                pieces[at:at] = [_operation(random)]
    return b"".join(pieces)


def _pieces(content: bytes) -> list[bytes]:
    starts = [position for _, _, position in genops(content)]
    return [content[a:b] for a, b in zip(starts, [*starts[1:], len(content)], strict=True)]


def _operation(random: Random) -> bytes:
    """An operation, or a call or an object with odd arguments."""
    name = NAMES[random.integers(len(NAMES))]
    odd = [_value(random) for _ in range(random.integers(0, 6))]
    match random.integers(6):
        case 0:
            return call(name, *odd)
        case 1:
            return call(name, *odd) + b"(" + b"".join(odd) + b"tb"
        case 2:
            module, _, function = name.rpartition(".")
            return f"c{module}\n{function}\n".encode() + b")\x81"
        case 3:
            place = bytes([random.integers(3)])
            return (b"q", b"h")[random.integers(2)] + place
        case 4:
            return [b"a", b"e", b"s", b"u", b"t", b"b", b"R", b"\x81", b"\x85", b"0", b"1", b"2",
                    b"l", b"d", b"Q", b"(", b"\x93", b"\x94"][random.integers(18)]  # fmt: skip
        case _:
            return _value(random)


def _value(random: Random) -> bytes:
    match random.integers(6):
        case 0:
            return text(TEXTS[random.integers(len(TEXTS))])
        case 1:
            return number(NUMBERS[random.integers(len(NUMBERS))] - 2**63)
        case 2:
            return b"K" + bytes([random.integers(9)])
        case 3:
            return call("numpy.dtype", text(TEXTS[random.integers(len(TEXTS))]))
        case 4:
            return b"(K\x02K\x01t"
        case _:
            return [b"N", b"]", b"}", b")", b"\x88", b"h\x00"][random.integers(6)]


def leaves(value: Any) -> Iterator[Any]:
    """All that is in a content, through the containers that a reader may hand out."""
    if isinstance(value, dict):
        yield from (leaf for each in value.values() for leaf in leaves(each))
    elif isinstance(value, list | tuple | set):
        yield from (leaf for each in value for leaf in leaves(each))
    elif hasattr(value, "__dict__") and type(value).__name__ == "Namespace":
        yield from leaves(vars(value))
    else:
        yield value


def check(value: Any) -> None:
    """A leaf is plain, and all of its memory can be read."""
    if isinstance(value, np.ndarray):
        assert value.dtype.kind in "biufcSU" and not value.dtype.hasobject, value.dtype
        assert value.dtype.fields is None
        value.tobytes()
        assert value.dtype.kind in "SU" or value.sum() is not None
    elif isinstance(value, torch.Tensor):
        assert type(value) is torch.Tensor and value.layout is torch.strided
        assert value.device.type == "cpu" and not value.requires_grad and not value.is_quantized
        reach = value.storage_offset() + sum(
            (n - 1) * step for n, step in zip(value.shape, value.stride(), strict=True)
        )
        room = value.untyped_storage().nbytes() // value.itemsize
        assert value.numel() == 0 or (min(value.stride(), default=0) >= 0 and reach < room)
        if value.numel():
            flat = value.reshape(-1).clone(memory_format=torch.contiguous_format)
            flat.view(torch.uint8).sum()
    else:
        plain = (
            str,
            bytes,
            bytearray,
            int,
            float,
            complex,
            bool,
            type(None),
            torch.dtype,
            NotDense,
        )
        assert isinstance(value, plain), type(value)
