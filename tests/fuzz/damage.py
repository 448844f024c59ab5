"""Damage that suits any file: bits, bytes, blocks, cuts, exchanges, growth."""

import numpy as np

Random = np.random.Generator

NUMBERS = (0, 1, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**64 - 1)
"""Values that are often a limit."""


def damage(content: bytes, random: Random) -> bytes:
    """`content` with one to three kinds of damage."""
    for _ in range(int(random.integers(1, 4))):
        content = _KINDS[random.integers(len(_KINDS))](content, random)
    return content


def flip(content: bytes, random: Random) -> bytes:
    """A few bits."""
    changed = bytearray(content)
    for _ in range(int(random.integers(1, 5))) if changed else ():
        changed[random.integers(len(changed))] ^= 1 << int(random.integers(8))
    return bytes(changed)


def overwrite(content: bytes, random: Random) -> bytes:
    """A block of zeros, ones or noise."""
    begin, length = _range(content, random)
    kinds = (bytes(length), b"\xff" * length, random.bytes(length))
    return content[:begin] + kinds[random.integers(3)] + content[begin + length :]


def number(content: bytes, random: Random) -> bytes:
    """A binary number that is often a limit, in 1, 2, 4 or 8 bytes."""
    size, order = int(random.choice([1, 2, 4, 8])), ("big", "little")[random.integers(2)]
    value = NUMBERS[random.integers(len(NUMBERS))] % 256**size
    begin = int(random.integers(len(content) + 1))
    return content[:begin] + value.to_bytes(size, order) + content[begin + size :]


def cut(content: bytes, random: Random) -> bytes:
    return content[: int(random.integers(len(content) + 1))]


def remove(content: bytes, random: Random) -> bytes:
    begin, length = _range(content, random)
    return content[:begin] + content[begin + length :]


def repeat(content: bytes, random: Random) -> bytes:
    """A block a few times in a row."""
    begin, length = _range(content, random)
    times = int(random.integers(2, 6))
    return content[:begin] + content[begin : begin + length] * times + content[begin + length :]


def exchange(content: bytes, random: Random) -> bytes:
    """One block over another."""
    begin, length = _range(content, random)
    to = int(random.integers(len(content) + 1))
    return content[:to] + content[begin : begin + length] + content[to + length :]


def _range(content: bytes, random: Random) -> tuple[int, int]:
    begin = int(random.integers(len(content) + 1))
    return begin, min(int(random.integers(1, 200)), len(content) - begin)


_KINDS = (flip, flip, overwrite, number, cut, remove, repeat, exchange)
