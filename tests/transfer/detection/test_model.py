"""Mask R-CNN on an encoder: its shape, its trained weights, and the positions of its boxes and
masks.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection.roi_heads import project_masks_on_boxes
from torchvision.transforms import Normalize

from pipeline.errors import UserError
from transfer.backbone import build_backbone
from transfer.config import InitConfig
from transfer.detection.config import ModelConfig
from transfer.detection.evaluate import paste
from transfer.detection.model import HALF_PIXEL, Detector, Heads

SMALL = ModelConfig(
    channels=16,
    anchor_sizes=(8, 16, 32, 64, 128),
    rpn_samples=32,
    candidates_train=50,
    candidates_test=50,
    proposals_train=20,
    proposals_test=20,
    roi_samples=16,
    box_convs=1,
    box_features=32,
    mask_convs=1,
    score_threshold=0.0,
    detections=5,
)


def detector(config: ModelConfig = SMALL, **init: Any) -> Detector:
    torch.manual_seed(0)
    encoder, _ = build_backbone(InitConfig(arch="resnet18", **init))
    return Detector(encoder, 3, config)


def batch() -> dict[str, Any]:
    """Two images of different sizes with one and two objects."""
    torch.manual_seed(1)
    boxes = [torch.tensor([[5.0, 8, 40, 44]]), torch.tensor([[0.0, 0, 30, 20], [20, 10, 70, 50]])]
    sizes = [(64, 48), (56, 80)]
    images = [torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in sizes]
    targets = []
    for some, (height, width) in zip(boxes, sizes, strict=True):
        masks = torch.zeros(len(some), height, width, dtype=torch.uint8)
        for mask, (x1, y1, x2, y2) in zip(masks, some.int().tolist(), strict=True):
            mask[y1:y2, x1:x2] = 1
        targets.append(
            {
                "boxes": some,
                "labels": torch.arange(len(some)) + 1,
                "masks": masks,
                "masked": masks.flatten(1).any(dim=1),
            }
        )
    return {"images": images, "targets": targets}


def test_every_weight_learns() -> None:
    """DistributedDataParallel would wait for ever for a weight that a step does not use."""
    model = detector().train()
    losses = model(batch())
    assert losses.keys() == {
        "loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg", "loss_mask",
    }  # fmt: skip
    assert all(loss.isfinite() and loss.ndim == 0 for loss in losses.values())
    torch.stack(list(losses.values())).sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_anchors_lie_at_whole_strides() -> None:
    """torchvision derives a level's stride from the padded size. If the coarsest stride does not
    divide this size, the anchors drift: by 36 pixels at a side of 800.
    """
    model = detector().eval()
    found: list[Tensor] = []
    model.rpn.anchor_generator.register_forward_hook(lambda m, i, o: found.extend(o))
    with torch.no_grad():
        model({"images": [torch.zeros(3, 96, 160, dtype=torch.uint8)]})
    centres, sides = (found[0][:, :2] + found[0][:, 2:]) / 2, found[0][:, 2:] - found[0][:, :2]
    for size, stride in zip(SMALL.anchor_sizes, (4, 8, 16, 32, 64), strict=True):
        level = centres[(sides == size).all(dim=1)]
        rows, columns = torch.arange(0, 96, stride), torch.arange(0, 160, stride)
        grid = torch.cartesian_prod(columns, rows).float()
        there = {(x, y) for x, y in level.tolist()}
        assert there >= {(x, y) for x, y in grid.tolist()}
        assert all(x % stride == 0 and y % stride == 0 for x, y in there)


def losses(given: dict[str, Any], config: ModelConfig = SMALL) -> dict[str, torch.Tensor]:
    model = detector(config)
    torch.manual_seed(2)
    return model(given)  # type: ignore[no-any-return]


def test_the_mask_loss_is_torchvisions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it figures of sets with all masks would change."""
    ours = losses(batch())
    monkeypatch.delattr(Heads, "forward")
    monkeypatch.delattr(Heads, "has_mask")
    theirs = losses(batch())
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in ours)


def test_objects_without_masks_are_left_out_of_the_mask_loss() -> None:
    """Without it their empty masks, or their boxes, are learned as masks."""
    every, some, other = batch(), batch(), batch()
    for given in (some, other):
        given["targets"][1]["masked"][0] = False
    other["targets"][1]["masks"][0] = 1
    all_masked, left_out, same = map(losses, (every, some, other))
    assert left_out["loss_mask"].equal(same["loss_mask"])
    assert left_out["loss_mask"].item() not in (0, all_masked["loss_mask"].item())
    for name in all_masked.keys() - {"loss_mask"}:
        assert left_out[name].equal(all_masked[name])


