"""Backbones are read from every file that holds one; all other files are refused."""

import argparse
import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from model import ModelConfig, SlotCon
from model.names import arch_of, archs_of, from_detectron2, stages_of, to_detectron2
from pipeline.errors import UserError
from tests.helpers.checkpoints import write_checkpoint
from tests.helpers.exported import CONFIG, meta_state
from train.pickles import pickle_arrays, read_pickle
from train.published import published_weights
from train.weights import read_backbone, read_weights

BLOCKS = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3), "resnet50": (3, 4, 6, 3)}


def same(found: dict[str, Tensor], expected: dict[str, Tensor], *, counts: bool = True) -> bool:
    """Equal names, order and bits; without `counts`, BatchNorm's counts may differ."""
    return list(found) == list(expected) and all(
        torch.equal(found[name], value) and found[name].dtype == value.dtype
        for name, value in expected.items()
        if counts or not name.endswith("num_batches_tracked")
    )


def under(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in state.items()}


def detectron2_resnet(arch: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of detectron2's build_resnet_backbone, from its classes: BasicStem has one
    convolution, a block two (BasicBlock) or three (BottleneckBlock) and a shortcut where the
    number of channels changes; each convolution holds its norm.
    """
    entries: dict[str, tuple[int, ...]] = {}

    def convolution(name: str, into: int, out: int, kernel: int) -> None:
        entries[f"{name}.weight"] = (out, into, kernel, kernel)
        for part in ("weight", "bias", "running_mean", "running_var"):
            entries[f"{name}.norm.{part}"] = (out,)

    convolution("stem.conv1", 3, 64, 7)
    basic = arch in ("resnet18", "resnet34")
    into, out, inner = 64, 64 if basic else 256, 64
    for stage, blocks in enumerate(BLOCKS[arch], 2):
        for number in range(blocks):
            block = f"res{stage}.{number}"
            if into != out:
                convolution(f"{block}.shortcut", into, out, 1)
            if basic:
                convolution(f"{block}.conv1", into, out, 3)
                convolution(f"{block}.conv2", out, out, 3)
            else:
                convolution(f"{block}.conv1", into, inner, 1)
                convolution(f"{block}.conv2", inner, inner, 3)
                convolution(f"{block}.conv3", inner, out, 1)
            into = out
        out, inner = out * 2, inner * 2
    return entries


@pytest.mark.parametrize("arch", BLOCKS)
def test_detectron2_names(arch: str) -> None:
    """detectron2 skips weights of unknown names, with only a line in its log: a detector would
    start from a half-random backbone.
    """
    state = meta_state(arch)
    theirs = to_detectron2(state)
    assert {name: tuple(value.shape) for name, value in theirs.items()} == detectron2_resnet(arch)
    back = from_detectron2(theirs)
    expected = {name: v for name, v in state.items() if not name.endswith("num_batches_tracked")}
    assert list(back) == list(expected)
    assert all(back[name] is expected[name] for name in expected)


def test_detectron2_names_that_are_documented() -> None:
    """Copied by hand from detectron2's tutorials and from files of its model zoo."""
    names = {
        "conv1.weight": "stem.conv1.weight",
        "bn1.running_var": "stem.conv1.norm.running_var",
        "layer1.0.conv1.weight": "res2.0.conv1.weight",
        "layer1.0.bn1.running_mean": "res2.0.conv1.norm.running_mean",
        "layer4.2.bn3.bias": "res5.2.conv3.norm.bias",
        "layer2.0.downsample.0.weight": "res3.0.shortcut.weight",
        "layer2.0.downsample.1.weight": "res3.0.shortcut.norm.weight",
    }
    ours = {name: torch.ones(1) for name in names}
    assert list(to_detectron2(ours)) == list(names.values())


@pytest.mark.parametrize("arch", ["resnet18", "resnet34", "resnet50", "resnet101"])
def test_the_weights_name_their_architecture(arch: str) -> None:
    """The import, and the message for a wrong architecture, depend on it."""
    assert arch_of(meta_state(arch)) == arch
    assert arch_of(name for name in meta_state(arch) if not name.startswith("layer3.1.")) is None


@pytest.mark.parametrize("arch", ["resnet18", "resnet34", "resnet50", "resnet101"])
def test_the_first_stages_name_their_architectures(arch: str) -> None:
    """Without it a run that ends early cannot be read, or a ResNet-101 passes for a ResNet-50."""
    names = [name for name in meta_state(arch) if not name.startswith(("layer3.", "layer4."))]
    alike = {"resnet50", "resnet101"}
    assert set(archs_of(names)) == (alike if arch in alike else {arch})
    assert (stages_of(names), stages_of(meta_state(arch))) == (2, 4)
    assert not archs_of(name for name in names if not name.startswith("layer2.1."))


def test_an_encoder_that_ends_early(tmp_path: Path) -> None:
    """Without it detection begins with random stages that pass for pre-trained ones."""
    config = ModelConfig("resnet50", 4, 4, 4, stages=2)
    model = SlotCon(config)
    checkpoint = write_checkpoint(tmp_path / "checkpoint", model, config)
    with pytest.raises(UserError, match=r"a resnet50 that ends at stage 2; all four are needed"):
        read_backbone(checkpoint, "resnet50")
    found = read_backbone(checkpoint, partial=True)
    assert (found.arch, found.stages, found.metadata["stages"]) == ("resnet50", 2, "2")
    assert same(found.weights, dict(model.teacher.encoder.state_dict()))
    with pytest.raises(UserError, match="weights of a resnet50, not of the resnet18"):
        read_backbone(checkpoint, "resnet18", partial=True)
    torch.save(found.weights, tmp_path / "w.pth")  # without metadata
    with pytest.raises(UserError, match="first stages of a resnet50 or resnet101, and it does not"):
        read_backbone(tmp_path / "w.pth", partial=True)
    assert read_backbone(tmp_path / "w.pth", "resnet50", partial=True).stages == 2


def test_runs_and_their_files(model: SlotCon, tmp_path: Path) -> None:
    """A run gives the requested encoder, and its metadata say how it was made."""
    checkpoint = write_checkpoint(tmp_path / "checkpoint", model, CONFIG)
    teacher = read_backbone(checkpoint)
    assert same(teacher.weights, dict(model.teacher.encoder.state_dict()))
    assert teacher.metadata["branch"] == "teacher"
    assert teacher.metadata["prototypes"] == "4"
    assert teacher.metadata["optimizer"] == "lars"
    assert json.loads(teacher.metadata["config"])["train"]["base_lr"] == 1.0
    student = read_backbone(checkpoint, branch="student")
    assert same(student.weights, dict(model.student.encoder.state_dict()))
    assert student.metadata["branch"] == "student"
    file = read_backbone(checkpoint / "model.safetensors", "resnet18", "student")
    assert same(file.weights, student.weights) and file.metadata == student.metadata
    with pytest.raises(UserError, match=r"checkpoint: weights of a resnet18, not of the resnet50"):
        read_backbone(checkpoint, "resnet50")


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state | {"fc.weight": torch.ones(5, 512), "fc.bias": torch.ones(5)},
        lambda state: {"state_dict": under("module.encoder_q.", state), "epoch": 200},
        lambda state: {"state_dict": under("module.base_encoder.", state), "arch": "resnet18"},
        lambda state: {"model": under("module.encoder_k.", state)},
        lambda state: under("encoder_k.", state),
        lambda state: {"state_dict": under("backbone.", state), "meta": {"epoch": 3}},
        lambda state: {"teacher": under("module.backbone.", state)},
    ],
    ids=["torchvision", "moco", "mocov3", "official", "bare", "mmseg", "dino"],
)
def test_files_of_others(wrap: Any, encoder: dict[str, Tensor], tmp_path: Path) -> None:
    """Each library wraps the same ResNet in a different way."""
    torch.save(wrap(encoder), tmp_path / "w.pth")
    assert same(read_backbone(tmp_path / "w.pth", "resnet18").weights, encoder)


