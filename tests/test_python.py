"""`import slotstream`: the examples in its docstrings and in docs/python.md, and other trainers on
its loader.
"""

import doctest
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

import slotstream
from slotstream import Loader, Model, UserError
from tests import ROOT
from tests.helpers.betons import varied
from tools import export

EXAMPLES = (
    slotstream.pack, Loader, slotstream.pretrain, slotstream.load, Model.features, Model.segment,
    slotstream.evaluate,
)  # fmt: skip
"""In this order: each uses the files of those before it."""


@pytest.fixture(scope="module")
def example_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which all examples of the docstrings have run, one after the other."""
    folder, before = tmp_path_factory.mktemp("examples"), Path.cwd()
    os.chdir(folder)
    try:
        for example in EXAMPLES:
            found = doctest.DocTestFinder(recurse=False).find(example, example.__name__, globs={})
            assert found and found[0].examples, f"{example.__name__} has no example"
            runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.ELLIPSIS)
            problems: list[str] = []
            runner.run(found[0], out=problems.append)
            assert not problems, "".join(problems)
    finally:
        os.chdir(before)
    return folder


@pytest.fixture(scope="module")
def beton(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten small images."""
    folder = tmp_path_factory.mktemp("data")
    for number, image in enumerate(varied(10)):
        Image.fromarray(image).save(folder / f"{number}.jpg")
    return slotstream.pack(folder, folder / "ten.beton")


def test_examples_do_what_they_say(example_folder: Path) -> None:
    """Without it the first thing that a user copies may not run.

    It packs, trains a step and evaluates: some seconds.
    """
    assert (example_folder / "runs/one/checkpoints/latest/model.safetensors").exists()


def test_the_import_is_light() -> None:
    """Without it `import slotstream` costs seconds, also where only its name is needed."""
    code = "import sys, slotstream; print({'torch', 'numpy', 'numba', 'yaml'} & {*sys.modules})"
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True
    )
    assert process.stdout == b"set()\n"
    assert {*slotstream.__all__} <= {*dir(slotstream)}
    with pytest.raises(AttributeError, match="no attribute 'Lader'"):
        slotstream.Lader  # noqa: B018


BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "docs/python.md").read_text(), re.DOTALL)


