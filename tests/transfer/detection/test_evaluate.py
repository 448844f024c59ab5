"""Average precision: equal to pycocotools', from masks at full size, over all processes."""

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from faster_coco_eval.core import mask as rle
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.parallel import ordered_map
from tests.helpers.coco_sets import (
    CATEGORIES,
    annotation,
    box_mask,
    run_lengths,
    varied_set,
    write_coco,
)
from transfer.detection import evaluate as evaluation
from transfer.detection.dataset import CocoInstances, nearest, open_instances
from transfer.detection.evaluate import paste, score, to_results

ALONE = SimpleNamespace(
    process_index=0, num_processes=1, is_main_process=True, device=torch.device("cpu")
)


def opened(root: Path) -> CocoInstances:
    return open_instances(root, "annotations/instances_{split}.json", "{split}", "train2017")


def disc(x: int, y: int, radius: int, size: tuple[int, int]) -> np.ndarray:
    rows, columns = np.mgrid[: size[0], : size[1]]
    return ((rows - y) ** 2 + (columns - x) ** 2 <= radius**2).astype(np.uint8)


def shaky_set(root: Path) -> tuple[CocoInstances, list[dict[str, Any]]]:
    """Discs of COCO's three sizes, a crowd and an image without objects. Detections of them: some
    are shifted by a few pixels, of another class, duplicated, or without an object.
    """
    generator = np.random.default_rng(0)
    sizes = [(240, 320), (300, 220), (260, 260), (100, 120)]
    ids = [category["id"] for category in CATEGORIES]
    objects, found = [], []
    for image, size in enumerate(sizes[:-1], start=1):
        for n in range(14):
            radius = int(generator.integers(4, 70))
            x, y = int(generator.integers(size[1])), int(generator.integers(size[0]))
            mask, category = disc(x, y, radius, size), ids[n % 2]
            box = tuple(int(v) for v in rle.toBbox(rle.encode(np.asfortranarray(mask))))
            crowd = n == 13
            more = {"area": int(mask.sum()), "iscrowd": int(crowd)}
            objects.append(annotation(image, category, box, run_lengths(mask), **more))  # type: ignore[arg-type]
            for _ in range(int(generator.integers(0, 4))):
                dx, dy, dr = (int(v) for v in generator.integers(-4, 5, 3))
                shape = disc(x + dx, y + dy, max(2, radius + dr), size)
                runs = rle.encode(np.asfortranarray(shape))
                wrong = generator.random() < 0.2
                found.append(
                    {
                        "image_id": image,
                        "category_id": ids[(n + wrong) % 2],
                        "bbox": [float(v) for v in rle.toBbox(runs)],
                        "score": round(float(generator.random()), 2),  # some are equal
                        "segmentation": runs,
                    }
                )
    found.append(
        {**found[0], "image_id": 4, "segmentation": rle.encode(np.zeros((100, 120), "u1"))}
    )
    write_coco(root, "train2017", sizes, objects)
    return opened(root), found


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scores_are_those_of_pycocotools(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """All published figures come from pycocotools."""
    pytest.importorskip("pycocotools")
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    source, found = shaky_set(tmp_path)
    rows = {row["metric"]: row["value"] for row in score(source, copy.deepcopy(found))}
    truth = COCO(str(source.annotations))
    for name, kind, key in (("box", "bbox", "bbox"), ("mask", "segm", "segmentation")):
        own = [{k: one[k] for k in ("image_id", "category_id", "score", key)} for one in found]
        theirs = COCOeval(truth, truth.loadRes(own), kind)
        theirs.evaluate()
        theirs.accumulate()
        theirs.summarize()
        ours = [rows[f"{name}_{metric}"] for metric in evaluation.METRICS]
        assert ours == pytest.approx(theirs.stats[:6].tolist(), abs=1e-6)
        assert 0.1 < ours[0] < 0.9 and len(set(ours)) > 4  # or it would prove little


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("maskless", [False, True])
def test_written_detections_have_the_printed_scores(
    maskless: bool, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Without it a benchmark's server refuses the files, or sees other detections than were scored.
    Masks are scored without the images where an object has none.
    """
    pytest.importorskip("pycocotools")
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    source, found = shaky_set(tmp_path)
    if maskless:
        content = json.loads(source.annotations.read_text())
        content["annotations"][3]["segmentation"] = []
        source.annotations.write_text(json.dumps(content))
        source = opened(tmp_path)
        assert source.maskless == {1}
    rows = {row["metric"]: row["value"] for row in score(source, found)}
    evaluation.write_results(tmp_path, found)
    truth = COCO(str(source.annotations))
    for name, kind in (("box", "bbox"), ("mask", "segm")):
        theirs = COCOeval(truth, truth.loadRes(str(tmp_path / f"{kind}.json")), kind)
        if maskless and name == "mask":
            theirs.params.imgIds = [2, 3, 4]
        theirs.evaluate()
        theirs.accumulate()
        theirs.summarize()
        ours = [rows[f"{name}_{metric}"] for metric in evaluation.METRICS]
        assert ours == pytest.approx(theirs.stats[:6].tolist(), abs=1e-6)
        assert 0.1 < ours[0] < 0.9
    written = json.loads((tmp_path / "segm.json").read_text())
    assert len(written) == len(found)
    assert written[0].keys() == {"image_id", "category_id", "score", "segmentation"}
    assert isinstance(written[0]["segmentation"]["counts"], str)


def test_boxes_alone_are_scored(tmp_path: Path) -> None:
    """Without it a set without masks has no scores, or mask scores of boxes."""
    source, found = shaky_set(tmp_path)
    both = score(source, found)
    alone = score(source, found, masks=False)
    assert alone == [row for row in both if row["metric"].startswith("box_")]
    content = json.loads(source.annotations.read_text())
    for one in content["annotations"][:-1]:
        one["segmentation"] = []
    content["images"].pop()
    source.annotations.write_text(json.dumps(content))
    without = score(opened(tmp_path), [one for one in found if one["image_id"] != 4])
    assert {row["metric"].partition("_")[0] for row in without} == {"box"}


class Oracle(nn.Module):
    """Returns the annotated objects, in the coordinates of its input image."""

    def __init__(self, source: CocoInstances) -> None:
        super().__init__()
        self.source, self.next = source, 0

    def forward(self, batch: dict[str, list[Tensor]]) -> list[dict[str, Tensor]]:
        (image,) = batch["images"]
        record = self.source.records[self.next]
        self.next += 1
        height, width = image.shape[1:]
        scale = torch.tensor([width / record.width, height / record.height] * 2)
        count = len(record.boxes)
        return [
            {
                "boxes": torch.from_numpy(record.boxes) * scale,
                "labels": torch.from_numpy(record.labels),
                "scores": torch.linspace(1, 0.5, count),
                "masks": torch.ones(count, 1, 28, 28),
            }
        ]


def test_a_perfect_detector_is_perfect(tmp_path: Path) -> None:
    """Labels become category ids again, boxes return to the stored image, and masks cover them. Any
    mistake between network and file would cost precision here.
    """
    varied_set(tmp_path)
    source = opened(tmp_path)
    rows = evaluation.evaluate(Oracle(source), source, 480, 1000, ALONE)  # type: ignore[arg-type]
    values = {row["metric"]: row["value"] for row in rows}
    assert values["box_ap"] == 1 and values["mask_ap"] > 0.9
    assert "box_ap_large" not in values  # there is no large object


def test_all_processes_share_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A score of one process's images alone would look like a score of all."""
    varied_set(tmp_path)
    source = opened(tmp_path)
    whole = evaluation.evaluate(Oracle(source), source, 96, 1000, ALONE)  # type: ignore[arg-type]
    gathered: list[Any] = []
    monkeypatch.setattr(evaluation, "gather_object", lambda own: gathered.extend(own) or gathered)
    for rank in (1, 0):
        share = copy.copy(source)
        share.records = source.records[rank::2]
        place = SimpleNamespace(**{**vars(ALONE), "process_index": rank, "num_processes": 2})
        place.is_main_process = rank == 0
        rows = evaluation.evaluate(Oracle(share), source, 96, 1000, place)  # type: ignore[arg-type]
    assert rows == whole
    assert len({(one["image_id"], *one["bbox"]) for one in gathered}) == len(gathered)


def test_finding_nothing_scores_nothing(tmp_path: Path) -> None:
    """An untrained detector finds nothing. If the evaluator failed then, it would end the run."""
    varied_set(tmp_path)
    rows = score(opened(tmp_path), [])
    assert {row["metric"] for row in rows} >= {"box_ap", "mask_ap75"}
    assert all(row["value"] == 0 for row in rows)


def test_objects_numbered_from_0_count(tmp_path: Path) -> None:
    """The evaluator reads 0 as "no object": without new numbers, a perfect detection would count as
    wrong.
    """
    file = varied_set(tmp_path)
    content = json.loads(file.read_text())
    for one in content["annotations"]:
        one["id"] -= 1
    file.write_text(json.dumps(content))
    source = opened(tmp_path)
    rows = evaluation.evaluate(Oracle(source), source, 96, 1000, ALONE)  # type: ignore[arg-type]
    assert rows[0] == {"metric": "box_ap", "value": 1}


def test_a_mask_is_cut_at_the_borders_of_the_image() -> None:
    """A box may reach out of the image by half a pixel, or be completely outside."""
    full = torch.ones(28, 28)
    assert paste(full, np.array([-4, 2, 10, 99], np.float32), 20, 30).sum() == 10 * 18
    assert paste(full, np.array([40, 2, 50, 10], np.float32), 20, 30).sum() == 0
    assert paste(full, np.array([4, 2, 4.2, 10], np.float32), 20, 30).sum() <= 8


def test_results_are_of_the_stored_image(tmp_path: Path) -> None:
    """Boxes are x, y, width, height in pixels of the stored image; categories are ids."""
    varied_set(tmp_path)
    source = opened(tmp_path)
    record = source.records[0]
    size = (2 * record.height, 3 * record.width)
    detections = {
        "boxes": torch.tensor([[30.0, 20, 60, 60]]),
        "labels": torch.tensor([3]),
        "scores": torch.tensor([0.5]),
        "masks": torch.ones(1, 1, 28, 28),
    }
    (one,) = to_results(detections, record, size, list(source.categories))
    assert (one["image_id"], one["category_id"], one["score"]) == (record.id, 90, 0.5)
    assert one["bbox"] == [10, 10, 10, 20]
    mask = rle.decode(one["segmentation"])
    assert mask.shape == (record.height, record.width)
    assert (mask == box_mask((10, 10, 10, 20), *mask.shape)).mean() > 0.99


@pytest.mark.parametrize("name", ["boxes", "scores"])
def test_detections_that_are_no_numbers_are_refused(name: str, tmp_path: Path) -> None:
    """Without it a NaN ends the evaluator in a traceback, or is null in the written results."""
    varied_set(tmp_path)
    source = opened(tmp_path)
    detections = {
        "boxes": torch.tensor([[1.0, 2, 3, 4]]),
        "labels": torch.tensor([1]),
        "scores": torch.tensor([0.5]),
    }
    detections[name] = detections[name] * torch.nan
    record = source.records[0]
    with pytest.raises(UserError, match=rf"{record.name}: the detector's boxes or scores are not"):
        to_results(detections, record, (record.height, record.width), list(source.categories))


def test_masks_are_resized_without_a_shift() -> None:
    """Twice the size repeats every pixel; half of that is the original mask."""
    mask = np.random.default_rng(0).integers(0, 2, (1, 9, 7), dtype=np.uint8)
    twice = nearest(mask, 18, 14)
    assert (twice == mask.repeat(2, axis=1).repeat(2, axis=2)).all()
    assert (nearest(twice, 9, 7) == mask).all()


def test_reading_ahead_keeps_the_order_and_the_errors() -> None:
    """Without it, results could belong to other images, or an unreadable file could be ignored."""
    assert list(ordered_map(lambda x: x * x, range(20), 2)) == [x * x for x in range(20)]

    def fails(x: int) -> int:
        if x == 6:
            raise UserError("6.jpg: damaged")
        return x

    with pytest.raises(UserError, match=r"6\.jpg"):
        list(ordered_map(fails, range(20), 2))
