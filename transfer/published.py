"""The published transfer results, and what makes a run comparable with them: published.yaml, which
explains the fields, as typed records.
"""

from pathlib import Path

import msgspec
import yaml
from msgspec import Struct

LABELS = "ImageNet labels"
"""The pre-training data of torchvision's supervised weights."""


class Recipe(Struct, frozen=True):
    """How the figures of one data set are made."""

    config: str
    task: str
    images: int
    scored: int


class Pretraining(Struct, frozen=True):
    """A set of images for pre-training."""

    files: tuple[str, ...]
    images: tuple[int, ...]


class Row(Struct, frozen=True, array_like=True):
    """A published row."""

    method: str
    data: str
    epochs: int | None
    figures: tuple[float | None, ...]


class Table(Struct, frozen=True):
    """A table of the paper."""

    number: int
    title: str
    data: tuple[str, ...]
    columns: tuple[str, ...]
    rows: tuple[Row, ...]


class Published(Struct, frozen=True):
    """The whole file."""

    recipes: dict[str, Recipe]
    columns: dict[str, tuple[str, str]]
    """Data set and metric by title."""
    pretraining: dict[str, Pretraining]
    tables: tuple[Table, ...]


def read(file: Path) -> Published:
    """Raises ValueError for a wrong type, an unknown name, or a row of another length."""
    content = msgspec.convert(yaml.safe_load(file.read_text("utf-8")), Published)
    for table in content.tables:
        known = {"", LABELS, *content.pretraining} >= set(table.data)
        known &= content.columns.keys() >= set(table.columns)
        for row in table.rows:
            known &= row.data in table.data and len(row.figures) == len(table.columns)
        if not known:
            raise ValueError(f"{file}: table {table.number} does not fit the other entries")
    return content


PUBLISHED = read(Path(__file__).with_name("published.yaml"))