def test_the_page_runs_from_top_to_bottom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without it what a user copies from docs/python.md fails, or shows the untrained network's
    score as the run's. Lightning is a stand-in here.
    """
    monkeypatch.chdir(tmp_path)
    lightning = ModuleType("lightning")
    lightning.LightningDataModule = object  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lightning", lightning)
    names: dict[str, Any] = {}
    for block in BLOCKS:
        exec(compile(block, "docs/python.md", "exec"), names)
    scores = {row["network"]: row["value"] for row in names["rows"] if row["metric"] == "miou"}
    assert set(scores) == {"trained", "untrained"}
    assert str(scores) in capsys.readouterr().out
    module = names["Views"]("sample.beton", 4, 32)
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    module.trainer = SimpleNamespace(strategy=strategy, global_rank=0, world_size=1)
    _, *rest = [batch.index.tolist() for batch in module.train_dataloader()]
    next(iter(module.train_dataloader()))
    module.load_state_dict(module.state_dict())
    assert [batch.index.tolist() for batch in module.train_dataloader()] == rest


class Contrast(nn.Module):
    """Momentum contrast (He et al., CVPR 2020, algorithm 1), small: a convolution, a slow copy of
    it that makes the keys, and a queue of earlier keys as negatives.
    """

    queue: Tensor

    def __init__(self, dim: int = 8, queue: int = 16) -> None:
        super().__init__()
        self.online, self.slow = (
            nn.Sequential(nn.Conv2d(3, dim, 7, 4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
            for _ in range(2)
        )
        self.slow.load_state_dict(self.online.state_dict())
        self.register_buffer("queue", F.normalize(torch.randn(queue, dim), dim=1))

    def forward(self, views: Tensor) -> Tensor:
        """Views [2, B, 3, S, S] → the loss."""
        queries = F.normalize(self.online(views[0]), dim=1)
        with torch.no_grad():
            for slow, fast in zip(self.slow.parameters(), self.online.parameters(), strict=True):
                slow.lerp_(fast, 0.01)
            keys = F.normalize(self.slow(views[1]), dim=1)
        same, others = (queries * keys).sum(dim=1, keepdim=True), queries @ self.queue.T
        with torch.no_grad():
            self.queue = torch.cat([keys, self.queue])[: len(self.queue)]
        logits = torch.cat([same, others], dim=1) / 0.2
        return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.int64))


def losses(beton: Path, steps: int, stop: int | None = None) -> list[float]:
    """The losses of a plain loop; with `stop`, of one that is cut after that step and begun again
    from what it has saved.
    """
    torch.manual_seed(0)
    model = Contrast()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    loader, found = Loader(beton, 4, size=32, device="cpu"), list[float]()
    while len(found) < steps:
        for batch in loader:
            loss = model(batch.views)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
            if len(found) in (stop, steps):
                break
        if len(found) == stop:
            state = loader.state_dict()
            loader = Loader(beton, 4, size=32, device="cpu", threads=1)
            loader.load_state_dict(state)
    return found


def test_a_plain_loop_trains_and_resumes_with_the_same_batches(beton: Path) -> None:
    """Without it the loader serves our trainer alone, or a run that continues repeats images."""
    whole = losses(beton, steps=5)
    assert np.isfinite(whole).all() and len({*whole}) == 5
    assert losses(beton, steps=5, stop=1) == whole, "in the middle of an epoch"
    assert losses(beton, steps=5, stop=2) == whole, "after its last batch"


def test_the_loader_gives_the_batches_of_a_run(beton: Path) -> None:
    """Without it another trainer sees other views than SlotCon with the same seed."""
    from pipeline.beton import Beton
    from pipeline.loader import make_loader
    from pipeline.views import ViewConfig

    loader = Loader(beton, 4, size=32, seed=3, device="cpu", views={"min_scale": 0.5})
    source = make_loader(
        Beton(beton), ViewConfig(size=32, min_scale=0.5), 4,
        crops="auto", backend="auto", seed=3, device=torch.device("cpu"),
    )  # fmt: skip
    for epoch in range(2):
        pairs = list(zip(loader, source.epoch(epoch), strict=True))
        assert len(pairs) == len(loader) == 2
        for ours, theirs in pairs:
            for name in ("views", "overlap", "flipped", "index"):
                assert torch.equal(getattr(ours, name), getattr(theirs, name))


def test_a_loop_resumes_with_the_same_masks(beton: Path) -> None:
    """Without it a masked model that continues sees other cells, or none are given to it at all; or
    a state that was saved before there were masks is refused.
    """
    options: dict[str, Any] = {"size": 32, "device": "cpu"}
    masked = options | {"views": {"mask_ratio": 0.5, "mask_cell": 8}}
    loader = Loader(beton, 4, **masked)
    next(iter(loader))
    state = loader.state_dict()
    again = Loader(beton, 4, **masked, threads=1)
    again.load_state_dict(state)
    (expected,), (found,) = list(loader), list(again)
    assert found.masks is not None and expected.masks is not None
    assert found.masks.shape == (2, 4, 4, 4) and torch.equal(found.masks, expected.masks)
    with pytest.raises(UserError, match="state: views was"):
        Loader(beton, 4, **options).load_state_dict(state)
    with pytest.raises(UserError, match="views: size must be a multiple of mask_cell"):
        Loader(beton, 4, **options, views={"mask_ratio": 0.5, "mask_cell": 20})
    plain = Loader(beton, 4, **options)
    before = plain.state_dict()
    before["views"] = {k: v for k, v in before["views"].items() if not k.startswith("mask")}
    plain.load_state_dict(before)
    assert next(iter(plain)).masks is None


def test_ranks_share_a_batch(beton: Path) -> None:
    """Without it the processes of a distributed run train on the same images."""
    whole = next(iter(Loader(beton, 4, size=32, device="cpu"))).index
    parts = [
        next(iter(Loader(beton, 4, size=32, device="cpu", rank=rank, world=2))) for rank in (0, 1)
    ]
    assert torch.equal(torch.cat([part.index for part in parts]).sort()[0], whole.sort()[0])


@pytest.mark.parametrize(
    ("changed", "named"),
    [({"seed": 1}, "seed"), ({"size": 48}, "views"), ({"order": "sequential"}, "order")],
)
def test_a_state_of_other_batches_is_refused(beton: Path, changed: Any, named: str) -> None:
    """Without it a loop continues with images that it has seen, without a word."""
    state = Loader(beton, 4, size=32, device="cpu").state_dict()
    with pytest.raises(UserError, match=f"state: {named} was"):
        Loader(beton, 4, **{"size": 32, "device": "cpu", **changed}).load_state_dict(state)


def test_bad_input_raises(tmp_path: Path, beton: Path) -> None:
    """Without it a typing mistake in a notebook ends its kernel, or shows a traceback of ours."""
    with pytest.raises(UserError, match="unrecognized arguments: --side=5"):
        slotstream.pack(tmp_path, tmp_path / "a.beton", side=5)
    with pytest.raises(UserError, match="invalid choice: 'foldr'"):
        slotstream.pack(tmp_path, tmp_path / "a.beton", "foldr")
    with pytest.raises(UserError, match="--quality cannot be used"):
        slotstream.pack(tmp_path, tmp_path / "a.beton", quality=5)
    with pytest.raises(UserError, match=r"unknown key train\.epoch "):
        slotstream.pretrain(beton, tmp_path / "run", "scenes_cpu", train={"epoch": 1})
    with pytest.raises(UserError, match="unrecognized arguments: --flop"):
        slotstream.evaluate(tmp_path, flop=True)
    with pytest.raises(UserError, match="views: "):
        Loader(beton, 4, views={"min_scal": 0.5})
    with pytest.raises(UserError, match=r"nothing\.beton"):
        Loader(tmp_path / "nothing.beton", 4)
    with pytest.raises(UserError):
        slotstream.load(tmp_path / "nothing")
    for arguments, message in [
        ({"device": "gpu"}, "device must be 'cpu', 'cuda' or 'cuda:N', not 'gpu'"),
        ({"device": "cuda"}, "device cuda: PyTorch finds 0 CUDA GPUs here"),
        ({"dtype": "float16"}, "dtype must be one of torch.float32"),
        ({"dtype": torch.float64}, "dtype must be one of torch.float32"),
        ({"path": None}, "a path is needed, not None"),
        ({"order": "quasi_random"}, "order must be one of random, quasi-random, sequential, not"),
        ({"on_corrupt": "Replace"}, "on_corrupt must be one of stop, replace, not 'Replace'"),
        ({"crops": "gpu"}, "crops must be one of auto, device, host, dali, not 'gpu'"),
        ({"rank": -1, "world": 2}, "rank must be a whole number from 0 to 1, not -1"),
        ({"rank": 2, "world": 2}, "rank must be a whole number from 0 to 1, not 2"),
        ({"world": 0}, "world must be a whole number from 1 to "),
        ({"seed": 1.5}, "seed must be a whole number from 0 to "),
        ({"threads": -1}, "threads must be a whole number from 1 to "),
        ({"batch_size": "4"}, "batch_size must be a whole number from 1 to "),
    ]:
        with pytest.raises(UserError, match=message):
            Loader(**{"path": beton, "batch_size": 4, **arguments})  # type: ignore[arg-type]
    with pytest.raises(UserError, match="a path is needed, not None"):
        slotstream.load(None)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="device must be"):
        slotstream.load(beton, device="gpu")


def test_images_in_each_form_give_the_same(example_folder: Path) -> None:
    """Without it a list of PIL images or normalised views is read wrongly."""
    model = slotstream.load(example_folder / "runs/one", device="cpu")
    pixels = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    normalised = torch.from_numpy(((pixels / 255 - mean) / std).transpose(0, 3, 1, 2)).float()
    expected = model.features(pixels)
    assert torch.equal(model.features([Image.fromarray(image) for image in pixels]), expected)
    assert torch.equal(model.features(torch.from_numpy(pixels)), expected)
    torch.testing.assert_close(model.features(normalised), expected)
    assert model.slotcon is not None
    with torch.no_grad():
        torch.testing.assert_close(model.slotcon.teacher.encoder(normalised), expected)
        scores = model.slotcon.segment(normalised)[0]
    up = F.interpolate(scores, (64, 64), mode="bilinear").argmax(dim=1)
    assert (model.segment(pixels) == up).float().mean() > 0.99  # a tie may fall either way
    for wrong in (pixels[0], pixels[..., :1], pixels.astype(np.int64), [pixels[0], pixels[1, :32]]):
        with pytest.raises(UserError, match="images must"):
            model.features(wrong)


def test_a_head_learns_on_features(example_folder: Path) -> None:
    """Without it torch refuses to learn from features: tensors of its inference mode."""
    features = slotstream.load(example_folder / "runs/one", device="cpu").features(
        np.zeros((1, 64, 64, 3), np.uint8)
    )
    head = nn.Conv2d(512, 2, 1)
    head(features).sum().backward()
    assert head.weight.grad is not None


def test_a_file_of_weights_has_features_and_no_segments(
    example_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without it exported weights cannot be used, or are segmented by prototypes of noise."""
    file = example_folder / "weights.safetensors"
    command = [
        "export",
        str(example_folder / "runs/one"),
        "--to",
        "torchvision",
        "--out",
        str(file),
    ]
    monkeypatch.setattr(sys, "argv", command)
    export.main()
    images = np.full((1, 64, 64, 3), 99, np.uint8)
    model, run = (slotstream.load(path, "cpu") for path in (file, example_folder / "runs/one"))
    assert torch.equal(model.features(images, "3+4"), run.features(images, "3+4"))
    with pytest.raises(UserError, match="load a run"):
        model.segment(images)


def test_the_beginning_of_an_option_is_none(tmp_path: Path) -> None:
    """Without it a mistyped `max_sid` is max_side, and nobody is told."""
    with pytest.raises(slotstream.UserError, match="unrecognized arguments: --max-sid=3"):
        slotstream.pack(tmp_path, tmp_path / "o.beton", store="jpeg", max_sid=3)
