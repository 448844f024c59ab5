"""Damage to nested plain values, as JSON and YAML hold them."""

import copy
import math
from typing import Any

from tests.fuzz.damage import NUMBERS, Random

ODD: tuple[Any, ...] = (
    None, True, False, "", " ", "null", "x\ny\x1b[2J\0", "../..", "é\u2028\U0001f600", "x" * 5000,
    "[" * 3000, "&a [*a]", "{class_path: os.system}", "1e999", "0x" + "f" * 5000, ".nan",
    0, -1, 1.5, -0.0, 1e-320, 1e300, math.inf, -math.inf, math.nan, 10**30, -(2**63) - 1,
    [], [[]], {}, {"": ""}, {"class_path": "os.system"}, [1, "a", None], {1: 2}, *NUMBERS,
)  # fmt: skip


def places(content: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value inside nested values: keys and indices."""
    keys = content if isinstance(content, dict) else range(len(content))
    found = []
    for key in keys:
        found.append((*path, key))
        if isinstance(content[key], dict | list):
            found += places(content[key], (*path, key))
    return found


def alter(content: Any, random: Random) -> tuple[Any, tuple[Any, ...]]:
    """A copy of nested values with an odd value, a lost, a repeated or a renamed part at one place;
    and this place.
    """
    content = copy.deepcopy(content)
    everywhere = places(content)
    *way, key = path = everywhere[random.integers(len(everywhere))]
    parent = content
    for step in way:
        parent = parent[step]
    match int(random.integers(8)):
        case 0:
            del parent[key]
        case 1:
            value = parent[key]
            for _ in range(int(random.choice([1, 5, 30, 300]))):
                value = {"x": value} if random.integers(2) else [value]
            parent[key] = value
        case 2:
            parent[key] = [parent[key]] * int(random.choice([2, 100, 20_000]))
        case 3 if isinstance(parent, dict):
            names = ["class_path", "init_args", "__path__", "a.b", "", str(key) * 2, 7]
            parent[names[random.integers(len(names))]] = parent.pop(key)
        case _:
            parent[key] = ODD[random.integers(len(ODD))]
    return content, path
