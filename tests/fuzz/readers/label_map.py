"""Label maps: each altered PNG is refused in one line, or read as the classes of its pixels."""

from pathlib import Path

import numpy as np
from PIL import Image

from evaluation.datasets.label_maps import VOID, IdReader, table_of
from pipeline.errors import UserError
from tests.fuzz.damage import Random, damage
from tests.fuzz.readers.picture import chunks_of_a_png, number_of_a_header
from tests.helpers.picture_files import HEIGHT, WIDTH, exif, saved

CLASSES = 12


class Target:
    def __init__(self, folder: Path) -> None:
        self.path = folder / "label.png"
        self.reader = IdReader([f"class {i}" for i in range(CLASSES)], table_of(range(12), [255]))
        ids = np.resize(np.array([*range(CLASSES), 255], np.uint8), (HEIGHT, WIDTH))
        palette = Image.fromarray(ids % CLASSES)
        palette = palette.convert("P")
        self.files = [
            saved(Image.fromarray(ids), "PNG"),
            saved(palette, "PNG", bits=4),
            saved(palette, "PNG", transparency=0),
            saved(Image.fromarray(ids.astype(np.uint16) % CLASSES), "PNG"),
            saved(Image.fromarray(ids), "PNG", exif=exif(1)),
            saved(Image.fromarray(ids > 6), "PNG"),
        ]

    def try_one(self, random: Random) -> str:
        data = self.files[random.integers(len(self.files))]
        kinds = (damage, number_of_a_header, chunks_of_a_png)
        self.path.write_bytes(kinds[random.integers(len(kinds))](data, random))
        outcomes = []
        for read in (self._header, self._pixels):
            try:
                outcomes.append(read())
            except UserError as error:
                assert str(self.path) in str(error), str(error)
                assert str(error).isprintable(), repr(str(error))
                outcomes.append("refused")
        assert outcomes != ["refused", "read"], "the header is refused, the pixels are not"
        return outcomes[1]

    def _header(self) -> str:
        self.reader.kind.check_header(self.path, (WIDTH, HEIGHT))
        return "read"

    def _pixels(self) -> str:
        classes = self.reader.read(self.path, HEIGHT, WIDTH)
        assert classes.shape == (HEIGHT, WIDTH)
        assert ((classes < CLASSES) | (classes == VOID)).all()
        return "read"
