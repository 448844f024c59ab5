"""A part of a data set, equal or long-tailed over its classes, the same on every machine.

Which images are taken follows from the seed and the images' names alone, by SHA-256: not from the
order of the files, the numbers of threads and shards, or a random generator.
"""

from collections import Counter
from collections.abc import Hashable
from decimal import Decimal
from hashlib import sha256

from pipeline.errors import UserError
from tools.packing.sources import Source

POWER = 6
"""α of the Pareto distribution of class sizes, as of ImageNet-LT (Liu et al., Large-Scale
Long-Tailed Recognition in an Open World, CVPR 2019). That it is the distribution of the second kind
is our reading: its sizes come near those that are published."""
SMALLEST = 5
"""Images of the smallest class of ImageNet-LT."""

Sizes = dict[int, int]
"""Images by label."""


def subset(source: Source, count: int, seed: int, long_tailed: bool = False) -> Source:
    """`count` images of a source in its order, and all its faults, which are bad files as before.

    With labels, the classes have equal sizes, as far as they have that many images; if
    `long_tailed`, those of `long_tail`.

    Raises:
        UserError: if there are not so many images; of `long_tailed`, if there are no labels, or
            more classes than images.
    """
    labels = source.labels
    if labels is None and long_tailed:
        raise UserError(
            "--subset-lt: the images have no labels; imagefolder, imagenet, list, parquet and"
            " webdataset read them"
        )
    good = [i for i in range(len(source)) if i not in source.faults]
    if count > len(good):
        raise UserError(f"--subset {count:,}: there are {len(good):,} images")
    of_class = [0 if labels is None else labels[i] for i in good]
    room = Counter(of_class)
    names = source.classes
    known = dict(enumerate(names or ()))  # not -1, of an image whose class is not told
    order = sorted(room, key=lambda one: _rank(seed, known.get(one, one)))
    left: Sizes = (long_tail if long_tailed else equal)([room[one] for one in order], count, order)
    chosen = []
    for place in sorted(range(len(good)), key=lambda k: _rank(seed, source.names[good[k]])):
        if left[of_class[place]]:
            left[of_class[place]] -= 1
            chosen.append(good[place])
    taken = source.take(sorted([*chosen, *source.faults]))
    taken.options = {"subset": count, "seed": seed, "subset_lt": long_tailed}
    return taken


def equal(room: list[int], count: int, labels: list[int]) -> Sizes:
    """Sizes of classes with `room` for so many images, of `count` in all: equal but for one image,
    which the first `labels` have; a smaller class is taken whole.
    """
    low, high = 0, max(room)
    while low < high:
        level = (low + high + 1) // 2
        low, high = (level, high) if _total(level, room) <= count else (low, level - 1)
    rest = count - _total(low, room)
    sizes = {}
    for label, most in zip(labels, room, strict=True):
        more = rest > 0 and most > low
        rest -= more
        sizes[label] = min(low, most) + more
    return sizes


def _total(level: int, room: list[int]) -> int:
    return sum(min(level, most) for most in room)


def long_tail(room: list[int], count: int, labels: list[int]) -> Sizes:
    """Sizes of classes with `room` for so many images, of `count` in all: the quantiles of a Pareto
    distribution, the largest for the first of `labels`.

    Class r of C has s · (((C + 1) / r)^(1/α) - 1) images: the Pareto distribution of the second
    kind (Lomax) with α = 6, at the probability r / (C + 1) to be larger. s is such that the sum is
    `count`, where a class has at least `SMALLEST` images (or all, or count / C), and not more than
    it has room for. 115,846 images of 1,000 classes then have 5 to 1,265 images in a class; of
    ImageNet-LT, whose sizes were drawn at random, 5 to 1,280 are published.

    Raises:
        UserError: if there are more classes than images.
    """
    classes = len(room)
    if count < classes:
        raise UserError(f"--subset-lt: {count:,} images of {classes:,} classes: one each at least")
    shape = [_quantile(classes, r) for r in range(1, classes + 1)]
    least = [min(SMALLEST, count // classes, most) for most in room]
    low, high = 0.0, max(room) / shape[-1]
    for _ in range(200):
        middle = (low + high) / 2
        total = sum(_sizes(middle, shape, least, room))
        low, high = (middle, high) if total <= count else (low, middle)
    sizes = _sizes(low, shape, least, room)
    parts = [low * x - size for x, size in zip(shape, sizes, strict=True)]
    rest = count - sum(sizes)
    while rest:  # to those of which most was rounded off; once, unless many classes are full
        for i in sorted(range(classes), key=lambda i: (-parts[i], i)):
            if rest and sizes[i] < room[i]:
                sizes[i], rest = sizes[i] + 1, rest - 1
    return dict(zip(labels, sizes, strict=True))


def _quantile(classes: int, r: int) -> float:
    """In decimals, whose powers are the same on every machine, unlike those of a C library."""
    return float((Decimal(classes + 1) / r) ** (Decimal(1) / POWER) - 1)


def _sizes(scale: float, shape: list[float], least: list[int], most: list[int]) -> list[int]:
    triples = zip(shape, least, most, strict=True)
    return [min(high, max(low, int(scale * x))) for x, low, high in triples]


def _rank(seed: int, name: Hashable) -> bytes:
    """A place in an order that depends on nothing but the seed and the name."""
    return sha256(f"{seed}\0{name}".encode("utf-8", "surrogateescape")).digest()
