"""The dilated encoder and the heads on it."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from evaluation.datasets.squares import normalise
from transfer.backbone import build_backbone
from transfer.config import InitConfig
from transfer.segmentation.config import ModelConfig
from transfer.segmentation.model import FCN, build_head

SMALL = ModelConfig(channels=8, convs=2, dilation=2)


def batch(seed: int = 0, side: int = 65) -> dict[str, torch.Tensor]:
    """Two images, three classes, a part of the pixels void."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (2, side, side, 3), generator=generator, dtype=torch.uint8)
    labels = torch.randint(3, (2, side, side), generator=generator, dtype=torch.uint8)
    labels[:, :20] = 255
    return {"pixels": pixels, "labels": labels}


def model(head: ModelConfig = SMALL, **init: object) -> FCN:
    torch.manual_seed(0)
    encoder, _ = build_backbone(InitConfig(arch="resnet18", **init))  # type: ignore[arg-type]
    return FCN(encoder, 3, head)


def test_head_of_the_published_runs() -> None:
    """FCN d6 on VOC: two 3×3 convolutions of dilation 6 and a classifier, nothing else."""
    head = build_head(2048, 21, ModelConfig())
    convs = [module for module in head.modules() if isinstance(module, nn.Conv2d)]
    assert [(c.in_channels, c.out_channels, c.kernel_size, c.dilation) for c in convs] == [
        (2048, 256, (3, 3), (6, 6)),
        (256, 256, (3, 3), (6, 6)),
        (256, 21, (1, 1), (1, 1)),
    ]
    assert [conv.bias is None for conv in convs] == [True, True, False]
    assert convs[0].weight.std().item() == pytest.approx((2 / (9 * 256)) ** 0.5, rel=0.02)
    assert convs[-1].weight.std().item() == pytest.approx(0.01, rel=0.1)
    assert head(torch.randn(2, 2048, 5, 7)).shape == (2, 21, 5, 7)

    ade = ModelConfig(channels=512, dilation=1, concat=True, dropout=0.1)
    wide = build_head(2048, 150, ade)
    widths = [m.in_channels for m in wide.modules() if isinstance(m, nn.Conv2d)]
    assert widths == [2048, 512, 2048 + 512, 512]
    assert [m.p for m in wide.modules() if isinstance(m, nn.Dropout2d)] == [0.1]


def test_loss_is_a_mean_over_all_pixels() -> None:
    """As in mmsegmentation, void pixels add nothing, but count. A mean over labelled pixels would
    amount to another learning rate, and be NaN if all pixels are void.
    """
    network, data = model().train(), batch()
    found = network(data)["seg"]
    features = network.train().encoder(normalise(data["pixels"]))
    logits = F.interpolate(network.head(features), (65, 65), mode="bilinear", align_corners=True)
    chance = logits.softmax(dim=1).detach()
    total = 0.0
    for b in range(2):
        for y in range(20, 65):
            for x in range(65):
                total -= float(chance[b, int(data["labels"][b, y, x]), y, x].log())
    assert found.item() == pytest.approx(total / (2 * 65 * 65), rel=1e-4)

    void = data | {"labels": torch.full_like(data["labels"], 255)}
    loss = network(void)["seg"]
    loss.backward()
    assert loss.item() == 0
    assert all(w.grad is not None and not w.grad.any() for w in network.parameters())


def test_auxiliary_head_learns_from_layer3() -> None:
    """The head exists in training only; its gradients do not reach layer4."""
    network = model(replace(SMALL, auxiliary_weight=0.4, dropout=0.1, concat=True))
    losses = network.train()(batch())
    assert set(losses) == {"seg", "auxiliary"}
    losses["auxiliary"].backward()
    layer4, layer3 = (network.encoder.get_submodule(f"layer{n}").parameters() for n in (4, 3))
    assert all(weight.grad is None for weight in layer4)
    assert any(weight.grad is not None for weight in layer3)
    same = model(replace(SMALL, auxiliary_weight=0.8, dropout=0.1, concat=True)).train()
    torch.manual_seed(1)
    twice = same(batch())["auxiliary"]
    torch.manual_seed(1)
    once = model(replace(SMALL, auxiliary_weight=0.4, dropout=0.1, concat=True))
    torch.manual_seed(1)
    assert once.train()(batch())["auxiliary"].item() == pytest.approx(twice.item() / 2)


def test_linear_head_on_a_frozen_encoder() -> None:
    """Only the 1×1 convolution learns, and the encoder's running statistics do not change."""
    network = model(ModelConfig(head="linear"), frozen=5).train()
    before = {name: tensor.clone() for name, tensor in network.encoder.state_dict().items()}
    sum(network(batch()).values()).backward()  # type: ignore[union-attr]
    learning = {name for name, weight in network.named_parameters() if weight.requires_grad}
    assert learning == {"head.2.weight", "head.2.bias"}
    assert all(weight.grad is None for weight in network.encoder.parameters())
    for name, tensor in network.encoder.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_scores_have_the_images_size() -> None:
    """For any size, also if it is no multiple of a cell. The corners of cells stay corners."""
    network = model().eval()
    with torch.inference_mode():
        scores = network.scores(batch(side=51)["pixels"])
        cells = network.head(network.encoder(normalise(batch(side=51)["pixels"])))
    assert scores.shape == (2, 3, 51, 51)
    assert cells.shape[2:] == (4, 4)
    torch.testing.assert_close(scores[:, :, ::50, ::50], cells[:, :, ::3, ::3])
