"""The content of the files that measurements write, as far as pages and comparisons show it."""

from typing import Annotated, Required, TypedDict

from msgspec import Meta, Struct, field

from train.run.json_file import Facts, Settings, Text

LARGEST = 10**12
"""No number of a measurement reaches it."""
ROWS = 1000
"""Measurements of a benchmark, or rows of a cost: a hundred times as many as there are."""
Number = Annotated[float, Meta(gt=-LARGEST, lt=LARGEST)]
Positive = Annotated[float, Meta(ge=0, lt=LARGEST)]
Count = Annotated[int, Meta(ge=0, lt=LARGEST)]


class Logged(TypedDict):
    """A score of an evaluation while the run trained."""

    metric: Text
    value: Number


class Line(TypedDict, total=False):
    """A line of metrics.jsonl. Values of a run that diverged are NaN or infinite."""

    step: Required[Annotated[float, Meta(ge=0, lt=LARGEST)]]
    epoch: Number
    seconds: Number
    loss: float
    grouping_12: float
    grouping_21: float
    masked_1: float
    masked_2: float
    slot_12: float
    slot_21: float
    image: float
    relations: float
    active_slots: float
    active_pairs: float
    usage_entropy: float
    dead_prototypes: float
    near_duplicates: float
    images_per_s: float
    wait_share: float
    results: list[Logged]
    """In a line of an evaluation, which has none of the values above but the step."""


class Score(Struct):
    """A number of an evaluation."""

    metric: Text
    value: Number
    network: Text = "trained"
    name: Text | None = field(name="class", default=None)
    """Of the class, for the metric "iou"."""
    probe: Text | None = None
    images: Count | None = None
    train_images: Count | None = None
    size: Count | None = None
    protocol: Text | None = None
    """Name of the published evaluator whose settings were used."""
    list: Text | None = None
    """Which images of the set were scored, if not all."""
    flip: bool = False
    made: Text | None = None
    """How the clusters were made, in words."""


class Use(Struct):
    """A number about the prototypes: of all, of one or of a pair."""

    metric: Text
    value: Number
    images: Count = 0
    prototype: Count | None = None
    prototypes: list[Count] | None = None


class Rate(Struct):
    """A measurement of the benchmark."""

    stage: Text
    images_per_s: Positive
    slowest: Positive | None = None
    fastest: Positive | None = None
    backend: Text | None = None
    crops: Text | None = None
    operation: Text | None = None
    batch: Count | None = None
    threads: Count | None = None


class Cost(Struct):
    """The cost of a recipe on a number of GPUs."""

    backend: Text = ""
    gpus: Count | None = None
    measured: bool = False
    images_per_s: Positive | None = None
    hours: Positive | None = None
    kwh: Positive | None = None
    co2_kg: Positive | None = None


class Measured(Struct, kw_only=True):
    """What every --json file holds; also run.json of a checkpoint."""

    hardware: Facts | None = None
    versions: Facts | None = None
    command: str = ""


class Scores(Measured, kw_only=True):
    """Of evaluation.unsupervised_segmentation or evaluation.probe."""

    results: list[Score]


class Uses(Measured, kw_only=True):
    """Of evaluation.slots."""

    results: list[Use]


class Rates(Measured, kw_only=True):
    """Of tools.benchmark."""

    results: Annotated[list[Rate], Meta(max_length=ROWS)]
    settings: Settings | None = None


class Costs(Measured, kw_only=True):
    """Of tools.benchmark cost."""

    cost: Annotated[list[Cost], Meta(max_length=ROWS)]
