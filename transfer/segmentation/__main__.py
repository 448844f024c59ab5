"""Semantic segmentation: `accelerate launch -m transfer.segmentation --config FILE
[--section.field value …]`."""

from transfer.command import run_task
from transfer.segmentation.config import SegmentationConfig
from transfer.task import Task

EXAMPLES = """examples:
  accelerate launch -m transfer.segmentation --config configs/transfer/voc.yaml \\
      --init.weights runs/coco_r50_800ep --data.root VOCdevkit/VOC2012 --name voc_slotcon
  accelerate launch -m transfer.segmentation --config configs/transfer/cityscapes.yaml \\
      --init.weights supervised --data.root cityscapes --resume auto
  python -m transfer.segmentation --config configs/transfer/camvid_cpu.yaml \\
      --data.root CamVid --init.weights runs/camvid
  python -m transfer.segmentation --config configs/transfer/camvid_cpu.yaml \\
      --data.root CamVid --evaluate runs/camvid_fcn --json scores.json"""


def build(config: SegmentationConfig) -> Task:
    """Imports the task here, because the import takes seconds and --help does not need it."""
    from transfer.segmentation.task import Segmentation

    return Segmentation(config)


if __name__ == "__main__":
    run_task(
        SegmentationConfig,
        build,
        "transfer.segmentation",
        "Train an FCN on a pre-trained ResNet and score it: mIoU.",
        EXAMPLES,
    )
