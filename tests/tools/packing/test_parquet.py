"""Parquet files of Hugging Face's layout, written by pyarrow."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.beton import Beton
from pipeline.errors import BadImage, UserError
from pipeline.manifest import Manifest
from tests.pipeline.test_beton_writer import stored
from tests.tools.packing.test_build_dataset import picture, run
from tests.tools.packing.test_run import Killed, same
from tools import build_dataset
from tools.packing import parquet as module
from tools.packing import run as packing
from tools.packing.job import shard_path
from tools.packing.journal import Journal
from tools.packing.parquet import parquet
from tools.packing.read import read_image
from tools.packing.shards import expanded
from tools.packing.subset import subset

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

ROW = {"image": {"bytes": b"", "path": "x/a.jpg"}, "label": 1}


def jpeg(shift: int, form: str = "JPEG") -> bytes:
    stream = io.BytesIO()
    picture(24, 32, shift).save(stream, form)
    return stream.getvalue()


def schema(names: list[str] | None = None) -> Any:
    """Of Hugging Face's `datasets`, as it describes an image and a label."""
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": names}}
    columns = [
        ("label", pa.int64()),
        ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
    ]
    described = json.dumps({"info": {"features": features}}).encode()
    return pa.schema(columns, {b"huggingface": described} if names else None)


def write(path: Path, rows: list[dict[str, Any]], kind: Any = None, group: int = 3) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, kind or schema()), path, row_group_size=group)
    return path


def shards(root: Path, count: int = 3, rows: int = 8) -> list[bytes]:
    """Shards with labels; returns the bytes of the images in order."""
    data = [jpeg(7 * i % 200) for i in range(count * rows)]
    for k in range(count):
        numbers = range(k * rows, (k + 1) * rows)
        content = [
            {"image": {"bytes": data[i], "path": f"n0/{i}.JPEG"}, "label": i % 2} for i in numbers
        ]
        write(root / f"train-{k:05d}-of-{count:05d}.parquet", content, schema(["cat", "dog"]))
    return data


def test_rows_become_images(tmp_path: Path) -> None:
    """Without it a row's image, label or name could be another row's."""
    data = shards(tmp_path / "in")
    run("parquet", tmp_path / "in", tmp_path / "a.beton")
    assert stored(tmp_path / "a.beton") == data
    manifest = Manifest.beside(tmp_path / "a.beton")
    assert manifest.classes == ["cat", "dog"]
    records = list(manifest.records())
    assert records[9].name == "train-00001-of-00003.parquet/1-9.JPEG"
    assert [record.label for record in records] == [i % 2 for i in range(24)]
    run("parquet", tmp_path / "in" / "train-*.parquet", tmp_path / "b.beton")
    assert same(tmp_path, "a.beton", "b.beton")


def test_killed_and_sharded_runs_give_the_same_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without it a run that begins within a row group could take other rows."""
    monkeypatch.setattr(packing, "BATCH_IMAGES", 2)
    root = tmp_path / "in"
    shards(root)
    run("parquet", root, tmp_path / "a.beton")
    append, count = Journal.append, 0

    def die(journal: Journal, rows: list) -> None:
        nonlocal count
        append(journal, rows)
        count += 1
        if count == 5:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Journal, "append", die)
        run("parquet", root, tmp_path / "b.beton")
    run("parquet", root, tmp_path / "b.beton")
    assert same(tmp_path, "a.beton", "b.beton")
    for i in (1, 2, 3):
        run("parquet", root, tmp_path / "c.beton", "--shard", f"{i}/3")
    paths = [str(shard_path(tmp_path / "c.beton", i, 3)) for i in (1, 2, 3)]
    build_dataset.main(["merge", *paths, "--out", f"{tmp_path}/c.beton"])
    assert same(tmp_path, "a.beton", "c.beton")


@pytest.mark.parametrize("waiting", [0, 1 << 20])
def test_rows_in_any_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waiting: int) -> None:
    """Threads ask for rows in no order, and again after a large image: each gets its own row, also
    when none is kept for later."""
    monkeypatch.setattr(module, "_WAITING", waiting)
    data = shards(tmp_path, count=1, rows=40)
    source = parquet(tmp_path)
    order = np.random.default_rng(0).permutation(np.repeat(np.arange(40), 2)).tolist()
    assert [read_image(source, i) for i in order] == [data[i] for i in order]


def test_rows_that_were_passed_by_are_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without it the memory of packing a part of a set grows with its row groups."""
    monkeypatch.setattr(module, "_WAITING", 2000)
    data = shards(tmp_path, count=1, rows=40)
    table = parquet(tmp_path).containers[0]
    group = table._group(0)  # type: ignore[attr-defined]
    assert group.take(2) == data[2]
    assert group._bytes == sum(map(len, group._waiting.values())) <= 2000


