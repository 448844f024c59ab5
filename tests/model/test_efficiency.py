"""Settings that make a step cheaper must not change its results."""

import copy
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from model import SlotCon, prepare
from model.efficiency import Fallback
from tests.helpers.tiny_slotcon import tiny_batch, tiny_model
from train.config import EfficiencyConfig


def step(model: SlotCon) -> dict[str, Tensor]:
    """Loss, gradients and state after one forward and backward pass."""
    output = model(*tiny_batch(side=64))
    output.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": output.loss.detach(), **gradients, **model.state_dict(prefix="state.")}


@pytest.mark.parametrize("synchronised", [False, True])
def test_checkpointing_changes_no_bit(synchronised: bool) -> None:
    """The recomputation must not count a batch in the running statistics a second time, nor take
    away the counter that SyncBatchNorm, the layer on several GPUs, insists on.
    """
    plain, prepared = tiny_model(), tiny_model()
    if synchronised:
        prepared = torch.nn.SyncBatchNorm.convert_sync_batchnorm(prepared)
    prepare(prepared, checkpointing=True)
    expected, actual = step(plain), step(prepared)
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], value) for name, value in expected.items())


def test_checkpointing_keeps_less() -> None:
    """Without this, checkpointing would cost time and save no memory."""

    def kept(model: SlotCon) -> int:
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            stages = list(model.student.encoder.children())[4:]  # without the stem
            torch.nn.Sequential(*stages)(torch.randn(2, 64, 16, 16))
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        return sum(size for at, size in sizes.items() if at not in weights)

    prepared = tiny_model()
    prepare(prepared, checkpointing=True)
    assert kept(prepared) < 0.5 * kept(tiny_model())


def test_encoders_and_projectors_are_compiled() -> None:
    """Two encoders and two projectors are compiled; names and results do not change. The compiler
    is a stub here, because tracing takes long."""
    calls: list[Any] = []

    def compiler(forward: Any, dynamic: bool) -> Any:
        assert not dynamic

        def compiled(*inputs: Any) -> Any:
            calls.append(forward.__self__)
            return forward(*inputs)

        return compiled

    plain, prepared = tiny_model(), tiny_model()
    with patch("torch.compile", compiler):
        prepare(prepared, compile=True)
    expected, actual = step(plain), step(prepared)
    parts = [part for branch in (prepared.student, prepared.teacher) for part in branch.children()]
    assert set(calls) == {part for part in parts if isinstance(part, torch.nn.Sequential)}
    assert len(calls) == 8
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], value) for name, value in expected.items())


def test_checkpointing_keeps_on_averaging_statistics() -> None:
    """The second step would show a momentum that was not restored after the recomputation."""
    plain, prepared = tiny_model(), tiny_model()
    prepare(prepared, checkpointing=True)
    for _ in range(2):
        expected, actual = step(plain), step(prepared)
    assert all(torch.equal(actual[name], value) for name, value in expected.items())


@pytest.mark.parametrize("works", [True, False])
def test_failing_compiler_is_one_warning(works: bool) -> None:
    """On a machine without a compiler for inductor, training must continue and warn once."""
    graphs: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        if not works:
            raise OSError("no such file: g++\nand a page of other things")
        graphs.append(graph)
        return graph

    plain = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4))
    compiled = copy.deepcopy(plain)
    warnings: list[str] = []
    with patch("torch.compile", partial(torch.compile, backend=backend)):
        forward = Fallback(warnings.append).compile(compiled.forward)
    for side in (2, 2, 3):
        images = torch.randn(5, 3, side, side)
        plain(images).square().sum().backward()
        forward(images).square().sum().backward()
    for ours, theirs in zip(compiled.parameters(), plain.parameters(), strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        assert torch.equal(ours.grad, theirs.grad)
    for mine, expected in zip(compiled.buffers(), plain.buffers(), strict=True):
        assert torch.equal(mine, expected)
    assert len(graphs) == (2 if works else 0)  # one for each size
    assert len(warnings) == (0 if works else 1)
    assert all("no such file: g++" in text and "\n" not in text for text in warnings)


def test_prepared_models_can_be_copied() -> None:
    """A copy whose blocks still used the original's weights would train neither model."""
    model = tiny_model()
    prepare(model, checkpointing=True)
    duplicate = copy.deepcopy(model)
    step(duplicate)
    for original, copied in zip(model.parameters(), duplicate.parameters(), strict=True):
        assert original.grad is None
        assert (copied.grad is not None) == copied.requires_grad


@pytest.mark.parametrize(
    ("setting", "device", "static"),
    [
        ("auto", "cuda", True),
        ("auto", "cpu", False),
        ("static", "cpu", True),
        ("exact", "cuda", False),
    ],
)
def test_selection_by_device(setting: Any, device: str, static: bool) -> None:
    """On a GPU the host must not wait. On a CPU waiting is free, and exact counts save work."""
    assert EfficiencyConfig(slot_selection=setting).selects_statically(device) == static
