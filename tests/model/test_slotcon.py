"""SlotCon as a whole: its guards, its state and what callers rely on."""

from typing import Any

import pytest
import torch

from model import ModelConfig, SlotCon
from model.architectures import ARCHITECTURES
from model.encoder import Encoder
from tests.helpers.tiny_slotcon import IMAGES, gradients, set_agreement, tiny_batch, tiny_model


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("pairs", [0, 1, 2])
def test_few_active_pairs(pairs: int, weight: float) -> None:
    """BatchNorm1d raises on one row, the mean over no rows is NaN, and DDP hangs on no gradient."""
    model = tiny_model(group_loss_weight=weight)
    views, overlap, flipped = tiny_batch()
    set_agreement(model, views, pairs)
    output = model(views, overlap, flipped)
    output.loss.backward()

    assert output.stats["active_pairs"].item() == pytest.approx(pairs / IMAGES)
    assert torch.isfinite(output.loss)
    grads = gradients(model)
    assert all(torch.isfinite(gradient).all() for gradient in grads.values())
    slot_terms = [output.terms["slot_12"].item(), output.terms["slot_21"].item()]
    if pairs < 2:
        assert slot_terms == [0, 0]
        assert not any(value.any() for name, value in grads.items() if "predictor" in name)
    else:
        assert min(slot_terms) > 0


def test_zero_term_is_zero_beside_infinite_weights() -> None:
    """A multiplication by zero must not make the zero: 0·∞ is NaN."""
    model = tiny_model()
    batch = tiny_batch()
    set_agreement(model, batch[0], pairs=0)
    torch.nn.init.constant_(next(model.predictor.parameters()), float("inf"))
    output = model(*batch)
    assert output.terms["slot_12"].item() == 0
    assert torch.isfinite(output.loss)


def test_pairs_without_overlap_are_left_out_of_grouping() -> None:
    """The authors' zero maps would teach the uniform distribution."""
    model = tiny_model()
    views, overlap, flipped = tiny_batch(side=64)
    inverted = torch.tensor([0.7, 0.2, 0.3, 0.8])

    none = model(views, inverted.expand(2, IMAGES, 4), flipped)
    none.loss.backward()
    assert none.terms["grouping_12"].item() == none.terms["grouping_21"].item() == 0
    assert all(torch.isfinite(gradient).all() for gradient in gradients(model).values())

    overlap = overlap.clone()
    overlap[1, 0] = inverted  # one view is enough to exclude the pair
    with torch.no_grad():
        center = model.center.clone()
        student, teacher = model.student(views[0]).scores, model.teacher(views[1]).scores
        some = model(views, overlap, flipped)
    target = ((teacher - center[..., None, None]) / 0.07).softmax(1)
    entropy = -(target * (student / 0.1).log_softmax(1)).sum(1)[1:].mean()
    torch.testing.assert_close(some.terms["grouping_12"], entropy)


def test_output_names_and_weighting() -> None:
    """The trainer logs these names; the loss must be the weighted sum of the logged terms."""
    model = tiny_model(group_loss_weight=0.3)
    output = model(*tiny_batch(side=64))
    terms = output.terms
    assert list(terms) == ["grouping_12", "grouping_21", "slot_12", "slot_21"]
    assert set(output.stats) == {"active_slots", "active_pairs", "dropped_pairs"}
    assert not any(value.requires_grad for value in (*terms.values(), *output.stats.values()))
    grouping, slots = (
        sum(terms[f"{kind}_{d}"] for d in ("12", "21")) for kind in ("grouping", "slot")
    )
    torch.testing.assert_close(output.loss.detach(), 0.3 * grouping + 0.7 * slots)


