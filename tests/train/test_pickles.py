"""Foreign pickles: what real files hold is read; nothing else is made, called or believed."""

import argparse
import collections
import io
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save

from pipeline.errors import UserError
from tests.helpers.pickled import call, number, text
from train import pickle_machine, torch_files
from train.pickles import read_pickle, torch_bytes
from train.weights import read_file


def written(tmp_path: Path, content: bytes, suffix: str) -> Path:
    path = tmp_path / f"w{suffix}"
    path.write_bytes(content)
    return path


def refusal(tmp_path: Path, content: bytes, suffix: str = ".pkl") -> str:
    """The one line in which the file is refused."""
    path = written(tmp_path, content, suffix)
    with pytest.raises(UserError) as caught:
        read_file(path)
    message = str(caught.value)
    assert message.startswith(str(path)) and message.isprintable() and len(message) < 400
    return message


def saved(content: Any, legacy: bool = False) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


def rezipped(data: bytes, change: Callable[[str, bytes], bytes | None], method: int = 0) -> bytes:
    """A file of torch with other records."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w", method) as new:
        for name in old.namelist():
            new.writestr(name, change(name.partition("/")[2], old.read(name)))
    return buffer.getvalue()


def many_kinds() -> dict[str, Any]:
    base = torch.arange(24, dtype=torch.float32)
    marked = torch.nn.Parameter(torch.ones(2))
    marked.note = "kept by torch, dropped by us"  # type: ignore[attr-defined]
    return {
        "row": base.reshape(4, 6), "column": base.reshape(4, 6).t(), "part": base[3:9],
        "step": base[1::5], "wide": torch.ones(1).expand(5), "empty": torch.ones(0, 3),
        "number": torch.tensor(2.5),
        "images": torch.ones(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "parameter": torch.nn.Parameter(torch.ones(3)), "marked": marked,
        "bool": torch.tensor([True, False]), "complex": torch.ones(2, dtype=torch.complex64),
        **{str(d): torch.ones(3).to(d) for d in (
            torch.float16, torch.bfloat16, torch.float64, torch.uint8, torch.int8, torch.int16,
            torch.int32, torch.int64,
        )},
    }  # fmt: skip


@pytest.mark.parametrize("legacy", [False, True])
def test_tensors_as_torch_reads_them(legacy: bool, tmp_path: Path) -> None:
    """Without it weights that torch reads would be refused, or have other values, shapes, strides,
    or no longer share their memory.
    """
    content = many_kinds() | ({} if legacy else {"u16": torch.ones(3, dtype=torch.uint16)})
    path = written(tmp_path, saved(content, legacy), ".pth")
    expected, found = torch.load(path, weights_only=True), read_pickle(path)
    assert list(found) == list(content)
    for name, value in expected.items():
        assert type(found[name]) is torch.Tensor
        assert not found[name].requires_grad
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name
        assert found[name].stride() == value.stride(), name
    assert found["row"].data_ptr() == found["column"].data_ptr()


@pytest.mark.parametrize("legacy", [False, True])
def test_settings_beside_the_weights(legacy: bool, tmp_path: Path) -> None:
    """Without it the checkpoints of other trainers, which hold such values, would be refused."""
    state = collections.OrderedDict(a=torch.ones(1))
    state._metadata = collections.OrderedDict(a={"version": 1})  # type: ignore[attr-defined]
    args = argparse.Namespace(lr=0.5, size=[1, 2], inner=argparse.Namespace(x=None))
    path = written(tmp_path, saved({
        "model": state, "args": args, "set": {1, 2}, "size": torch.Size([3, 4]),
        "device": torch.device("cpu"), "dtype": torch.float32, "complex": 1 + 2j,
        "counter": collections.Counter({30: 1}), "best": np.float64(0.7), "bytes": b"\xff\x00",
        "curve": np.arange(6, dtype=">i4").reshape(2, 3, order="F"), "big": 1 << 100,
    }, legacy), ".pth")  # fmt: skip
    found = read_pickle(path)
    assert found["model"]["a"].tolist() == [1]
    assert found["args"] == args
    assert found["set"] == {1, 2} and found["counter"] == {30: 1} and found["size"] == (3, 4)
    assert found["best"] == 0.7 and found["complex"] == 1 + 2j and found["bytes"] == b"\xff\x00"
    assert found["curve"].tolist() == [[0, 2, 4], [1, 3, 5]] and found["big"] == 1 << 100
    assert found["device"] == "cpu" and found["dtype"] is torch.float32


def test_storages_that_are_deflated_or_big_endian(tmp_path: Path) -> None:
    """Without it an archive that was packed again, or comes from an s390x, would be misread."""
    content = saved({"a": torch.arange(3.0), "b": torch.tensor([True])})
    again = rezipped(content, lambda _, data: data, zipfile.ZIP_DEFLATED)
    assert read_pickle(written(tmp_path, again, ".pth"))["a"].tolist() == [0, 1, 2]
    floats = np.arange(3, dtype=">f4").tobytes()
    records = {"byteorder": b"big", "data/0": floats}
    swapped = rezipped(content, records.get)
    assert read_pickle(written(tmp_path, swapped, ".pth"))["a"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("module", ["numpy.core", "numpy._core"])
def test_arrays_of_each_protocol_and_numpy(protocol: int, module: str, tmp_path: Path) -> None:
    """Without it detectron2's files would be refused, whose NumPy and Python nobody can choose."""
    arrays = {
        "f": np.arange(6, dtype=np.float32).reshape(2, 3), "zero": np.array(1.5),
        "columns": np.asfortranarray(np.arange(6).reshape(2, 3)), "empty": np.ones((0, 2)),
        "turned": np.arange(24.0).reshape(2, 3, 4).transpose(1, 0, 2),
        "big": np.arange(3, dtype=">f8"),
        "bool": np.array([True, False]), "text": np.array(["ab", "c"]), "bytes": np.array([b"ab"]),
        "half": np.ones(2, np.float16), "complex": np.ones(2, np.complex64), "number": np.int64(3),
    }  # fmt: skip
    data = pickle.dumps(arrays, protocol)
    if protocol < 4:  # before, a name ends with its line: its length is not in the pickle
        data = data.replace(b"numpy._core", module.encode())
    found = read_pickle(written(tmp_path, data, ".pkl"))
    for name, value in arrays.items():
        np.testing.assert_array_equal(found[name], value, strict=isinstance(value, np.ndarray))
        assert name == "number" or found[name].dtype.byteorder == value.dtype.byteorder
        assert name == "number" or found[name].flags.writeable


