"""What SlotMIM adds to SlotCon: hidden patches, their loss, heads without BatchNorm."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

pytest.importorskip("timm")

from model import ModelConfig, SlotCon, prepare
from model.losses import masked_loss
from tests.helpers.host_sync import host_syncs
from tests.helpers.processes import run_workers
from tests.helpers.tiny_slotcon import gradients, tiny_batch, tiny_model
from tests.helpers.tiny_slotmim import CELLS, masked_batch, tiny_slotmim
from train.config import TrainConfig
from train.optimizer import build_optimizer, clip_each, set_rate


def test_a_hidden_patch_is_not_seen() -> None:
    """By the student; the others and the whole teacher are. Without it the student could copy what
    it is asked to guess, and the loss would fall all the same."""
    model = tiny_slotmim()
    batch = masked_batch()
    views, masks = batch["views"][0], batch["masks"][0]
    pixels = masks.repeat_interleave(16, dim=1).repeat_interleave(16, dim=2)[:, None]
    other = torch.where(pixels, torch.randn(views.shape), views)
    with torch.no_grad():
        for branch, hidden, same in (
            (model.student, masks, True),
            (model.student, ~masks, False),
            (model.student, None, False),
            (model.teacher, None, False),
        ):
            one, two = (branch.stages(each, hidden)[-1].features for each in (views, other))
            assert torch.equal(one, two) is same
        before = model.student.stages(views, masks)[-1].features
        model.student.encoder.get_parameter("mask_token").add_(1)
        assert not torch.equal(model.student.stages(views, masks)[-1].features, before)
        assert torch.equal(model.student(views).features, model.student.stages(views)[-1].features)


def test_the_masked_loss_is_the_mean_over_hidden_patches() -> None:
    """Of the whole batch, written patch by patch. Without it images with few hidden patches could
    count as much as those with many."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 3, 5, 2, 2, generator=generator, dtype=torch.float64)
    center = torch.randn(1, 5, generator=generator, dtype=torch.float64)
    masks = torch.tensor([[1, 1, 1, 0], [0, 0, 1, 0], [0, 0, 0, 0]]).bool().view(3, 2, 2)
    terms = []
    for image, row, column in masks.nonzero().tolist():
        target = ((teacher[image, :, row, column] - center[0]) / 0.05).softmax(dim=0)
        terms.append(-(target * F.log_softmax(student[image, :, row, column] / 0.1, 0)).sum())
    found = masked_loss(student, teacher, center, masks, 0.1, 0.05)
    torch.testing.assert_close(found, torch.stack(terms).mean(), rtol=1e-12, atol=0)


def test_the_loss_is_the_weighted_sum_of_its_terms() -> None:
    """Half of each pair (docs/slotmim.md). Without it a term could have another weight."""
    model = tiny_slotmim(group_loss_weight=0.3)
    output = model(**masked_batch())
    groups, masked, slots = (
        sum(value for name, value in output.terms.items() if name.startswith(kind))
        for kind in ("grouping", "masked", "slot")
    )
    expected = (0.3 * groups + 0.3 * masked + 0.7 * slots) / 2
    torch.testing.assert_close(output.loss.detach(), torch.as_tensor(expected))
    assert set(output.terms) == set(model.term_names)


def with_winners(model: SlotCon, student: int, teacher: int) -> SlotCon:
    """All cells of the student prefer this prototype of two, all of the teacher that one."""
    with torch.no_grad():
        for branch, winner in ((model.student, student), (model.teacher, teacher)):
            last: Any = branch.projector[-1]  # type: ignore[index]
            last.weight.mul_(1e-3)
            last.bias.fill_(1)
            branch.grouping.prototypes.fill_(-1)[winner] = 1
    return model


@pytest.mark.parametrize("hidden", [0, CELLS**2])
@pytest.mark.parametrize("pair", [False, True])
def test_no_hidden_patch_or_pair_leaves_a_step(hidden: int, pair: bool) -> None:
    """The term is zero, and the others still teach; the authors' code skips the step. Without it
    one such batch would make weights that are no numbers. A single pair is enough for a loss, where
    SlotCon's BatchNorm needs two."""
    model = tiny_slotmim(num_prototypes=2, slot_loss="regression")
    with_winners(model, 0, 0 if pair else 1)
    output = model(**{name: value[:, :1] for name, value in masked_batch(hidden=hidden).items()})
    output.loss.backward()
    assert output.stats["active_pairs"] == pair
    for name in ("masked_1", "masked_2"):
        assert (output.terms[name] > 0) == (hidden > 0)
    assert output.terms["grouping_12"] > 0
    assert all(grad.isfinite().all() for grad in gradients(model).values())
    learns = bool(model.predictor[0].weight.grad.any())  # type: ignore[union-attr]
    assert learns == pair


