"""Reads typed configurations from YAML files and the command line.

A configuration is a frozen dataclass. Its fields are plain values or sections; a section is a
dataclass of plain values. Docstrings under the fields are the texts of --help. Every refusal is one
line that names the key.
"""

import argparse
import difflib
import errno
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import MISSING, Field, asdict, dataclass, fields, is_dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar, get_args, get_origin

import yaml
from jsonargparse import (
    ArgumentError,
    ArgumentParser,
    DefaultHelpFormatter,
    get_loader,
    set_parsing_settings,
)

from pipeline.bounds import Bound
from pipeline.errors import UserError

set_parsing_settings(docstring_parse_attribute_docstrings=True)

Config = TypeVar("Config")

RESUME = (
    "auto|PATH",
    "auto: resume from this run's newest checkpoint, if there is one; PATH: resume from this "
    "checkpoint or run.",
)
"""The option that every training command has."""

RUN_NAME: Bound = {
    "made of letters, digits, '.', '_' and '-'": lambda name: bool(
        re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", name)
    )
}
SEED: Bound = {"in 0..2^32-1": lambda seed: 0 <= seed < 2**32}

_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
_WORDS |= {type(None): "null", dict: "keys and values"}
_TEXT = str | None
_load_yaml = get_loader("yaml")


@dataclass(eq=False)
class Settings(Generic[Config]):
    """How the configurations of one class are read, and the texts of the command's --help."""

    kind: type[Config]
    prog: str
    description: str
    epilog: str
    options: Mapping[str, tuple[str, str]]
    """Further options of the command, by name: the placeholder of the value in --help, and the
    explanation. Their values are text, or None if they are not given."""
    fixed: tuple[str, ...]
    """Beginnings of the keys that a resumed run may not change: it would be another run."""
    free: tuple[str, ...]
    """Exceptions from `fixed`."""

    def __post_init__(self) -> None:
        self._fields = dict(_fields_by_key(self.kind))
        types: dict[str, Any] = {key: field.type for key, field in self._fields.items()}
        self._sections: dict[str, Any] = {k: t for k, t in types.items() if is_dataclass(t)}
        options = dict.fromkeys(self.options, _TEXT)
        self._types = types | dict.fromkeys(self._sections, dict) | options

    def load(self, argv: list[str] | None = None) -> tuple[Config, dict[str, str | None]]:
        """The configuration that a command line describes, and the values of `options` by name.

        Raises UserError, which names the key, if a key is unknown or missing or a value impossible.
        """
        argv = sys.argv[1:] if argv is None else argv
        try:
            values = self._parser.parse_args(argv).as_dict()
        except (ArgumentError, UnicodeDecodeError) as error:
            raise self._explained(error, list(self._given(argv))) from None
        return self._build(values), {name: values[name] for name in self.options}

    def from_dict(self, values: Mapping[str, Any]) -> Config:
        """A configuration from nested plain values. Raises UserError, which names the key."""
        try:
            return self._build(self._parser.parse_object(dict(values)).as_dict())
        except ArgumentError as error:
            raise self._explained(error, list(flatten(values).items())) from None

    def changed(self, before: Config, now: Config) -> list[tuple[str, Any, Any]]:
        """The keys that a resumed run may not change but that differ, with both values."""
        old, new = flatten(to_dict(before)), flatten(to_dict(now))
        fixed = [key for key in new if key.startswith(self.fixed) and key not in self.free]
        return [(key, old[key], new[key]) for key in fixed if old[key] != new[key]]

    @cached_property
    def _parser(self) -> ArgumentParser:
        usage = "".join(f"[--{name} {value}] " for name, (value, _) in self.options.items())
        parser = ArgumentParser(
            prog=self.prog,
            usage=f"%(prog)s --config FILE {usage}[--section.field VALUE ...]",
            formatter_class=_Help,
            description=self.description,
            epilog=self.epilog,
            exit_on_error=False,
            allow_abbrev=False,
        )
        text = "YAML file with any of the values below."
        parser.add_argument("--config", action="config", help=text)
        for name, (metavar, text) in self.options.items():
            parser.add_argument(f"--{name}", type=_TEXT, metavar=metavar, help=text)
        parser.add_class_arguments(self.kind, None)
        return parser

    def _build(self, values: Mapping[str, Any]) -> Config:
        """A configuration from parsed values. Raises UserError, which names the key."""
        parts = {name: values[name] for name in self._fields if "." not in name}
        flat = flatten(parts).items()
        # The parser accepts null for any key and any value for a section.
        self._check((k, v) for k, v in flat if v is None or k in self._sections)
        for name, section in self._sections.items():
            parts[name] = _built(section, parts[name], f"{name}.")
        return _built(self.kind, parts)

    def _check(self, values: Iterable[tuple[str, Any]]) -> None:
        """Refuse unknown keys and values of the wrong type. Raises UserError."""
        for key, value in values:
            if key not in self._types:
                near = difflib.get_close_matches(key, self._types, n=1)
                hint = f" (did you mean {near[0]}?)" if near else ""
                raise UserError(f"unknown key {key}{hint}")
            kind = self._types[key]
            if not (type(None) in get_args(kind) if value is None else _fits(value, kind)):
                shown = "null" if value is None else value or repr(value)
                raise UserError(f"{key} must be {_words(kind)}, not {shown}")

    def _explained(self, error: Exception, given: list[tuple[str, Any]]) -> UserError:
        """The reason why jsonargparse refuses these keys and values; if unknown, its message."""
        self._check(given)
        known = self._sections.keys() | dict(given)
        missing = [k for k, f in self._fields.items() if f.default is MISSING and k not in known]
        if missing:
            keys = ", ".join(missing)
            return UserError(f"missing: {keys}; set each in the --config file or as --KEY VALUE")
        return UserError(" ".join(str(error).split()))

    def _given(self, argv: list[str]) -> Iterator[tuple[str, Any]]:
        """Keys and values of a command line and of its files. Raises UserError."""
        for word, following in zip(argv, [*argv, ""][1:], strict=True):
            key, equals, text = word.removeprefix("--").partition("=")
            value = text if equals else following
            if not word.startswith("--") or key in ("help", "print_config"):
                continue
            if key == "config" or key in self._sections:
                prefix = "" if key == "config" else f"{key}."
                yield from flatten(_read(key, value), prefix).items()
            else:
                yield key, value


