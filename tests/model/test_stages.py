"""Losses at several stages, and encoders that end early."""

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from model import ModelConfig, SlotCon, prepare
from model.branch import Grouped
from model.encoder import Encoder
from model.objective import Geometry
from model.slots import SlotCapacity
from tests.helpers.host_sync import host_syncs
from tests.helpers.tiny_slotcon import gradients, tiny_batch, tiny_model

DEEP: dict[str, object] = {"supervise": (2, 3, 4), "stage_sizes": ((2, 12, 5, 3),)}
SIDE = 64


def test_each_stage_has_its_own_heads_and_the_whole_loss() -> None:
    """Without it a stage that shares a head, or whose loss is left out, learns something else."""
    model, batch = tiny_model(**DEEP), tiny_batch(side=SIDE)
    with torch.no_grad():
        output = model(*batch)
    geometry = Geometry(*batch[1:], 1, (0, 0))
    expected = torch.zeros(())
    for at, objective in enumerate(model.objectives.values()):
        student, teacher = (
            [Grouped(*branch.stages(view)[at]) for view in batch[0]]
            for branch in (model.student, model.teacher)
        )
        with torch.no_grad():
            objective.center.zero_()
            expected = expected + objective.measure(student, teacher, geometry).loss
    torch.testing.assert_close(output.loss, expected)
    model(*batch).loss.backward()
    assert {name.split(".")[1] for name in gradients(model) if name.startswith("further.")} == {
        "2", "3"
    }  # fmt: skip


def test_a_stage_has_its_sizes() -> None:
    """Without it 64 cells a view go through a projector as wide as that of 4 cells."""
    model = tiny_model(**DEEP)
    branch = model.teacher
    of_two, of_three = branch.heads["2"], branch.heads["3"]
    assert of_two.grouping.prototypes.shape == (5, 16)
    assert of_three.grouping.prototypes.shape == branch.grouping.prototypes.shape == (6, 16)
    assert of_two.projector[0].weight.shape == (12, 128, 1, 1)
    assert of_three.projector[0].weight.shape == (16, 256, 1, 1)
    assert [tuple(one.center.shape) for one in model.objectives.values()] == [
        (1, 5), (1, 6), (1, 6)
    ]  # fmt: skip
    shapes = [tuple(each.scores.shape[1:]) for each in branch.stages(tiny_batch(side=SIDE)[0][0])]
    assert shapes == [(5, 8, 8), (6, 4, 4), (6, 2, 2)]


def test_further_stages_change_no_weight_of_the_last() -> None:
    """Without it runs with and without them start from other weights, and cannot be compared; and
    the checkpoints of one cannot be read as the other's encoder.
    """
    plain, deep = tiny_model().state_dict(), tiny_model(**DEEP).state_dict()
    assert all(torch.equal(deep[name], value) for name, value in plain.items())
    ours = {name for name in deep if name not in plain}
    assert all(name.startswith(("further.", "student.heads.", "teacher.heads.")) for name in ours)
    assert list(tiny_model(**DEEP).official_state_dict()) == list(
        tiny_model().official_state_dict()
    )


