"""Images that each have a label map.

Letters: N images, B images of a batch, H W a stored image's height and width, R the side of an
evaluated image, in pixels.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from evaluation.datasets.images import DECODE_THREADS
from evaluation.datasets.label_maps import VOID, LabelReader
from evaluation.datasets.pairs import Pair, require_labels
from pipeline.errors import UserError
from pipeline.images import load_rgb, load_size
from pipeline.parallel import ordered_map


class LabelledImages:
    """N images with label maps, as `datasets.images.ImageSource` reads them.

    Raises UserError if a label map is missing.
    """

    def __init__(
        self, pairs: Sequence[Pair], reader: LabelReader, source: Path, selection: str = "all"
    ) -> None:
        require_labels(pairs, source)
        self.paths = [image for image, _ in pairs]
        self.label_paths = [labels for _, labels in pairs]
        self.reader, self.names, self.num_classes = reader, reader.names, reader.num_classes
        self.source = source
        """The folder of the label maps, for messages."""
        self.selection = selection
        """Which images of the part of the data set these are, in words."""

    def only(self, numbers: np.ndarray, selection: str) -> "LabelledImages":
        """The images `numbers`, int64 [M], described as `selection`."""
        pairs = [(self.paths[i], self.label_paths[i]) for i in numbers]
        return LabelledImages(pairs, self.reader, self.source, selection)

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def class_names(self) -> list[str]:
        """A name for each class id; "class N" if no names are known."""
        return self.names or [f"class {c}" for c in range(self.num_classes)]

    def load(self, i: int) -> np.ndarray:
        """Image `i` as uint8 [H, W, 3] RGB. Raises UserError."""
        return load_rgb(self.paths[i])

    def labels(self, i: int, height: int, width: int) -> np.ndarray:
        """Label map `i` as uint8 [H, W], void as 255. Raises UserError unless it fits the image."""
        return self.reader.read(self.label_paths[i], height, width)

    def notes(self) -> list[str]:
        """What is odd about the label maps read so far: a line each, with their folder."""
        return [f"{self.source}: {note}" for note in self.reader.notes()]

    def require_apart(self, train: "LabelledImages") -> None:
        """Raise UserError if one of these images, to be scored, is in the training set `train`."""
        common = {path.resolve() for path in train.paths} & {path.resolve() for path in self.paths}
        if common:
            raise UserError(f"{min(common)}: belongs to the training set and to the set to score")

    def check_headers(self) -> None:
        """Raise UserError for the first label map whose header shows that it holds no ids, or a
        size that differs from its image's. Reads no pixels but those of maps of several channels.
        """
        for image, labels in zip(self.paths, self.label_paths, strict=True):
            self.reader.check_header(labels, load_size(image))

    def check_labels(self) -> None:
        """Read all label maps. Raises UserError for the first one that cannot be used, and if no
        pixel of any has a class.
        """

        def has_class(i: int) -> bool:
            width, height = load_size(self.paths[i])
            return bool((self.labels(i, height, width) != VOID).any())

        if not any([*ordered_map(has_class, range(len(self)), DECODE_THREADS)]):
            raise UserError(
                f"{self.source}: no labelled pixel to score: the label maps are all void"
            )
