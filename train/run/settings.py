"""Reads typed configurations from YAML files and the command line.

A configuration is a frozen dataclass. Its fields are plain values or sections; a section is a
dataclass of plain values. Docstrings under the fields are the texts of --help. Every refusal is one
line that names the key, and the file if it stands in one. What a file holds is data: no value is
ever imported, run, or opened as a further file.
"""

import argparse
import difflib
import errno
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import MISSING, Field, asdict, dataclass, fields, is_dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, Literal, NamedTuple, TypeVar, get_args, get_origin

import msgspec
from jsonargparse import ArgumentParser, DefaultHelpFormatter, set_parsing_settings

from pipeline.bounds import Bound, check
from pipeline.commands import as_called
from pipeline.errors import UserError
from train.run import text
from train.run.text import DEEPEST, LARGEST_YAML, configuration_file, read_text, read_yaml

set_parsing_settings(docstring_parse_attribute_docstrings=True)

Config = TypeVar("Config")

RESUME = (
    "auto|PATH",
    "auto: resume from this run's newest checkpoint, if there is one; PATH: resume from this "
    "checkpoint or run.",
)
"""The option that every training command has."""

RUN_NAME: Bound = {
    "made of letters, digits, '.', '_' and '-', the first one no '.' or '-'": lambda name: bool(
        re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", name)  # -x is an option for other programs
    ),
    "at most 200 characters long": lambda name: len(name) <= 200,  # folders of Linux: 255
}
SEED: Bound = {"in 0..2^32-1": lambda seed: 0 <= seed < 2**32}

_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
_WORDS |= {type(None): "null", dict: "keys and values"}
_TEXT = str | None
LONGEST = 4096
"""Characters of a value that is a text: Linux opens no longer path."""