def test_center_moves_once_a_training_step() -> None:
    """A centre moved by validation, or n times by n micro-batches, changes the method."""
    batch = tiny_batch(side=64)
    model = tiny_model()
    mean = model.teacher(batch[0][0]).scores.mean(dim=(0, 2, 3))[None]
    with torch.no_grad():
        model(*batch)
    model.eval()(*batch)
    assert not model.center.any()

    model.train()(*batch)
    torch.testing.assert_close(model.center, 0.1 * mean)
    halves = tiny_model()
    for _ in range(2):
        halves(*batch, micro_batches=2)
    torch.testing.assert_close(halves.center, model.center)


def test_teacher_is_the_moving_average_of_parameters_only() -> None:
    """Averaged buffers, or a teacher that learns by gradient, would be another method."""
    model = tiny_model()
    assert not any(parameter.requires_grad for parameter in model.teacher.parameters())
    for mine, its in zip(model.student.parameters(), model.teacher.parameters(), strict=True):
        assert torch.equal(mine, its)
        torch.nn.init.normal_(mine)
    before = {name: value.clone() for name, value in model.teacher.state_dict().items()}
    model.update_teacher(0.9)
    parameters = dict(model.student.named_parameters())
    for name, value in model.teacher.state_dict().items():
        expected = before[name]
        if name in parameters:
            expected = expected * 0.9 + parameters[name].detach() * 0.1
        torch.testing.assert_close(value, expected)
    with pytest.raises(ValueError, match="momentum"):
        model.update_teacher(1.5)


def test_each_view_is_its_own_batchnorm_batch() -> None:
    """With both views in one batch there would be half the updates, and mixed statistics."""
    model = tiny_model()
    model(*tiny_batch())
    for branch in (model.student, model.teacher):
        assert branch.state_dict()["encoder.bn1.num_batches_tracked"].item() == 2


@pytest.mark.parametrize("network", ["teacher", "student"])
def test_segment_leaves_no_trace(network: Any) -> None:
    """An evaluation during training must not change the run."""
    model = tiny_model()
    model.student.projector.eval()  # mixed modes must be restored too
    modes = [module.training for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}

    scores, features = model.segment(torch.randn(2, 3, 96, 96), network=network)
    assert scores.shape == (2, 6, 3, 3)
    assert features.shape == (2, 16, 3, 3)
    assert scores.abs().max() <= 1 + 1e-6
    assert not scores.requires_grad
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_segment_refuses_an_unknown_network() -> None:
    """A misspelt name must not select one of the branches."""
    with pytest.raises(ValueError, match="network"):
        tiny_model().segment(torch.zeros(1, 3, 32, 32), network="tutor")  # type: ignore[arg-type]


