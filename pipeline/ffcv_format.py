"""FFCV's file format, version 2, as NumPy types.

    header · a descriptor for each field · metadata[N] · padding │ pages of data │ allocation table

ffcv itself is not imported. The import takes seconds and 0.8 GB, and silently sets PyTorch and
Numba to one thread for the whole process. On two cores this halves the speed of a training step.
"""

import numpy as np

VERSION = 2

HEADER = np.dtype(
    [
        ("version", "<u2"),
        ("num_fields", "<u2"),
        ("page_size", "<u4"),
        ("num_samples", "<u8"),
        ("alloc_table_ptr", "<u8"),
    ],
    align=True,
)
DESCRIPTOR = np.dtype(
    [("type_id", "<u1"), ("name", ("<u1", 16)), ("arguments", ("<u1", (1024,)))], align=True
)
ALLOCATION = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
IMAGE = np.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
INTEGER = np.dtype("<i8")

JPEG, RAW = 0, 1
"""The values of `mode` in an image's metadata."""

MIN_PAGE, MAX_PAGE = 1 << 21, 1 << 31
"""Limits of the page size in bytes. It is a power of two, and the header has a uint32 for it."""

MAX_SIDE = 65535
"""Largest height and width of an image in pixels: they are uint16."""

FIELDS = {"image": IMAGE, "index": INTEGER, "label": INTEGER}
"""The fields of each sample in slotstream's betons; label is optional."""

TYPE_ID = {"image": 2, "index": 1, "label": 1}
"""ffcv's numbers for an RGBImageField and an IntField, which need no arguments."""


def metadata_type(names: list[str]) -> np.dtype:
    """The metadata type of one sample with these fields; columns are named f0, f1, …"""
    return np.dtype([("", FIELDS[name]) for name in names], align=True)
