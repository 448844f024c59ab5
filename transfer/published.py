"""The transfer results that Wen et al. publish (arXiv 2205.15288, tables 2, 3, 4 and 7), in
percent, and what makes a run comparable with them.

Marks are theirs: † re-implemented with official weights, ‡ fully re-implemented.
"""

from dataclasses import dataclass
from typing import NamedTuple


class Recipe(NamedTuple):
    """How the figures of some columns were made."""

    config: str
    """The file in configs/transfer that makes them, without its suffix."""
    task: str
    dataset: str
    images: int
    """That it learns from."""
    scored: int
    """Images that it is scored on."""


COCO = Recipe("coco_1x", "detection", "coco", 117_266, 5_000)
CITYSCAPES = Recipe("cityscapes", "segmentation", "cityscapes", 2_975, 500)
VOC = Recipe("voc", "segmentation", "voc-aug", 10_582, 1_449)
ADE20K = Recipe("ade20k", "segmentation", "ade20k", 20_210, 2_000)
RECIPES = (COCO, CITYSCAPES, VOC, ADE20K)


class Column(NamedTuple):
    """A figure of a row: its title, and the recipe and metric that give it."""

    title: str
    recipe: Recipe
    metric: str


COLUMNS = (
    Column("AP^b", COCO, "box_ap"),
    Column("AP^b_50", COCO, "box_ap50"),
    Column("AP^b_75", COCO, "box_ap75"),
    Column("AP^m", COCO, "mask_ap"),
    Column("AP^m_50", COCO, "mask_ap50"),
    Column("AP^m_75", COCO, "mask_ap75"),
    Column("City.", CITYSCAPES, "miou"),
    Column("VOC", VOC, "miou"),
    Column("ADE", ADE20K, "miou"),
)

Figures = tuple[float | None, ...]


class Row(NamedTuple):
    """A published row."""

    method: str
    data: str
    """That it was pre-trained on; empty: on none."""
    epochs: int | None
    figures: Figures
    """In percent, one a column; None: not given."""


@dataclass(frozen=True)
class Table:
    """One of the paper's."""

    number: int
    title: str
    data: tuple[str, ...]
    """Pre-training data that it compares: names in PRETRAINING, LABELS, or empty for none."""
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]


class Pretraining(NamedTuple):
    """A set of images that networks are pre-trained on: its name here, its names as a file (without
    suffix, letters, digits and + only), and how many images it has.
    """

    name: str
    files: tuple[str, ...]
    images: tuple[int, ...]
    """One of these numbers."""


PRETRAINING = (
    Pretraining("COCO", ("coco",), (118_287,)),
    Pretraining("COCO+", ("coco+", "cocoplus"), (241_690,)),
    Pretraining("ImageNet", ("imagenet", "imagenet1k"), (1_281_167,)),
    # Its training set has 70,000; the authors' slides count 90 K.
    Pretraining("BDD100K", ("bdd100k",), (70_000, 90_000)),
)

LABELS = "ImageNet labels"
"""What torchvision's supervised weights were trained on."""

_SLOTCON_COCO = Row("SlotCon", "COCO", 800, (41.0, 61.1, 45.0, 37.0, 58.3, 39.8, 76.2, 71.6, 39.0))
_SLOTCON_IMAGENET = (
    Row("SlotCon", "ImageNet", 100, (41.4, 61.6, 45.6, 37.2, 58.5, 39.9, 75.4, 73.1, 38.6)),
    Row("SlotCon", "ImageNet", 200, (41.8, 62.2, 45.7, 37.8, 59.1, 40.7, 76.3, 75.0, 38.8)),
)
_RANDOM = Row("random init.", "", None, (32.8, 50.9, 35.3, 29.9, 47.9, 32.0, 65.3, 39.5, 29.4))

