"""A ResNet is found by its own names, below any prefix; of several, a rule says which is taken."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from model import SlotCon
from pipeline.errors import UserError
from tests.train.test_weights import same, under
from train.weights import read_backbone, read_file, read_weights, tensors_in


def nested(path: str, value: Any) -> Any:
    """`value` in dictionaries with these keys."""
    for key in reversed(path.split("/")):
        value = {key: value} if key else value
    return value


@pytest.mark.parametrize(
    ("keys", "prefix"),
    [
        ("", "_orig_mod."),
        ("model", "module._orig_mod."),
        ("state_dict", "model."),
        ("net", ""),
        ("model_state_dict", ""),
        ("state_dict", "net.model.encoder."),
        ("classy_state_dict/base_model/model/trunk", "_feature_blocks."),
        ("a/b/c", "d.e.f."),
        ("model", "backbone.body."),
        ("state_dict", "model.base_encoder.0."),
    ],
)
def test_any_prefix(keys: str, prefix: str, encoder: dict[str, Tensor], tmp_path: Path) -> None:
    """Without it each new framework's wrapper is refused, though a ResNet's own names show it."""
    head = {f"{prefix}projector.0.weight": torch.ones(2), "mean": torch.ones(3)}
    content = nested(keys, under(prefix, encoder) | head) | {"epoch": 3, "optimizer": {"state": {}}}
    torch.save(content, tmp_path / "w.pth")
    found = read_backbone(tmp_path / "w.pth")
    assert same(found.weights, encoder)
    taken = "".join(f"{key}." for key in keys.split("/") if key) + prefix
    assert found.metadata.get("prefix", "") == taken


def children(name: str) -> str:
    """The name in nn.Sequential of a ResNet's children: conv1, bn1, relu, maxpool, layer1 …"""
    first, _, rest = name.partition(".")
    places = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4")
    return f"{places.index(first)}.{rest}"


def transformers(name: str) -> str:
    """The name in ResNetModel of Hugging Face's transformers, from its classes."""
    parts = name.split(".")
    kind = {"c": "convolution", "b": "normalization"}
    if len(parts) == 2:
        return f"embedder.embedder.{kind[name[0]]}.{parts[1]}"
    block = f"encoder.stages.{int(parts[0][-1]) - 1}.layers.{parts[1]}"
    if parts[2] == "downsample":
        return f"{block}.shortcut.{kind['cb'[int(parts[3])]]}.{parts[4]}"
    return f"{block}.layer.{int(parts[2][-1]) - 1}.{kind[parts[2][0]]}.{parts[3]}"


@pytest.mark.parametrize("rename", [children, transformers])
@pytest.mark.parametrize("prefix", ["", "backbone.", "state_dict.resnet."])
def test_other_names(rename: Any, prefix: str, encoder: dict[str, Tensor], tmp_path: Path) -> None:
    """Lightly's files and those of transformers hold the same ResNet under names of their own."""
    state = {prefix + rename(name): value for name, value in encoder.items()}
    torch.save(state | {f"{prefix}head.0.weight": torch.ones(2)}, tmp_path / "w.pth")
    assert same(read_backbone(tmp_path / "w.pth").weights, encoder)