def test_heads_have_no_batch_statistics() -> None:
    """Without it a process's own images would change each other's features."""
    model = tiny_slotmim(
        image_loss_weight=1.0, cell_loss_weight=1.0, relation_loss_weight=1.0, cells=4
    )
    norms = [
        n for n, part in model.named_modules() if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d)
    ]
    assert not norms
    assert [type(part) for part in model.predictor] == [nn.Linear, nn.GELU, nn.Linear]
    assert len(model.student.projector) == 5
    model(**masked_batch()).loss.backward()
    gradients(model)  # all are there and finite


def test_the_temperature_is_that_of_slots_and_targets() -> None:
    """Without it a warm-up would reach one and not the other."""
    warm, cold = tiny_slotmim(teacher_temp=0.04), tiny_slotmim()
    cold.set_teacher_temp(0.04)
    batch = masked_batch()
    assert torch.equal(warm(**batch).loss, cold(**batch).loss)
    cold.set_teacher_temp(0.07)
    assert not torch.equal(warm(**batch).loss, cold(**batch).loss)


def test_masks_that_do_not_fit_are_refused() -> None:
    """Another grid, or none. Without it a mask would be spread over the wrong patches."""
    model, batch = tiny_slotmim(), masked_batch()
    for masks in (batch["masks"][..., :1], batch["masks"].float(), batch["masks"][0]):
        with pytest.raises(ValueError, match=r"masks must be bool \[2, 3, 4, 4\], not torch"):
            model(**{**batch, "masks": masks})
    with pytest.raises(ValueError, match="masks must be given with slotmim, and only with it"):
        model(**{**batch, "masks": None})
    with pytest.raises(ValueError, match="masks must be given with slotmim, and only with it"):
        tiny_model()(*tiny_batch(side=64), masks=batch["masks"])


def test_networks_that_cannot_hide_patches_are_refused() -> None:
    """In one line. Without it a ResNet would fail in its first step, or see everything."""
    for arch in (
        "resnet18",
        "timm:test_convnext",
        "timm:test_efficientnet",
        "timm:swin_tiny_patch4_window7_224",
    ):
        with pytest.raises(
            ValueError, match="arch must be a ViT of timm, as timm:vit_small"
        ) as error:
            ModelConfig(arch, objective="slotmim")
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"projector must be mlp with model\.objective"):
        ModelConfig("timm:test_vit", dim_out=64, projector="norm", objective="slotmim")


def test_no_host_synchronisation() -> None:
    """In a whole step, once the slots' buffers have a size and the optimiser its state. Without it
    a GPU would wait in each step."""
    model = tiny_slotmim(drop_path=0.1)
    train = TrainConfig(optimizer="adamw", base_lr=0.01, weight_decay=0.04, decay_positions=True)
    optimizer = build_optimizer(model, train)
    model(**masked_batch()).loss.backward()
    optimizer.step()
    model.adapt_capacity()
    with host_syncs() as found:
        set_rate(optimizer, 0.01, 0.2)
        model.set_teacher_temp(0.05)
        model.update_teacher(0.9)
        model(**masked_batch()).loss.backward()
        clip_each(model.parameters(), 0.3)
        optimizer.step()
        optimizer.zero_grad()
    assert not found
    decays = {group["weight_decay"] for group in optimizer.param_groups}
    assert decays == {0.0, 0.2}


def test_each_gradient_is_clipped_by_itself() -> None:
    """A small one stays. Without it one large gradient would shrink all the others."""
    weights = [torch.zeros(shape, requires_grad=True) for shape in ((2, 2), (3,), (1,))]
    values = (torch.tensor([[3.0, 0], [0, 4]]), torch.tensor([0.1, 0.2, 0.2]), torch.zeros(1))
    for weight, value in zip(weights[:2], values, strict=False):
        weight.grad = value.clone()
    clip_each(weights, 0.6)
    torch.testing.assert_close(weights[0].grad, values[0] * 0.6 / 5)
    torch.testing.assert_close(weights[1].grad, values[1])
    assert weights[2].grad is None


