"""The method's ablations: each against a naive formula, and that it changes nothing else."""

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torchvision.ops import roi_align

from model import SlotCon
from model.branch import Branch
from model.grouping import winning_slots
from model.losses import slot_regression
from model.slots import SlotCapacity
from tests.helpers.host_sync import host_syncs
from tests.helpers.processes import run_workers
from tests.helpers.tiny_slotcon import (
    IMAGES,
    gradients,
    set_agreement,
    tiny_batch,
    tiny_crops,
    tiny_model,
)

Batch = tuple[Tensor, Tensor, Tensor]
VARIANTS: dict[str, dict[str, object]] = {
    "regression": {"slot_loss": "regression"},
    "projections": {"align": "projections"},
    "image": {"image_loss_weight": 0.5},
    "all": {"slot_loss": "regression", "align": "projections", "image_loss_weight": 0.5},
}
each_variant = pytest.mark.parametrize("variant", VARIANTS)
crops = partial(tiny_crops, side=96)
THEIRS = ("grouping_12", "grouping_21", "slot_12", "slot_21")


# ---- Naive formulae ----


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return a @ b / a.norm() / b.norm()


def naive_regression(model: SlotCon, views: Tensor, student_view: int, teacher_view: int) -> Tensor:
    student, teacher = model.student(views[student_view]), model.teacher(views[teacher_view])
    active = winning_slots(student.scores) & winning_slots(teacher.scores)
    pairs = [(b, k) for b in range(IMAGES) for k in range(active.shape[1]) if active[b, k]]
    assert len(pairs) > 1
    queries = model.predictor(torch.stack([student.slots[b, k] for b, k in pairs]))
    total = torch.zeros(())
    for query, (b, k) in zip(queries, pairs, strict=True):
        total = total + 2 - 2 * cosine(query, teacher.slots[b, k])
    return total / len(pairs)


def naive_projection(branch: Branch, view: Tensor, box: Tensor, flip: Tensor) -> list[Tensor]:
    """The features [D, H, W] of each image's shared pixels."""
    results = []
    features = branch(view).features
    height, width = features.shape[2:]
    for b in range(IMAGES):
        corners = box[b] * torch.tensor([width, height, width, height])
        cut = roi_align(features[b : b + 1], [corners[None]], (height, width), aligned=True)[0]
        results.append(cut.flip(-1) if flip[b] else cut)
    return results


def naive_projected_grouping(
    model: SlotCon, batch: Batch, student_view: int, teacher_view: int
) -> Tensor:
    views, overlap, flipped = batch
    total, cells = torch.zeros(()), 0
    sides = ((model.student, student_view), (model.teacher, teacher_view))
    aligned = [naive_projection(branch, views[v], overlap[v], flipped[v]) for branch, v in sides]
    for student, teacher in zip(*aligned, strict=True):
        for h in range(student.shape[1]):
            for w in range(student.shape[2]):
                scores = [
                    torch.stack([cosine(each[:, h, w], one) for one in branch.grouping.prototypes])
                    for each, (branch, _) in zip((student, teacher), sides, strict=True)
                ]
                p = ((scores[1] - model.center[0]) / 0.07).softmax(0)
                total = total - (p * (scores[0] / 0.1).log_softmax(0)).sum()
                cells += 1
    return total / cells


def naive_image_loss(queries: Tensor, keys: Tensor, first: int = 0) -> Tensor:
    """`first`: the row of the first query's positive among the keys."""
    total = torch.zeros(())
    for b, query in enumerate(queries):
        logits = torch.stack([cosine(query, key) / 0.2 for key in keys])
        total = total - torch.log(logits[first + b].exp() / logits.exp().sum())
    return total / len(queries) * 2 * 0.2


def pooled(
    model: SlotCon, views: Tensor, student_view: int, teacher_view: int
) -> tuple[Tensor, Tensor]:
    """Queries of the image-level loss, and the keys of this process."""
    assert model.image_predictor is not None
    student, teacher = (
        model.student(views[student_view]).features,
        model.teacher(views[teacher_view]).features,
    )
    mean = student.flatten(2).sum(2) / student[0, 0].numel()
    return model.image_predictor(mean), teacher.flatten(2).sum(2) / teacher[0, 0].numel()


