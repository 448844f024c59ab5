"""Sources from lists of files."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.beton import Beton
from pipeline.errors import UserError
from pipeline.manifest import Manifest
from tests.helpers.manifests import names_of
from tests.tools.packing.test_build_dataset import fill, run
from tools.packing import archives
from tools.packing.lists import listed
from tools.packing.read import read_image
from tools.packing.sources import Source


def lists(path: Path, text: str) -> Source:
    path.write_text(text)
    return listed(path)


def test_lists(tmp_path: Path) -> None:
    """The order is that of the list; labels are numbers or names."""
    fill(tmp_path, "a b.jpg", "c/d.jpg")
    text = lists(tmp_path / "l.txt", "c/d.jpg\r\n\na b.jpg\n./c//d.jpg\n")
    assert text.names == ["c/d.jpg", "a b.jpg", "c/d.jpg"]
    assert text.labels is None
    assert text.faults == {2: "duplicate path"}
    table = lists(tmp_path / "l.csv", 'path,label\n"a b.jpg",zebra\nc/d.jpg, cat\n')
    assert table.labels is not None
    assert (table.names, table.labels.tolist()) == (["a b.jpg", "c/d.jpg"], [1, 0])
    assert table.classes == ["cat", "zebra"]
    numbers = lists(tmp_path / "l.tsv", "a b.jpg\t7\nc/d.jpg\t3\n")
    assert numbers.labels is not None
    assert (numbers.labels.tolist(), numbers.classes) == ([7, 3], None)
    names = f"{tmp_path}/c/d.jpg\nc/d.jpg\n../{tmp_path.name}/c/d.jpg\n"
    absolute = lists(tmp_path / "m.txt", names)
    assert read_image(absolute, 0) == (tmp_path / "c/d.jpg").read_bytes()
    assert absolute.faults == {1: "duplicate path", 2: "duplicate path"}
    (tmp_path / "w.csv").write_text("c/d.jpg,é\r\na b.jpg,a\r\n", encoding="utf-16")
    assert listed(tmp_path / "w.csv").classes == ["a", "é"]


@pytest.mark.parametrize(
    ("labels", "stored", "classes"),
    [
        (("-1", "10", "2"), [-1, 10, 2], None),
        (("007", str(2**63 - 1), str(-(2**63))), [7, 2**63 - 1, -(2**63)], None),
        (("10", "2", "cat"), [0, 1, 2], ["10", "2", "cat"]),
        (("1e5", "n01", "2"), [0, 2, 1], ["1e5", "2", "n01"]),
    ],
)
def test_labels(
    tmp_path: Path, labels: tuple[str, ...], stored: list[int], classes: list[str] | None
) -> None:
    """Numbers treated as names would be renumbered: "10" comes before "2"."""
    source = lists(tmp_path / "l.csv", "".join(f"{i}.jpg,{x}\n" for i, x in enumerate(labels)))
    assert source.labels is not None
    assert (source.labels.tolist(), source.classes) == (stored, classes)


def test_a_list_is_packed(tmp_path: Path) -> None:
    """Paths are relative to --root; the beton holds the labels."""
    fill(tmp_path / "in", "a.jpg", "b.jpg")
    path = tmp_path / "l.csv"
    path.write_text("b.jpg,x\na.jpg,y\n")
    run("list", tmp_path / "in", tmp_path / "o.beton", "--list", str(path))
    path.write_text("b.jpg,-5\na.jpg,7\n")
    run("list", tmp_path / "in", tmp_path / "n.beton", "--list", str(path))
    assert Beton(tmp_path / "n.beton").label.tolist() == [-5, 7]  # type: ignore[union-attr]
    manifest = Manifest.beside(tmp_path / "o.beton")
    assert (names_of(manifest), manifest.classes) == (["b.jpg", "a.jpg"], ["x", "y"])


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("l.txt", "\n\n", "names no files"),
        ("l.csv", "a.jpg,1\nb.jpg\n", "1 of 2 rows have no label"),
        ("l.csv", "a.jpg,1\nb.jpg,1,2\n", "line 2: expected path or path,label"),
        ("l.csv", ",1\n", "line 1: expected path"),
        ("l.csv", "a.jpg,1\nb.jpg,\n", "line 2: an empty label"),
        ("l.csv", "a.jpg,1.0\nb.jpg,2\n", "label 1.0: numbers must be whole and fit 64 bits"),
        ("l.csv", f"a.jpg,1\nb.jpg,{10**20}\n", f"label {10**20}: numbers must be whole"),
        ("l.txt", "a.jpg\nb\0.jpg\n", "line 2: a NUL byte"),
        ("none.txt", None, "No such file"),
        ("l.txt", "https://h/a.jpg\n", "line 1: https://h/a.jpg is a URL: list paths"),
        ("l.csv", "a.jpg,1\ns3://h/b,2\n", "line 2: s3://h/b is a URL: list paths"),
        ("l.parquet", "PAR1\x15", "l.parquet: a Parquet file; expected a path on each line"),
        ("l.jsonl", '{"path": "a.jpg"}\n', "line 1: JSON, not a path: expected a path on"),
        ("l.json", '[\n  "a.jpg"\n]\n', "line 1: JSON, not a path: expected a path on"),
        ("l.csv", "url,label\nhttps://h/a.jpg,1\n", "line 1: its columns are url,label: expected"),
        ("l.txt", "file:///h/a.jpg\n", "line 1: file:///h/a.jpg is a URL: list paths"),
        ("l.csv", "label,path\n1,a.jpg\n", "line 1: its columns are label,path: expected path"),
        ("l.csv", "id,path,label\n1,a.jpg,2\n", "its columns are id,path,label: expected path"),
        ("l.csv", "cat,a.jpg\n", "line 1: cat,a.jpg: a label and a path? Expected path,label"),
        ("l.csv", "key,category\na.jpg,1\n", "line 1: there is no file key: expected"),
        ("l.csv", "a.jpg;1\n", "line 1: a.jpg;1: a path and a label? expected a path on"),
        ("l.txt", "a.jpg 1\n", "line 1: a.jpg 1: a path and a label? expected a path on"),
        ("l.txt", "path,label\na.jpg,1\n", "line 1: path,label: a path and a label? expected"),
    ],
)
def test_bad_lists(tmp_path: Path, name: str, text: str | None, message: str) -> None:
    """An extra column would shift labels silently."""
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError) as error:
        listed(tmp_path / name)
    assert message in str(error.value)


def test_odd_names_of_files_that_exist(tmp_path: Path) -> None:
    """Without it a file is refused because its name looks like two columns, a heading or JSON."""
    names = ["path", "a.jpg 1", "{b}", "c,d", "[e"]
    fill(tmp_path, *names)
    assert lists(tmp_path / "l.txt", "\n".join(names)).names == names


@pytest.mark.parametrize("name", ["l.txt", "l.csv"])
def test_lists_that_are_too_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Without it a line of a gigabyte, or a billion lines, fill the memory."""
    path = tmp_path / name
    path.write_text("a.jpg\n" + "x" * (1 << 20))
    with pytest.raises(UserError, match=r"line 2: more than 65,536 characters"):
        listed(path)
    monkeypatch.setattr(archives, "MAX_FILES", 3)
    path.write_text("a.jpg\n" * 4)
    with pytest.raises(UserError, match=f"{name}: more than 3 files"):
        listed(path)


