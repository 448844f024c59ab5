"""Damage to JSON: odd values at any place, removed and repeated parts, bytes."""

import copy
import json
from pathlib import Path
from typing import Any

from tests.fuzz.damage import Random, damage

HUGE, DEEP = "@huge@", "@deep@"
"""Stand for an integer of 5,000 digits and for 100,000 open brackets."""
ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 255, 1.5, 0.1, -0.0, 1e-6, 1e-320, 5e-324, 1e12, 1e300, -1e300,
    float("nan"), float("inf"), float("-inf"), 100_000, 100_001, 10**12, 10**18, 2**31, 2**53,
    2**53 + 1, 2**63, 2**64, -(2**63), 10**400, HUGE, DEEP, [], {}, [[]], [{}], {"a": {}}, "", "a",
    "1", "nan", "\x1b[2J\n", "\0", "\ud800", "\udc00x", "\u202e", "../a", "/etc/passwd", "a" * 6000,
    "<script>alert(1)</script>", "a|b\n| c", "![a](b)`c`", [1, 2], [1.5] * 6, [0] * 5, ["a"],
)  # fmt: skip


def alter(content: Any, random: Random) -> bytes:
    """The text of `content` with one to three kinds of damage, to bytes or to its structure."""
    if random.integers(4) == 0:
        return damage(json.dumps(content).encode(), random)
    content = copy.deepcopy(content)
    for _ in range(int(random.choice([1, 1, 1, 2, 3]))):
        _at_a_place(content, random)
    text = json.dumps(content)
    text = text.replace(f'"{HUGE}"', "7" * 5000).replace(f'"{DEEP}"', "[" * 100_000)
    mark = "\ufeff" if random.integers(20) == 0 else ""
    return (mark + text).encode()


def put(path: Path, content: bytes) -> None:
    """Write a file in place: ext4 writes at once, slowly, what was cut to nothing before."""
    with path.open("r+b") as file:
        file.write(content)
        file.truncate()


def _at_a_place(content: Any, random: Random) -> None:
    place, key = content, None
    while isinstance(place, dict | list) and place:
        keys = list(place) if isinstance(place, dict) else range(len(place))
        holder, key = place, keys[int(random.integers(len(keys)))]
        place = holder[key]
        if random.integers(8) == 0:
            break
    if key is None:
        return
    match int(random.integers(7)):
        case 0:
            del holder[key]
        case 1 if isinstance(holder, list):
            holder[key:key] = [holder[key]] * int(random.choice([1, 2, 300]))
        case 2 | 4 | 5 if type(place) in (int, float) and abs(place) < 2**62:
            holder[key] = place * float(random.choice([-1, 0.5, 1.2, 2, 1 + 1e-9, 1e3, 1e-9]))
        case 3 if isinstance(holder, dict):
            holder[str(ODD[int(random.integers(len(ODD)))])] = holder.pop(key)
        case _:
            holder[key] = copy.deepcopy(ODD[int(random.integers(len(ODD)))])