@pytest.mark.parametrize(
    "prefixes",
    [("encoder_k.", "encoder_q."), ("encoder_k.", "encoder."), ("encoder_k.0.", "encoder_q.0.")],
)
def test_of_two_encoders_the_branch_decides(
    prefixes: tuple[str, str], model: SlotCon, tmp_path: Path
) -> None:
    """The wrong encoder would silently cost a point or two."""
    teacher, student = (dict(b.encoder.state_dict()) for b in (model.teacher, model.student))
    both = under(f"module.{prefixes[0]}", teacher) | under(f"module.{prefixes[1]}", student)
    if prefixes[0] == "encoder_k.0.":  # files of DenseCL hold the student twice
        both |= under("backbone.", student)
    torch.save({"model": both}, tmp_path / "w.pth")
    for branch, expected in (("teacher", teacher), ("student", student)):
        found = read_backbone(tmp_path / "w.pth", branch=branch)  # type: ignore[arg-type]
        assert same(found.weights, expected)
        prefix = f"model.module.{prefixes[branch == 'student']}"
        assert found.metadata == {"branch": branch, "prefix": prefix}


def test_files_without_counts(encoder: dict[str, Tensor], tmp_path: Path) -> None:
    """torchvision's oldest files and those of detectron2 have no num_batches_tracked."""
    less = {name: v for name, v in encoder.items() if not name.endswith("num_batches_tracked")}
    save_file(less, tmp_path / "w.safetensors", {"arch": "resnet18"})
    found = read_backbone(tmp_path / "w.safetensors", "resnet18")
    assert same(found.weights, encoder, counts=False)
    assert found.weights["bn1.num_batches_tracked"] == 0
    assert found.metadata == {"arch": "resnet18"}


