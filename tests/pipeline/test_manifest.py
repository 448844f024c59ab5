"""The list of a beton's records, written and read as a stream."""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import manifest as manifests
from pipeline.errors import UserError
from pipeline.manifest import Manifest, Record, Shard, Source
from tests.helpers.manifests import names_of

RECORDS = [
    Record("a/é.jpg", 12, "0123abcd", "original"),
    Record("b\udc80\u2028\n.jpg", 0, "00000000", "converted: not a JPEG"),
    Record('"]}', 1 << 40, "ffffffff", "scaled"),
    Record("t.jpg", 9, "00000001", "tiles", None, Source(8, "0000000a")),
    Record("p.jpg", 9, "00000001", "converted: coded anew, tiles", -5, Source(8, "0000000a")),
]


@pytest.fixture(autouse=True, scope="module", params=[1, 60, 1 << 20])
def block(request: pytest.FixtureRequest) -> Iterator[None]:
    """Bytes that are decoded at once: a line, two lines, the whole file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manifests, "_BLOCK", request.param)
        yield


def written(path: Path, records: list[Record] = RECORDS) -> Manifest:
    manifest = Manifest("folder", {"store": "original"}, len(records), 77, skipped=[("x", "empty")])
    manifest.write(path, iter(records))
    return manifest


def test_what_is_written_is_read(tmp_path: Path) -> None:
    """Any name of a file system is read back, and any JSON library reads the file."""
    manifest = written(tmp_path / "a.json")
    again = Manifest.read(tmp_path / "a.json")
    assert again == manifest
    assert list(again.records()) == RECORDS
    assert names_of(again) == [record.name for record in RECORDS]
    content = json.loads((tmp_path / "a.json").read_text())
    assert content["format"] == 4
    assert content["digest"] == manifest.digest
    rows = [[*row[:5], Source(*row[5])] if len(row) == 6 else row for row in content["records"]]
    assert [Record(*row) for row in rows] == RECORDS
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_format_3_is_read(tmp_path: Path) -> None:
    """Without it the betons of earlier versions lose their names and checksums."""
    path, records = tmp_path / "a.json", RECORDS[:3]
    written(path, records)
    old = path.read_bytes().replace(b'{"format": 4,', b'{"format": 3,')
    digest = Manifest.read(path).digest.encode()
    blank = old.replace(digest, b"0" * 64)
    path.write_bytes(old.replace(digest, hashlib.sha256(blank).hexdigest().encode()))
    assert list(Manifest.read(path).records()) == records


def test_a_record_a_line(tmp_path: Path) -> None:
    """With one record per line, 1.3 million records need no memory."""
    written(tmp_path / "a.json")
    lines = (tmp_path / "a.json").read_text().splitlines()
    assert lines[-6:-1] == [
        '["a/\\u00e9.jpg", 12, "0123abcd", "original"],',
        '["b\\udc80\\u2028\\n.jpg", 0, "00000000", "converted: not a JPEG"],',
        '["\\"]}", 1099511627776, "ffffffff", "scaled"],',
        '["t.jpg", 9, "00000001", "tiles", null, [8, "0000000a"]],',
        '["p.jpg", 9, "00000001", "converted: coded anew, tiles", -5, [8, "0000000a"]]',
    ]


WRONG = [None, True, -1, 1.5, "", [], {}, [[1]], {"a": {"a": 1}}, 10**40, 2**63]


@pytest.mark.parametrize("key", [field.name for field in fields(Manifest) if field.name != "path"])
def test_wrong_values_of_each_key(tmp_path: Path, key: str) -> None:
    """Without it a value of another type ends in a traceback where it is used: in a merge, in a
    summary.
    """
    path = tmp_path / "a.json"
    content = json.loads(written(path).path.read_text())  # type: ignore[union-attr]
    for value in WRONG:
        write_document(path, content | {key: value})
        try:
            manifest = Manifest.read(path)
        except UserError as error:
            assert str(error).startswith(f"{path}: ")
            assert str(error).isprintable()
        else:
            assert type(getattr(manifest, key)) in (type(value), Shard)
    write_document(path, {name: content[name] for name in content if name != key})
    if key in ("source", "options", "count", "bytes"):
        with pytest.raises(UserError, match=f"missing required field `{key}`"):
            Manifest.read(path)


@pytest.mark.parametrize(
    "line",
    [
        "7", "{}", "[]", "[" * 100_000, '["a"]', '["a",1,"0123abcd"]', '["a","1","0123abcd","x"]',
        '["a",1,"0123abcg","x"]', '["a",-1,"0123abcd","x"]', '["a",1e400,"0123abcd","x"]',
        '["a",1,"0123abcd","x",null,[1]]', '["a",1,"0123abcd","x",null,[1,"x"]]',
        '["a",1,"0123abcd","x",1.5]', '["a",1,"0123abcd","x",1,2]',
        f'["a",{10**40},"0123abcd","x"]', f'["\\udc80",{"[" * 100_000}',
        '["a",1,"0123abcd","x\xff"]', "\0", "",
    ],
)  # fmt: skip
def test_damaged_records(tmp_path: Path, line: str) -> None:
    """Without it a command that reads the records of a damaged manifest ends in a traceback."""
    path = tmp_path / "a.json"
    written(path)
    lines = path.read_text().splitlines(keepends=True)
    lines[-5] = line + ",\n"
    path.write_text("".join(lines), encoding="latin-1")
    manifest = Manifest.read(path)
    for read in (lambda: list(manifest.records()), lambda: manifest.name(1)):
        with pytest.raises(UserError, match="the line of record 1 is damaged") as error:
            read()
        assert str(error.value).startswith(f"{path}: ")
        assert str(error.value).isprintable()


@pytest.mark.parametrize("edit", [(",\n", ","), (', "0123', ',\n "0123'), ("],\n", "], \n")])
def test_each_record_has_a_line(tmp_path: Path, edit: tuple[str, str]) -> None:
    """Records are decoded many at once, and found again by their lines. Without it a file that is
    good JSON, with two records in a line, gives names of other images.
    """
    path = tmp_path / "a.json"
    written(path)
    head, end, records = path.read_text().partition('"records": [\n')
    path.write_text(head + end + records.replace(*edit, 1))
    with pytest.raises(UserError, match=r"damaged|digest"):
        list(Manifest.read(path).records())
    json.loads(path.read_text())


def test_more_records_than_the_head_says(tmp_path: Path) -> None:
    """Without it a line repeated without end fills the memory of a merge before its digest."""
    path = tmp_path / "a.json"
    written(path)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:-2], *lines[-4:-3] * 5, *lines[-2:]]))
    seen = 0
    with pytest.raises(UserError, match="does not match its digest"):
        for _ in Manifest.read(path).records():
            seen += 1
    assert seen == len(RECORDS)


@pytest.mark.parametrize(("name", "size"), [("MAX_LINE", 150), ("MAX_HEAD", 200)])
def test_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, size: int) -> None:
    """Without them a line of gigabytes fills the memory. The message says the limit."""
    path = tmp_path / "a.json"
    written(path, [Record("x" * 200, 1, "00000000", "original")] * 3)
    monkeypatch.setattr(manifests, name, size)
    with pytest.raises(UserError, match=f"{path}: .*{size}"):
        list(Manifest.read(path).records())


def test_what_is_no_file(tmp_path: Path) -> None:
    """Without it a pipe blocks the command for ever."""
    os.mkfifo(tmp_path / "pipe")
    for name, reason in (("pipe", "not a regular"), (".", "Is a dir"), ("none", "No such file")):
        with pytest.raises(UserError) as error:
            Manifest.read(tmp_path / name)
        assert str(error.value).startswith(f"{tmp_path / name}: {reason}")
    (tmp_path / "other").write_text('{"format": 2,\n"records": [\n]}\n')
    with pytest.raises(UserError) as error:
        Manifest.read(tmp_path / "other")
    reason = "not a manifest of format 3 or 4: it begins with other text"
    assert str(error.value) == f"{tmp_path / 'other'}: {reason}"


def write_document(path: Path, content: dict) -> None:
    """A manifest with any values, its lines as they are written."""
    records = ",\n".join(json.dumps(row) for row in content["records"])
    head = [f"{json.dumps(key)}: {json.dumps(content[key])},\n" for key in content]
    head = [line for line in head if not line.startswith('"records"')]
    path.write_text("{" + "".join(head) + f'"records": [\n{records}\n]}}\n')


@given(data=st.data())
def test_damage_is_found(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """A changed or truncated manifest must give one clear error line, or the original records."""
    path = tmp_path_factory.mktemp("m") / "a.json"
    written(path)
    content = bytearray(path.read_bytes())
    offset = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        del content[offset:]
    else:
        content[offset] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    try:
        assert list(Manifest.read(path).records()) == RECORDS
    except UserError as error:
        assert str(path) in str(error)