# ---- What each variant changes ----


def test_slot_regression_is_the_loop() -> None:
    """A mean over positions instead of pairs, or cosines of wrong rows, would still be a loss."""
    queries, targets = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
    valid = torch.tensor([True, False, True, True, False])
    total = sum((2 - 2 * cosine(queries[n], targets[n]) for n in (0, 2, 3)), torch.zeros(()))
    torch.testing.assert_close(slot_regression(queries, targets, valid), total / 3)
    assert slot_regression(queries, queries, valid).item() == pytest.approx(0, abs=1e-6)
    assert slot_regression(queries, -queries, valid).item() == pytest.approx(4)


def test_regression_replaces_the_slot_terms_only() -> None:
    """Each query must be compared with the slot of the same prototype and image, in both
    directions."""
    model, plain, batch = tiny_model(slot_loss="regression"), tiny_model(), crops()
    with torch.no_grad():
        terms, before = model(*batch).terms, plain(*batch).terms
        for name, *way in (("12", 0, 1), ("21", 1, 0)):
            expected = naive_regression(model, batch[0], *way)
            torch.testing.assert_close(terms[f"slot_{name}"], expected)
            assert torch.equal(terms[f"grouping_{name}"], before[f"grouping_{name}"])
            assert terms[f"slot_{name}"] != before[f"slot_{name}"]


def test_regression_in_buffers_of_fixed_size() -> None:
    """Empty positions hold arbitrary queries and must not count as pairs."""
    batch = crops()
    exact, static = (tiny_model(slot_loss="regression") for _ in range(2))
    static.capacity = SlotCapacity(IMAGES * 5, IMAGES * 6)  # of 18 slots
    outputs = [model(*batch) for model in (exact, static)]
    for output in outputs:
        output.loss.backward()
    for name, term in outputs[0].terms.items():
        torch.testing.assert_close(outputs[1].terms[name], term)
    before, after = gradients(exact), gradients(static)
    # A bias before a BatchNorm has a gradient of zero: what is left there is rounding noise.
    noise = 1e-6 * max(gradient.norm() for gradient in before.values())
    for name, gradient in before.items():
        assert (after[name] - gradient).norm() <= 1e-3 * gradient.norm() + noise, name


def test_projections_are_aligned_before_they_are_scored() -> None:
    """The grouping terms use the aligned features; slots still come from the unaligned maps."""
    model, plain, batch = tiny_model(align="projections"), tiny_model(), crops()
    center = torch.linspace(-0.1, 0.1, model.config.num_prototypes)[None]
    for each in (model, plain):
        each.center.copy_(center)
    with torch.no_grad():
        terms, before = model(*batch).terms, plain(*batch).terms
        for name, *way in (("12", 0, 1), ("21", 1, 0)):
            expected = naive_projected_grouping(model, batch, *way)
            torch.testing.assert_close(terms[f"grouping_{name}"], expected)
            assert terms[f"grouping_{name}"] != before[f"grouping_{name}"]
            assert torch.equal(terms[f"slot_{name}"], before[f"slot_{name}"])


def test_both_alignments_agree_where_there_is_nothing_to_align() -> None:
    """If both views are the whole image, not flipped, scores of aligned features equal aligned
    scores."""
    batch = tiny_batch(side=96)
    with torch.no_grad():
        terms = [tiny_model(align=a)(*batch).terms for a in ("assignments", "projections")]
    for name in THEIRS:
        torch.testing.assert_close(terms[0][name], terms[1][name])


