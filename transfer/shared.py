"""Images that are in the training set and in the validation set: scores on them tell nothing."""

import filecmp
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from pipeline.errors import UserError, printable

FEW = 0.01
"""Share of the images to score that may be copies of training images under another name, for large
collections have some photographs twice."""
_PROBE = 4096  # bytes


def check_apart(train: Sequence[Path], val: Sequence[Path], source: Path) -> None:
    """Raise UserError if an image of `val`, which `source` describes, is in `train`: as the same
    file or as a copy of the same name, or if more than `FEW` are there as copies of any name. The
    same picture in another file is not noticed.
    """
    try:
        shared = list(_shared(train, val))
    except OSError as error:
        raise UserError(f"{printable(str(error.filename))}: {error.strerror}") from None
    if len(shared) > FEW * len(val) or any(
        path.name == other.name or path.samefile(other) for path, other in shared
    ):
        raise UserError(
            f"{source}: {len(shared)} of the {len(val)} images to score are in the training set"
            f" (the first: {printable(str(shared[0][0]))})"
        )


def _shared(train: Iterable[Path], val: Sequence[Path]) -> Iterator[tuple[Path, Path]]:
    """The images of `val` that are in `train`, each with its twin there. Reads little: the sizes of
    all files, a few bytes of those whose size is in both sets, and whole files only if these agree.
    """
    sizes = {path.stat().st_size for path in val}
    alike: dict[tuple[int, int], list[Path]] = defaultdict(list)
    for path in train:
        if path.stat().st_size in sizes:
            alike[_probe(path)].append(path)
    for path in val if alike else ():
        others = [
            other
            for other in alike.get(_probe(path), ())
            if path.samefile(other) or filecmp.cmp(path, other, shallow=False)
        ]
        if others:
            yield path, next((other for other in others if other.name == path.name), others[0])


def _probe(path: Path) -> tuple[int, int]:
    """A file's size and a hash of the bytes in its middle, where two images rarely agree."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size // 2 - _PROBE // 2))
        return size, hash(file.read(_PROBE))
