"""Reads JSON files by a schema; one that does not fit is refused in a line that says where."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from pipeline.errors import UserError, printable
from train.run.text import read_text

RESULT_BYTES = 64 << 20
"""Bytes of a file of results: a hundred times as many as a command writes."""
LOOSE_BYTES = 32 << 20
"""Bytes of a file that may be read without its schema, which takes up to 30 times as much memory:
to read NaN, which is no JSON, and to name a wrong value."""
_SHOWN = 40  # characters of a value in a message

Text = Annotated[str, Meta(max_length=5000)]  # a path has at most 4,096
Scalar = Text | Annotated[int, Meta(ge=-(2**62), le=2**62)] | float | bool | None
Facts = dict[Text, Scalar | list[Scalar]]
Settings = dict[Text, Scalar | list[Scalar] | dict[Text, Scalar | list[Scalar] | Facts]]
"""Of a run or a measurement. At most three levels: what is nested deeper cannot be printed."""
Content = TypeVar("Content")


def read_json(
    path: Path, kind: type[Content], most: int = RESULT_BYTES, what: str = "of this form"
) -> Content:
    """The content of a file of at most `most` bytes, as msgspec converts it to `kind`. NaN and
    Infinity count as numbers. `what` says in a message what the file should be.

    Raises UserError.
    """
    return decode_json(path, read_text(path, most), kind, what)


def decode_json(path: Path, text: str, kind: type[Content], what: str) -> Content:
    """`text`, which was read from `path`, as `read_json`."""
    name = _name(path)
    try:
        return msgspec.json.decode(text, type=kind)
    except msgspec.ValidationError as error:
        wrong = str(error)
        content = _loose(name, text) if len(text) <= LOOSE_BYTES else None
    except msgspec.DecodeError as error:
        if len(text) > LOOSE_BYTES:
            raise UserError(f"{name}: not JSON ({error})") from None
        content = _loose(name, text)
        try:
            return msgspec.convert(content, kind)
        except msgspec.ValidationError as invalid:
            wrong = str(invalid)
    except RecursionError:
        raise UserError(f"{name}: not JSON (nested too deeply)") from None
    raise UserError(f"{name}: {_described(wrong, content, what)}")


def _loose(name: str, text: str) -> Any:
    """Whatever JSON `text` is, and also NaN and Infinity."""
    try:
        content = json.loads(text)
        if "\\ud" in text.lower():  # half of a pair: no file name or terminal takes it
            json.dumps(content, ensure_ascii=False).encode()
    except RecursionError:
        raise UserError(f"{name}: not JSON (nested too deeply)") from None
    except ValueError as error:
        raise UserError(f"{name}: not JSON ({str(error).partition(';')[0]})") from None
    return content


def _described(wrong: str, content: Any, kind: str) -> str:
    """msgspec's message with the value, and with the id of the innermost entry that has one:
    annotations[3].bbox[0] (id 17) is NaN: expected float <= 100000.0
    """
    what, _, place = wrong.replace("`", "").partition(" - at ")
    what = what[:1].lower() + what[1:]
    if place in ("", "$"):
        return f"not {kind}: {what}"
    place = place.rpartition(" in ")[2].removeprefix("$").removeprefix(".")
    entry, value = "", content
    for key in _keys(place):
        try:
            value = value[key]
        except (LookupError, TypeError):  # `[...]`, any key of a mapping; or not read
            return f"{place}: {what}"
        if isinstance(value, dict) and isinstance(value.get("id"), int | str):
            entry = f" (id {_short(value['id'])})"
    if isinstance(value, dict | list):
        return f"{place}{entry}: {what}"
    return f"{place}{entry} is {_short(value)}: {what}"


def _keys(place: str) -> Iterator[str | int]:
    for name, number in re.findall(r"([^.\[\]]+)(?![^\[]*\])|\[([^\]]*)\]", place):
        yield int(number) if number.isdecimal() else name or number


def _short(value: Any) -> str:
    """A value as JSON, cut to `_SHOWN` characters."""
    if isinstance(value, int) and abs(value) >= 10**_SHOWN:
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, str):
        value = value[: _SHOWN + 1]
    text = json.dumps(value)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "…"


def _name(path: Path) -> str:
    return printable(str(path))