def test_a_batch_without_masks_costs_the_mask_head_nothing() -> None:
    """Without it the norms of the mask head become NaN, or other processes wait for gradients."""
    given = batch()
    for target in given["targets"]:
        target["masked"][:] = False
    model = detector()
    found = model(given)
    assert found["loss_mask"] == 0
    torch.stack(list(found.values())).sum().backward()
    head = list(model.roi_heads.mask_head.parameters())
    assert all(each.grad is not None and not each.grad.any() for each in head)
    assert all(each.isfinite().all() for each in model.state_dict().values())


def test_boxes_alone_need_no_mask_head() -> None:
    """Without it a set of boxes pays for a head that learns nothing."""
    given = batch()
    for target in given["targets"]:
        del target["masks"], target["masked"]
    config = replace(SMALL, masks=False)
    found, both = losses(given, config), losses(batch())
    assert found.keys() == both.keys() - {"loss_mask"}
    model = detector(config).eval()
    assert not any("mask" in name for name in model.state_dict())
    with torch.no_grad():
        assert all("masks" not in one and len(one["boxes"]) for one in model(given))


def test_regions_do_not_depend_on_earlier_batches() -> None:
    """torchvision takes the maps' scales from the first batch, before padding. After an image of 85
    pixels, padded to 128, it would read all boxes of all images at twice their coordinates.
    """
    generator = torch.Generator().manual_seed(0)
    low, square = (
        torch.randint(0, 256, (3, height, 128), dtype=torch.uint8, generator=generator)
        for height in (85, 128)
    )
    with torch.no_grad():
        (alone,) = detector().eval()({"images": [square]})
        model = detector().eval()
        model({"images": [low]})
        (after,) = model({"images": [square]})
    assert all(alone[name].equal(after[name]) for name in alone)
    heads = model.roi_heads
    for pool in (heads.box_roi_pool, heads.mask_roi_pool):
        assert pool.scales == [1 / 4, 1 / 8, 1 / 16, 1 / 32]


def test_large_objects_are_read_from_coarse_maps() -> None:
    """Lin et al. 2017, equation 1: level ⌊4 + log2(√(wh) / 224)⌋, clipped to 2..5."""
    sides = torch.tensor([20.0, 110, 115, 220, 230, 440, 450, 900])
    boxes = torch.stack([sides * 0, sides * 0, sides, sides], dim=1)
    levels = detector().roi_heads.box_roi_pool.map_levels([boxes])
    assert levels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_the_network_sees_what_the_encoder_was_trained_on() -> None:
    """RGB, each channel with its mean and deviation. With red and blue exchanged, the backbone's
    first layer would be useless. Padding is 0.
    """
    model = detector().eval()
    seen: list[Tensor] = []
    model.backbone.register_forward_pre_hook(lambda m, inputs: seen.append(inputs[0]))
    red = torch.zeros(3, 64, 48, dtype=torch.uint8)
    red[0] = 255
    with torch.no_grad():
        model({"images": [red]})
    normal = Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))(red / 255)
    assert seen[0].shape == (1, 3, 64, 64)
    torch.testing.assert_close(seen[0][0, :, :, :48], normal)
    assert not seen[0][..., 48:].any()


def test_a_frozen_encoder_stays_as_it_is() -> None:
    """If the batch statistics of a frozen backbone change, it is another backbone."""
    model = detector(frozen=5).train()
    before = {name: value.clone() for name, value in model.backbone.body.state_dict().items()}
    torch.stack(list(model(batch()).values())).sum().backward()
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert not any(name.startswith("backbone.body") for name in learning)
    assert any(name.startswith("backbone.fpn") for name in learning)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    after = model.backbone.body.state_dict()
    assert all(value.equal(after[name]) for name, value in before.items())


def test_the_default_is_the_authors_setting() -> None:
    """The published figures come from norms in pyramid and heads, and from these sizes."""
    torch.manual_seed(0)
    with torch.device("meta"):
        encoder, _ = build_backbone(InitConfig())
        model = Detector(encoder, 80, ModelConfig())

    def norms(part: nn.Module) -> int:
        return sum(isinstance(module, nn.BatchNorm2d) for module in part.modules())

    heads = model.roi_heads
    assert norms(model.backbone.fpn) == 8
    assert (norms(heads.box_head), norms(heads.mask_head)) == (4, 4)
    linear = [module for module in heads.box_head.modules() if isinstance(module, nn.Linear)]
    assert [tuple(layer.weight.shape) for layer in linear] == [(1024, 256 * 7 * 7)]
    assert heads.box_predictor.cls_score.out_features == 81
    assert heads.mask_predictor.mask_fcn_logits.out_channels == 81
    assert model.rpn.anchor_generator.sizes == ((32,), (64,), (128,), (256,), (512,))
    assert all(p.requires_grad for p in model.parameters())

    rpn, matcher, sampler = model.rpn, model.rpn.proposal_matcher, model.rpn.fg_bg_sampler
    assert rpn.anchor_generator.aspect_ratios == ((0.5, 1.0, 2.0),) * 5
    assert (matcher.high_threshold, matcher.low_threshold) == (0.7, 0.3)
    assert (sampler.batch_size_per_image, sampler.positive_fraction) == (256, 0.5)
    assert (rpn._pre_nms_top_n, rpn._post_nms_top_n, rpn.nms_thresh) == (
        {"training": 2000, "testing": 1000},
        {"training": 1000, "testing": 1000},
        0.7,
    )
    matcher, sampler = heads.proposal_matcher, heads.fg_bg_sampler
    assert (matcher.high_threshold, matcher.low_threshold) == (0.5, 0.5)
    assert (sampler.batch_size_per_image, sampler.positive_fraction) == (512, 0.25)
    assert heads.box_coder.weights == (10, 10, 5, 5)
    assert (heads.score_thresh, heads.nms_thresh, heads.detections_per_img) == (0.05, 0.5, 100)
    assert (heads.box_roi_pool.output_size, heads.mask_roi_pool.output_size) == ((7, 7), (14, 14))
    assert heads.box_roi_pool.sampling_ratio == heads.mask_roi_pool.sampling_ratio == 0