@pytest.mark.parametrize("stages", [2, 3])
def test_an_encoder_may_end_early(stages: int) -> None:
    """Without it a run on a few hundred images pays for stages that learn nothing there. Its
    stages start as those of the whole network, so an untrained one is the same for both.
    """
    short, whole = tiny_model(stages=stages), tiny_model()
    names = [name for name, _ in short.student.encoder.named_children()]
    assert names[4:] == [f"layer{stage}" for stage in range(1, stages + 1)]
    weights = whole.student.encoder.state_dict()
    for name, value in short.student.encoder.state_dict().items():
        assert torch.equal(value, weights[name])
    images = tiny_batch(side=SIDE)[0][0]
    assert torch.equal(
        short.student.encoder(images), whole.student.encoder.maps(images, (stages, 4))[0]
    )
    output = short(*tiny_batch(side=SIDE))
    output.loss.backward()
    gradients(short)
    assert list(output.terms) == ["grouping_12", "grouping_21", "slot_12", "slot_21"]
    scores, _ = short.segment(images)
    assert scores.shape[2:] == (SIDE // 2 ** (stages + 1),) * 2


def test_the_teacher_averages_every_head() -> None:
    """Without it a further head of the teacher stays untrained, and teaches nothing."""
    model = tiny_model(**DEEP)
    for parameter in model.student.parameters():
        torch.nn.init.normal_(parameter)
    model.update_teacher(0.0)
    student = dict(model.student.named_parameters())
    for name, value in model.teacher.named_parameters():
        assert torch.equal(value, student[name]), name
        assert not value.requires_grad


def test_names_and_sums_in_the_log() -> None:
    """Without it the log mixes stages up, or slots dropped at a further stage are not seen."""
    model = tiny_model(**DEEP)
    model.further["2"].capacity = SlotCapacity(2, 2)
    output = model(*tiny_batch(side=SIDE))
    assert tuple(output.terms) == model.term_names
    assert model.term_names[:4] == (
        "stage2_grouping_12", "stage2_grouping_21", "stage2_slot_12", "stage2_slot_21",
    )  # fmt: skip
    assert model.term_names[-1] == "slot_21"
    assert output.stats["dropped_pairs"] > 0
    counts = model.prototype_counts
    assert output.usage.shape == (sum(counts.values()),) and next(iter(counts)) == "stage2_"
    first = output.usage[: counts["stage2_"]]
    scores = torch.stack(
        [model.teacher.stages(view)[0].scores for view in tiny_batch(side=SIDE)[0]]
    )
    won = torch.bincount(scores.argmax(dim=2).flatten(), minlength=counts["stage2_"])
    assert torch.equal(first, won)


def test_no_host_synchronisation_at_any_stage() -> None:
    """Without it the host waits for a GPU at every further stage."""
    model, batch = tiny_model(**DEEP), tiny_batch(side=SIDE)
    model(*batch)
    model.adapt_capacity()
    assert all(objective.capacity for objective in model.objectives.values())
    with host_syncs() as found:
        model(*batch).loss.backward()
    assert not found
    model.forget_capacity()
    assert not any(objective.capacity for objective in model.objectives.values())


def test_recomputed_activations_change_no_bit_at_any_stage() -> None:
    """Without it `efficiency.checkpointing` is another training with several stages."""

    def step(model: SlotCon) -> Mapping[str, Tensor]:
        output = model(*tiny_batch(side=SIDE))
        output.loss.backward()
        return {"loss": output.loss.detach(), **gradients(model), **model.state_dict(prefix="s.")}

    plain, prepared = tiny_model(**DEEP), tiny_model(**DEEP)
    prepare(prepared, checkpointing=True)
    expected, actual = step(plain), step(prepared)
    assert all(torch.equal(actual[name], value) for name, value in expected.items())


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"stages": 5}, "stages must be a whole number in 1..4, not 5"),
        ({"stages": 0}, "stages"),
        ({"supervise": (2, 5)}, "supervise must be a growing list"),
        ({"supervise": (4, 2)}, "supervise must be a growing list"),
        ({"supervise": (2, 2, 4)}, "supervise must be a growing list"),
        ({"supervise": (2, 3)}, "supervise must be a list that ends with 4, .* not \\(2, 3\\)"),
        ({"supervise": (2, 4), "stages": 3}, "supervise must be a list that ends with 3"),
        ({"supervise": (2, 4), "stage_sizes": ((3, 8, 8, 8),)}, "stage_sizes must be of stages"),
        ({"stage_sizes": ((4, 8, 8, 8),)}, "stage_sizes must be of stages"),
        ({"supervise": (2, 4), "stage_sizes": ((2, 8, 8),)}, "stage_sizes must be a list"),
        ({"supervise": (2, 4), "stage_sizes": ((2, 8, 0, 8),)}, "stage_sizes must be a list"),
        ({"supervise": (2, 4), "stage_sizes": ((2, 8, 8, 8),) * 2}, "stage_sizes must be a list"),
    ],
)
def test_stages_that_the_encoder_has_not(fields: dict[str, object], words: str) -> None:
    """Without it a run trains other stages than its configuration says, or fails after loading."""
    with pytest.raises(ValueError, match=words):
        ModelConfig(arch="resnet18", **fields)  # type: ignore[arg-type]


def test_settings_of_one_stage() -> None:
    """Without it a stage takes another one's sizes."""
    config = ModelConfig(supervise=(2, 3, 4), stage_sizes=((2, 8, 9, 10),), contrast_temp=0.3)
    assert config.supervised == (2, 3, 4)
    assert ModelConfig(stages=2).supervised == (2,)
    last = ModelConfig(contrast_temp=0.3)
    assert config.at(4) == last
    assert config.at(3) == replace(last, stages=3)
    assert config.at(2) == replace(last, stages=2, dim_hidden=8, num_prototypes=9, cells=10)


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_the_sizes_of_an_encoder(stages: int) -> None:
    """Without it a projector is built for another number of channels than the map has."""
    with torch.device("meta"):
        encoder = Encoder("resnet50", stages)
        side = 64 // 2 ** (stages + 1)
        assert encoder(torch.empty(1, 3, 64, 64)).shape == (1, encoder.dim, side, side)
    assert encoder.dim == 128 * 2**stages
    assert list(encoder.stage_dims) == list(range(1, stages + 1))