def test_a_row_group_is_closed_after_the_last_row_that_is_taken(tmp_path: Path) -> None:
    """Without it packing a part of a set keeps each row group open and is slower than all of it."""
    data = shards(tmp_path, count=1, rows=12)  # in row groups of three
    source = parquet(tmp_path).take([1, 6, 7, 11])
    assert [read_image(source, i) for i in (1, 0, 2, 3)] == [data[i] for i in (6, 1, 7, 11)]
    assert not source.containers[0]._groups  # type: ignore[attr-defined]


def null_image(rows: list[dict]) -> None:
    rows[1]["image"] = None


def only_a_path(rows: list[dict]) -> None:
    rows[1]["image"] = {"bytes": None, "path": "a.jpg"}


def no_picture(rows: list[dict]) -> None:
    rows[1]["image"] = {"bytes": b"hello", "path": "a.jpg"}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (null_image, "t.parquet/1.jpg: no image: the row is null, or holds only a path"),
        (only_a_path, "t.parquet/1-a.jpg: no image: the row is null, or holds only a path"),
        (no_picture, "t.parquet/1-a.jpg: not an image"),
    ],
)
def test_bad_rows_are_named(
    tmp_path: Path, damage: Callable[[list[dict]], None], message: str
) -> None:
    """Without it one bad row of a million ends in a traceback, or is dropped without a word."""
    rows = [{"image": {"bytes": jpeg(i), "path": None}, "label": i} for i in range(3)]
    damage(rows)
    write(tmp_path / "in/t.parquet", rows)
    with pytest.raises(UserError) as error:
        run("parquet", tmp_path / "in", tmp_path / "a.beton")
    assert "1 of 3 images is bad" in str(error.value)
    assert message in str(error.value)
    assert not (tmp_path / "a.beton").exists()
    run("parquet", tmp_path / "in", tmp_path / "a.beton", "--on-error", "skip")
    assert Beton(tmp_path / "a.beton").label.tolist() == [0, 2]  # type: ignore[union-attr]


@pytest.mark.parametrize("share", [0.0, 0.4, 0.99])
def test_a_truncated_shard_is_one_bad_file(tmp_path: Path, share: float) -> None:
    """Without it an interrupted download ends in a traceback of pyarrow."""
    shards(tmp_path)
    cut = tmp_path / "train-00001-of-00003.parquet"
    data = cut.read_bytes()
    cut.write_bytes(data[: int(share * len(data))])
    source = parquet(tmp_path)
    assert (len(source), list(source.faults)) == (17, [8])
    assert source.names[8] == cut.name
    assert "cannot be read as Parquet" in source.faults[8]
    assert source.labels is not None and len(source.labels) == 17


def test_damaged_pages_are_bad_rows(tmp_path: Path) -> None:
    """Without it a hole in a download that leaves the end whole ends in a traceback, or in another
    image. (pyarrow's pages have no checksums unless they are asked for.)"""
    data = shards(tmp_path, count=1, rows=12)
    path = next(tmp_path.glob("*.parquet"))
    content = bytearray(path.read_bytes())
    middle = content.find(data[7]) if data[7] in content else len(content) // 2
    content[middle - 60 : middle + 400] = bytes(460)
    path.write_bytes(content)
    source, wrong = parquet(tmp_path), 0
    for i, expected in enumerate(data):
        try:
            wrong += read_image(source, i) != expected
        except BadImage:
            wrong += 1
    assert 0 < wrong <= 4  # of the row group, or of the rows beside


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ({"url": "string", "label": "int64"}, {}, "no column of images; expected image: {bytes"),
        ({"a": "other"}, {}, "no column of images"),
        ({"image": "string"}, {}, "no column of images; .* its columns are image: string"),
        ({"a": "struct", "b": "struct"}, {}, "several columns of images: choose one .*, a or b"),
        ({"image": "struct"}, {"image": "img"}, "no column img of images"),
        ({"image": "struct", "label": "float64"}, {"label": "label"}, "no column label of whole"),
    ],
)
def test_tables_of_other_columns(
    tmp_path: Path, columns: dict[str, str], options: dict[str, str], message: str
) -> None:
    """Without it a table of URLs gives a beton of nothing, or one of two columns is guessed."""
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    known = {"struct": struct, "other": pa.struct([("path", pa.string())])}
    fields = [(name, known.get(k) or getattr(pa, k)()) for name, k in columns.items()]
    pq.write_table(pa.schema(fields).empty_table(), tmp_path / "t.parquet")
    with pytest.raises(UserError, match=message):
        parquet(tmp_path, **options)


