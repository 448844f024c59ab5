"""Images that are in the training set and in the validation set: scores on them tell nothing."""

import filecmp
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from pipeline.errors import UserError, printable


def check_apart(train: Sequence[Path], val: Sequence[Path], source: Path) -> None:
    """Raise UserError if an image of `val`, which `source` describes, is in `train`: one of the
    same name and content. A copy under another name is not noticed.
    """
    try:
        common = list(_shared(train, val))
    except OSError as error:
        raise UserError(f"{printable(str(error.filename))}: {error.strerror}") from None
    if common:
        raise UserError(
            f"{source}: {len(common)} of the {len(val)} images to score are in the training set"
            f" (the first: {printable(str(common[0]))})"
        )


def _shared(train: Iterable[Path], val: Sequence[Path]) -> Iterator[Path]:
    names = {path.name for path in val}
    sizes: dict[tuple[str, int], list[Path]] = defaultdict(list)
    for path in train:
        if path.name in names:
            sizes[path.name, path.stat().st_size].append(path)
    for path in val if sizes else ():
        others = sizes.get((path.name, path.stat().st_size), ())
        if any(path.samefile(other) or filecmp.cmp(path, other, shallow=False) for other in others):
            yield path