def test_initial_weights_are_detectron2s() -> None:
    """Initial scores are close to zero for all classes, and initial box deltas and masks close to
    zero. torchvision's initial weights are several times as large.
    """
    heads = detector(replace(SMALL, channels=64, box_features=256)).roi_heads
    for layer, deviation in (
        (heads.box_predictor.cls_score, 0.01),
        (heads.box_predictor.bbox_pred, 0.001),
        (heads.mask_predictor.mask_fcn_logits, 0.001),
    ):
        assert layer.weight.std().item() == pytest.approx(deviation, rel=0.15)
        assert not layer.bias.any()


def test_detections_lie_in_their_image() -> None:
    """The batch is padded to one size: a box in the padding would be a box of nothing."""
    model = detector().eval()
    given = batch()
    with torch.no_grad():
        found = model({"images": given["images"]})
    for one, image in zip(found, given["images"], strict=True):
        count = len(one["boxes"])
        assert one["masks"].shape == (count, 1, 28, 28) and 0 < count <= 5
        limit = torch.tensor([image.shape[2], image.shape[1]] * 2)
        assert (one["boxes"] >= 0).all() and (one["boxes"] <= limit).all()
        assert one["labels"].min() >= 1 and one["labels"].max() <= 3


def test_maps_that_are_no_numbers_are_refused() -> None:
    """Without it a detector that overflows in fp16 finds nothing, without a word."""
    model = detector().eval()
    nn.init.constant_(model.backbone.fpn.layer_blocks[0][0].weight, torch.inf)  # type: ignore[arg-type, index]
    with torch.no_grad(), pytest.raises(UserError, match="maps have NaN or infinite values"):
        model(batch())


def test_boxes_are_computed_in_float32_under_mixed_precision() -> None:
    """bfloat16 rounds a coordinate near 1,000 to a multiple of 4 or 8 pixels, and torchvision would
    give anchors the type of the maps.
    """
    model = detector().train()
    types: list[torch.dtype] = []

    def note(module: nn.Module, inputs: Any, output: list[Tensor]) -> None:
        types.extend(anchors.dtype for anchors in output)

    model.rpn.anchor_generator.register_forward_hook(note)
    model.roi_heads.box_head.register_forward_hook(lambda m, i, o: types.append(i[0].dtype))
    inside: list[torch.dtype] = []
    model.roi_heads.mask_head.register_forward_hook(lambda m, i, o: inside.append(o.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(batch())
    assert set(types) == {torch.float32} and inside == [torch.bfloat16]
    assert all(loss.dtype == torch.float32 for loss in losses.values())
    model.eval()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        (found, _) = model({"images": batch()["images"]})
    assert {value.dtype for value in found.values()} == {torch.float32, torch.int64}


@pytest.mark.parametrize("box", [(20.0, 12.0, 60.0, 52.0), (18.3, 10.7, 57.9, 49.2)])
def test_masks_are_pasted_where_their_targets_were_read(
    box: tuple[float, float, float, float],
) -> None:
    """torchvision reads the targets of the mask loss half a pixel right of and below their boxes.
    If masks were pasted at the boxes, every mask would be shifted.
    """
    rows, columns = torch.meshgrid(torch.arange(64), torch.arange(80), indexing="ij")
    disc = ((columns + 0.5 - 40) ** 2 + (rows + 0.5 - 32) ** 2 < 15**2).to(torch.uint8)
    place = torch.tensor([box])
    target = project_masks_on_boxes(disc[None], place, torch.tensor([0]), 28)[0]

    def overlap(shift: float) -> float:
        pasted = paste(target, (place[0] + shift).numpy(), 64, 80)
        both, either = disc.numpy() & pasted, disc.numpy() | pasted
        return float(both.sum() / either.sum())

    assert overlap(HALF_PIXEL) > 0.98
    assert overlap(HALF_PIXEL) > overlap(0) + 0.02 and overlap(HALF_PIXEL) > overlap(1) + 0.02
