"""The list of a beton's records, written and read as a stream."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import UserError
from pipeline.manifest import Manifest, Record
from tests.helpers.manifests import names_of

RECORDS = [
    Record("a/é.jpg", 12, "0123abcd", "original"),
    Record("b\udc80\u2028\n.jpg", 0, "00000000", "converted: not a JPEG"),
    Record('"]}', 1 << 40, "ffffffff", "scaled"),
]


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
    assert content["format"] == 3
    assert content["digest"] == manifest.digest
    assert [Record(*row) for row in content["records"]] == RECORDS
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_record_a_line(tmp_path: Path) -> None:
    """With one record per line, 1.3 million records need no memory."""
    written(tmp_path / "a.json")
    lines = (tmp_path / "a.json").read_text().splitlines()
    assert lines[-4:-1] == [
        '["a/\\u00e9.jpg", 12, "0123abcd", "original"],',
        '["b\\udc80\\u2028\\n.jpg", 0, "00000000", "converted: not a JPEG"],',
        '["\\"]}", 1099511627776, "ffffffff", "scaled"]',
    ]


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