def to_dict(config: Any) -> dict[str, Any]:
    """Nested plain values, as YAML and JSON hold them; `Settings.from_dict` reads them back."""
    return {key: _plain(value) for key, value in asdict(config).items()}


def to_yaml(config: Any) -> str:
    """The text of a --config file that describes this configuration."""
    return str(yaml.safe_dump(to_dict(config), sort_keys=False))


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"train": {"epochs": 2}} as {"train.epochs": 2}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        nested = isinstance(value, Mapping)
        flat.update(flatten(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value})
    return flat


class _Help(argparse.RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Keeps the lines of the examples."""


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, tuple) else value


def _built(kind: Callable[..., Config], values: Mapping[str, Any], prefix: str = "") -> Config:
    try:
        return kind(**values)
    except ValueError as error:
        raise UserError(f"{prefix}{error}") from None


def _fields_by_key(kind: Any, prefix: str = "") -> Iterator[tuple[str, Field[Any]]]:
    """The sections and settings of a configuration."""
    for field in fields(kind):
        yield f"{prefix}{field.name}", field
        if is_dataclass(field.type):
            yield from _fields_by_key(field.type, f"{prefix}{field.name}.")


_NO_SUCH_FILE = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG)  # it may be a text in YAML


def _read(option: str, source: str) -> Mapping[str, Any]:
    """The content of a YAML file, or of a text in YAML. Raises UserError."""
    if not source or source.startswith("--"):
        raise UserError(f"--{option} needs a value")
    try:
        text = Path(source).read_text()
    except OSError as error:
        if error.errno not in _NO_SUCH_FILE:
            raise UserError(f"--{option}: {source}: {error.strerror}") from None
        text = source
    except UnicodeDecodeError as error:
        raise UserError(f"--{option}: {source}: not a text in UTF-8 ({error.reason})") from None
    try:
        values = _load_yaml(text)
    except yaml.YAMLError as error:
        raise UserError(f"--{option}: {' '.join(str(error).split())}") from None
    if isinstance(values, Mapping):
        return values
    if text is source:
        expected = "does not exist" if option == "config" else "is no file of keys and values"
        raise UserError(f"--{option}: {source} {expected}")
    raise UserError(f"--{option}: {source} holds no keys and values")


def _fits(value: Any, kind: Any) -> bool:
    """Whether jsonargparse accepts a value, or the text of one, for this type."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=kind)
    try:
        return bool(parser.parse_object({"value": value}))
    except ArgumentError:
        return False


def _words(kind: Any) -> str:
    """A type in words: `int | None` as "a whole number or null"."""
    args = get_args(kind)
    if get_origin(kind) is Literal:
        hint = ' (in YAML, "no" needs its quotes)' if "no" in args else ""
        return f"one of {', '.join(map(str, args))}{hint}"
    if get_origin(kind) is tuple:
        return f"a list [{', '.join('…' if arg is ... else _words(arg) for arg in args)}]"
    return " or ".join(map(_words, args)) if args else _WORDS[kind]
