"""Detection and instance segmentation: `accelerate launch -m transfer.detection --config FILE
[--section.field value …]`."""

from transfer.command import run_task
from transfer.detection.config import DetectionConfig
from transfer.task import Task

EXAMPLES = """examples:
  accelerate launch -m transfer.detection --config configs/transfer/coco_1x.yaml \\
      --init.weights runs/coco_r50_800ep --data.root COCO --name coco_1x_slotcon
  accelerate launch -m transfer.detection --config configs/transfer/coco_2x.yaml \\
      --init.weights supervised --data.root COCO --resume auto
  python -m transfer.detection --config configs/transfer/coco_overfit_cpu.yaml --data.root COCO
  python -m transfer.detection --evaluate runs/coco_1x_slotcon --json scores.json

COCO is the folder with annotations/instances_{train,val}2017.json, train2017/ and val2017/."""


def build(config: DetectionConfig) -> Task:
    """Imports the task here, because the import takes seconds and --help does not need it."""
    from transfer.detection.task import Detection

    return Detection(config)


def main(argv: list[str] | None = None) -> None:
    """The command."""
    run_task(
        DetectionConfig,
        build,
        "transfer.detection",
        "Train Mask R-CNN on a pre-trained ResNet and score it: AP of boxes and masks.",
        EXAMPLES,
        argv,
    )


if __name__ == "__main__":
    main()
