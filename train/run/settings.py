"""Typed configurations, whatever they are of: a frozen dataclass whose fields are plain values or
sections, dataclasses themselves, is read from YAML, overridden on the command line, and refused in
one line that names the key. Docstrings under the fields are the texts of --help.
"""

import argparse
import difflib
import re
from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass
from functools import cached_property
from typing import Any, Generic, TypeVar

import yaml
from jsonargparse import (
    ArgumentError,
    ArgumentParser,
    DefaultHelpFormatter,
    set_parsing_settings,
)

from pipeline.bounds import Bound
from pipeline.errors import UserError

set_parsing_settings(docstring_parse_attribute_docstrings=True)

Config = TypeVar("Config")

RESUME = (
    "auto|PATH",
    "auto: go on from this run's newest checkpoint, if there is one; PATH: from this checkpoint or "
    "run.",
)
"""The option that every training command has."""

RUN_NAME: Bound = {
    "made of letters, digits, '.', '_' and '-'": lambda name: bool(
        re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", name)
    )
}
SEED: Bound = {"in 0..2^32-1": lambda seed: 0 <= seed < 2**32}


class Settings(Generic[Config]):
    """How configurations of a class are read.

    Args:
        kind: the class.
        prog, description, epilog: of --help.
        options: the command's own, texts that are None where they are not given: by name, what
            stands for the value in --help, and the explanation.
        fixed, free: what the keys begin with that a resumed run may not change, for it would be
            another run, and those of them that it may.
    """

    def __init__(
        self,
        kind: type[Config],
        *,
        prog: str,
        description: str,
        epilog: str,
        options: Mapping[str, tuple[str, str]],
        fixed: tuple[str, ...],
        free: tuple[str, ...],
    ) -> None:
        self.kind, self.options = kind, options
        self._fixed, self._free = fixed, free
        self._prog, self._description, self._epilog = prog, description, epilog

    def load(self, argv: list[str] | None = None) -> tuple[Config, dict[str, str | None]]:
        """The configuration that a command line describes, and the command's own options by name.

        Raises UserError, naming the key, for anything that is unknown, missing or impossible.
        """
        try:
            values = self._parser.parse_args(argv).as_dict()
        except ArgumentError as error:
            raise UserError(self._explain(str(error))) from None
        return self._build(values), {name: values[name] for name in self.options}

    def from_dict(self, values: Mapping[str, Any]) -> Config:
        """A configuration from nested plain values. Raises UserError, naming the key."""
        try:
            return self._build(self._parser.parse_object(dict(values)).as_dict())
        except ArgumentError as error:
            raise UserError(self._explain(str(error))) from None

    def changed(self, before: Config, now: Config) -> list[tuple[str, Any, Any]]:
        """Key and both values of what a resumed run may not change and has."""
        old, new = flatten(to_dict(before)), flatten(to_dict(now))
        fixed = [key for key in new if key.startswith(self._fixed) and key not in self._free]
        return [(key, old[key], new[key]) for key in fixed if old[key] != new[key]]

    @cached_property
    def _parser(self) -> ArgumentParser:
        usage = "".join(f"[--{name} {value}] " for name, (value, _) in self.options.items())
        parser = ArgumentParser(
            prog=self._prog,
            usage=f"%(prog)s --config FILE {usage}[--section.field VALUE ...]",
            formatter_class=_Help,
            description=self._description,
            epilog=self._epilog,
            exit_on_error=False,
            allow_abbrev=False,
        )
        text = "YAML file with any of the values below."
        parser.add_argument("--config", action="config", help=text)
        for name, (metavar, text) in self.options.items():
            parser.add_argument(f"--{name}", type=str | None, metavar=metavar, help=text)
        parser.add_class_arguments(self.kind, None)
        return parser

    def _build(self, values: Mapping[str, Any]) -> Config:
        """A configuration from parsed values; names the section that refuses one."""
        parts: dict[str, Any] = {}
        for section in fields(self.kind):  # type: ignore[arg-type]
            parts[section.name] = values[section.name]
            if is_dataclass(section.type) and isinstance(section.type, type):
                try:
                    parts[section.name] = section.type(**values[section.name])
                except ValueError as error:
                    raise UserError(f"{section.name}.{error}") from None
        try:
            return self.kind(**parts)
        except ValueError as error:
            raise UserError(str(error)) from None

    def _explain(self, message: str) -> str:
        """jsonargparse's account of what is wrong, in one line that names the key."""
        message = " ".join(message.split())
        if found := re.match(r'Parser key "([^"]+)": (.*)', message):
            return _explain_value(*found.groups())
        if found := re.match(r"(?:Group '(.+)' does not accept option|Option) '([^']+)'", message):
            return self._unknown(".".join(filter(None, found.groups())))
        if found := re.match(r"unrecognized arguments: (?:--)?([^\s=]+)", message):
            return self._unknown(found[1])
        if found := re.match(r"the following arguments are required: (.+)", message):
            return f"{found[1]} is missing: give it in the --config file or as --{found[1]} VALUE"
        if message.startswith("Unexpected config"):
            return "--config: the file holds no keys and values"
        return message.replace("Problems parsing config:", "--config:")

    def _unknown(self, key: str) -> str:
        known = [action.dest for action in self._parser._actions]
        near = difflib.get_close_matches(key, known, n=1)
        return f"unknown key {key}" + (f" (did you mean {near[0]}?)" if near else "")


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


def _explain_value(key: str, problem: str) -> str:
    value = re.search(r"(?:Got|Given) value: (.*)$", problem)
    kinds = re.findall(r"Expected an? (.+?)(?= - |\. Got| Given value|$)", problem)
    if value and kinds:
        return f"{key} must be {_kinds(kinds)}, not {value[1]}"
    return f"{'--config' if key == 'config' else key}: {problem}"


def _kinds(kinds: list[str]) -> str:
    """["<class 'int'>", "<class 'NoneType'>"] as "int or null"."""
    text = " or ".join(kinds).replace("typing.Literal", "one of ").replace("NoneType", "null")
    hint = ' (in YAML, "no" needs its quotes)' if "'no'" in text else ""
    return re.sub(r"<class '(\w+)'>", r"\1", text) + hint
