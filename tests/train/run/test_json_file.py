"""JSON files are read by a schema, or refused in one line that says where."""

import os
from pathlib import Path
from typing import Annotated, Any

import pytest
from msgspec import Meta, Struct

from pipeline.errors import UserError
from train.run import json_file
from train.run.json_file import read_json, read_text


class Entry(Struct):
    id: int
    values: list[Annotated[float, Meta(ge=0, le=9)]] = []


class Content(Struct):
    entries: list[Entry]
    score: float = 0.0
    names: dict[str, str] = {}


def refused(path: Path, content: bytes, kind: type[Any] = Content) -> str:
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_json(path, kind)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and message.isprintable()
    return message.removeprefix(f"{path}: ")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"entries": [{"id": 5, "values": [1, 10]}]}',
         "entries[0].values[1] (id 5) is 10: expected float <= 9.0"),
        (b'{"entries": [{"id": 5, "values": [1, NaN]}]}',
         "entries[0].values[1] (id 5) is NaN: expected float >= 0.0"),
        (b'{"entries": [{"id": "x"}]}',
         'entries[0].id (id "x") is "x": expected int, got str'),
        (b'{"entries": [{"values": []}]}', "entries[0]: object missing required field id"),
        (b'{"entries": [7]}', "entries[0] is 7: expected object, got int"),
        (b'{"entries": [], "names": {"a": 3}}', "names[...]: expected str, got int"),
        (b'{"entries": [], "score": 1e400}', "score is Infinity: number out of range"),
        (b'{"entries": [], "score": "%s"}' % (b"a" * 99),
         'score is "' + "a" * 39 + "…: expected float, got str"),
        (b'{"entries": [], "score": 1%s}' % (b"0" * 999), "score is an integer of 3319 bits:"),
        (b'{"entries": [], "score": 1%s}' % (b"0" * 9999), "not JSON (Exceeds the limit"),
        (b'{"entries": [], "names": {"a": "\\ud800"}}', "not JSON ("),
        (b'{"entries": [], "names": {"a": "\xe9"}}', "not UTF-8 (byte 32)"),
        (b'{"entries": [], "unused": "\xe9"}', "not UTF-8 (byte 27)"),
        (b'{"unused": ' + b"[" * 10**5, "not JSON (nested too deeply)"),
        (b'{"entries": NaN, "unused": ' + b"[" * 10**5, "not JSON (nested too deeply)"),
        (b'"\\u001b[2J\\n"', "not of this form: expected object, got str"),
        (b'{"entries": [], "score": "\\u001b\\n"}', 'score is "\\u001b\\n": expected float'),
        (b"", "not JSON (Expecting value"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(content: bytes, message: str, tmp_path: Path) -> None:
    """Without it each is a traceback, or a line in which the user cannot find the place."""
    assert refused(tmp_path / "a.json", content).startswith(message)


def test_json_as_programs_write_it(tmp_path: Path) -> None:
    """Without it files of Windows' editors, and of runs that diverged, are refused."""
    file = tmp_path / "a.json"
    file.write_bytes(b'\xef\xbb\xbf{"entries": [{"id": 1}], "score": -Infinity}')
    assert read_json(file, Content) == Content([Entry(1)], -float("inf"))


def test_sizes_are_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it a file that is far too large fills the memory before anything is said."""
    file = tmp_path / "a.json"
    with file.open("wb") as stream:
        stream.truncate(2**40)
    with pytest.raises(UserError, match=r"too large: 1,099,511,627,776 bytes, at most 67,108,864"):
        read_json(file, Content)
    monkeypatch.setattr(json_file, "LOOSE_BYTES", 10)
    assert refused(file, b'{"entries": [7]}') == "entries[0]: expected object, got int"
    assert refused(file, b'{"entries": NaN}').startswith("not JSON (JSON is malformed")


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    """Without it a pipe that nobody writes to hangs the command."""
    os.mkfifo(tmp_path / "pipe")
    for name, message in (
        ("pipe", "not a regular file"),
        (".", "Is a directory"),
        ("none", "No such file"),
        ("a\0b", "null byte"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            read_text(tmp_path / name, 10)
        assert str(caught.value).isprintable()
