"""Networks of timm as encoders: their maps are timm's own, and SlotCon trains them."""

import copy
import sys
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from model import ModelConfig, SlotCon, prepare
from model.architectures import IMAGENET
from model.encoder import build_encoder
from model.timm_encoder import TimmEncoder, facts, has_drop_path, stage_levels, weights_of
from pipeline.augment import IMAGENET_MEAN, IMAGENET_STD
from tests.helpers.tiny_slotcon import gradients, tiny_batch

timm = pytest.importorskip("timm")
SIZES = {"dim_hidden": 16, "dim_out": 8, "num_prototypes": 6}
ARCHS = ["test_vit", "test_convnext", "test_efficientnet", "test_resnet", "regnetx_002"]


def config(name: str, **more: object) -> ModelConfig:
    return ModelConfig(f"timm:{name}", **{**SIZES, **more})  # type: ignore[arg-type]


def model(name: str, **more: object) -> SlotCon:
    torch.manual_seed(0)
    return SlotCon(config(name, **more))


def views(side: int = 64) -> Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))


def seen_by(own: tuple[Tensor, Tensor], images: Tensor) -> Tensor:
    """ImageNet-normalised images, normalised by `own` mean and deviation instead."""
    mean, deviation = (torch.tensor(each)[:, None, None] for each in IMAGENET)
    return ((images * deviation + mean) - own[0]) / own[1]


@pytest.mark.parametrize("name", ARCHS)
def test_the_last_map_is_timms(name: str) -> None:
    """Of the same weights, on images normalised as timm says. Without it another level, a missing
    norm or a wrong normalisation would train, and give worse features than the network can.
    """
    torch.manual_seed(0)
    encoder = TimmEncoder(f"timm:{name}").eval()
    flexible = {"dynamic_img_size": True} if "vit" in name else {}
    theirs = timm.create_model(name, num_classes=0, **flexible).eval()
    theirs.load_state_dict(encoder.net.state_dict(), strict=True)
    settings = theirs.pretrained_cfg
    own = tuple(torch.tensor(settings[key])[:, None, None] for key in ("mean", "std"))
    images = views(96)
    with torch.inference_mode():
        found = encoder(images)
        expected = theirs.forward_intermediates(
            seen_by(own, images), norm=True, intermediates_only=True
        )[-1]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert found.shape == (2, encoder.dim, *[96 // encoder.strides[4]] * 2)


@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "test_resnet", "regnetx_002"])
def test_the_last_map_is_the_input_of_timms_pooling(name: str) -> None:
    """Its `forward_features`, without class tokens. Without it the map could be another one that
    `forward_intermediates` numbers."""
    torch.manual_seed(0)
    encoder = TimmEncoder(f"timm:{name}", image_stats=IMAGENET).eval()
    images = views(64)
    with torch.inference_mode():
        expected = encoder.net.forward_features(images)
        if expected.ndim == 3:
            tokens = expected[:, encoder.net.num_prefix_tokens :]
            expected = tokens.transpose(1, 2).unflatten(2, (4, 4))
        torch.testing.assert_close(encoder(images), expected, rtol=0, atol=0)


def test_stages() -> None:
    """The last four levels of a pyramid; the quarters of a ViT's blocks. Without it `supervise`
    would put heads on other stages than a ResNet's."""
    assert stage_levels([2, 4, 8, 16, 32]) == {1: 1, 2: 2, 3: 3, 4: 4}
    assert stage_levels([4, 8, 16, 32]) == {1: 0, 2: 1, 3: 2, 4: 3}
    assert stage_levels([4, 8, 16]) == {2: 0, 3: 1, 4: 2}
    assert stage_levels([16] * 12) == {1: 2, 2: 5, 3: 8, 4: 11}
    assert stage_levels([14] * 6) == {1: 0, 2: 2, 3: 3, 4: 5}
    assert dict(config("test_convnext").strides) == {1: 4, 2: 8, 3: 16, 4: 32}
    assert config("test_vit").cells_of(64) == 16