TABLES = (
    Table(
        2,
        "Main transfer results with COCO pre-training",
        ("", "COCO"),
        COLUMNS,
        (
            _RANDOM,
            Row("MoCo v2‡", "COCO", 800, (38.5, 58.1, 42.1, 34.8, 55.3, 37.3, 73.8, 69.2, 36.2)),
            Row("Revisit.†", "COCO", 800, (40.1, 60.2, 43.6, 36.3, 57.3, 38.9, 75.3, 70.6, 37.0)),
            Row("Self-EMD", "COCO", 800, (39.3, 60.1, 42.8, None, None, None, None, None, None)),
            Row("DenseCL†", "COCO", 800, (39.6, 59.3, 43.3, 35.7, 56.5, 38.4, 75.8, 71.6, 37.1)),
            Row("PixPro‡", "COCO", 800, (40.5, 60.5, 44.0, 36.6, 57.8, 39.0, 75.2, 72.0, 38.3)),
            Row("DetCon†", "COCO", 1000, (39.8, 59.5, 43.5, 35.9, 56.4, 38.7, 76.1, 70.2, 38.1)),
            Row("ORL†", "COCO", 800, (40.3, 60.2, 44.4, 36.3, 57.3, 38.9, 75.6, 70.9, 36.7)),
            _SLOTCON_COCO,
        ),
    ),
    Table(
        3,
        "Pushing the limit of scene-centric pre-training",
        ("COCO", "ImageNet", "COCO+"),
        COLUMNS,
        (
            _SLOTCON_COCO,
            *_SLOTCON_IMAGENET,
            Row("ORL", "COCO+", 800, (40.6, 60.8, 44.5, 36.7, 57.9, 39.3, None, None, None)),
            Row("SlotCon", "COCO+", 800, (41.8, 62.2, 45.8, 37.8, 59.4, 40.6, 76.5, 73.9, 39.2)),
        ),
    ),
    Table(
        4,
        "Main transfer results with ImageNet-1K pre-training",
        ("", "ImageNet", LABELS),
        COLUMNS,
        (
            _RANDOM,
            Row(
                "supervised", "ImageNet", 100,
                (39.7, 59.5, 43.3, 35.9, 56.6, 38.6, 74.6, 74.4, 37.9),
            ),
            Row(
                "MoCo v2†", "ImageNet", 800,
                (40.4, 60.1, 44.2, 36.5, 57.2, 39.2, 76.2, 73.7, 36.9),
            ),
            Row("DetCo†", "ImageNet", 200, (40.1, 61.0, 43.9, 36.4, 58.0, 38.9, 76.0, 72.6, 37.8)),
            Row("InsLoc†", "ImageNet", 200, (40.9, 60.9, 44.7, 36.8, 57.8, 39.4, 75.4, 72.9, 37.3)),
            Row(
                "DenseCL†", "ImageNet", 200,
                (40.3, 59.9, 44.3, 36.4, 57.0, 39.2, 76.2, 72.8, 38.1),
            ),
            Row("PixPro†", "ImageNet", 100, (40.7, 60.5, 44.8, 36.8, 57.4, 39.7, 76.8, 73.9, 38.2)),
            Row("DetCon", "ImageNet", 200, (40.6, None, None, 36.4, None, None, 75.5, 72.6, None)),
            Row("SoCo‡", "ImageNet", 100, (41.6, 61.9, 45.6, 37.4, 58.8, 40.2, 76.5, 71.9, 37.8)),
            *_SLOTCON_IMAGENET,
        ),
    ),
    Table(
        7,
        "Transfer learning results with BDD100K pre-training",
        ("", "COCO", "BDD100K"),
        (COLUMNS[6],),
        (
            Row("random init.", "", None, (65.3,)),
            Row("MoCo v2", "COCO", None, (73.8,)),
            Row("SlotCon", "COCO", None, (76.2,)),
            Row("SlotCon", "BDD100K", None, (73.9,)),
        ),
    ),
)  # fmt: skip