def test_image_level_loss_is_the_loop_and_is_added() -> None:
    """Both directions count, the other terms do not change, and the weight is applied once."""
    model, plain, batch = tiny_model(image_loss_weight=0.3), tiny_model(), crops()
    with torch.no_grad():
        output, before = model(*batch), plain(*batch)
        expected = sum(
            (naive_image_loss(*pooled(model, batch[0], *way)) for way in ((0, 1), (1, 0))),
            torch.zeros(()),
        )
    torch.testing.assert_close(output.terms["image"], expected)
    torch.testing.assert_close(output.loss, before.loss + 0.3 * expected)
    assert all(torch.equal(output.terms[name], value) for name, value in before.terms.items())


# ---- What no variant may break ----


def test_no_host_synchronisation() -> None:
    """With a fixed capacity for slots, no variant may make the host wait for the device."""
    model, batch = tiny_model(**VARIANTS["all"]), crops(side=32)
    model.capacity = SlotCapacity(8, 8)
    with host_syncs() as results:
        model(*batch).loss.backward()
    assert not results


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("slot_loss", "byol"),
        ("align", None),
        ("image_loss_weight", -0.1),
        ("image_loss_weight", float("nan")),
        ("image_loss_weight", float("inf")),
    ],
)
def test_config_names_an_impossible_field(field: str, value: object) -> None:
    """A misspelt variant must not train as the published method."""
    with pytest.raises(ValueError, match=field):
        tiny_model(**{field: value})


@pytest.mark.parametrize("variant", ["regression", "all"])
@pytest.mark.parametrize("capacity", [None, SlotCapacity(8, 8)], ids=["exact", "static"])
@pytest.mark.parametrize("pairs", [0, 1, 2])
def test_few_active_pairs(pairs: int, capacity: SlotCapacity | None, variant: str) -> None:
    """The variants need the guards of the contrast too: no NaN, and a gradient everywhere."""
    model = tiny_model(**VARIANTS[variant])
    model.capacity = capacity
    batch = tiny_batch()
    set_agreement(model, batch[0], pairs)
    output = model(*batch)
    output.loss.backward()
    results = gradients(model)
    assert torch.isfinite(output.loss)
    assert list(output.terms) == list(model.term_names)
    if pairs < 2:
        assert output.terms["slot_12"] == output.terms["slot_21"] == 0
        slots = [grad for name, grad in results.items() if name.startswith("predictor.")]
        assert not any(grad.any() for grad in slots)
    if "image_predictor.0.weight" in results:
        assert all(results[f"image_predictor.{layer}.weight"].any() for layer in (0, 1, 3, 4, 6))


def test_pairs_without_overlap() -> None:
    """The cosine of all-zero aligned features must not be NaN."""
    model = tiny_model(align="projections")
    views, overlap, flipped = crops()
    overlap[0, 1] = torch.tensor([0.7, 0.2, 0.3, 0.8])
    output = model(views, overlap, flipped)
    output.loss.backward()
    gradients(model)
    some = output.terms["grouping_12"]
    for one in range(2):
        overlap[one] = torch.tensor([0.7, 0.2, 0.3, 0.8])
    assert model(views, overlap, flipped).terms["grouping_12"] == 0 < some


