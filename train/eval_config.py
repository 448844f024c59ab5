"""The section `eval` of a pre-training run: the labelled images that score the teacher while it
trains, and the scores.
"""

from dataclasses import dataclass, field

from evaluation.datasets.kinds import KINDS
from pipeline.bounds import LONGEST_SIDE, Bound, Bounded, at_least, one_of, optional, some_of
from pipeline.errors import require

PROTOCOLS = ("knn", "kmeans", "prototypes", "slots")
METRICS = tuple(f"{p}_{m}" for p in PROTOCOLS[:3] for m in ("miou", "pixel_accuracy"))
"""The scores that say which of two checkpoints is better."""

_SCORED: Bound = {"one or more besides slots": lambda names: bool({*names} - {"slots"})}


@dataclass(frozen=True)
class EvalConfig(Bounded):
    """Scores of the teacher on labelled images, while it trains. They change nothing in the
    training."""

    every: int | None = field(default=None, metadata=optional(at_least(1)))
    """Steps between two evaluations. There is also one before the first step, of the untrained
    network, and one after the last. null: no evaluation."""
    protocols: tuple[str, ...] = field(default=PROTOCOLS, metadata=some_of(PROTOCOLS) | _SCORED)
    """"knn": dense k-NN with a memory of labelled training cells. "kmeans": k-means on the scored
    images, matched to classes. "prototypes": the same with the run's prototypes. "slots": active
    slots, and use of the prototypes."""
    metric: str = field(default="knn_miou", metadata=one_of(METRICS))
    """The checkpoint with the highest one is kept, as checkpoints/best. See also
    train.stop_on_plateau."""
    dataset: str = field(default="folder", metadata=one_of(KINDS))
    """Layout of the labelled images; "folder": any folder of images and one of label PNGs of the
    same names."""
    root: str | None = None
    """Folder of the data set, in the chosen layout."""
    split: str = "val"
    """Part under root to score."""
    train_split: str = "train"
    """Part under root whose cells are the memory of k-NN."""
    images: str | None = None
    """Folder of images to score, instead of those under root."""
    labels: str | None = None
    """Folder of their label maps."""
    train_images: str | None = None
    """Folder of images for the memory, instead of those under root."""
    train_labels: str | None = None
    """Folder of their label maps."""
    classes: str | None = None
    """"folder" only: JSON list of class names by id; null: classes.json beside or above the
    labels."""
    max_images: int = field(default=200, metadata=at_least(1))
    """Images to score, and images for the memory, at most: evenly spread over each part."""
    memory: int = field(default=10_000, metadata=at_least(1))
    """Cells in the memory of k-NN."""
    clusters: int | None = field(default=None, metadata=optional(at_least(1)))
    """Clusters of k-means; null: as many as classes."""
    size: int | None = field(default=None, metadata=optional(at_least(32, LONGEST_SIDE)))
    """Side of the scored square in pixels; null: 320 for views of 224 pixels, others in
    proportion."""
    batch_size: int = field(default=8, metadata=at_least(1))
    """Images at once, on each process."""

    def __post_init__(self) -> None:
        super().__post_init__()
        protocol = self.metric.partition("_")[0]
        require(
            self.every is None or protocol in self.protocols,
            "metric",
            self.metric,
            f"of one of the protocols ({', '.join(self.protocols)})",
        )