def test_a_file_of_the_teacher_is_not_the_student(
    encoder: dict[str, Tensor], tmp_path: Path
) -> None:
    """But a file of the student is accepted if the branch is left at its default."""
    file = tmp_path / "w.safetensors"
    save_file(encoder, file, {"arch": "resnet18", "branch": "teacher", "of a later version": "x"})
    with pytest.raises(UserError, match="of the teacher, not of the student"):
        read_backbone(file, branch="student")
    save_file(encoder, file, {"arch": "resnet18", "branch": "student"})
    assert read_backbone(file).metadata["branch"] == "student"
    save_file(under("encoder_q.", encoder), file, {"arch": "resnet18", "branch": "teacher"})
    assert read_backbone(file).metadata["branch"] == "student"  # names decide, not metadata


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: under("encoder_k.", state),
        lambda state: {"state_dict": under("module.momentum_encoder.", state)},
        lambda state: {"teacher": under("module.backbone.", state)},
    ],
    ids=["official", "mocov3", "dino"],
)
def test_names_say_which_encoder_it_is(
    wrap: Any, encoder: dict[str, Tensor], tmp_path: Path
) -> None:
    """If the names say so, a teacher is not taken for a student, and tables name the right one."""
    torch.save(wrap(encoder), tmp_path / "w.pth")
    assert read_backbone(tmp_path / "w.pth").metadata["branch"] == "teacher"
    with pytest.raises(UserError, match="of the teacher, not of the student"):
        read_backbone(tmp_path / "w.pth", branch="student")


def test_both_of_dino(model: SlotCon, tmp_path: Path) -> None:
    """DINO's files hold two state dicts with equal names; only the keys above tell them apart."""
    both = {
        side: dict(getattr(model, side).encoder.state_dict()) for side in ("teacher", "student")
    }
    torch.save(both, tmp_path / "w.pth")
    for branch in ("teacher", "student"):
        found = read_backbone(tmp_path / "w.pth", branch=branch)  # type: ignore[arg-type]
        assert same(found.weights, both[branch])
        assert found.metadata == {"branch": branch, "prefix": f"{branch}."}


def test_metadata_of_others_are_dropped(encoder: dict[str, Tensor], tmp_path: Path) -> None:
    """mmcv writes its environment, and Python source under `config`, a name that we use for JSON.
    Every exported file would contain them, and a table would fail to read the JSON.
    """
    theirs = {"config": "model = dict(pretrained='mine')", "env_info": "x", "epoch": 200}
    torch.save({"state_dict": encoder, "meta": theirs}, tmp_path / "w.pth")
    assert read_backbone(tmp_path / "w.pth").metadata == {"prefix": "state_dict."}
    save_file(encoder, tmp_path / "w.safetensors", {"format": "pt", "author": "x"})
    assert read_backbone(tmp_path / "w.safetensors").metadata == {}