def test_a_row_without_end(tmp_path: Path) -> None:
    """A quoted line feed does not end a row: without it one row fills the memory."""
    path = tmp_path / "l.csv"
    path.write_text("a.jpg,x\n" + "\n" * 70_000 + "b.jpg,y\n" * 20_000)
    assert len(listed(path)) == 20_001  # no row of them is long
    path.write_text("a.jpg,x\n" + '"x\n",' * 20_000)
    with pytest.raises(UserError, match=r"line \d+: more than 65,536 characters"):
        listed(path)


def test_lists_that_are_no_files(tmp_path: Path) -> None:
    """Without it a pipe or a device as a list blocks for ever. The shell's <(…) is read."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="pipe: names no files"):
        listed(tmp_path / "pipe")
    with pytest.raises(UserError, match="/dev/zero: line 1: a NUL byte"):
        listed(Path("/dev/zero"))
    with pytest.raises(UserError, match="Is a directory"):
        listed(tmp_path)
    command = f"""
from pathlib import Path
from tools.packing import archives
from tools.packing.lists import listed
import sys
print(listed(Path(sys.argv[1]), Path("{tmp_path}")).names)
"""
    shell = f"{sys.executable} -c '{command}' <(sleep 0.2; echo a.jpg; sleep 0.2; echo b.jpg)"
    said = subprocess.run(["bash", "-c", shell], check=False, capture_output=True, timeout=60)
    assert said.stdout == b"['a.jpg', 'b.jpg']\n", said.stderr


@given(text=st.text(max_size=80), suffix=st.sampled_from(["txt", "csv", "tsv"]))
def test_any_list_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, text: str, suffix: str
) -> None:
    """Spreadsheets and scripts write lists: no content may end in a traceback."""
    path = tmp_path_factory.getbasetemp() / f"any.{suffix}"
    path.write_text(text, encoding="utf-8", newline="")
    try:
        source = listed(path)
    except UserError:
        return
    assert source.names
    assert source.labels is None or len(source.labels) == len(source.names)