@pytest.mark.parametrize(
    ("teacher", "student"),
    [
        ("state_dict.backbone_momentum.", "state_dict.backbone."),
        ("state_dict.momentum_backbone.", "state_dict.backbone."),
        ("state_dict_ema.", "state_dict."),
        ("model_ema.module.", "model."),
        ("state_dict.target_encoder.net.", "state_dict.online_encoder.net."),
        ("target_net.module.0.", "online_net.0."),
        ("encoder_k.module.0.", "backbone."),
        ("teacher.backbone.", "student.module.backbone."),
        ("momentum_encoder.", "base_encoder."),
        ("key_encoder.", "query_encoder."),
    ],
)
def test_which_of_two_networks(teacher: str, student: str, model: SlotCon, tmp_path: Path) -> None:
    """The names of lightly, solo-learn, timm, torchvision, BYOL, mmpretrain, DINO and MoCo v3. The
    wrong network costs points, and nothing would show it.
    """
    sides = {"teacher": (teacher, model.teacher), "student": (student, model.student)}
    states = {p: dict(side.encoder.state_dict()) for p, side in sides.values()}
    both = {k: v for prefix, state in states.items() for k, v in under(prefix, state).items()}
    again = under("alias.", states[student])  # BYOL's and DenseCL's student has two names
    for content in (both, both | again):
        torch.save(content, tmp_path / "w.pth")
        for branch, (prefix, _) in sides.items():
            found = read_backbone(tmp_path / "w.pth", branch=branch)  # type: ignore[arg-type]
            assert same(found.weights, states[prefix])
            assert found.metadata == {"branch": branch, "prefix": prefix}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("rgb.", "depth."),
        ("", "second."),
        ("target_encoder.", "depth_net."),
        ("teacher_1.", "teacher_2."),
        ("left.encoder_k.", "right.encoder_k."),
        ("student.", "backbone."),
        ("model_ema.student.", "model.student."),
    ],
)
def test_two_networks_that_no_rule_tells_apart(
    one: str, other: str, model: SlotCon, tmp_path: Path
) -> None:
    """Without it one of them is taken by chance, and nobody learns of the other."""
    first, second = (dict(b.encoder.state_dict()) for b in (model.teacher, model.student))
    torch.save({"model": under(one, first) | under(other, second)}, tmp_path / "w.pth")
    for branch in ("teacher", "student"):
        with pytest.raises(UserError, match="no rule says which of them to take") as caught:
            read_backbone(tmp_path / "w.pth", branch=branch)  # type: ignore[arg-type]
        assert all(f"'model.{prefix}'" in str(caught.value) for prefix in (one, other))
    copies = {f"n{i}.{k}": v + i for i in range(40) for k, v in first.items() if "layer1" in k}
    torch.save(copies, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"below 'n0\.', .* and 11 more, and no rule"):
        read_backbone(tmp_path / "w.pth")


def test_networks_that_are_not_quite_resnets(encoder: dict[str, Tensor], tmp_path: Path) -> None:
    """Without it a squeeze-and-excitation network is read as the ResNet that it contains."""
    more = under("layer1.0.se.", {"fc1.weight": torch.ones(2), "fc1.bias": torch.ones(2)})
    torch.save({"model": encoder | more}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"below 'model.': .*layer1.0.se.fc1.bias is .*unknown"):
        read_backbone(tmp_path / "w.pth")
    torch.save({k: v for k, v in encoder.items() if k != "conv1.weight"}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"it lacks conv1.weight"):  # as of a deep stem
        read_backbone(tmp_path / "w.pth")


def test_a_refusal_lists_the_names_that_are_there(tmp_path: Path) -> None:
    """Without it the user must open the file to see what it holds."""
    state = {f"vit.blocks.{n}.attn.qkv.weight": torch.ones(2) for n in range(9)}
    content = {"model": state | {"vit.norm.weight": torch.ones(2)}, "\x1b[2J": torch.ones(1)}
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"begin with 'model.vit.blocks', 'model.vit.norm', ") as it:
        read_backbone(tmp_path / "w.pth")
    assert str(it.value).isprintable()


def test_names_of_any_length(tmp_path: Path) -> None:
    """Without it a long key above many tensors is copied to each name, until memory is full."""
    content = {"x" * 2**20: {f"{n}": torch.ones(1) for n in range(1000)}, "kept": torch.ones(1)}
    torch.save(content, tmp_path / "w.pth")
    assert list(tensors_in(read_file(tmp_path / "w.pth")[0])) == ["kept"]


def test_weights_of_any_model_below_any_prefix(tmp_path: Path) -> None:
    """Without it timm's models of DINO, of averages and of torch.compile do not load."""
    mine, other = {"a.weight": torch.ones(2), "b": torch.ones(1)}, {"a.weight": torch.zeros(2)}
    file = tmp_path / "w.pth"
    for content in (mine, {"net": under("_orig_mod.", mine)}, {"teacher": mine, "student": other}):
        torch.save(content, file)
        assert read_weights(file, ["b", "a.weight"])[0].keys() == mine.keys()
    torch.save({"one": mine, "two": other}, file)
    with pytest.raises(
        UserError, match=r"weights of this model below 'one\.', 'two\.', and no rule"
    ):
        read_weights(file, ["b", "a.weight"])
    with pytest.raises(UserError, match="no weights of this model in it; its names begin with"):
        read_weights(file, ["c.weight"])
