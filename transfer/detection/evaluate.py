"""COCO's average precision (AP) of boxes and masks, computed by faster-coco-eval.

Letters: D detections of an image, H W its stored height and width, M the side of a predicted mask.
"""

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from faster_coco_eval import COCO, COCOeval_faster
from faster_coco_eval.core import mask as rle
from msgspec.structs import asdict
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from evaluation.datasets.images import DECODE_THREADS
from pipeline.errors import UserError, printable
from pipeline.parallel import ordered_map
from train.run.provenance import write_bytes
from transfer.detection.annotations import RunLengths, read_annotations
from transfer.detection.dataset import CocoInstances, Record, pixels_of, resized
from transfer.detection.model import HALF_PIXEL
from transfer.task import Row

METRICS = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
"""In the evaluator's order."""
KINDS = (("box", "bbox", "bbox"), ("mask", "segmentation", "segm"))
"""What is scored: our name, the field of a result, the evaluator's name."""
CocoResult = dict[str, Any]
"""One detection in COCO's format: image_id, category_id, bbox [x, y, width, height] in pixels of
the stored image, score, and of a detector with masks segmentation (run lengths)."""


def evaluate(
    model: nn.Module,
    source: CocoInstances,
    side: int,
    longest: int,
    accelerator: Accelerator,
    masks: bool = True,
    predictions: Path | None = None,
) -> list[Row]:
    """Score a detector on all images of `source`, resized by `resized`. The caller sets evaluation
    mode and disables gradients. Each process scores its share; all return all rows. `masks`:
    whether the detector has masks; `predictions`: a folder for the detections.

    Raises UserError.
    """
    share = source.records[accelerator.process_index :: accelerator.num_processes]
    results: list[CocoResult] = []

    def load(record: Record) -> Tensor:
        size = resized(record.height, record.width, side, longest)
        return torch.from_numpy(pixels_of(source.load(record), *size).copy())

    images = ordered_map(load, share, DECODE_THREADS)
    hidden = not accelerator.is_main_process
    categories = list(source.categories)
    for record, image in tqdm(
        zip(share, images, strict=True), "evaluate", len(share), unit="image", disable=hidden
    ):
        (detections,) = model({"images": [image.to(accelerator.device)]})
        results += to_results(detections, record, image.shape[1:], categories)
    results = gather_object(results)
    rows: list[Row] = []
    if accelerator.is_main_process:
        rows = score(source, results, masks)
        if predictions:
            write_results(predictions, results, masks)
    return broadcast_object_list([rows])[0]


def to_results(
    detections: dict[str, Tensor], record: Record, size: tuple[int, int], categories: list[int]
) -> list[CocoResult]:
    """The detections of one image in COCO's format: boxes and masks move from `size`, the (height,
    width) of the network's input, to the stored size. Masks are encoded one at a time, so that
    memory holds only one at full size. A detector without masks gives none. Raises UserError for
    boxes or scores that are no finite numbers: the evaluator and JSON have no place for them.
    """
    if not all(detections[name].isfinite().all() for name in ("boxes", "scores")):
        raise UserError(
            f"{printable(record.name)}: the detector's boxes or scores are not finite numbers"
        )
    scale = torch.tensor([record.width / size[1], record.height / size[0]] * 2)
    boxes = detections["boxes"].float().cpu()
    mask_boxes = ((boxes + HALF_PIXEL) * scale).numpy()
    corners = (boxes * scale).numpy().astype(np.float64)
    labels, scores = detections["labels"].tolist(), detections["scores"].tolist()
    results = [
        {
            "image_id": record.id,
            "category_id": categories[label - 1],
            "bbox": [*corner[:2], *(corner[2:] - corner[:2])],
            "score": confidence,
        }
        for corner, label, confidence in zip(corners, labels, scores, strict=True)
    ]
    if "masks" in detections:
        masks = detections["masks"].float().cpu()
        for one, box, mask in zip(results, mask_boxes, masks, strict=True):
            pasted = paste(mask[0], box, record.height, record.width)
            one["segmentation"] = rle.encode(pasted)
    return results


def paste(mask: Tensor, box: NDArray[np.float32], height: int, width: int) -> NDArray[np.uint8]:
    """Stretch a mask [M, M] of values in 0..1 over `box`: uint8 [H, W], 1 where it is ≥ 0.5."""
    image = np.zeros((height, width), np.uint8, order="F")  # the order that the encoder reads
    x1, y1 = np.floor(box[:2]).astype(int).clip(0)
    x2, y2 = np.ceil(box[2:]).astype(int).clip(0, (width, height))
    if x2 <= x1 or y2 <= y1:
        return image
    x = (torch.arange(x1, x2) + 0.5 - box[0]) / (box[2] - box[0]) * 2 - 1  # centres of pixels
    y = (torch.arange(y1, y2) + 0.5 - box[1]) / (box[3] - box[1]) * 2 - 1
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)
    values = F.grid_sample(mask[None, None], grid[None].to(mask), align_corners=False)[0, 0]
    image[y1:y2, x1:x2] = (values >= 0.5).numpy()
    return image


def score(source: CocoInstances, results: list[CocoResult], masks: bool = True) -> list[Row]:
    """Rows box_ap … mask_ap_large with values in 0..1. Sizes without any object have no row. Masks
    are scored on the images whose objects all have one.

    Raises UserError.
    """
    truth = ground_truth(source)
    rows = []
    for name, field, kind in KINDS if masks else KINDS[:1]:
        evaluator = COCOeval_faster(truth, truth.loadRes(_only(results, field)), kind)
        if name == "mask" and source.maskless:
            evaluator.params.imgIds = sorted(set(truth.getImgIds()) - source.maskless)
            if not evaluator.params.imgIds:
                break
        evaluator.run()
        for metric, value in zip(METRICS, evaluator.stats, strict=False):
            if value >= 0:
                rows.append({"metric": f"{name}_{metric}", "value": float(value)})
    return rows


def write_results(folder: Path, results: list[CocoResult], masks: bool = True) -> None:
    """Write bbox.json and, with `masks`, segm.json: lists of results as COCO's server and loadRes
    of pycocotools read them. Raises UserError.
    """
    for _, field, kind in KINDS if masks else KINDS[:1]:
        found = _only(results, field)
        for one in found:
            if field == "bbox":
                one["bbox"] = [float(number) for number in one["bbox"]]
            else:
                size, counts = one["segmentation"]["size"], one["segmentation"]["counts"]
                one["segmentation"] = {"size": size, "counts": counts.decode()}
        write_bytes(folder / f"{kind}.json", msgspec.json.encode(found))


def _only(results: list[CocoResult], field: str) -> list[CocoResult]:
    """The results with boxes or masks alone. Given both, the evaluator would use the area of the
    box for the mask.
    """
    keys = ("image_id", "category_id", "score", field)
    return [{key: one[key] for key in keys} for one in results]


def ground_truth(source: CocoInstances) -> COCO:
    """The annotation file for the evaluator, crowds included. Annotations are numbered from 1,
    because the evaluator reads a 0 as "no object". Raises UserError.
    """
    content = read_annotations(source.annotations)
    annotations = []
    for number, one in enumerate(content.annotations, start=1):
        annotations.append({**asdict(one), "id": number, "iscrowd": int(one.iscrowd)})
        if isinstance(one.segmentation, RunLengths):
            annotations[-1]["segmentation"] = asdict(one.segmentation)
    return COCO(
        {
            "images": [asdict(image) for image in content.images],
            "categories": [asdict(category) for category in content.categories],
            "annotations": annotations,
        }
    )