def test_under_autocast_losses_are_float32() -> None:
    """A cosine or softmax in half precision would be wrong by per cents, or overflow."""
    batch = crops(side=32)
    model = tiny_model(**VARIANTS["all"])
    with torch.no_grad():
        expected = tiny_model(**VARIANTS["all"])(*batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(*batch)
    output.loss.backward()
    gradients(model)
    assert all(term.dtype == torch.float32 for term in output.terms.values())
    for name in ("grouping_12", "grouping_21", "image"):  # which slots win may differ
        torch.testing.assert_close(output.terms[name], expected.terms[name], rtol=0.1, atol=0)


@each_variant
def test_weights_are_those_of_the_published_model(variant: str) -> None:
    """Every tool that reads a SlotCon must read a variant's checkpoint, and runs start equal."""
    plain, model = tiny_model(), tiny_model(**VARIANTS[variant])
    before, state = plain.state_dict(), model.state_dict()
    assert set(state) - set(before) == {name for name in state if "image_predictor" in name}
    assert all(torch.equal(state[name], value) for name, value in before.items())
    official = model.official_state_dict()
    assert list(official) == list(plain.official_state_dict())
    names = plain.term_names
    assert names == THEIRS
    has_image = model.config.image_loss_weight > 0
    assert model.term_names == ((*names, "image") if has_image else names)
    assert any("image_predictor" in name for name in state) == has_image


def test_loading_official_weights_keeps_the_image_predictor() -> None:
    """The authors' checkpoints have no image predictor. A trained one must be kept."""
    source, target = tiny_model(), tiny_model(image_loss_weight=1.0)
    for parameter in [*source.parameters(), *target.parameters()]:
        torch.nn.init.normal_(parameter)
    before = {name: value.clone() for name, value in target.state_dict().items()}
    target.load_official_state_dict(source.official_state_dict())
    theirs = source.state_dict()
    for name, value in target.state_dict().items():
        assert torch.equal(value, before[name] if "image_predictor" in name else theirs[name]), name


# ---- Two processes ----

# In eval mode an image does not depend on its batch, and without slot terms each process has the
# same weight. So two processes must give the result of one process with all images.
SHARED: dict[str, object] = {
    "group_loss_weight": 1.0,
    "align": "projections",
    "image_loss_weight": 1.0,
}


def _step(batch: Batch, model: SlotCon) -> dict[str, dict[str, Tensor]]:
    ddp = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
    output = ddp(*batch)
    output.loss.backward()
    return {"terms": output.terms, "gradients": gradients(model)}


def _worker(rank: int, folder: Path) -> None:
    batch = crops(seed=rank)
    results = {
        "all": _step(batch, tiny_model(**VARIANTS["all"])),
        "shared": _step(batch, tiny_model(**SHARED).eval()),
    }
    torch.save(results, folder / f"{rank}.pt")


Results = list[dict[str, dict[str, dict[str, Tensor]]]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """The results of each of two ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    run_workers(_worker, folder)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


def test_ranks_take_the_same_step(results: Results) -> None:
    """A missing gradient, or one that differs between ranks, makes their weights diverge."""
    first, second = (of_rank["all"]["gradients"] for of_rank in results)
    assert first.keys() == second.keys()
    for name, gradient in first.items():
        assert torch.equal(gradient, second[name]), name


def test_image_keys_come_from_all_ranks(results: Results) -> None:
    """A positive taken from another rank's images would still give a loss."""
    models = [tiny_model(**VARIANTS["image"]) for _ in range(2)]
    with torch.no_grad():
        for rank, of_rank in enumerate(results):
            total = torch.zeros(())
            for way in ((0, 1), (1, 0)):
                sides = [pooled(model, crops(seed)[0], *way) for seed, model in enumerate(models)]
                keys = torch.cat([side[1] for side in sides])
                total = total + naive_image_loss(sides[rank][0], keys, first=rank * IMAGES)
            torch.testing.assert_close(of_rank["all"]["terms"]["image"], total)


def test_regression_needs_no_other_rank(results: Results) -> None:
    """Without negatives, the term of a rank depends only on the images of that rank."""
    for rank, of_rank in enumerate(results):
        with torch.no_grad():
            alone = tiny_model(**VARIANTS["regression"])(*crops(seed=rank)).terms
        for name in ("slot_12", "slot_21"):
            torch.testing.assert_close(of_rank["all"]["terms"][name], alone[name])


def test_two_processes_do_what_one_does(results: Results) -> None:
    """Half of the batch on each of two processes gives the same loss and gradients."""
    batch = [torch.cat(parts, dim=1) for parts in zip(crops(seed=0), crops(seed=1), strict=True)]
    model = tiny_model(**SHARED).eval()
    output = model(*batch)
    output.loss.backward()
    for name in ("grouping_12", "grouping_21", "image"):
        mean = sum(of_rank["shared"]["terms"][name] for of_rank in results) / 2
        torch.testing.assert_close(mean, output.terms[name])
    for name, gradient in gradients(model).items():
        both = results[0]["shared"]["gradients"][name]
        assert (both - gradient).norm() <= 1e-4 * gradient.norm(), name
