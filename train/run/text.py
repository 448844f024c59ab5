"""Texts from files: of a limited size, and YAML that cannot grow, run or hide anything."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from pipeline.errors import UserError, printable
from pipeline.files import encoding_of, open_file

LARGEST_YAML = 1 << 18
"""Bytes of a text in YAML. A configuration with all its keys has 2 kB."""
MOST_VALUES = 10_000
"""Values in a text of YAML, after its aliases are replaced by what they stand for. Ten lines of
aliases can stand for more than any memory holds."""
DEEPEST = 20
"""Lists and mappings inside each other in a text of YAML. Parsers read them by recursion."""
CONFIGS = Path(__file__).parents[2] / "configs"
"""The configurations that come with slotstream."""


def configuration_file(name: str) -> str:
    """The path that a --config names: a file, or one of those that come with slotstream, as
    scenes_cpu or configs/scenes_cpu.yaml from anywhere.
    """
    if not re.fullmatch(r"[\w./-]{1,200}", name) or Path(name).is_file():
        return name
    known = CONFIGS / f"{name.removeprefix('configs/').removesuffix('.yaml')}.yaml"
    return str(known) if known.is_file() else name


def read_text(path: Path, limit: int) -> str:
    """The content of a file of at most `limit` bytes, in UTF-8 with or without a byte order mark,
    or in UTF-16 with one. Reads a pipe only in /dev, where a shell puts it. Raises UserError.
    """
    name = printable(str(path))
    try:
        with open_file(path, pipes=path.is_relative_to("/dev")) as file:
            content = file.read(limit + 1)
    except OSError as error:
        raise UserError(f"{name}: {error.strerror}") from None
    except ValueError as error:  # NUL in the name
        raise UserError(f"{name}: {error}") from None
    if len(content) > limit:
        size = max(path.stat().st_size, len(content))
        raise UserError(f"{name}: too large: {size:,} bytes, at most {limit:,} are read")
    try:
        return content.decode(encoding_of(content))
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: not {error.encoding.upper()} (byte {error.start})") from None


def read_yaml(text: str, name: object) -> Any:
    """The plain values of a text in YAML; 1e-3 is a number, as in YAML 1.2.

    Refuses tags, a key that is given twice, integers of more than 64 bits, and what passes the
    limits above. Raises UserError, which begins with `name`.
    """
    try:
        if len(text) > LARGEST_YAML:
            raise yaml.YAMLError(f"more than {LARGEST_YAML:,} bytes")
        _check_events(yaml.parse(text, Loader=_Loader))
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            _check_keys(node)
            return None if node is None else loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        reason = str(error) if mark is None else f"line {mark.line + 1}: {error.problem}"
        raise UserError(f"{name}: {printable(' '.join(reason.split())[:200])}") from None


def to_yaml(values: Any) -> str:
    """A text that `read_yaml` reads back as equal values."""
    return str(yaml.dump(values, Dumper=_Dumper, sort_keys=False))


_FLOAT, _TIMESTAMP = "tag:yaml.org,2002:float", "tag:yaml.org,2002:timestamp"


_TWO_MEANINGS = re.compile(r"[-+]?(0[0-9_]|[^:]+:)")
"""010 and 1:30 are 8 and 90 in YAML 1.1, but 10 and a text in YAML 1.2."""


class _Loader(yaml.SafeLoader):  # not in C, where deep nesting ends in a segmentation fault
    yaml_implicit_resolvers = {  # noqa: RUF012 (of the base class)
        letter: [(tag, regexp) for tag, regexp in known if tag not in (_FLOAT, _TIMESTAMP)]
        for letter, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        line = node.start_mark.line + 1
        if _TWO_MEANINGS.match(node.value):
            raise yaml.YAMLError(f"line {line}: {node.value[:40]}: write a number in plain digits")
        try:
            value = int(super().construct_yaml_int(node))
        except ValueError:  # 5,000 digits, or 0x_
            value = 1 << 64
        if value.bit_length() > 64:
            raise yaml.YAMLError(f"line {line}: {node.value[:40]} is no integer of 64 bits")
        return value


class _Dumper(yaml.SafeDumper):
    """Puts quotes around the text 1e3, which the reader would take for a number."""


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_float = re.compile(
    r"[-+]?([0-9][0-9_]*\.[0-9_]*([eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+"
    r"|\.[0-9][0-9_]*([eE][-+]?[0-9]+)?|\.(inf|Inf|INF))$|\.(nan|NaN|NAN)$"
)
for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver(_FLOAT, _float, list("-+0123456789."))


def _check_events(events: Iterator[Any]) -> None:
    """Raises YAMLError for a tag, or for more than MOST_VALUES or DEEPEST. Builds nothing."""
    known: dict[str | None, tuple[int, int]] = {}  # values and depth of what an anchor stands for
    open_: list[list[Any]] = [[None, 0, 0]]  # anchor, values, depth of each unfinished collection
    for event in events:
        if getattr(event, "tag", None):
            raise yaml.YAMLError(f"the tag {event.tag}: only plain values are read")
        if isinstance(event, yaml.CollectionStartEvent):
            open_.append([event.anchor, 1, 1])
            size, depth = 0, 0
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, size, depth = open_.pop()
            known[anchor] = (size, depth)
        elif isinstance(event, yaml.ScalarEvent):
            size, depth = known[event.anchor] = (1, 0)
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor not in known:
                raise yaml.YAMLError(f"the alias *{event.anchor} stands for nothing before it")
            size, depth = known[event.anchor]
        else:
            continue
        open_[-1][1] += size
        open_[-1][2] = max(open_[-1][2], depth + 1)
        if sum(values for _, values, _ in open_) > MOST_VALUES:
            raise yaml.YAMLError(f"more than {MOST_VALUES:,} values")
        if len(open_) + open_[-1][2] > DEEPEST + 2:
            raise yaml.YAMLError(f"more than {DEEPEST} lists and mappings inside each other")


def _check_keys(root: yaml.Node | None) -> None:
    """Raises YAMLError if a mapping has a key twice: YAML would forget the first value."""
    left, seen = [root], set()
    while left:
        node = left.pop()
        if node is None or id(node) in seen or isinstance(node, yaml.ScalarNode):
            continue
        seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            keys: set[str] = set()
            for key, value in node.value:
                if isinstance(key, yaml.ScalarNode):
                    if key.value in keys:
                        line = key.start_mark.line + 1
                        raise yaml.YAMLError(f"line {line}: {key.value} is given a second time")
                    keys.add(key.value)
                left += [key, value]
        else:
            left += node.value