def test_other_layouts(tmp_path: Path) -> None:
    """A column of plain bytes, as img2dataset writes; two columns of images, of which one is
    chosen; no labels."""
    data = [jpeg(i, "PNG") for i in range(3)]
    table = pa.table({"jpg": pa.array(data), "depth": pa.array(data[::-1]), "key": list("abc")})
    pq.write_table(table, tmp_path / "00000.parquet")
    source = parquet(tmp_path)
    assert [read_image(source, i) for i in range(3)] == data
    assert (source.labels, source.names[0]) == (None, "00000.parquet/0.jpg")
    other = parquet(tmp_path, image="depth")
    assert read_image(other, 0) == data[2]


def test_a_folder_of_the_hub_cache(tmp_path: Path) -> None:
    """Without it the download of `hf download` must be copied, for its folder holds every revision
    that was ever fetched."""
    hub = tmp_path / "datasets--org--name"
    for revision in ("aaa", "bbb"):
        shards(hub / "snapshots" / revision / "data", count=1)
    with pytest.raises(UserError, match="holds 2 revisions"):
        parquet(hub)
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text("bbb\n")
    source = parquet(hub)
    assert source.root == hub / "snapshots" / "bbb"
    assert source.names[0] == "data/train-00000-of-00001.parquet/0-0.JPEG"
    (hub / "refs" / "main").write_text("../../../etc")
    with pytest.raises(UserError, match="revisions"):
        parquet(hub)


def test_splits_are_not_mixed_and_shards_not_missed(tmp_path: Path) -> None:
    """Without it the validation images are trained on, or a third of the set is missing in
    silence."""
    shards(tmp_path)
    write(tmp_path / "test-00000-of-00001.parquet", [ROW])
    with pytest.raises(UserError, match=r"of 2 names, .*splits: test-\*.parquet, train-\*.parquet"):
        parquet(tmp_path)
    assert len(parquet(tmp_path / "train-*.parquet")) == 24
    (tmp_path / "test-00000-of-00001.parquet").unlink()
    (tmp_path / "train-00001-of-00003.parquet").unlink()
    with pytest.raises(UserError, match="1 of 3 shards are missing: train-00001-of-00003"):
        parquet(tmp_path)
    assert len(parquet(tmp_path / "train-0000{0,2}-of-00003.parquet")) == 16
    with pytest.raises(UserError, match=r"no \.parquet file has such a name"):
        parquet(tmp_path / "val-*.parquet")
    with pytest.raises(UserError, match="no such folder"):
        parquet(tmp_path / "none" / "*.parquet")


def test_labels_that_are_missing(tmp_path: Path) -> None:
    """Without it a row without a label gets one, or the end of a shard does."""
    write(tmp_path / "a-0.parquet", [ROW, ROW | {"label": None}])
    write(tmp_path / "a-1.parquet", [ROW])
    source = parquet(tmp_path)
    assert source.faults == {0: "row 1: no label"}
    assert source.labels is not None
    assert source.labels.tolist() == [-1, 1]
    write(tmp_path / "a-0.parquet", [ROW])
    write(tmp_path / "a-1.parquet", [ROW], schema(["other", "names"]))
    assert "other columns or class names" in parquet(tmp_path).faults[1]