class _Given(NamedTuple):
    """A value of a configuration, and where it stands."""

    key: str
    value: Any
    source: str
    """The beginning of a message: "run.yaml: "; empty for the command line."""


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

    def load(
        self, argv: list[str] | None = None, under: Mapping[str, Any] | None = None
    ) -> tuple[Config, dict[str, str | None]]:
        """The configuration that a command line describes, and the values of `options` by name.

        `under`: nested plain values below those of the command line. Raises UserError, which names
        the key, if a key is unknown or missing or a value impossible.
        """
        argv = sys.argv[1:] if argv is None else argv
        if {"-h", "--help"} & set(argv):
            print(as_called(self._help.format_help()), end="")
            sys.exit(0)
        given = self._typed([*_leaves(under or {}), *self._given(argv)])
        if "--print_config" in argv:
            self._check(given)
            print(text.to_yaml(_plain(_nested(self._defaults() | _values(given)))), end="")
            sys.exit(0)
        return self._build(given), {name: _values(given).get(name) for name in self.options}

    def from_dict(self, values: Mapping[str, Any]) -> Config:
        """A configuration from nested plain values. Raises UserError, which names the key."""
        return self._build(self._typed(_leaves(values)))

    def changed(self, before: Config, now: Config) -> list[tuple[str, Any, Any]]:
        """The keys that a resumed run may not change but that differ, with both values."""
        old, new = flatten(to_dict(before)), flatten(to_dict(now))
        fixed = [key for key in new if key.startswith(self.fixed) and key not in self.free]
        return [(key, old[key], new[key]) for key in fixed if old[key] != new[key]]

    @cached_property
    def _help(self) -> ArgumentParser:
        """Writes --help. It reads no arguments: jsonargparse imports the classes that they name."""
        usage = "".join(f"[--{name} {value}] " for name, (value, _) in self.options.items())
        parser = ArgumentParser(
            prog=as_called(self.prog),
            usage=f"%(prog)s --config FILE {usage}[--section.field VALUE ...]",
            formatter_class=_Help,
            description=self.description,
            epilog=self.epilog,
            print_config=None,
        )
        about = "YAML file with any of the values below, or the name of one in configs/."
        parser.add_argument("--config", metavar="FILE", help=about)
        about = "Print the configuration after applying all other arguments and exit."
        parser.add_argument("--print_config", action="store_true", help=about)
        for name, (metavar, about) in self.options.items():
            parser.add_argument(f"--{name}", type=_TEXT, metavar=metavar, help=about)
        parser.add_class_arguments(self.kind, None)
        for action in parser._actions:
            field = self._fields.get(action.dest)
            if field and get_origin(field.type) is not Literal:  # whose values are shown already
                action.help = " ".join(
                    [str(action.help), *map("Must be {}.".format, field.metadata)]
                )
        return parser

    def _defaults(self) -> dict[str, Any]:
        """The default of each key that is no section; None for those that must be given."""
        leaves = {k: f for k, f in self._fields.items() if k not in self._sections}
        options: dict[str, Any] = dict.fromkeys(self.options)
        return options | {k: None if _required(f) else f.default for k, f in leaves.items()}

    def _given(self, argv: list[str]) -> list[_Given]:
        """Keys and values of the files of a command line, then its own: they win over the files,
        wherever they stand. Raises UserError.
        """
        return sorted(self._in_order(argv), key=lambda given: not given.source)

    def _in_order(self, argv: list[str]) -> Iterator[_Given]:
        words = iter(argv)
        for word in words:
            key, equals, value = word.removeprefix("--").partition("=")
            if not word.startswith("--"):
                raise UserError(f"unknown argument {_shown(word)} (see --help)")
            if word == "--print_config":
                continue
            value = value if equals else next(words, "--")
            if not equals and value.startswith("--"):
                raise UserError(f"--{_shown(key)} needs a value")
            if key == "config":
                yield from _read(key, configuration_file(value))
            elif key in self._sections:
                yield from _read(key, value)
            else:
                yield _Given(key, value, "")

    def _typed(self, given: Iterable[_Given]) -> dict[str, _Given]:
        """The last value of each key, in the key's type.

        A key that no configuration has and a value of another type are refused here, before any
        code of ours or of a library acts on them. Raises UserError.
        """
        typed: dict[str, _Given] = {}
        for key, value, source in given:
            if key not in self._types:
                near = difflib.get_close_matches(key[:100], self._types, n=1)
                hint = f" (did you mean {near[0]}?)" if near else ""
                raise UserError(f"{source}unknown key {_shown(key)}{hint}")
            kind = self._types[key]
            try:
                typed[key] = _Given(key, _as_type(value, kind), source)
            except ValueError:
                must = f"{source}{key} must be {_words(kind)}"
                raise UserError(f"{must}, not {_shown(value)}") from None
        return typed

    def _missing(self, given: Mapping[str, _Given]) -> list[str]:
        """The keys without default that are not given."""
        known = self._sections.keys() | given.keys()
        return [k for k, field in self._fields.items() if k not in known and _required(field)]

    def _check(self, given: Mapping[str, _Given]) -> None:
        """Raise UserError for a value beyond its own bounds, and for values that do not fit each
        other if none is missing.
        """
        for key, (_, value, source) in given.items():
            try:
                check(key, value, self._fields[key].metadata if key in self._fields else {})
            except ValueError as error:
                raise UserError(f"{source}{error}") from None
        if not self._missing(given):
            self._build(given)

    def _build(self, given: Mapping[str, _Given]) -> Config:
        """A configuration from typed values. Raises UserError, which names the key."""
        if missing := self._missing(given):
            keys = f"missing: {', '.join(missing)}"
            where = "set each in the --config file or as --KEY VALUE"
            raise UserError(f"{_source('', given)}{keys}; {where}")
        nested = _nested(
            {key: value for key, value in _values(given).items() if key in self._fields}
        )
        for name, section in self._sections.items():
            nested[name] = _built(section, nested.get(name, {}), f"{name}.", given)
        return _built(self.kind, nested, "", given)


def to_dict(config: Any) -> dict[str, Any]:
    """Nested plain values, as YAML and JSON hold them; `Settings.from_dict` reads them back."""
    return {key: _plain(value) for key, value in asdict(config).items()}


def to_yaml(config: Any) -> str:
    """The text of a --config file that describes this configuration."""
    return text.to_yaml(to_dict(config))


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


def _built(
    kind: Callable[..., Config], values: Mapping[str, Any], prefix: str, given: Mapping[str, _Given]
) -> Config:
    try:
        return kind(**values)
    except ValueError as error:  # it begins with the name of the field
        key = f"{prefix}{str(error).partition(' ')[0]}"
        raise UserError(f"{_source(key, given)}{prefix}{error}") from None


def _source(key: str, given: Mapping[str, _Given]) -> str:
    """The file that gives the key; if none does, the file of all other values, if it is one."""
    sources = {given[key].source} if key in given else {each.source for each in given.values()}
    return sources.pop() if len(sources) == 1 else ""


