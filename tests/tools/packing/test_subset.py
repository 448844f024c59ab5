"""Parts of a data set: which images, of which classes, and that nothing else decides."""

from array import array
from collections import Counter
from hashlib import sha256
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import UserError
from pipeline.manifest import Manifest
from tests.pipeline.test_beton_writer import stored
from tests.tools.packing.test_build_dataset import fill, run
from tests.tools.packing.test_parquet import shards
from tests.tools.packing.test_run import same
from tools import build_dataset
from tools.packing.job import shard_path
from tools.packing.sources import Source
from tools.packing.subset import equal, long_tail, subset


def labelled(sizes: list[int]) -> Source:
    source = Source(Path("x"), classes=[f"c{label}" for label in range(len(sizes))])
    source.add_files(f"c{label}/{i}.jpg" for label, size in enumerate(sizes) for i in range(size))
    source.labels = array("q", (label for label, size in enumerate(sizes) for _ in range(size)))
    return source


def counts(source: Source) -> Counter[int]:
    return Counter(source.labels or ())


def test_the_names_decide_and_not_their_order() -> None:
    """Without it a file system that lists a folder in another order gives another data set."""
    names = [f"{i}.jpg" for i in range(1000)]
    forwards, backwards = Source(Path("a")), Source(Path("b"))
    forwards.add_files(names)
    backwards.add_files(names[::-1])
    chosen = subset(forwards, 100, seed=3).names
    assert chosen == subset(backwards, 100, seed=3).names[::-1]
    assert len(set(chosen)) == 100
    assert set(chosen) != set(subset(forwards, 100, seed=4).names)
    first = sorted(names, key=lambda name: sha256(f"3\0{name}".encode()).digest())[:100]
    assert set(chosen) == set(first)  # the rule in the docs


def test_a_larger_subset_holds_the_smaller_one() -> None:
    """So that a study of sizes compares sizes, not images."""
    source = labelled([50] * 10)
    small, large = (set(subset(source, count, seed=0).names) for count in (100, 300))
    assert small < large


def test_classes_are_equal() -> None:
    """ImageNet-118K: as many images of each class; a class that has fewer is taken whole."""
    sizes = [100] * 8 + [5, 7]
    found = counts(subset(labelled(sizes), 100, seed=1))
    assert found[8] == 5
    assert found[9] == 7
    assert {found[label] for label in range(8)} == {11}
    found = counts(subset(labelled(sizes), 103, seed=1))
    assert sorted(found[label] for label in range(8)) == [11] * 5 + [12] * 3


@settings(max_examples=100, deadline=None)
@given(room=st.lists(st.integers(1, 60), min_size=1, max_size=12), data=st.data())
def test_sizes_add_up_and_fit(room: list[int], data: st.DataObject) -> None:
    """Without it a rounding loses an image, or asks a class for more than it has."""
    count = data.draw(st.integers(len(room), sum(room)))
    for rule in (equal, long_tail):
        sizes = list(rule(room, count, list(range(len(room)))).values())
        assert sum(sizes) == count
        assert all(0 < size <= most for size, most in zip(sizes, room, strict=True))


def test_long_tail_is_that_of_imagenet_lt() -> None:
    """Of ImageNet-LT (Liu et al. 2019) 115,846 images, at most 1,280 and at least 5 of a class are
    published. Its sizes were drawn at random; the largest of 1,000 varies widely.
    """
    sizes = list(long_tail([1300] * 1000, 115_846, list(range(1000))).values())
    assert sizes == sorted(sizes, reverse=True)
    assert (sum(sizes), sizes[-1]) == (115_846, 5)
    assert 0.9 < sizes[0] / 1280 < 1.1
    # The distribution, written naively: the share of classes above a size, of those not clipped.
    scale = sizes[0] / (1001 ** (1 / 6) - 1)
    for size in (20, 50, 100, 300, 600):
        share = sum(one > size for one in sizes) / 1000
        assert share == pytest.approx((1 + size / scale) ** -6, abs=0.01)


def test_long_tail_of_images() -> None:
    """The seed decides which classes are large."""
    source = labelled([200] * 20)
    found = counts(subset(source, 400, seed=0, long_tailed=True))
    assert found.total() == 400
    assert min(found.values()) == 5
    assert max(found.values()) > 5 * 400 / 20 / 2
    other = counts(subset(source, 400, seed=1, long_tailed=True))
    assert sorted(other.values()) == sorted(found.values())
    assert other != found


def test_what_cannot_be_taken() -> None:
    """One line each."""
    source = labelled([4, 4])
    source.faults[0] = "cut short"
    with pytest.raises(UserError, match="--subset 8: there are 7 images"):
        subset(source, 8, seed=0)
    with pytest.raises(UserError, match="1 images of 2 classes: one each"):
        subset(source, 1, seed=0, long_tailed=True)
    taken = subset(source, 4, seed=0)
    assert (len(taken), taken.faults) == (5, {0: "cut short"})  # it is named, whatever is chosen
    source.labels = None
    with pytest.raises(UserError, match="--subset-lt: the images have no labels; imagefolder"):
        subset(source, 4, seed=0, long_tailed=True)


def test_a_subset_is_packed_sharded_and_recorded(tmp_path: Path) -> None:
    """Without it the shards of a subset are subsets of the shards, and the beton does not say what
    it holds.
    """
    root = tmp_path / "in"
    fill(root, *(f"train/n{i % 3}/{i:02d}.JPEG" for i in range(30)))
    options = ["--subset", "12", "--seed", "5", "--subset-lt"]
    run("imagenet", root, tmp_path / "a.beton", *options)
    manifest = Manifest.beside(tmp_path / "a.beton")
    chosen = {name: manifest.options[name] for name in ("subset", "seed", "subset_lt")}
    assert chosen == {"subset": 12, "seed": 5, "subset_lt": True}
    assert manifest.count == 12
    for i in (1, 2):
        run("imagenet", root, tmp_path / "b.beton", "--shard", f"{i}/2", *options)
    paths = [str(shard_path(tmp_path / "b.beton", i, 2)) for i in (1, 2)]
    build_dataset.main(["merge", *paths, "--out", f"{tmp_path}/b.beton"])
    assert same(tmp_path, "a.beton", "b.beton")


def test_a_subset_of_parquet_keeps_no_other_rows(tmp_path: Path) -> None:
    """Without it the rows that are not taken stay in memory until the end."""
    data = shards(tmp_path / "in", count=2, rows=40)
    run("parquet", tmp_path / "in", tmp_path / "a.beton", "--subset", "20")
    names = [record.name for record in Manifest.beside(tmp_path / "a.beton").records()]
    rows = [int(name.rsplit("-", 1)[1].removesuffix(".JPEG")) for name in names]
    assert stored(tmp_path / "a.beton") == [data[i] for i in rows]


def test_a_part_of_nothing(tmp_path: Path) -> None:
    """Without it --subset-lt or --seed alone is silently without effect."""
    fill(tmp_path / "in", "a.jpg")
    with pytest.raises(UserError, match="--subset-lt needs --subset"):
        run("folder", tmp_path / "in", tmp_path / "o.beton", "--subset-lt")
    with pytest.raises(UserError, match="--seed needs --subset"):
        run("folder", tmp_path / "in", tmp_path / "o.beton", "--seed", "3")
