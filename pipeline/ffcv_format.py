"""FFCV's file format and the libraries that it links, without what importing ffcv does on the side.

ffcv sets PyTorch and Numba to one thread for the whole process when it is imported. On two cores
that halves the speed of a training step on the CPU, without a word, so it is undone here; nothing
else in slotstream imports ffcv.
"""

import numba
import torch

_threads = torch.get_num_threads(), numba.get_num_threads()

from ffcv import _libffcv  # noqa: E402
from ffcv.fields import IntField, RGBImageField  # noqa: E402
from ffcv.types import (  # noqa: E402
    ALLOC_TABLE_TYPE,
    CURRENT_VERSION,
    TYPE_ID_HANDLER,
    FieldDescType,
    HeaderType,
    get_metadata_type,
)

torch.set_num_threads(_threads[0])
numba.set_num_threads(_threads[1])

LIBRARY = str(_libffcv.__file__)
"""ffcv's extension; a handle of it also finds the symbols of libturbojpeg, which it links."""

JPEG, RAW = 0, 1
"""The values of `mode` in the RGB field."""

__all__ = [
    "ALLOC_TABLE_TYPE",
    "CURRENT_VERSION",
    "JPEG",
    "LIBRARY",
    "RAW",
    "TYPE_ID_HANDLER",
    "FieldDescType",
    "HeaderType",
    "IntField",
    "RGBImageField",
    "get_metadata_type",
]