def test_tensors_are_like_those_of_a_new_network(
    encoder: dict[str, Tensor], tmp_path: Path
) -> None:
    """In float32, contiguous, each with its own memory, without gradients."""
    weight, bias = torch.cat([encoder["bn1.weight"], encoder["bn1.bias"]]).split(64)
    odd: dict[str, Tensor] = encoder | {
        "bn1.weight": weight,
        "bn1.bias": bias,
        "conv1.weight": encoder["conv1.weight"].contiguous(memory_format=torch.channels_last),
        "layer1.0.bn1.bias": torch.nn.Parameter(encoder["layer1.0.bn1.bias"]),
        "layer1.0.bn2.bias": encoder["layer1.0.bn2.bias"].bfloat16(),
        "layer1.1.bn1.bias": encoder["layer1.1.bn1.bias"].double(),
        "layer1.1.bn2.bias": encoder["layer1.0.bn1.bias"],
        "bn1.num_batches_tracked": encoder["bn1.num_batches_tracked"].int(),
    }
    torch.save(odd, tmp_path / "w.pth")
    found = read_backbone(tmp_path / "w.pth").weights
    assert same(found, {name: value.to(encoder[name].dtype) for name, value in odd.items()})
    assert not any(value.requires_grad for value in found.values())
    save_file(found, tmp_path / "w.safetensors")  # refuses strides and shared memory


def test_numpy_values_are_plain_values(encoder: dict[str, Tensor], tmp_path: Path) -> None:
    """The best accuracy in a published checkpoint is often a NumPy number."""
    extras = {"best": np.float64(0.7), "epoch": np.int64(3), "curve": np.ones(3, np.float32)}
    torch.save({"state_dict": encoder} | extras, tmp_path / "w.pth")
    assert same(read_backbone(tmp_path / "w.pth").weights, encoder)
    array = np.arange(3, dtype=">f4")[::-1]
    (tmp_path / "w.pkl").write_bytes(pickle.dumps({"model": {"a": array}} | extras))
    assert read_weights(tmp_path / "w.pkl", ["a"])[0]["a"].tolist() == [2, 1, 0]
    assert read_pickle(tmp_path / "w.pkl")["best"] == 0.7


def test_detectron2_files(encoder: dict[str, Tensor], tmp_path: Path) -> None:
    """The authors' script uses NumPy's own pickling in any protocol, and also writes counts."""
    arrays = {name: value.numpy() for name, value in to_detectron2(encoder).items()}
    counts = {
        k.replace("bn1", "conv1.norm"): v.numpy() for k, v in encoder.items() if "k.bn1.n" in k
    }
    content = {"model": arrays | counts, "__author__": "x", "matching_heuristics": True}
    for protocol in (2, 5):
        (tmp_path / "w.pkl").write_bytes(pickle.dumps(content, protocol))
        found = read_backbone(tmp_path / "w.pkl", "resnet18").weights
        assert same(found, encoder, counts=False)
    full = {f"backbone.bottom_up.{name}": v for name, v in arrays.items()}
    (tmp_path / "w.pkl").write_bytes(pickle.dumps({"model": full | {"roi_heads.x": np.ones(2)}}))
    assert same(read_backbone(tmp_path / "w.pkl").weights, encoder, counts=False)


def test_arrays_are_pickled_for_any_numpy(tmp_path: Path) -> None:
    """detectron2 often runs with NumPy 1, which lacks the module names that NumPy 2 pickles."""
    content = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.array(1.5), "c": True}
    data = pickle_arrays(content)
    assert b"_core" not in data
    assert b"multiarray" not in data
    (tmp_path / "w.pkl").write_bytes(data)
    for found in (pickle.loads(data), read_pickle(tmp_path / "w.pkl")):
        assert found["a"].flags.writeable
        assert found["a"].dtype == np.float32
        np.testing.assert_array_equal(found["a"], content["a"])
        assert found["b"].shape == ()
        assert found["c"] is True