@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "test_efficientnet"])
def test_each_stage_can_be_the_last(name: str) -> None:
    """Its map is the same whether later stages are built or not. Without it a short encoder would
    have other features, or compute what nothing reads.
    """
    whole = TimmEncoder(f"timm:{name}").eval()
    short = TimmEncoder(f"timm:{name}", 2).eval()
    kept = {name: whole.state_dict()[name] for name in short.state_dict()}
    assert len(kept) < len(whole.state_dict())
    short.load_state_dict(kept)
    with torch.inference_mode():
        first, second = whole.maps(views(), (2, 1))
        torch.testing.assert_close(short(views()), first)
        assert second.shape[1] == whole.stage_dims[1]
    assert short.dim == whole.stage_dims[2] and list(short.strides) == [1, 2]


@pytest.mark.parametrize("name", ARCHS)
def test_slotcon_trains_all_that_the_map_depends_on(name: str) -> None:
    """And nothing else asks for gradients: DistributedDataParallel would wait for weights that
    never get one. Frozen weights are still there, so that timm loads all strictly.
    """
    trained = model(name, supervise=(3, 4))
    trained(*tiny_batch(64)).loss.backward()
    assert gradients(trained.student)
    trained.update_teacher(0.5)
    theirs = timm.create_model(name, num_classes=0).state_dict()
    assert trained.student.encoder.net.state_dict().keys() == theirs.keys()


def test_drop_paths_follow_from_the_batchs_number() -> None:
    """So a resumed run draws the same, the student alone drops, and nobody else's random numbers
    change. Without it a resumed run would end elsewhere, or targets would be random.
    """
    dropping = model("test_vit", drop_path=0.5)
    batch = tiny_batch(64)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    copies = [copy.deepcopy(dropping) for _ in range(3)]  # the first forward moves the centre
    first, again, other = (
        one(*batch, draw=(0, n)).loss.item() for one, n in zip(copies, (1, 1, 2), strict=True)
    )
    assert first == again != other
    assert torch.equal(state, torch.get_rng_state())
    images = views()
    assert torch.equal(dropping.teacher.encoder(images), dropping.teacher.encoder(images))
    assert not torch.equal(dropping.student.encoder(images), dropping.student.encoder(images))
    with pytest.raises(ValueError, match="drop_path must be 0: timm:densenet121 has none"):
        config("densenet121", drop_path=0.1)
    assert has_drop_path("timm:test_convnext")