@pytest.mark.parametrize("side", [64, 96])
def test_checkpointing_keeps_the_bits(side: int) -> None:
    """At any size of view, drop paths included. Without it saving memory would change the run."""
    results = []
    for checkpointing in (False, True):
        model = tiny_slotmim(drop_path=0.2)
        prepare(model, checkpointing=checkpointing)
        output = model(**masked_batch(side=side), draw=(0, 3))
        output.loss.backward()
        results.append((output.loss.detach(), gradients(model)))
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(grad, results[1][1][name]) for name, grad in results[0][1].items())


def test_bfloat16_trains() -> None:
    """Without it a type that does not fit would show on a GPU first."""
    model = tiny_slotmim()
    whole = model(**masked_batch()).loss.detach()
    with torch.autocast("cpu", torch.bfloat16):
        output = model(**masked_batch())
    output.loss.backward()
    gradients(model)
    torch.testing.assert_close(output.loss.detach(), whole, rtol=0.1, atol=0)


def test_the_authors_names_both_ways() -> None:
    """Without it checkpoints of the authors could not be read, or ours by their code."""
    source, target = tiny_slotmim(), tiny_slotmim()
    for parameter in source.parameters():
        nn.init.normal_(parameter)
    official = source.official_state_dict()
    assert {
        "encoder_k.mask_token", "encoder_q.blocks.0.attn.qkv.weight", "predictor_slot.mlp.2.bias",
        "grouping_k.prototypes_patch.weight", "projector_q.mlp.4.weight", "center",
    } <= set(official)  # fmt: skip
    assert official["projector_q.mlp.0.weight"].ndim == 2
    target.load_official_state_dict({f"module.{name}": value for name, value in official.items()})
    for name, value in target.state_dict().items():
        assert torch.equal(value, source.state_dict()[name]), name


# ---- Two processes ----

# Without slot terms, and with equally many hidden patches, each process has the same weight. So two
# processes must give the result of one process with all images.
ALONE: dict[str, Any] = {"group_loss_weight": 1.0}


def _worker(rank: int, folder: Path) -> None:
    model = tiny_slotmim(**ALONE).double()
    model.predictor.requires_grad_(False)
    ddp = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
    output = ddp(**masked_batch(seed=rank, dtype=torch.float64))
    output.loss.backward()
    own = {"masks": masked_batch(seed=rank)["masks"] & (rank == 0)}
    uneven = ddp(**{**masked_batch(seed=rank, dtype=torch.float64), **own})
    result = {"terms": output.terms, "gradients": gradients(model), "center": model.center}
    torch.save({**result, "uneven": uneven.terms}, folder / f"{rank}.pt")


def test_two_processes_do_what_one_does(tmp_path: Path) -> None:
    """Half of the batch on each gives the same loss, gradients and centre; a process without a
    hidden patch does not hang the others. Without it a run would depend on the number of GPUs."""
    run_workers(_worker, tmp_path)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    halves = [masked_batch(seed=rank, dtype=torch.float64) for rank in (0, 1)]
    whole = {name: torch.cat([half[name] for half in halves], dim=1) for name in halves[0]}
    model = tiny_slotmim(**ALONE).double()
    output = model(**whole)
    output.loss.backward()
    for name in ("grouping_12", "grouping_21", "masked_1", "masked_2"):
        mean: Tensor = (ranks[0]["terms"][name] + ranks[1]["terms"][name]) / 2
        torch.testing.assert_close(mean, output.terms[name], rtol=1e-12, atol=0)
    for name, gradient in ranks[0]["gradients"].items():
        expected = model.get_parameter(name).grad
        assert expected is not None
        # timm interpolates positions in float32.
        assert (gradient - expected).norm() <= 1e-5 * expected.norm() + 1e-12, name
        assert torch.equal(gradient, ranks[1]["gradients"][name]), name
    assert ranks[1]["uneven"]["masked_1"] == 0 < ranks[0]["uneven"]["masked_1"]
    torch.testing.assert_close(ranks[0]["center"], ranks[1]["center"])