class Touch:
    """Its pickle executes a command when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("suffix", ["pth", "pkl"])
def test_no_code_is_executed(suffix: str, encoder: dict[str, Tensor], tmp_path: Path) -> None:
    """A file of weights from the web must not be able to execute code."""
    file, trace = tmp_path / f"w.{suffix}", tmp_path / "trace"
    content = {"model": encoder, "args": Touch(trace)}
    if suffix == "pth":
        torch.save(content, file)
    else:
        file.write_bytes(pickle.dumps({"model": {}, "args": Touch(trace)}))
    with pytest.raises(UserError, match=r"refused.*names posix.system") as caught:
        read_backbone(file, "resnet18")
    assert "\n" not in str(caught.value)
    assert not trace.exists()
    torch.save({"model": encoder, "args": argparse.Namespace(lr=1.0)}, tmp_path / "fine.pth")
    assert same(read_backbone(tmp_path / "fine.pth").weights, encoder)


def test_bad_files(encoder: dict[str, Tensor], tmp_path: Path) -> None:
    """Each error is one line that names the file and the problem."""
    file = tmp_path / "w.pth"

    def refused(message: str, path: Path = file, arch: str | None = "resnet18") -> None:
        with pytest.raises(UserError, match=message) as caught:
            read_backbone(path, arch)
        assert "\n" not in str(caught.value)
        assert str(path) in str(caught.value)

    refused("No such file", tmp_path / "nowhere.pth")
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "config.json").write_text("{}")
    refused("hub/model.safetensors: No such file or directory$", tmp_path / "hub")
    refused("no such checkpoint or run|holds no whole checkpoint", tmp_path)
    torch.save(encoder, file)
    refused("weights of a resnet18, not of the resnet50", arch="resnet50")
    file.write_bytes(file.read_bytes()[:-100_000])
    refused("damaged, or not a file of weights")
    torch.save({"model": {"weight": torch.ones(2)}}, file)
    refused("no weights of a ResNet in it; its names begin with 'model'$")
    torch.save({"model": {"conv1.weight": "text"}}, file)
    refused("no weights in it")
    torch.save({k: v for k, v in encoder.items() if k != "layer2.0.bn1.bias"}, file)
    refused("not a resnet18 .it lacks layer2.0.bn1.bias")
    torch.save({k: v for k, v in encoder.items() if "layer3.1" not in k}, file)
    refused("damaged, or not one of torchvision's ResNets", arch=None)
    torch.save(encoder | {"bn1.bias": torch.full((64,), torch.nan)}, file)
    refused("bn1.bias is not finite")
    large = encoder["bn1.bias"].double() + 1e300
    torch.save(encoder | {"bn1.bias": large}, file)
    refused("bn1.bias is not finite")
    weight = encoder["conv1.weight"]
    for odd in (weight.to_sparse(), weight.to("meta"), weight.to(torch.complex64)):
        torch.save(encoder | {"conv1.weight": odd}, file)
        refused("conv1.weight is not a dense tensor of real numbers")
    save_file(encoder, tmp_path / "w.safetensors")
    whole = (tmp_path / "w.safetensors").read_bytes()
    (tmp_path / "w.safetensors").write_bytes(whole[:-100_000])
    refused("damaged, or not a file of weights", tmp_path / "w.safetensors")
    (tmp_path / "w.pkl").write_bytes(pickle.dumps({"model": {"conv1": np.ones(3)}})[:-5])
    refused("damaged, or not a file of weights", tmp_path / "w.pkl")
    torch.save({"bias": torch.ones(1)}, tmp_path / "w.pkl")
    refused("in the format of .pkl", tmp_path / "w.pkl")
    objects, texts = np.array([1, "a"], dtype=object), np.array(["a"] * 64)
    for array, reason in ((objects, "an array of type O8"), (texts, "no weights in it")):
        (tmp_path / "w.pkl").write_bytes(pickle.dumps({"model": {"stem.conv1.weight": array}}))
        refused(reason, tmp_path / "w.pkl")


def test_published_weights_are_a_backbone(
    encoder: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchvision's files also hold a classifier, and some lack BatchNorm's counts."""
    state = {k: v for k, v in encoder.items() if not k.endswith("num_batches_tracked")}
    monkeypatch.setattr(
        "torchvision.models._api.load_state_dict_from_url",
        lambda *_, **__: state | {"fc.weight": torch.ones(1000, 512), "fc.bias": torch.ones(1000)},
    )
    assert same(published_weights("resnet18"), encoder, counts=False)


def test_published_weights_are_the_usual_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision's newer weights are four points better on ImageNet; papers do not use them."""

    def offline(url: str, **_: object) -> None:
        raise OSError(f"no network for {url}")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    with pytest.raises(UserError, match=r"resnet50-0676ba61\.pth cannot be downloaded"):
        published_weights("resnet50")