@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_tensors_that_are_not_dense_are_named(tmp_path: Path) -> None:
    """Without it one quantised or sparse tensor of a file hides which one it is."""
    odd = {
        "sparse": torch.eye(2).to_sparse(), "csr": torch.eye(2).to_sparse_csr(),
        "meta": torch.ones(2, device="meta"), "conjugate": torch.ones(2, dtype=torch.cfloat).conj(),
        "small": torch.ones(2).to(torch.float8_e4m3fn),
    }  # fmt: skip
    for name, value in odd.items():
        path = written(tmp_path, saved({"a": torch.ones(1), name: value}), ".pth")
        content = read_pickle(path)
        assert isinstance(content[name], pickle_machine.NotDense), name
        assert content["a"].tolist() == [1]


FLOAT = text("f4")
DTYPE = call("numpy.dtype", text("f4"))
OBJECT = call("numpy.dtype", text("V8")) + (
    b"(K\x03" + text("|") + b"N(" + text("a") + b"t}" + text("a") + b"(" + DTYPE + b"K\x00ts"
    b"K\x08K\x01K\x00tb"
)
BOMB = b"]q\x00" + b"".join(b"](h%ch%ceq%c" % (i, i, i + 1) for i in range(40))
HOSTILE = {
    "object dtype": (OBJECT, "an array of type V8"),
    "object code": (call("numpy.dtype", text("O8")), "an array of type O8"),
    "structured code": (call("numpy.dtype", text("f4,O")), "an array of type f4,O"),
    "dtype with fields": (
        DTYPE + b"(K\x03" + text("|") + b"N(" + text("a") + b"t}K\x08K\x01K\x00tb", "with parts",
    ),
    "dtype with flags": (DTYPE + b"(K\x03" + text("|") + b"NNNK\x08K\x01K?tb", "with parts"),
    "more than the bytes": (
        call("numpy.ndarray", b"(K\x64K\x64t", text("f4"), text("abcd")), "40,000 bytes in 4",
    ),
    "overflowing shape": (
        call("numpy.ndarray", b"(" + number(2**62) * 2 + b"t", FLOAT, text("")),
        "an impossible shape",
    ),
    "negative shape": (
        call("numpy.ndarray", b"(J" + b"\xff" * 4 + b"J" + b"\xff" * 4 + b"t", FLOAT, text("abcd")),
        "an impossible shape",
    ),
    "a terabyte": (call("builtins.bytearray", b"\x8a\x06" + (10**12).to_bytes(6, "little")), "int"),
    "shared lists": (BOMB, "share containers"),
    "a list that holds itself": (b"]q\x00h\x00a", "or one that holds itself"),
    "deep": (b")" + b"\x85" * 100_000, "more than 100 levels"),
    "deep key": (b"}" + b")" + b"\x85" * 100_000 + b"Ns", "a tuple as a key"),
    "colliding keys": (b"}\x8a\x10" + bytes(15) + b"\x01Ns", "a int as a key"),
    "long integer": (b"\x8b\x00\x10\x00\x00" + b"\x01" * 4096, "more than 1024 bits"),
    "function as a value": (b"cnumpy\ndtype\n", "a method|a function"),
    "call of a value": (b"K\x01)R", "no function"),
    "set of lists": (call("builtins.set", b"](]e"), "a list as a key"),
    "array of a subclass": (
        call("numpy.core.multiarray._reconstruct", b"cbuiltins\nset\n", b"(K\x00t", text("b")),
        "subclass",
    ),
    "build on a list": (b"]}b", "a list with attributes"),
    "another name": (b"cos\nsystem\n", "names os.system"),
    "a name that breaks the line": (b"\x8c\x06a\nb\x1b[2\x8c\x01x\x93", "names 'a"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("suffix", [".pkl", ".pth"])
def test_hostile_pickles(name: str, suffix: str, tmp_path: Path) -> None:
    """Without it a file from the web reads the program's memory, crashes it, or fills it."""
    program, reason = HOSTILE[name]
    data = b"\x80\x02" + program + b"."
    if suffix == ".pth":
        data = rezipped(saved({}), lambda record, old: data if record == "data.pkl" else old)
    message = refusal(tmp_path, data, suffix)
    assert any(part in message for part in reason.split("|")), message


def test_a_memo_far_away_takes_no_memory(tmp_path: Path) -> None:
    """Without it five bytes make Python's own unpickler fill 64 GB."""
    path = written(tmp_path, b"\x80\x02K\x05r\xff\xff\xff\xff.", ".pkl")
    assert read_pickle(path) == 5


def strided(
    shape: tuple[int, ...], strides: tuple[int, ...], offset: int = 0, size: int = 1
) -> bytes:
    """A file whose only tensor claims this of a storage of `size` floats."""
    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu")
    storage += number(size) + b"tQ"
    numbers = [b"(" + b"".join(map(number, each)) + b"t" for each in (shape, strides)]
    program = call(
        "torch._utils._rebuild_tensor_v2", storage, number(offset), *numbers, b"\x89", b"N"
    )
    data = b"\x80\x02}" + text("a") + program + b"s."
    return rezipped(saved([torch.ones(1)]), lambda name, old: data if name == "data.pkl" else old)


@pytest.mark.parametrize(
    ("claim", "reason"),
    [
        (((16 << 30,), (0,)), "65,536 MiB and more, the limit for this file is 64 MiB"),
        (((1 << 40, 1 << 40), (0, 0)), "MiB and more, the limit for this file is"),
        (((2,), (1,)), "larger than its storage"),
        (((1,), (1,), 1), "larger than its storage"),
        (((1,), (1,), -1), "impossible shape"),
        (((2,), (-1,), 1, 2), "impossible shape"),
        (((1,), (1,), 0, 2), "of another size than its record"),
        (((1,), (1,), 0, 2**31 - 1), "MiB and more, the limit for this file is"),
        (((1,) , (1, 1)), "damaged"),
    ],
)  # fmt: skip
def test_tensors_lie_in_their_storages(claim: Any, reason: str, tmp_path: Path) -> None:
    """Without it a tensor reads beyond its memory, or four bytes of a file become 64 GB."""
    assert reason in refusal(tmp_path, strided(*claim), ".pth")


def test_small_expanded_tensors_stay(tmp_path: Path) -> None:
    """Without it the check of sizes refuses torch.ones(1).expand(5)."""
    path = written(tmp_path, strided((5,), (0,)), ".pth")
    assert read_pickle(path)["a"].shape == (5,)


def test_records_that_inflate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it a file of 6 MB that inflates to 6 GB fills the memory before it is refused."""
    monkeypatch.setattr(torch_files, "PICKLE_BYTES", 10_000)
    monkeypatch.setattr(torch_files, "_PIECE", 1000)
    large = {"data.pkl": bytes(10_001)}
    bomb = rezipped(saved({}), large.get, zipfile.ZIP_DEFLATED)
    assert "a record of 10,001 bytes, the limit is 10,000" in refusal(tmp_path, bomb, ".pth")
    monkeypatch.setattr(torch_files, "DIRECTORY_BYTES", 100)
    assert "table of" in refusal(tmp_path, saved({}), ".pth")


def test_a_damaged_record(tmp_path: Path) -> None:
    """Without it, as in torch.load, weights with a damaged byte are used."""
    data = saved({"a": torch.full((1000,), 7.0)})
    at = data.index(struct.pack("<f", 7.0) * 100) + 500
    damaged = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
    assert "damaged" in refusal(tmp_path, damaged, ".pth")


def test_many_tensors_and_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it a file of a million tensors takes minutes before anybody looks at it."""
    monkeypatch.setattr(pickle_machine, "TENSORS", 20)
    monkeypatch.setattr("train.weights.TENSORS", 20)
    tensors = {str(i): torch.ones(1) for i in range(21)}
    for suffix, data in ((".pth", torch_bytes(tensors)), (".pth", saved(tensors, legacy=True))):
        assert "more than 20 tensors" in refusal(tmp_path, data, suffix)
    arrays = {name: value.numpy() for name, value in tensors.items()}
    assert "more than 20 tensors" in refusal(tmp_path, pickle.dumps(arrays))
    assert "21 tensors, the limit is 20" in refusal(tmp_path, save(tensors), ".safetensors")
    monkeypatch.setattr(pickle_machine, "VALUES", 1000)
    data = pickle.dumps(list(range(1100)))
    assert "more than 1,000 operations" in refusal(tmp_path, data)


@pytest.mark.parametrize("length", [16 << 20, 10**8, 2**63, 2**64 - 1])
def test_headers_of_safetensors(length: int, tmp_path: Path) -> None:
    """Without it a length from the file decides how much memory a reader takes."""
    data = struct.pack("<Q", length) + b"{}"
    assert "not a file of weights, or cut short" in refusal(tmp_path, data, ".safetensors")
    if 16 << 20 < length < 1 << 30:
        os.truncate(tmp_path / "w.safetensors", 2 * length)
        with pytest.raises(UserError, match="the limit is 16,777,216"):
            read_file(tmp_path / "w.safetensors")


@pytest.mark.parametrize("suffix", [".pkl", ".pth", ".safetensors", ""])
def test_a_pipe_is_no_file_of_weights(suffix: str, tmp_path: Path) -> None:
    """Without it a command waits for ever for the writer of a pipe."""
    path = tmp_path / f"w{suffix}"
    os.mkfifo(path)
    with pytest.raises(UserError, match=r"w.*: not a regular file"):
        read_file(path)
    with pytest.raises(UserError, match=r"/dev/zero: not a regular file"):
        read_file(Path("/dev/zero"))
    with pytest.raises(UserError, match="Is a directory"):
        read_file(tmp_path)


class Shared:
    """An array that the pickle makes of the same bytes as the others."""

    def __reduce__(self) -> Any:
        return np.ndarray, ((1 << 20,), "|u1", DATA)


DATA = bytes(1 << 20)


def test_bytes_that_are_used_again_and_again(tmp_path: Path) -> None:
    """Without it a file of one megabyte makes gigabytes of arrays."""
    few = written(tmp_path, pickle.dumps([Shared() for _ in range(3)]), ".pkl")
    assert len(read_pickle(few)) == 3
    many = pickle.dumps([Shared() for _ in range(100)])
    assert "the limit for this file is 84 MiB" in refusal(tmp_path, many)