def test_bfloat16_autocast_stays_near_float32() -> None:
    """Under autocast, losses and centre are float32. Overflow or a half-precision softmax would
    show here."""
    batch = tiny_batch(side=64)
    plain, mixed = tiny_model(), tiny_model()
    expected = plain(*batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = mixed(*batch)
    output.loss.backward()
    assert output.loss.dtype == mixed.center.dtype == torch.float32
    assert all(torch.isfinite(gradient).all() for gradient in gradients(mixed).values())
    for name in ("grouping_12", "grouping_21"):
        torch.testing.assert_close(output.terms[name], expected.terms[name], rtol=0.02, atol=0)
    torch.testing.assert_close(output.loss, expected.loss, rtol=0.1, atol=0)


@pytest.mark.parametrize(
    ("arch", "channels", "parameters"),
    # torchvision's parameter counts without the classifier's 1000·(channels + 1)
    [
        ("resnet18", 512, 11_176_512),
        ("resnet34", 512, 21_284_672),
        ("resnet50", 2048, 23_508_032),
        ("resnet101", 2048, 42_500_160),
    ],
)
def test_encoder_architectures(arch: str, channels: int, parameters: int) -> None:
    """Every available encoder knows the channels of its stages and of its last map, and its stride:
    32 pixels."""
    assert arch in ARCHITECTURES
    with torch.device("meta"):
        encoder = Encoder(arch)
        assert encoder(torch.empty(2, 3, 224, 224)).shape == (2, channels, 7, 7)
        assert encoder(torch.empty(2, 3, 96, 96)).shape == (2, channels, 3, 3)
        features = torch.empty(2, 3, 96, 96)
        for name, part in encoder.named_children():
            features = part(features)
            if name.startswith("layer"):
                assert features.shape[1] == encoder.stage_dims[int(name[-1])]
    assert encoder.dim == channels
    assert list(encoder.stage_dims) == [1, 2, 3, 4]
    config = ModelConfig(arch)
    assert [config.cells_of(side) for side in (224, 96, 97)] == [49, 9, 16]
    assert sum(parameter.numel() for parameter in encoder.parameters()) == parameters


def test_initialisation() -> None:
    """The authors' start: identity blocks, He convolutions by fan-out, narrow heads, N(0, 1)."""
    torch.manual_seed(0)
    model = SlotCon(ModelConfig(arch="resnet18", dim_hidden=256, num_prototypes=128))
    state = model.state_dict()
    for name, value in state.items():
        if "encoder" in name and name.endswith("bn2.weight"):
            assert not value.any()
        elif "encoder" in name and value.ndim == 4:
            out, _, height, width = value.shape
            assert value.std().item() == pytest.approx(
                (2 / (out * height * width)) ** 0.5, rel=0.05
            )
        elif ("projector" in name or "predictor" in name) and value.ndim > 1:
            assert value.std().item() == pytest.approx(0.02, rel=0.05)
    assert state["student.grouping.prototypes"].std().item() == pytest.approx(1, rel=0.05)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("arch", "resnet19"),
        ("dim_hidden", 0),
        ("dim_out", -1),
        ("num_prototypes", 2.5),
        ("teacher_temp", 0.0),
        ("student_temp", -0.1),
        ("contrast_temp", float("nan")),
        ("center_momentum", 1.1),
        ("group_loss_weight", -0.5),
    ],
)
def test_config_names_an_impossible_field(field: str, value: Any) -> None:
    """A wrong setting must fail before hours of training, and the message must name it."""
    with pytest.raises(ValueError, match=field):
        ModelConfig(**{field: value})


def test_forward_names_a_malformed_input() -> None:
    """Broadcasting would otherwise accept boxes or flags of the wrong batch."""
    model = tiny_model()
    views, overlap, flipped = tiny_batch()
    with pytest.raises(ValueError, match="views"):
        model(views[0], overlap, flipped)
    with pytest.raises(ValueError, match="overlap"):
        model(views, overlap[:, :1], flipped)
    with pytest.raises(ValueError, match="flipped"):
        model(views, overlap, flipped.long())
    with pytest.raises(ValueError, match="micro_batches"):
        model(views, overlap, flipped, micro_batches=0)


def test_official_state_dict_round_trip() -> None:
    """Users load the authors' checkpoints, which have DDP's prefix, and export ours."""
    source, target = tiny_model(), tiny_model()
    for parameter in source.parameters():
        torch.nn.init.normal_(parameter)
    official = source.official_state_dict()
    assert {"encoder_k.layer4.1.bn2.weight", "grouping_q.slot_embed.weight", "center"} <= set(
        official
    )
    for prefix in ("", "module."):
        target.load_official_state_dict({prefix + name: value for name, value in official.items()})
        for name, value in target.state_dict().items():
            assert torch.equal(value, source.state_dict()[name])


def test_official_state_dict_refuses_what_does_not_fit() -> None:
    """A checkpoint of another size must be refused, with the entries' names, and change nothing."""
    model = tiny_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    wrong = {name: value + 1 for name, value in model.official_state_dict().items()}
    del wrong["center"]
    wrong["fc.weight"] = torch.zeros(1)
    wrong["grouping_q.slot_embed.weight"] = torch.zeros(7, 16)
    with pytest.raises(ValueError, match=r"missing: center; unknown: fc\.weight; .*\(7, 16\)"):
        model.load_official_state_dict(wrong)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