def _required(field: Field[Any]) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def _fields_by_key(kind: Any, prefix: str = "") -> Iterator[tuple[str, Field[Any]]]:
    """The sections and settings of a configuration."""
    for field in fields(kind):
        yield f"{prefix}{field.name}", field
        if is_dataclass(field.type):
            yield from _fields_by_key(field.type, f"{prefix}{field.name}.")


_NO_SUCH_FILE = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG)  # it may be a text in YAML


def _read(option: str, source: str) -> Iterator[_Given]:
    """Keys and values of a YAML file, or of a text in YAML. Raises UserError."""
    if not source:
        raise UserError(f"--{option} needs a value")
    prefix = "" if option == "config" else f"{option}."
    try:
        Path(source).stat()
    except OSError as error:
        if error.errno not in _NO_SUCH_FILE:
            raise UserError(f"--{option}: {source}: {error.strerror}") from None
        values, name = read_yaml(source, f"--{option}"), ""
        if not isinstance(values, Mapping):
            expected = "does not exist" if option == "config" else "is no file of keys and values"
            raise UserError(f"--{option}: {_shown(source)} {expected}") from None
    else:
        name = f"--{option}: {source}"
        try:
            values = read_yaml(read_text(Path(source), LARGEST_YAML), source)
        except UserError as error:
            raise UserError(f"--{option}: {error}") from None
        if not isinstance(values, Mapping):
            raise UserError(f"{name} holds no keys and values")
    given = list(_leaves(values, prefix, name and f"{source}: "))
    for key, count in Counter(each.key for each in given).items():
        if count > 1:  # in two spellings, which the parser of YAML takes for two keys
            raise UserError(f"{name or f'--{option}'}: {_shown(key)} is given {count} times")
    yield from given


def _leaves(values: Mapping[Any, Any], prefix: str = "", source: str = "") -> Iterator[_Given]:
    """{"train": {"epochs": 2}} as "train.epochs", 2. Raises UserError."""
    for name, value in values.items():
        if not isinstance(name, str):
            raise UserError(f"{source}a key must be text, not {_shown(name)}")
        key = f"{prefix}{name}"
        if key.count(".") > DEEPEST:
            raise UserError(f"{source}{_shown(key)}: more than {DEEPEST} keys inside each other")
        if value and isinstance(value, Mapping):
            yield from _leaves(value, f"{key}.", source)
        else:
            yield _Given(key, value, source)


def _values(given: Mapping[str, _Given]) -> dict[str, Any]:
    return {key: value for key, (_, value, _) in given.items()}


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """{"train.epochs": 2} as {"train": {"epochs": 2}}, without what stands for a whole section."""
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        section, _, name = key.rpartition(".")
        if section:
            nested.setdefault(section, {})[name] = value
        elif value != {}:
            nested[name] = value
    return nested


def _as_type(value: Any, kind: Any) -> Any:
    """A plain value as one of this type. Where the type is no text, a text is read as YAML.

    Raises ValueError.
    """
    args = get_args(kind)
    if isinstance(value, str) and kind is not dict:
        if value == "null" and type(None) in args:
            return None
        os.fsencode(value)  # a ValueError for half of a pair of characters, which no file can hold
        if len(value) > LONGEST or "\0" in value:
            raise ValueError
        in_words = str in args or isinstance(
            next(iter(args), None), str
        )  # str | None, Literal["no"]
        is_text = kind is str or (in_words and get_origin(kind) is not tuple)
        value = value if is_text else read_yaml(value, "")
        if kind == tuple[str, ...] and isinstance(value, str):
            value = [value]  # a list of one
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise ValueError(str(error)) from None


def _shown(value: Any) -> str:
    """A value in a message of one line."""
    shown = "null" if value is None else value or repr(value) if type(value) is str else repr(value)
    shown = shown if shown.isprintable() else ascii(shown)
    return shown if len(shown) <= 100 else f"{shown[:100]}…"


def _words(kind: Any) -> str:
    """A type in words: `int | None` as "a whole number or null"."""
    args = get_args(kind)
    if get_origin(kind) is Literal:
        hint = ' (in YAML, "no" needs its quotes)' if "no" in args else ""
        return f"one of {', '.join(map(str, args))}{hint}"
    if get_origin(kind) is tuple:
        return f"a list [{', '.join('…' if arg is ... else _words(arg) for arg in args)}]"
    return " or ".join(map(_words, args)) if args else _WORDS[kind]