@pytest.mark.parametrize(("name", "drop_path"), [("test_efficientnet", 0.0), ("test_vit", 0.3)])
def test_checkpointing_changes_nothing(name: str, drop_path: float) -> None:
    """Gradients and running statistics are bit-equal, with drop paths too. timm's own checkpointing
    counts each batch twice in BatchNorm's statistics.
    """
    results, kept = [], []
    for checkpointing in (False, True):
        one = model(name, drop_path=drop_path)
        prepare(one, checkpointing=checkpointing)
        sizes = list[int]()

        def count(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loss = one(*tiny_batch(64), draw=(0, 3)).loss
        loss.backward()
        results.append({**gradients(one.student), **dict(one.named_buffers())})
        kept.append(sum(sizes))
    different = [n for n in results[0] if not torch.equal(results[0][n], results[1][n])]
    assert not different and kept[1] < kept[0]


def test_own_normalisation_is_recorded() -> None:
    """In the configuration, so that it outlives timm's next release, and in the checkpoint. Without
    it evaluation would show the network other colours than training did.
    """
    assert IMAGENET == (IMAGENET_MEAN, IMAGENET_STD)
    halves = ((0.5,) * 3, (0.5,) * 3)
    recorded = config("test_vit")
    assert recorded.image_stats == halves == replace(recorded, stages=2).image_stats
    assert config("test_vit", image_stats=IMAGENET).image_stats == IMAGENET
    assert ModelConfig().image_stats is None
    other = TimmEncoder("timm:test_vit", image_stats=IMAGENET)
    other.load_state_dict(build_encoder(recorded).state_dict())
    torch.testing.assert_close(other.scale.flatten(), torch.tensor(IMAGENET_STD) / 0.5)


def test_dilated_and_frozen() -> None:
    """Dilation keeps the weights. A frozen stage does not move in training mode, nor do its norms,
    and its output is that of the unfrozen one in eval mode, with the activation in timm's norms.
    """
    torch.manual_seed(0)
    encoder = TimmEncoder("timm:test_efficientnet")
    for _ in range(3):
        encoder(views() + 1)
    encoder.eval()
    with torch.inference_mode():
        expected = encoder.maps(views(), (2, 4))
        finer = encoder.dilated(16)
        assert finer(views()).shape[2:] == (4, 4)
        torch.testing.assert_close(finer.maps(views(), (2,))[0], expected[0])
    with pytest.raises(ValueError, match="timm:test_vit: it cannot be dilated"):
        TimmEncoder("timm:test_vit").dilated(8)
    encoder.freeze(2)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    found = encoder.train().maps(views(), (2, 4))
    torch.testing.assert_close(found[0], expected[0])
    found[1].sum().backward()
    moved = {n for n, value in encoder.state_dict().items() if not torch.equal(value, before[n])}
    frozen = encoder.names_up_to(2)
    assert moved and not {name.rpartition(".")[0] for name in frozen} & {
        name.removeprefix("net.").rpartition(".")[0] for name in moved
    }
    learning = {name for name, weight in encoder.net.named_parameters() if weight.requires_grad}
    assert learning and not learning & frozen


def test_what_is_not_an_encoder_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is loaded. Without it the user would see a traceback of timm's."""
    refused = {
        "convnxt_atto": "timm has no such network; near it: convnext_atto",
        "test_vit.nonsense": "timm has no such weights; it has: test_vit.r160_in1k",
        "levit_128s": "its maps do not divide an image",
        "test_vit4.x.y": "no such weights",
    }
    for name, message in refused.items():
        with pytest.raises(ValueError, match=f"arch timm:{name}: .*{message}") as caught:
            config(name)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="arch must be one of"):
        ModelConfig("timm:hf-hub:someone/something")
    with pytest.raises(ValueError, match="drop_path must be 0 unless"):
        ModelConfig(drop_path=0.1)
    monkeypatch.setattr("model.timm_encoder.outline", lambda arch, _=None: torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="timm gives no maps"):
        config("test_convnext2")
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match=r"needs timm \(pip install \.\[timm\]\)"):
        config("test_convnext3")


def test_views_that_do_not_fit() -> None:
    """No multiple of the stride, or a size that the architecture does not know. Without it the map
    would cover a part of the view, and SlotCon would align the wrong cells.
    """
    assert "a multiple of 16" in str(config("test_vit").refused_side(72))
    assert "a multiple of 32" in str(config("test_convnext").refused_side(16))
    assert config("test_convnext", stages=2).refused_side(72) is None
    assert config("test_vit").refused_side(96) is None
    assert "a size that timm:test_maxvit takes" in str(config("test_maxvit").refused_side(96))
    assert ModelConfig().refused_side(97) is None


def test_facts_are_measured() -> None:
    """Strides and channels of every stage are those of real maps, for a network of each kind."""
    for name in ("test_vit2", "test_byobnet"):
        known = facts(f"timm:{name}")
        encoder = TimmEncoder(f"timm:{name}").eval()
        with torch.inference_mode():
            maps = encoder.maps(views(64), list(known.strides))
        for stage, found in zip(known.strides, maps, strict=True):
            side = 64 // known.strides[stage]
            assert found.shape == (2, known.dims[stage], side, side), (name, stage)


def test_an_encoder_is_built_where_no_gradients_are() -> None:
    """Without it a network cannot be opened inside of an evaluation, unless one was before."""
    names = weights_of.__wrapped__("timm:test_efficientnet", 4)
    with torch.inference_mode():
        assert weights_of.__wrapped__("timm:test_efficientnet", 4) == names
