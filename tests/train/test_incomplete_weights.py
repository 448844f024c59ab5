"""Files whose weights are not whole or not sound: refused by every reader, and told apart."""

import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import train.encoders
import train.weights
from model import ModelConfig, SlotCon
from model.encoder import Encoder
from model.timm_encoder import TimmEncoder, create
from pipeline.errors import UserError
from train.encoders import read_encoder
from train.init_config import InitConfig
from train.published import published
from train.run.sound import STATISTICS
from train.start import start_from
from train.weights import read_file

ARCHS = ("resnet18", "timm:test_efficientnet")


@pytest.fixture(scope="module", params=ARCHS)
def network(request: pytest.FixtureRequest) -> tuple[str, dict[str, Tensor]]:
    torch.manual_seed(0)
    arch: str = request.param
    net: Any = TimmEncoder(arch).net if ":" in arch else Encoder(arch)
    return arch, net.state_dict()


def model_of(arch: str) -> SlotCon:
    return SlotCon(ModelConfig(arch, dim_hidden=8, dim_out=8, num_prototypes=4))


FAULTS: dict[str, tuple[Any, str]] = {
    "negative": (lambda n, v: -v if n.endswith("running_var") else v, "running_var is negative"),
    "infinite": (lambda n, v: v / 0 if n.endswith("_var") else v, "running_var is not finite"),
    "not a number": (lambda n, v: v / 0 if n.endswith("_mean") else v, "_mean is not finite"),
    "no statistics": (
        lambda n, v: None if n.endswith(STATISTICS) else v,
        r"it lacks running statistics of BatchNorm, as \S*bn1\.running_mean",
    ),
    "nor counts": (
        lambda n, v: None if n.endswith((*STATISTICS, "tracked")) else v,
        r"it lacks running statistics of BatchNorm, as \S*bn1\.running_mean",
    ),
}


@pytest.mark.parametrize(("changed", "message"), FAULTS.values(), ids=FAULTS)
def test_statistics_that_cannot_be(
    network: tuple[str, dict[str, Tensor]], changed: Any, message: str, tmp_path: Path
) -> None:
    """Without it the root of a negative variance makes every feature NaN in the first step, or a
    file without statistics is called one of another model."""
    arch, state = network
    torch.save({n: w for n, v in state.items() if (w := changed(n, v)) is not None}, tmp_path / "w")
    with pytest.raises(UserError, match=message):
        read_encoder(tmp_path / "w", arch)
    with pytest.raises(UserError, match=message):
        start_from(InitConfig(str(tmp_path / "w")), model_of(arch))


def test_negative_variances_of_a_whole_model(tmp_path: Path) -> None:
    """The same for projectors. Without it only encoders are looked at."""
    state = model_of("resnet18").state_dict()
    state["student.projector.1.running_var"] -= 2
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=r"student\.projector\.1\.running_var is negative"):
        start_from(InitConfig(str(tmp_path / "w.safetensors"), "all"), model_of("resnet18"))


def test_what_lacks_is_named(network: tuple[str, dict[str, Tensor]], tmp_path: Path) -> None:
    """The longest names too, by which a network is found in a file. Without it a file that lacks
    one tensor, or has one too many, is said to be of another model."""
    arch, state = network
    convolutions = [name for name, value in state.items() if value.ndim == 4]
    for lacking in (convolutions[4:5], [max(convolutions, key=len)], convolutions[-2:]):
        torch.save({n: v for n, v in state.items() if n not in lacking}, tmp_path / "w")
        more = r" and 1 more" if len(lacking) > 1 else ""
        with pytest.raises(UserError, match=rf"it lacks {lacking[0]}{more}, of \d+ tensors"):
            read_encoder(tmp_path / "w", arch)
    extra = convolutions[0].replace("weight", "kernel")
    torch.save(state | {extra: torch.ones(1)}, tmp_path / "w")
    with pytest.raises(UserError, match=rf"{extra} is unknown"):
        read_encoder(tmp_path / "w", arch)


def test_parts_that_are_not_used(tmp_path: Path) -> None:
    """The largest parts of which nothing is used. Without it `head.mlp` is said to be left out
    where `head` is, or `net` where a part of it is."""
    state = {f"net.{name}": value for name, value in Encoder("resnet18").state_dict().items()}
    others = ("net.fc.weight", "net.neck.mlp.fc.bias", "head.mlp.fc.0.bias", "head.b", "scale")
    torch.save(state | {name: torch.ones(1) for name in others}, tmp_path / "w")
    about = start_from(InitConfig(str(tmp_path / "w")), model_of("resnet18"))
    assert about["unused"] == ["net.fc", "net.neck", "head", "scale"]


def test_a_file_is_read_once(
    network: tuple[str, dict[str, Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without it large files are read twice, once for their metadata alone."""
    arch, state = network
    save_file({n: v.contiguous() for n, v in state.items()}, tmp_path / "w.safetensors")
    read = list[Path]()

    def counted(path: Path) -> Any:
        read.append(path)
        return read_file(path)

    for module in (train.encoders, train.weights):
        monkeypatch.setattr(module, "read_file", counted)
    assert read_encoder(tmp_path / "w.safetensors", arch).weights.keys() == state.keys()
    assert read == [tmp_path / "w.safetensors"]


@pytest.mark.parametrize("answers", [True, False], ids=["network", "no network"])
def test_without_a_network_a_download_fails_at_once(
    answers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without it the hub's client asks again for a minute before the one line, also where only
    exceptions from a proxy or one for another scheme are set. With a network, or a proxy that may
    have one, nothing is forbidden."""
    timm = pytest.importorskip("timm")
    constants = pytest.importorskip("huggingface_hub").constants
    seen = list[bool]()

    def look_up(*_: object) -> list[int]:
        if not answers:
            raise socket.gaierror("name not known")
        return [1]

    def asked(name: str, pretrained: bool = False, **_: object) -> Any:
        seen.append(constants.HF_HUB_OFFLINE)
        raise OSError(f"no {name}, {pretrained}")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("socket.getaddrinfo", look_up)
    monkeypatch.setattr(timm, "create_model", asked)
    useless = {"no": "localhost", "ftp": "somewhere"}
    for arch, proxies in zip(ARCHS, ({}, useless), strict=True):
        monkeypatch.setattr("model.hub.getproxies", lambda proxies=proxies: proxies)
        with pytest.raises(UserError, match=r"no \w+, True"):
            published("timm", arch)
    monkeypatch.setattr("model.hub.getproxies", lambda: {"https": "somewhere"})
    with pytest.raises(ValueError, match="no resnet18, True"):
        create("resnet18", pretrained=True)
    assert seen == [not answers, not answers, False] and constants.HF_HUB_OFFLINE is False