@pytest.mark.parametrize("label", [2, -2, None])
def test_labels_that_cannot_be(tmp_path: Path, label: int | None) -> None:
    """Without it --subset fails on a label without a name, which training would count as a class.
    Hugging Face writes -1 where the class is not told.
    """
    write(tmp_path / "a-0.parquet", [ROW, ROW | {"label": label}], schema(["cat", "dog"]))
    write(tmp_path / "a-1.parquet", [ROW, ROW | {"label": -1}], schema(["cat", "dog"]))
    source = parquet(tmp_path)
    assert [*source.faults] == [0]
    assert "row 1: " in source.faults[0]
    assert source.labels is not None
    assert source.labels.tolist() == [-1, 1, -1]
    assert len(subset(source, 2, seed=0)) == 3


def test_labels_beyond_64_bits(tmp_path: Path) -> None:
    """Without it a hash as label is a traceback."""
    kind = schema().set(0, pa.field("label", pa.uint64()))
    write(tmp_path / "a-0.parquet", [ROW, ROW | {"label": 2**64 - 1}], kind)
    write(tmp_path / "a-1.parquet", [ROW], kind)
    assert "row 1: label 18446744073709551615" in parquet(tmp_path).faults[0]


def of_text(kind: Any, name: str = "label") -> Any:
    """As Polars writes text."""
    return pa.schema([
        ("image", pa.struct([("bytes", pa.large_binary()), ("path", pa.large_string())])),
        (name, kind),
    ])  # fmt: skip


@pytest.mark.parametrize("kind", [pa.large_string(), pa.dictionary(pa.int8(), pa.string())])
def test_labels_that_are_names(tmp_path: Path, kind: Any) -> None:
    """Without it sets whose labels are text lose them, also where a data frame wrote them as
    categories. As in a list: the rank of the name.
    """
    for shard, names in enumerate([["dog", "cat"], ["ant", "dog"]]):
        rows = [ROW | {"label": name} for name in names]
        write(tmp_path / f"in/a-{shard}.parquet", rows, of_text(kind))
    source = parquet(tmp_path / "in")
    assert source.classes == ["ant", "cat", "dog"]
    assert source.labels is not None and source.labels.tolist() == [2, 1, 0, 2]
    write(tmp_path / "b/a-0.parquet", [ROW | {"kind": "x"}], of_text(pa.string(), "kind"))
    assert parquet(tmp_path / "b").labels is None
    chosen = parquet(tmp_path / "b", label="kind")
    assert chosen.classes == ["x"] and chosen.labels is not None
    bad = [ROW | {"label": "cat"}, ROW | {"label": None}]
    write(tmp_path / "in/a-2.parquet", bad, of_text(kind))
    source = parquet(tmp_path / "in")
    assert source.faults == {4: "row 1: no label"}
    assert source.labels is not None and source.labels.tolist() == [2, 1, 0, 2, -1]


def test_columns_of_labels_that_are_not_read_are_named(tmp_path: Path) -> None:
    """Without it a beton has no labels, and nobody is told why."""
    kind = of_text(pa.list_(pa.string()))
    write(tmp_path / "a.parquet", [ROW | {"label": ["cat"]}], kind)
    source = parquet(tmp_path)
    assert source.names == ["a.parquet/0-a.jpg"]
    (unread,) = source.left
    assert unread.endswith(": labels are whole numbers or names)")
    features = {name: {"_type": "ClassLabel", "names": ["x"]} for name in ("coarse", "fine")}
    described = {"huggingface": json.dumps({"info": {"features": features}})}
    kind = pa.schema([kind.field("image"), ("coarse", pa.int64()), ("fine", pa.int64())], described)
    write(tmp_path / "a.parquet", [{"image": ROW["image"], "coarse": 0, "fine": 0}], kind)
    assert [*parquet(tmp_path).left] == ["choice of labels (coarse or fine: see --label)"]


@pytest.mark.parametrize(
    "pattern",
    ["s-{000000..000012}.tar", "{a,b}/{9..11}.tar", "{3..1}", "x", "{01..2}{a,}", "a{}b"],
)
def test_braces_are_expanded_as_elsewhere(pattern: str) -> None:
    """webdataset reads such patterns with the package braceexpand: another order would give another
    beton."""
    braceexpand = pytest.importorskip("braceexpand").braceexpand
    assert list(expanded(pattern)) == list(braceexpand(pattern))


def test_braces_without_end(tmp_path: Path) -> None:
    """Without it a typing error fills the memory."""
    for pattern in ("{0..99999999}", "{0..999}" * 3):
        with pytest.raises(UserError, match="shards"):
            list(expanded(pattern))
