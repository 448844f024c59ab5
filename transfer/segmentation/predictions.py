"""Predicted classes as label PNGs with the ids of the data set, as the benchmarks' servers want."""

import io
import os
from pathlib import Path

import numpy as np
from PIL import Image

from evaluation.datasets.label_maps import IdReader, LabelReader
from evaluation.datasets.labelled_images import LabelledImages
from train.run.provenance import write_bytes


class LabelWriter:
    """Writes a PNG for each image: 8-bit grey, of the image's size as it is shown. Its name is the
    image's, in the subfolders that the images have below their common folder.
    """

    def __init__(self, folder: Path, data: LabelledImages) -> None:
        common = os.path.commonpath([path.parent for path in data.paths])
        self._files = [folder / path.relative_to(common).with_suffix(".png") for path in data.paths]
        self._ids = class_ids(data.reader)

    def __call__(self, index: int, classes: np.ndarray) -> None:
        """Write the predicted classes [H, W] of image `index`. Raises UserError."""
        file = io.BytesIO()
        Image.fromarray(self._ids[classes]).save(file, "PNG")
        write_bytes(self._files[index], file.getvalue())


def class_ids(reader: LabelReader) -> np.ndarray:
    """uint8 [C]: the id that stands for each class in the data set's label maps. Where several ids
    are one class (COCO's 27), the number of the class.
    """
    ids = np.arange(reader.num_classes)
    if isinstance(reader, IdReader):
        known = np.flatnonzero((reader.table >= 0) & (reader.table < reader.num_classes))
        classes = reader.table[known]
        if len(np.unique(classes)) == len(classes):
            ids[classes] = known
    return ids.astype(np.uint8)
