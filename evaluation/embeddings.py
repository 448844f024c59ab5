"""Features of whole images or of their slots, row by row; `evaluation.embed` is the command.

Letters: B images, K prototypes, D features, h w cells, R rows.
"""

import argparse
import csv
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from evaluation.commands import side_for
from evaluation.datasets.images import FITS, open_images
from evaluation.datasets.squares import SquareImages
from evaluation.features import Features
from evaluation.networks import default_device, load_network
from evaluation.specs import open_all
from model import SlotCon
from model.grouping import pool_slots, won_cells
from pipeline.errors import UserError
from train.run.provenance import new_file


class Rows(NamedTuple):
    """R rows of the result."""

    features: np.ndarray
    """float32 [R, D]"""
    image: list[str]
    """Name of each row's image."""
    slot: np.ndarray | None = None
    """int64 [R], its prototype; None for rows of whole images."""
    share: np.ndarray | None = None
    """float32 [R], the share of the image's cells that the prototype wins."""


Write = Callable[[Rows], None]


def write_embeddings(args: argparse.Namespace) -> None:
    """Write the file that the options describe. Raises UserError."""
    images = open_images(args.data)
    names = images.names()
    size = args.size or side_for(args.checkpoint)
    squares = SquareImages(images, size, default_device(), args.batch, FITS[args.fit])
    (features,) = open_all(args, squares)
    network = load_network(args.checkpoint, squares.device)[0] if args.slots else None
    writer = WRITERS[args.out.suffix.lower()]
    count, dim = 0, 0
    with writer(args.out, args.slots) as write:
        for rows in rows_of(features, network, squares, names):
            write(rows)
            count, dim = count + len(rows.image), rows.features.shape[1]
    what = f"slots of {len(names):,} images" if args.slots else "images"
    print(f"wrote {args.out}: {count:,} {what}, {dim:,} features of {features.name}")


def rows_of(
    features: Features, network: SlotCon | None, squares: SquareImages, names: Sequence[str]
) -> Iterator[Rows]:
    """The rows of all images, batch by batch; those of slots if there is a `network`."""
    for batch in squares.batches(features.name):
        images = batch.normalised(squares.device)
        maps = features(images)
        shown = [names[i] for i in batch.index.tolist()]
        if network is None:
            yield Rows(maps.mean(dim=(2, 3)).cpu().numpy(), shown)
        else:
            yield _slots(network, images, maps, shown)


def _slots(network: SlotCon, images: Tensor, maps: Tensor, names: Sequence[str]) -> Rows:
    """The active slots of B images, of the cells of `maps` [B, D, h, w]. Where these are finer than
    the prototypes' scores, the scores are interpolated.
    """
    with torch.inference_mode():
        scores = network.segment(images)[0].float()
        share = won_cells(scores) / (scores.shape[2] * scores.shape[3])  # [B, K]
        if scores.shape[2:] != maps.shape[2:]:
            scores = F.interpolate(scores, maps.shape[2:], mode="bilinear")
        slots = pool_slots(maps, scores, network.teacher.grouping.temperature)  # [B, K, D]
        active = share > 0
    image, slot = active.nonzero(as_tuple=True)
    return Rows(
        slots[active].cpu().numpy(),
        [names[b] for b in image.tolist()],
        slot.cpu().numpy(),
        share[active].float().cpu().numpy(),
    )


@contextmanager
def npy_writer(path: Path, slots: bool) -> Iterator[Write]:
    """Writes FILE.npy and FILE.npy.csv; both appear together, when they are complete."""
    beside = path.with_name(path.name + ".csv")
    with new_file(path) as array, new_file(beside) as table:
        with array.open("wb") as file, _text(table) as lines:
            names = csv.writer(lines)
            names.writerow(["image", "slot", "share"] if slots else ["image"])
            count = dim = 0

            def write(rows: Rows) -> None:
                nonlocal count, dim
                if not count:
                    dim = rows.features.shape[1]
                    _header(file, 0, dim)
                count += len(rows.image)
                file.write(np.ascontiguousarray(rows.features, "<f4").tobytes())
                columns = (rows.image, rows.slot, rows.share) if slots else (rows.image,)
                for row in zip(*(_plain(column) for column in columns), strict=True):
                    names.writerow(row)

            yield write
            file.seek(0)
            _header(file, count, dim)  # as long as before: NumPy leaves room for the first axis
        path.unlink(missing_ok=True)  # an older one never stands beside the new names


def _header(file: Any, count: int, dim: int) -> None:
    described = {"descr": "<f4", "fortran_order": False, "shape": (count, dim)}
    np.lib.format.write_array_header_1_0(file, described)


def _text(path: Path) -> Any:
    return path.open("w", encoding="utf-8", errors="surrogateescape", newline="")


def _plain(column: Any) -> list[Any]:
    return column.tolist() if isinstance(column, np.ndarray) else list(column)


@contextmanager
def parquet_writer(path: Path, slots: bool) -> Iterator[Write]:
    """Writes FILE.parquet. Raises UserError without pyarrow."""
    try:
        import pyarrow as pa
        from pyarrow.parquet import ParquetWriter
    except ImportError:
        raise UserError("--out .parquet needs pyarrow: pip install slotstream[parquet]") from None

    def columns(rows: Rows) -> dict[str, Any]:
        dim = rows.features.shape[1]
        flat = pa.array(np.ascontiguousarray(rows.features, np.float32).ravel())
        text = [name.encode(errors="backslashreplace").decode() for name in rows.image]
        found: dict[str, Any] = {"image": pa.array(text, pa.string())}
        if rows.slot is not None:
            found |= {"slot": pa.array(rows.slot), "share": pa.array(rows.share)}
        return found | {"features": pa.FixedSizeListArray.from_arrays(flat, dim)}

    writer: Any = None

    def write(rows: Rows) -> None:
        nonlocal writer
        table = pa.table(columns(rows))
        if writer is None:
            writer = ParquetWriter(file, table.schema)
        writer.write_table(table)

    with new_file(path) as file:
        try:
            yield write
        finally:
            if writer is not None:
                writer.close()


WRITERS = {".npy": npy_writer, ".parquet": parquet_writer}
